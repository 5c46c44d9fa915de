"""Measures before training: the cost of a step on other devices, and roles of parameters.

`ahead` compiles the step for a TPU topology, and `cost_table` prints what the compiled program
needs on each chip: memory, FLOPs and communication. `benchmarks.compiled` reads the program.
`analysis` prints the roles of the parameters and the attention that the program of the model shows.
"""
