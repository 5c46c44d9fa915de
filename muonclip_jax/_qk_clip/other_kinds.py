"""Head layouts of another kind than the user passed, filled in from shapes and max logits.

With N query heads and K key heads of width d, a fused kernel has (N + 2K) d columns and the output
projection N d inputs. In MLA with latent vectors of width r,

    query columns = N (nope + rope)        key and value columns = N (nope + value)
    columns of the down-projection = r + rope        inputs of the output projection = N value
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from muonclip_jax._head_layouts.fused_qkv import FusedQKVLayout
from muonclip_jax._head_layouts.head_layout import HeadLayout, Shape, axes_first
from muonclip_jax._head_layouts.kernel_pattern import KernelPattern, kernel_pattern, stack_axes
from muonclip_jax._head_layouts.mla import MLALayout
from muonclip_jax._head_layouts.module_names import (
    is_latent,
    is_norm,
    is_out_projection,
    letters,
    names_fused_bias,
    names_fused_columns,
    words,
)
from muonclip_jax._head_layouts.multi_head import MultiHeadLayout

_ORDER = (
    "No shape shows the columns of a fused kernel: order='sectioned', the default, is all queries, "
    "all keys, all values, of one width and nothing else. Pass order='interleaved' if the queries, "
    "the key and the value of each key head are side by side."
)
_IN_HEAD = (
    "No shape shows the order of the columns of a fused head: '(3 head_dim)' is its query, its "
    "key, its value; '(head_dim 3)' alternates them."
)
_IN_LATENT_HEAD = (
    "No shape shows the order of the columns of latent attention: each head of an MLALayout is its "
    "key, then its value; and in the queries the rotary columns last, or first with "
    "rope_first=True."
)
IF_UNKNOWN = (
    "If you do not know, pass layout=mc.analyze(loss_fn, params, batch), which reads all of "
    "it from the program."
)

# The shape of the kernel of each child.
Kernels: TypeAlias = Mapping[str, Shape]

_FUSED_PATTERNS = (
    "inputs heads head_dim",
    "inputs (heads head_dim)",
    "(heads head_dim) inputs",
    "inputs 3 heads head_dim",
    "inputs heads 3 head_dim",
    "inputs heads (3 head_dim)",
    "inputs 3 (heads head_dim)",
    "3 heads inputs head_dim",
    "3 inputs heads head_dim",
    "3 inputs (heads head_dim)",
)
_LATENT_PATTERNS = "inputs heads head_dim", "inputs (heads head_dim)", "(heads head_dim) inputs"


def fused_names(children: Mapping[str, Any]) -> list[str]:
    """Returns the children whose names show queries, keys and values in one kernel.

    None beside queries or keys alone: `c_attn` beside `q_attn`, in the cross-attention of GPT-2,
    holds keys and values.

    Args:
      children: The children of an attention module, by name.

    Example:
      >>> fused_names({"Wqkv": None, "out": None}), fused_names({"c_attn": None, "c_proj": None})
      (['Wqkv'], ['c_attn'])
    """
    fused = [name for name in children if names_fused_columns(name) and not is_norm(name)]
    alone = [n for n in children if n not in fused and letters(n) & {"q", "k"} and not is_norm(n)]
    return [] if alone else [name for name in fused if not names_fused_bias(name)]


def latent_names(children: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the children that compute queries and keys of MLA; None without names of both.

    Args:
      children: The children of an attention module, by name.

    Example:
      >>> latent_names(dict.fromkeys(("q_a", "q_b", "kv_a", "kv_b", "out")))
      ('q_b', 'kv_b')
    """
    shown = {name: letters(name) for name in children if not is_norm(name)}
    is_mla = any(is_latent(name) and found & {"k", "v"} for name, found in shown.items())
    query = [n for n, found in shown.items() if found == {"q"} and not is_latent(n)]
    key = [n for n, found in shown.items() if found == {"k", "v"} and not is_latent(n)]
    return (query[0], key[0]) if is_mla and len(query) == len(key) == 1 else None


def other_kinds(
    own: Sequence[HeadLayout], children: Mapping[str, Sequence[Shape]], heads: int | None
) -> Iterator[HeadLayout]:
    """Yields head layouts that the names and shapes of a module show.

    Args:
      own: The head layouts of the user, which set all fields that are not read from shapes.
      children: Shapes of the leaves at or below each child of the attention module.
      heads: Number of query heads, by the max logits; None without max logits.

    Yields:
      Head layouts whose equations hold. Their leaves are not checked.
    """
    kernels = {name: max(shapes, key=len) for name, shapes in children.items() if shapes}
    if not any(isinstance(one, MultiHeadLayout) for one in own):
        yield _like(MultiHeadLayout, own)
    if not heads:
        return
    latent = latent_names(kernels)
    for axis in dict.fromkeys((own[0].stack_axis, 1)):
        for name in fused_names(kernels):
            width = next((one.head_dim for one in own if isinstance(one, FusedQKVLayout)), None)
            for fields in _fused(name, kernels, heads, axis, width):
                yield _like(FusedQKVLayout, own, qkv=name, stack_axis=axis, **fields)
        if latent:
            names = dict(zip(("query", "key_value"), latent, strict=True))
            for fields in _latent(*latent, kernels, heads, axis):
                yield _like(MLALayout, own, stack_axis=axis, **names, **fields)


