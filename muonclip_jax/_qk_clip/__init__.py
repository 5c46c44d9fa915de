"""QK-clip of parameters: the matching of max logits to kernels, the clip, and metrics."""
