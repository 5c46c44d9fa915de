"""Roles of parameters: which go to AdamW, which to Muon, and along which axes.

`role_table` is the table of names, `names` has all other patterns; `modules` and `evidence` are
what the shapes of a pytree show. `rules` tries the rules in order: `adamw_rules`, then the axes of
matrices (`attention`, `biases`, `convolutions`, `orientation`), then output heads (`heads`) and
the doubts that become warnings.
"""
