"""Newton–Schulz on arrays of shape (..., m, n).

`newton_schulz.py` has the public function and its settings as one value, `iterations.py` the two
methods as equations on `symmetric.py`, `choices.py` all decisions by counting, `matrices.py` the
way from leaves to batches of matrices and back, whose axes `dimension_numbers.py` reads.
"""
