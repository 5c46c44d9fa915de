"""Hints in an error message where no head layout is proposed."""

from muonclip_jax._head_layouts.module_names import letters, normalizes
from muonclip_jax._qk_clip.matching import Matching, Path
from muonclip_jax._qk_clip.module_faults import IF_NORM
from muonclip_jax._qk_clip.other_kinds import IF_UNKNOWN, fused_names


def hint(found: Matching, path: Path) -> str:
    """Names the kind of layout that a module without a proposal needs, and the fields to fill in.

    Args:
      found: All modules and max logits.
      path: The module to describe.

    Returns:
      One sentence, or an empty string for a module without names of queries and keys and without
      max logits.
    """
    children = found.modules[path]
    shown = {name: letters(name) for name in children if normalizes(name) is None}
    latent = {"q_b", "kv_b", "wq_b", "wkv_b", "q_b_proj", "kv_b_proj"} & {*children}
    if (norms := [n for n in children if normalizes(n)]) and len(latent) < 2 and len(shown) > 1:
        return " ".join([*(f"{name!r} normalizes queries or keys." for name in norms), IF_NORM])
    if fused := fused_names(children):
        return (
            f"{fused[0]!r} holds queries, keys and values: pass a FusedQKVLayout with "
            f"qkv={fused[0]!r} and its kernel, head_dim, num_kv_heads and order, which the shapes "
            f"do not show.\n{IF_UNKNOWN}"
        )
    if len(latent) > 1:
        return (
            f"{' and '.join(map(repr, sorted(latent)))} are up-projections of latent attention: "
            "pass an MLALayout with these names and its nope_dim, rope_dim, value_dim and kernel.\n"
            + IF_UNKNOWN
        )
    if {"q"} in shown.values() and any("k" in found_letters for found_letters in shown.values()):
        return (
            "No layout fits by names and shapes alone: pass a MultiHeadLayout with query, key "
            "and kernel, and with query_dim where query heads hold a gate too; docs/qk_clip.md "
            "has a table of kernels."
        )
    if any(path == sown for sown, _ in found.max_logits):
        return (
            "These names do not show queries and keys: name them in a MultiHeadLayout, or pass "
            "layout=mc.analyze(loss_fn, params, batch), which finds them without names."
        )
    return ""
