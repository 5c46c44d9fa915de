"""Matrices that are sharded over a mesh.

How each leaf is placed, the plan of which device orthogonalizes which matrix, and the exchange that
executes it.
"""