def _like(kind: type[HeadLayout], own: Sequence[HeadLayout], **fields: Any) -> HeadLayout:
    """Builds a head layout with the other fields of the user's layout of this kind, or of any."""
    for layout in own:
        if type(layout) is kind:
            if "3" in fields.get("kernel", ""):  # the position of the 3 is the order
                fields["order"] = "sectioned"
            return dataclasses.replace(layout, **fields)
    # Without qk_norm: what the user knows of the norms in other modules may be wrong in this one.
    names = "stat", "stat_stack_axis", "scaled_leaves", "kept_leaves"
    return kind(**{name: getattr(own[0], name) for name in names}, **fields)


def _layer(shape: Shape, axes: int, stack_axis: int) -> Shape | None:
    """Returns the sizes of one layer's kernel; None if it has fewer axes."""
    stacked = stack_axes(stack_axis, len(shape) - axes)
    if len(shape) < axes or not all(-len(shape) <= axis < len(shape) for axis in stacked):
        return None
    return tuple(shape[i] for i in axes_first(stacked, len(shape)))[len(stacked) :]


def _fused(
    name: str, kernels: Kernels, heads: int, stack_axis: int, given: int | None
) -> Iterator[dict[str, Any]]:
    """Yields the fields of fused layouts, with the width of a head and the number of key heads.

    Output projections show the width of a flat kernel; without any, only the user does.
    """
    outs = [kernels[n] for n in kernels if n != name and is_out_projection(n)]
    outs = [shape for shape in outs if len(shape) > 1]
    for text in _FUSED_PATTERNS:
        pattern = kernel_pattern(text, ("3",), FusedQKVLayout.axis_names)
        layer = _layer(kernels[name], len(pattern.axes), stack_axis)
        for sizes in _fused_sizes(pattern, layer, heads) if layer else ():
            width, inputs = sizes["head_dim"], sizes["inputs"]
            sides = (heads * width, inputs), (heads, width, inputs)
            by_kernel = pattern.literal == 3 or not pattern.is_flat
            shown = [_has(shape, one) for shape in outs for one in sides] or [
                width == given or (given is None and by_kernel)
            ]
            if any(shown):
                key_heads = None if sizes["kv_heads"] == heads else sizes["kv_heads"]
                yield {"head_dim": width, "num_kv_heads": key_heads, "kernel": text}


def _fused_sizes(pattern: KernelPattern, layer: Shape, heads: int) -> Iterator[dict[str, int]]:
    """Yields the sizes of a fused kernel, for each number of key heads that fits."""
    if pattern.literal == 3:
        sizes = pattern.sizes(layer, {"heads": heads})
        if sizes and sizes["head_dim"]:
            yield {**sizes, "kv_heads": heads}
        return
    for key_heads in (k for k in range(1, heads + 1) if heads % k == 0):
        sizes = pattern.sizes(layer, {"heads": heads + 2 * key_heads})
        if sizes and sizes["head_dim"]:
            yield {**sizes, "kv_heads": key_heads}


def _has(shape: Shape, sizes: Sequence[int]) -> bool:
    """Returns whether a shape has axes of all sizes, in any order."""
    return not collections.Counter(sizes) - collections.Counter(shape)


def _latent(
    query: str, key_value: str, kernels: Kernels, heads: int, stack_axis: int
) -> Iterator[dict[str, Any]]:
    """Yields the fields of layouts of MLA, with the widths of the parts of a head."""
    outs = [kernels[n] for n in kernels if is_out_projection(n)]
    downs = [kernels[n] for n in kernels if is_latent(n) and letters(n) & {"k", "v"}]
    rotary = [kernels[n] for n in kernels if {"rope", "pe"} & {*words(n)}]  # a projection alone
    for text in _LATENT_PATTERNS:
        pattern = kernel_pattern(text, (), MLALayout.axis_names)
        layers = [_layer(kernels[n], len(pattern.axes), stack_axis) for n in (query, key_value)]
        q, kv = (pattern.sizes(one, {"heads": heads}) if one else None for one in layers)
        if not q or not kv:
            continue
        for nope in range(1, min(q["head_dim"], kv["head_dim"]) + 1):
            rope, value = q["head_dim"] - nope, kv["head_dim"] - nope
            ranks = kv["inputs"] + rope, *(kv["inputs"] for shape in rotary if rope in shape)
            # The width of the model is the other axis of the down-projection and of the output.
            widths = {d for down in downs for r in ranks if _has(down, (r,)) for d in down}
            sides = [(*one, d) for d in widths for one in ((heads * value,), (heads, value))]
            if any(_has(out, one) for out in outs for one in sides):
                yield {"nope_dim": nope, "rope_dim": rope, "value_dim": value, "kernel": text}


def unshown(layouts: Sequence[HeadLayout]) -> list[str]:
    """Lists the fields of proposed layouts that no shape shows, with the fix.

    Args:
      layouts: The layouts, each of which runs as it is.

    Returns:
      A sentence or two for each such field.
    """
    found = []
    for one in layouts:
        if isinstance(one, FusedQKVLayout):
            pattern = one.patterns[one.qkv]
            found += [_ORDER] if pattern.literal == 1 and one.order == "sectioned" else []
            found += [_IN_HEAD] if ("3", "head_dim") in pattern.axes else []
        elif isinstance(one, MLALayout):
            found.append(_IN_LATENT_HEAD)
    return [*dict.fromkeys(found), IF_UNKNOWN] if found else []
