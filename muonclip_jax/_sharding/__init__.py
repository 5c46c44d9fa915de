"""Matrices that are sharded over a mesh.

`placement.py` finds how each leaf is sharded, `plan.py` decides which device orthogonalizes which
matrix, from shapes alone, and `exchange.py` executes the plan.
"""
