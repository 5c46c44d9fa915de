"""Head layouts: which columns of the projections of attention belong to which head.

`kernel_pattern` names the axes of a kernel. `multi_head`, `mla` and `fused_qkv` are the public
layouts. QK-clip scales the columns of heads, and per-head Muon orthogonalizes them.
"""
