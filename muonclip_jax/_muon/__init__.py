"""Muon as optax transforms.

`muon` is the public optimizer, `scale_by_muon` its update of matrices, `adamw` the rest; `settings`
are built once from their arguments. `routing` is the table of which parameter gets which, decided
in `roles` and by `overrides`. `show_plan` is the printed plan of a mesh, `injection` makes
`optax.inject_hyperparams` work.
"""
