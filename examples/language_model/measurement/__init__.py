"""The cost of a train step on devices that need not be attached.

`ahead` compiles the step for a TPU topology, and `cost_table` prints what the compiled program
needs on each chip: memory, FLOPs and communication. `benchmarks.compiled` reads the program.
"""
