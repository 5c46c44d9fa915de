"""Newton–Schulz on arrays of shape (..., m, n).

Coefficients, iterations, products of symmetric matrices, the matrix axes of a leaf, and batches of
equal shapes.
"""
