"""QK-clip of parameters.

Head layouts, the matching of max logits to kernels, the clip, and metrics.
"""
