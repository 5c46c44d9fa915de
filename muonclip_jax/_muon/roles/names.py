"""Patterns of names, and the role that the names in a path have, see `role_table`."""

import functools
import itertools
import re

from muonclip_jax._muon.roles.role_table import ADAMW_NAMES, ADAMW_ROLES, Role

# Names that show a state-space layer, and its parameters beside them: S4, S4D, DSS, S5.
STATE_SPACE = (
    r"log_(step|dt|lambda)|lambda(_re|_im|_real|_imag)?|a_log|(nu|theta)_log"
    r"|dt(_\w+)?|x_proj|conv1d"
)
STATE_SPACE_MATRICES = r"[abcpw](_re|_im|_real|_imag)?|lambda(_re|_im|_real|_imag)?"

# Names of a parameter inside a module that has the name of the layer.
MATRIX_NAMES = r"(kernel|w|weights?)(_mu|_orig)?|(kernel|weights?)_v|(\w+_)?lora_[ab]"
PARAMETER_NAMES = rf"{MATRIX_NAMES}|embeddings?|scale|bias|b|offset|gamma|alpha"
# Weights of a recurrent cell, which PyTorch and Equinox store (outputs, inputs).
OF_CELL = r"weight_[ih]h(_l\d+)?(_reverse)?"
CELL = r"\w*(rnn|lstm|gru)(_?(cell|layer))?"
# The noise of a noisy layer, and its mean.
NOISE, MEAN = r"sigma|rho|std|stddev", r"mu|mean|loc"
# Suffixes of a matrix and of its bias where both are parameters of the module around.
MATRIX_SUFFIXES = ("_w", "_kernel", "_weight", "_weights")
MATRIX_ENDS = r"\w+_(proj(ection)?|kernel|w|weights?|dense|linear|mlp|fc)"
MATRIX_STARTS = r"w_?[a-z]{1,2}\d?|(fc|lin(ear)?|dense|proj(ection)?)(_?\d|_\w+)?"
BIAS_SUFFIXES = ("_b", "_bias")

# Components that are one layer or a stack of layers, so that a head is not below them.
BLOCKS = (
    r"\w*(layer|block|attn|attention|mlp|ffn|feed_?forward|mixer|moe|experts?|stage|cell)s?"
    r"|h|att|ff\w*"
)

# Projections into and out of heads: Flax, Llama ports, tunix, haiku, lucidrains, Gemma, MaxText.
INTO_HEADS = (
    r"w?(q|k|v|kv|qkv)|w_(q|k|v|qkv)|(q|k|v|kv|qkv|r)_(proj(ection)?|einsum|up|up_proj|linear)"
    r"|(query|key|value|query_key_value)(_(proj(ection)?|layer|kernel|linear|dense))?"
    r"|(queries|keys|values)|q_wi_fused|kv_fused|c_attn|to_(q|k|v|kv|qkv)|w?(q|kv|k|v)_b(_proj)?|(q|k|v|qkv|kv)_kernel"
)
OUT_OF_HEADS = (
    r"w?o|w_o|((self_|cross_)?att(n|ention)_)?(o|out|output|post)(_(proj(ection)?|kernel|einsum))?|to_out|attn_vec(_einsum)?"
    r"|proj_(attn|out)|attn_out|wo|o_wo_fused"
)
# Names of an output projection only beside queries, keys and values.
PERHAPS_OUT = r"dense|linear|proj|c_proj|projection"
FROM_OTHERS = r"(w_?|to_)?[kv](_proj(ection)?)?|(key|value)(_proj(ection)?)?"
FROM_LOW_RANK = r"w?(q|kv|k|v)_b(_proj)?"
HEADS_FIRST = r"(q|k|v|kv|qkv)_einsum"
FUSED = {"qkv": 3, "kv": 2, "query_key_value": 3}

