"""The networks: decoder-only transformers in Flax Linen.

`gqa` has grouped-query attention, `mla` multi-head latent attention, `moe` latent attention with a
mixture of experts; `layers` is what they share. `presets` holds their sizes as data, and
`logical_axes` the names of their axes and the rules from these names to the axes of a mesh.
"""
