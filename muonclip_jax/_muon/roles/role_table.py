"""The table of names that assign a parameter to AdamW, each row with its source.

A pattern is matched against a whole path component in lower case, without a trailing number
(`LayerNorm_0`, `layers_3`). `where` limits the components that count:

- `any`: every component;
- `near`: the parameter and, if its own name is one of `names.PARAMETER_NAMES`, its module;
- `leaf`: the name of the parameter alone;
- `top`: as `near`, if no component before it is a layer, a block or an attention module.
"""

from typing import NamedTuple


class Role(NamedTuple):
    """A role that assigns parameters to AdamW.

    Attributes:
      name: The text in the table.
      where: The path components that count.
      pattern: Regular expression.
      source: Public code or paper with these names.
    """

    name: str
    where: str
    pattern: str
    source: str


_EMBED = r"embed(d(ing|er)s?|s)?"

ADAMW_ROLES = (
    Role("embedding", "any", rf"(\w+_)?({_EMBED}|embs?)(_\w+)?|wte|wpe", "Flax, HF, big_vision"),
    Role("embedding", "top", r"shared", "T5"),
    Role("embedding", "near", r"ve|codebooks?|(\w+_)?(lookup|hash)_tables?", "modded-nanogpt"),
    Role("n-gram table", "near", r"(\w+_)?(n_?gram|bigram|trigram|engram)s?(_\w+)?", "Engram"),
    Role("table", "leaf", r"(\w+_)?tables?(_[a-z]+)?", "Swin, DiT, Engram"),
    Role(
        "positional table",
        "any",
        r"(abs(olute)?_?)?pos(ition)?(al)?s?_?(emb\w*|enc(oding)?s?|tables?|bias(_table)?)",
        "CLIP, Whisper, scenic",
    ),
    Role(
        "positional table",
        "near",
        r"(\w+_)?pos(ition)?s?(_[hwtxy])?|pe|rel_[kv]",
        "learned positions, DETR, ViTDet",
    ),
    Role(
        "embedding",
        "near",
        r"vocab(ulary)?|words?|tok|segments?|(\w+_)?table|(user|item)_factors|query_feat(ure)?s?",
        "word2vec",
    ),
    Role(
        "relative positional table",
        "any",
        r"rel(ative)?_?(pos(ition(al)?)?(_?(bias(es)?|emb\w*|table|bias_table|[hwkv]))?"
        r"|bias|attention_bias|attn_bias|embedding)|rpb(_table)?",
        "T5, T5X, Swin, SAM",
    ),
    Role(
        "relative positional table",
        "leaf",
        r"rel_(height|width)|relative_(keys?|values?)|rpe",
        "BoTNet, Shaw et al.",
    ),
    Role(
        "learned token",
        "near",
        r"((\w+_)?(cls|class|mask|registers?|reg|dist(illation)?|sep|query|prompt|storage|bos|eos|pad"
        r"|summary|latent|learned|memory|null|start|end|cond)_?tokens?)|registers?|probe"
        r"|(object|learned|latent)_queries|class_embedding|prototypes",
        "big_vision, DINOv2, BLIP-2, MAE, DETR",
    ),
    Role(
        "learned token",
        "leaf",
        r"(\w+_)?(cls|null|tokens?)|null_(k?v|cond\w*)|latents?|queries|slots|(soft_)?prompts?"
        r"|inducing_points?|prefix(_(k|v|kv|keys?|values?))?|[hc]_?0|(init(ial)?|learned)_(\w+_)?(states?|hidden|carry|cell)"
        r"|anchors|mem(ory)?_[kv]|(\w+_)?memory(_(k|v|keys?|values?))?|(decoder|output|obj(ect)?|class|input|learned|latent|pool(ing)?)_quer(y|ies)",
        "big_vision, Perceiver IO, DETR, Set Transformer",
    ),
    Role("learned token", "any", r"(prefix|prompt)_tuning", "prefix tuning"),
    Role(
        "random frequency",
        "near",
        r"(\w+_)?(gaussian_?)?fourier_?(emb\w*|feat\w*|proj\w*|basis|enc\w*)",
        "score_sde, jaxpi, Octo",
    ),
    Role("attention vector", "leaf", r"att(n|ention)?_(l|r|left|right|src|dst|vec(tor)?)", "GAT"),
    Role(
        "output head",
        "any",
        r"lm_heads?|un_?emb(ed(d(ing|er))?)?|output_head|(to_)?logits?(_?(dense|proj\w*|layer|linear|head))?"
        r"|vocab_(proj\w*|head)|output_logits|projection_shard",
        "HF, MaxText, lucidrains, mesh-transformer-jax",
    ),
    Role(
        "output head",
        "top",
        r"(?!(multi|per)_head)(\w+_)?heads?|classifier|output|score|pred(iction)?|w_out|proj_out"
        r"|(output|out|final|last|prediction)_layer",
        "big_vision, HF, LLaMA, scenic, Dreamer, ProteinMPNN, LTX-Video, Wan",
    ),
    Role("router", "any", r"(\w+_)?router(_\w+)?|moe_gate|gating_network", "MaxText, HF, T5X"),
    Role(
        "router",
        "near",
        r"(\w+_)?centroids?|gate_logits?|routing(_(kernel|weights?|layer|proj|linear))?"
        r"|(expert|product|sub)_keys",
        "DeepSeek-V3, product keys",
    ),
    Role("norm", "any", r"(\w*_)?(ln|bn|gn)(_\w*)?|\w*norm\d*(_\w*)?", "all"),
    Role("weight of each channel", "any", r"symmetric_?contractions?", "MACE, equation 10"),
    Role("depthwise convolution", "any", r"depthwise\w*|dw_?conv\w*", "ConvNeXt, MobileNet"),
    Role("layer scale", "near", r"gamma|layer_?scale\w*|ls|res(idual)?_scale", "CaiT, ConvNeXt"),
    Role("attention sink", "near", r"(\w+_)?sinks?", "gpt-oss"),
    Role("adapter vector", "any", r"ia3\w*|lora_magnitude_vector|dora_scale", "IA3, DoRA"),
    Role(
        "state-space parameter",
        "leaf",
        r"a_?logs?|log_?a(_real)?|(\w+_)?dt_bias|d_skip|log_(step|dt|lambda)|(nu|theta|gamma)_log|lambda_(re|im)"
        r"|inv_dt|a_param|delta_bias",
        "Mamba, Gated DeltaNet, KDA, S5, LRU, RG-LRU",
    ),
    Role(
        "time-mixing vector",
        "leaf",
        r"(\w+_)?decays?(_(rates?|log|logits?|base|bias|factor|speed|param))?|mu(_[krvgx])?|x_[rwkvag]|(token_)?(mix|shift)_[krwvgx]|[rk]_k|k_a|bonus"
        r"|time_(decay|first|faaaa|mix_[a-z]+|maa_[kvrgx])",
        "RWKV",
    ),
    Role(
        "hyper-connection",
        "any",
        r"m?hc(_\w+)?|(\w+_)?hyper_?connections?(_\w+)?",
        "Hyper-Connections, mHC, DeepSeek-V4, MaxText",
    ),
    Role(
        "gate vector",
        "leaf",
        r"(static_)?(alpha|beta)(_\w+)?|(gate|gating)_\w*factors?",
        "Hyper-Connections, Flamingo",
    ),
    Role("bias", "leaf", r"(\w+_)?bias(es)?(_\w+)?", "all"),
    Role(
        "scale",
        "leaf",
        r"(\w+_)?(scales?|scalars?|gains?|gamma|offset|temperature|lambdas?|sigma)(_[a-z]+)?"
        r"|skip_weights?|g|scale_shift_\w+|coefficients|freq(s|uenc(y|ies))|(\w+_)?slopes?|thetas?|pi"
        r"|(\w+_)?res(id(ual)?)?_mix(ing)?|scaling|tau|inv_temp(erature)?|s_?qk",
        "all; noisy networks, nGPT",
    ),
)

# Names whose case matters: `D`, the skip vector of a state-space layer, is no `d`.
ADAMW_NAMES = {"D": "state-space parameter"}
