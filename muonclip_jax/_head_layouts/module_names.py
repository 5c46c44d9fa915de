"""Names of the children of an attention module: queries, keys, values, norms."""

import re

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
_LETTERS = {
    "q": {"q", "wq", "qw", "query", "queries", "qproj", "toq", "bq"},
    "k": {"k", "wk", "kw", "key", "keys", "kproj", "tok", "bk"},
    "v": {"v", "wv", "vw", "val", "value", "values", "vproj", "tov"},
    "kv": {"kv", "wkv", "kvproj", "tokv", "keyvalue", "keyvalues", "keysvalues", "bkv"},
    "qk": {"qk", "wqk"},
    "qkv": {"qkv", "wqkv", "qkvproj", "toqkv", "querykeyvalue", "bqkv"},
}
# Names of fused kernels without the letters: GPT-2, torch.nn.MultiheadAttention, Baichuan. These
# words may follow.
_FUSED = ["c", "attn"], ["in", "proj"], ["w", "pack"]
_OF_KERNELS = {"weight", "weights", "w", "kernel"}
_OF_BIASES = {"bias", "biases", "b", "bq", "bk", "bkv", "bqkv"}
# Other columns in a kernel of queries, keys and values.
_OTHER_COLUMNS = {"gate", "gates", "gated", "g", "z", "mlp", "ffn", "ff", "up"}
_OUT = {"o", "wo", "out", "output", "to", "proj", "projection", "oproj", "outproj"}
_OUT |= {"dense", "linear", "c", "w", "attn", "attention", "vec", "einsum", "post", "final"}

_NORM = r"(?:rms|layer|group|l2)?(?:norms?|ln|normali[sz](?:ation|e|er))|rms"
_QUERY_KEY = r"qkv?|q|k|query|queries|keys?"
_NORM_WORD = re.compile(f"({_QUERY_KEY})?(?:{_NORM})({_QUERY_KEY})?")
_GAINS = {"qn", "kn", "nq", "nk", "gq", "gk"}  # and q_gain, gamma_k
# Norms of the latent vectors of MLA, between its down- and up-projection.
_LATENT = {"a", "lora", "latent", "compressed", "compress", "down"}
# Words of a norm before the projections, after the attention, or of something else.
_ELSEWHERE = {"pre", "post", "in", "input", "inputs", "out", "output", "o", "v", "value", "values"}
_ELSEWHERE |= {"kv", "context", "ctx", "cond", "mem", "memory", "sub", "inner", "final", "gate"}
_ELSEWHERE |= {"mlp", "ffn", "ff", "x", "y", "hidden", "residual", "token", "tokens", "embed"}


def words(name: str) -> list[str]:
    """Splits a name into lower-case words, at underscores, digits and capitals.

    Example:
      >>> words("QNorm_0"), words("to_kv")
      (['q', 'norm', '0'], ['to', 'kv'])
    """
    return [word.lower() for word in _WORD.findall(name)]


def letters(name: str) -> set[str]:
    """Returns the letters of queries (q), keys (k) and values (v) in the name of a projection.

    Example:
      >>> sorted(letters("to_kv")), sorted(letters("query_proj")), letters("out")
      (['k', 'v'], ['q'], set())
    """
    return {
        letter
        for word in words(name)
        for shown, known in _LETTERS.items()
        if word in known
        for letter in shown
    }


def names_keys_and_values(name: str) -> bool:
    """Returns whether the name of a projection shows keys and values in one kernel."""
    return {"k", "v"} <= letters(name)


def names_fused_bias(name: str) -> bool:
    """Returns whether a name shows a bias of queries, keys and values.

    Example:
      >>> names_fused_bias("in_proj_bias"), names_fused_bias("bqkv"), names_fused_bias("Wqkv")
      (True, True, False)
    """
    return names_fused_columns(name) and not _OF_BIASES.isdisjoint(words(name))


def names_bias(name: str) -> bool:
    """Returns whether a name may show a bias of queries or keys; `q_b` of MLA is a kernel.

    Example:
      >>> names_bias("bq"), names_bias("k_bias"), names_bias("bv"), names_bias("wq")
      (True, True, False, False)
    """
    return bool(letters(name) & {"q", "k"}) and not _OF_BIASES.isdisjoint(words(name))


def names_fused_columns(name: str) -> bool:
    """Returns whether a name shows queries, keys and values, and no other columns.

    Example:
      >>> names_fused_columns("Wqkv"), names_fused_columns("c_attn_b")
      (True, True)
      >>> names_fused_columns("qkv_mlp"), names_fused_columns("in_proj_qkvz")
      (False, False)
    """
    first, rest = words(name)[:2], {*words(name)[2:]}
    if first in _FUSED:
        return rest <= _OF_KERNELS | _OF_BIASES
    return {"q", "k", "v"} <= letters(name) and _OTHER_COLUMNS.isdisjoint(words(name))


def is_out_projection(name: str) -> bool:
    """Returns whether a name is a name of the output projection, and of nothing else."""
    return all(word in _OUT or word.isdigit() for word in words(name))


def is_latent(name: str) -> bool:
    """Returns whether a name is a name of a latent vector of MLA, or of its down-projection.

    Example:
      >>> is_latent("q_a_proj"), is_latent("q_b_proj")
      (True, False)
    """
    return not _LATENT.isdisjoint(words(name))


def is_norm(name: str) -> bool:
    """Returns whether a name shows a norm, of anything.

    Example:
      >>> is_norm("kv_norm"), is_norm("kv_b")
      (True, False)
    """
    return any(_NORM_WORD.fullmatch(word) for word in words(name))


def is_gain(name: str) -> bool:
    """Returns whether a vector of this name may be the gain of a norm of queries or keys.

    Example:
      >>> is_gain("q_gain"), is_gain("kn"), is_gain("q_scale")
      (True, True, False)
    """
    found = {*words(name)}
    return bool(found & _GAINS or (found & {"gain", "gamma"} and letters(name) & {"q", "k"}))


def normalizes(name: str) -> str | None:
    """Returns whether a child of an attention module normalizes queries or keys, by its name.

    Returns:
      The letters of queries and keys, such as `"q"` or `"qk"`; `""` for a norm with an ambiguous
      name; None for a norm of something else, and for all other children.

    Example:
      >>> normalizes("q_layernorm"), normalizes("ln_k"), normalizes("RMSNorm_0")
      ('q', 'k', '')
      >>> normalizes("q_a_layernorm"), normalizes("kv_norm"), normalizes("out")
      (None, None, None)
    """
    found = words(name)
    norms = [match for word in found if (match := _NORM_WORD.fullmatch(word))]
    others = {word for word in found if not _NORM_WORD.fullmatch(word) and not word.isdigit()}
    if not norms or others & _LATENT:
        return None
    joined = "".join(part or "" for match in norms for part in match.groups())
    shown = letters(name) - {"v"} | ({*joined} & {"q", "k"})
    if letters(name) == {"k", "v"}:
        return None
    if shown:
        return "".join(sorted(shown, reverse=True))
    return None if others & _ELSEWHERE else ""
