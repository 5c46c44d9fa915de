"""The Muon family: small optax transforms that go before and after the orthogonalization.

`normalize` has MuonEq and Muon+, `normuon` the second moment of each output neuron,
`cautious_decay` weight decay where update and weight agree in sign, and `sinkhorn` the momentum of
token tables.
"""
