"""Roles of parameters: which go to AdamW, which to Muon, and along which axes.

`names` is the table of names, `modules` and `evidence` are what the shapes of a pytree show.
`rules` tries the rules in order: `adamw_rules`, then the axes of matrices (`attention`,
`convolutions`, `orientation`), then the doubts that become warnings.
"""
