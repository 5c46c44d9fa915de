"""Measures before training: the cost of a step on other devices, and roles of parameters.

`ahead` compiles the step for TPUs or GPUs, and `cost_table` prints what the compiled program needs
on each device: memory, FLOPs and communication. `benchmarks.compiled` reads the program.
`analysis` prints the roles of the parameters and the attention that the program of the model shows.
"""
