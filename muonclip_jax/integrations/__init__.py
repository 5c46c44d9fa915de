"""MuonClip in the frameworks that people train in: one module for each, imported by its users only.

No module is imported by `muonclip_jax`, and none adds a dependency: the framework that it is named
after has to be installed. The modules use the public names of `muonclip_jax` alone.
"""
