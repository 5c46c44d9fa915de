"""Reading the model's program: roles of parameters and attention logits, from the jaxpr.

Nothing outside this package depends on the inside of a jaxpr.
"""