# Projections whose inputs, or outputs, are as wide as the residual stream.
FROM_RESIDUAL = (
    r"up|gate|(up|gate|gate_up|gating|fc|in|ffn?_up|ffn?_gate)_(proj|einsum)|w[13]|fc1|fc_in|c_fc"
    r"|w?i|wi_[01]|w_(up|gate|in)|linear1|dense_h_to_4h|intermediate"
)
TO_RESIDUAL = (
    r"down|(down|ffn?_down)_proj|w2|fc2|fc_out|w_(down|out)|linear2|dense_4h_to_h|wo|down_einsum"
)
# Projections of an MLP, and of a bottleneck, which projects down first: adapters, low ranks.
UP_OR_DOWN = r"(w_)?(up|down)(_(proj|einsum))?"
BOTTLENECK = r"\w*(adapter|adaptor|lora|bottleneck|low_?rank)\w*"
BESIDE_UP = r"(w_)?gate(_(proj|einsum))?"
PROJECTIONS = (FROM_RESIDUAL, TO_RESIDUAL, INTO_HEADS, OUT_OF_HEADS)
GATED_PAIR = r"wi|(\w+_)?gate_?up(_\w+)?|(\w+_)?gating(_\w+)?|gate_and_up\w*|w13|fc1|linear_fc1"

GATE = r"gate|gating|wg|w_gate|gate_(w|weights?|kernel|linear|proj)|switch"
# Modules beside a `gate` that is part of a gated MLP or of attention.
BESIDE_GATE = (
    r"(\w*_)?(up|down|value|query|key|v|q|k|o|out|fc|proj(ection)?|wi|wo|in|w)(_\w*)?"
    r"|w[123qkvo]|fc[12]|linear\w*"
)
MIXTURES = r"\w*moe\w*|sparse_?mlp\w*|routed_?experts?"
HEAD = r"(?!(multi|per|num)_?head)(\w+_)?heads?|classifier|predictions"
# Norms inside latent attention, whose width is a low rank.
LOW_RANK_NORM = r"\w*(q|kv)_(a_)?(layer_?|rms_?)?norm|\w*(q|kv)_(a_)?ln|compressed_\w*norm"
# Names that show nothing about a dense layer, so that the last of a network may be its head.
GENERIC = (
    r"|dense|linear|fc|layers?|hidden|out(put)?(_proj(ection)?)?|proj(ection)?|final|last"
    r"|sequential|decoder|noisy\w*|mu|(\w+_)?(mean|log_?std|log_?var)(_\w+)?|output_?dense\w*"
    r"|advantages?|q_values?|policy|actions?|regression"
)
READOUT = r"(\w+_)?read_?out(_\w+)?"
# Names of the last module of a network, and of its last layer outside of all blocks.
ENDS = r"\w*(decod|read_?out|pred|regress|classif|logit|policy|value|critic|actor)\w*"
OUTPUT = r"(\w+_)?out(put)?(_(proj(ection)?|layer|dense|linear|mlp))?"
PREDICTOR = r"\w+(predictor|classifier)"
LAST_LAYER = r"(output|final|last|prediction)_?layer"
FEED_FORWARD = r"\w*(moe|mlp|ffn|feed_?forward|experts?|channel_mix\w*)(_?block)?|ff"
EXPERTS = r"(shared_)?experts?(_\w*)?"
CONVOLUTION = r"\w*conv\w*"
SPECTRAL = r"\w*(spectral|fourier)_?(conv\w*|layer|block)\w*"
# Embeddings of a number or a vector, computed by dense layers: DiT, diffusers, SD3, Flux.
COMPUTED = (
    r"(\w+_)?(t|time_?steps?|time|sigma|noise|cond(ition(ing)?)?|pooled|guidance)"
    r"_?(emb|embed\w*)(_\w+)?"
)
DENSE = r"(\w+_)?(dense|linear|mlp|proj(ection)?|fc)(_\w+)?|layers?"
PATCHES = r"(\w+_)?(patch\w*|stem)(_\w+)?|embeddings?|conv_?proj|proj(ection)?"

# Components that hold several layers; without a number, these may be stacked.
STACKS = r"layers|blocks|stacked|stages|h"

_NUMBER = re.compile(r"_?\d+$")
_QK_NORM = re.compile(r"_?(q|k|query|key)_?(norm|ln|layer_?norm|rms_?norm)")


