"""Muon as optax transforms.

`scale_by_muon`, the roles of parameters, `muon` with AdamW for the rest, and the printed plan.
"""
