"""Newton–Schulz on arrays of shape (..., m, n).

`newton_schulz.py` has the public function and its settings as one value, `iterations.py` the two
methods as equations on `symmetric.py`, `choices.py` all decisions by counting, `matrix_axes.py` and
`batching.py` the way from leaves to batches of matrices.
"""