@functools.lru_cache(maxsize=1 << 14)
def matches(pattern: str, name: str) -> bool:
    """Returns whether a path component, in any case and with or without a number, has a name.

    Args:
      pattern: Regular expression.
      name: A path component.

    Returns:
      Whether the whole component matches.

    Example:
      >>> matches("layer_?norm", "LayerNorm_0"), matches("norm", "normalizer")
      (True, False)
    """
    lower = name.lower()
    compiled = re.compile(pattern)
    return bool(compiled.fullmatch(lower) or compiled.fullmatch(without_number(lower)))


@functools.lru_cache(maxsize=1 << 14)
def is_qk_norm(name: str) -> bool:
    """Returns whether a component names a normalization of queries or keys; not one of MLA.

    Example:
      >>> is_qk_norm("_query_norm"), is_qk_norm("q_a_layernorm")
      (True, False)
    """
    return bool(_QK_NORM.fullmatch(without_number(name.lower())))


def core(path: tuple[str, ...]) -> tuple[str, ...]:
    """Returns a path without the components of the container around its parameter.

    The arrays of Haliax end in `weight/0`. `paths.without_boxes` removes boxes.

    Example:
      >>> core(("q_proj", "weight", "0"))
      ('q_proj', 'weight')
    """
    if len(path) > 2 and path[-1].isdigit() and path[-2] == "args":  # Paramax
        path = path[:-2]
    while len(path) > 1 and path[-1].isdigit() and matches(PARAMETER_NAMES, path[-2]):
        path = path[:-1]
    return path


def near(path: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the name of the parameter and, if that is a usual one, of its module."""
    if len(path) > 1 and (path[-1].isdigit() or matches(PARAMETER_NAMES, path[-1])):
        return path[-2:]
    return path[-1:]


def stem(name: str) -> str:
    """Returns the name of a matrix without `_w`, `_kernel` or `_weight`.

    Example:
      >>> stem("query_w"), stem("query")
      ('query', 'query')
    """
    suffix = next((end for end in MATRIX_SUFFIXES if name.endswith(end) and name != end), "")
    return name.removesuffix(suffix)


def is_numbered(name: str) -> bool:
    """Returns whether a component ends in a number, as `layers_3` and `3` do."""
    return name[-1:].isdigit()


def without_number(name: str) -> str:
    """Returns a component without its trailing number: `Dense` for `Dense_3`."""
    return _NUMBER.sub("", name)


def number(name: str) -> int:
    """Returns the number at the end of a component; -1 if there is none."""
    return int(name.removeprefix(without_number(name)).lstrip("_") or -1)


def is_stacked(path: tuple[str, ...]) -> bool:
    """Returns whether a module around a parameter may be a stack, and not one of numbered layers.

    Example:
      >>> is_stacked(("layers", "mlp", "w1")), is_stacked(("layers", "0", "w1"))
      (True, False)
    """
    return any(
        matches(STACKS, name) and not is_numbered(name) and not inside.isdigit()
        for name, inside in itertools.pairwise(path)
    )


def is_in_block(path: tuple[str, ...]) -> bool:
    """Returns whether a component is a layer, a block or an attention module."""
    return any(is_numbered(name) or matches(BLOCKS, name) for name in path)


def adamw_role(path: tuple[str, ...]) -> tuple[Role, str] | None:
    """Finds the first role that a name in the path has.

    Args:
      path: Components of a path, see `core`.

    Returns:
      The role and the component; None if no name has a role.

    Example:
      >>> role, name = adamw_role(("decoder", "layers", "input_layernorm", "weight"))
      >>> role.name, name
      ('norm', 'input_layernorm')
    """
    for role in ADAMW_ROLES:
        for name in _candidates(role.where, path):
            if matches(role.pattern, name):
                return role, name
    if role := ADAMW_NAMES.get(path[-1]):
        return Role(role, "leaf", path[-1], "Mamba"), path[-1]
    return None


def _candidates(where: str, path: tuple[str, ...]) -> tuple[str, ...]:
    if where == "any":
        return path
    names = near(path)
    if where == "leaf":
        return path[-2:] if path[-1].isdigit() else path[-1:]
    if where == "top" and is_in_block(path[: len(path) - len(names)]):
        return ()
    return names
