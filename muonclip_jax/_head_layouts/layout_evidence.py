"""Evidence that a head layout would scale wrong columns, although all sizes divide.

The names and shapes of the other children of an attention module contradict the layout. The module
then raises, and the user confirms or corrects the layout; nothing here chooses a layout.
"""

from collections.abc import Collection, Iterator, Mapping

from muonclip_jax._head_layouts.head_layout import Children, HeadLayout, Leaf
from muonclip_jax._head_layouts.module_names import (
    is_latent,
    is_out_projection,
    letters,
    names_fused_bias,
    names_keys_and_values,
    normalizes,
)

_IF_FUSED = (
    "If it holds keys and values, pass key_kernel with a 2 for the axis that stacks them, such as "
    "key_kernel='inputs (2 heads head_dim)' (all keys, then all values) or "
    "'inputs (heads 2 head_dim)' (key and value of each head); if it holds keys alone, pass its "
    "pattern as key_kernel."
)

# Letters in the name of a module, by the field of the layout that names it.
_SHOWN = {"query": {"q"}, "key": {"k"}, "key_value": {"k"}, "qkv": {"q", "k"}}
_WORDS = {"query": "queries", "key": "keys", "key_value": "keys", "qkv": "queries and keys"}


def undeclared_kernels(
    layout: HeadLayout, kernels: Mapping[str, Leaf], children: Children
) -> list[str]:
    """Lists the children with kernels that the layout does not mention, by name alone.

    Args:
      layout: A layout; a child in its `kept_leaves` is mentioned too.
      kernels: The kernels by module name.
      children: All children of the attention module.

    Returns:
      The names, without norms and without down-projections to latent vectors.
    """
    declared = {*layout.projections, *layout.scaled_leaves, *layout.kept_leaves}
    ranks = {len(leaf.shape) for leaf in kernels.values()}
    return [
        name
        for name, shapes in children.items()
        if name not in declared and normalizes(name) is None and not is_latent(name)
        if ranks & {*map(len, shapes)}
    ]


def module_of(layout: HeadLayout, name: str) -> str | None:
    """Returns the module of a layout whose bias a name shows: the query of `bq`; or None.

    Args:
      layout: The layout.
      name: Name of a parameter beside the modules.
    """
    if names_fused_bias(name) and layout.module_fields == ("qkv",):
        return layout.modules[0]
    fields = zip(layout.module_fields, layout.modules, strict=True)
    found = [module for field, module in fields if _SHOWN.get(field, {""}) <= letters(name)]
    return found[0] if len(found) == 1 else None


def misnamed_modules(layout: HeadLayout, others: Collection[str]) -> Iterator[tuple[str, str]]:
    """Finds modules of a layout whose names fit worse than the name of another child.

    Args:
      layout: The layout.
      others: Names of the other children, see `undeclared_kernels`.

    Yields:
      The fault, and the name of the other child.
    """
    for field, name in zip(layout.module_fields, layout.modules, strict=True):
        shown = _SHOWN.get(field, set())
        better = next((other for other in others if shown <= letters(other)), None)
        if better is not None and not shown <= letters(name):
            yield f"{field}={name!r}, but {better!r} has a name of {_WORDS[field]}.", better


def second_pair(others: Collection[str]) -> list[str]:
    """Returns the names of further queries and keys among other children; empty without both.

    Args:
      others: Names of the other children, see `undeclared_kernels`.
    """
    pair = [name for name in others if letters(name) & {"q", "k"}]
    return pair if {"q", "k"} <= {letter for name in pair for letter in letters(name)} else []


def swapped_axes(
    layout: HeadLayout, kernels: Mapping[str, Leaf], stack: int, heads: int, head_dim: int
) -> str | None:
    """Describes inputs and outputs that look swapped.

    Queries and keys have the same inputs. Kernels of two axes with unequal inputs, which would be
    equal in the other order, are in the other order.

    Args:
      layout: A layout with one pattern for both kernels.
      kernels: The query kernel and the key kernel, by module name.
      stack: Number of stack axes.
      heads: Number of query heads.
      head_dim: Width of a key head.

    Returns:
      The fault, or None.
    """
    query, key = (kernels[name] for name in layout.modules)
    pattern = layout.patterns[layout.modules[0]]
    if len(pattern.axes) != 2:
        return None
    inputs_first = 1 if pattern.input_axis == 0 else -1
    (q_in, q_out), (k_in, k_out) = (
        layout.split(leaf.shape, stack)[1][::inputs_first] for leaf in (query, key)
    )
    key_heads, remainder = divmod(k_in, head_dim)
    fits_swapped = q_out == k_out and q_in == heads * head_dim and not remainder
    if q_in != k_in and fits_swapped and heads % key_heads == 0:
        return (
            f"{query} and {key} have unequal inputs under {layout.kernel!r}, and equal ones under "
            f"{str(pattern.mirrored())!r}: pass that kernel=, or key_kernel= to confirm this one."
        )
    return None


def values_in_key_kernel(
    modules: Collection[str], key: Leaf, children: Collection[str]
) -> str | None:
    """Describes a key kernel that seems to hold the values too.

    Args:
      modules: Names of the query module and of the key module.
      key: The key kernel.
      children: Names of all children of the attention module.

    Returns:
      The fault, or None.
    """
    others = [name for name in children if name not in modules]
    if names_keys_and_values(key.path.partition("/")[0]):
        return f"{key} seems to hold keys and values, so its key heads do not fit. {_IF_FUSED}"
    elif others and all(map(is_out_projection, others)):
        there = ", ".join(map(repr, sorted(children)))
        return f"no value module beside {there}, so {key} may hold keys and values. {_IF_FUSED}"
    return None


def gate_in_query_heads(
    query: Leaf, stack: int, heads: int, head_dim: int, key: Leaf, children: Children
) -> str | None:
    """Describes query heads that seem to hold a gate too, counted as part of `head_dim`.

    If values have the shape of keys, attention outputs heads of `head_dim` columns, and these are
    a side of the output projection.

    Args:
      query: The query kernel.
      stack: Number of stack axes.
      heads: Number of query heads.
      head_dim: Width of a key head.
      key: The key kernel.
      children: All children of the attention module.

    Returns:
      The fault, or None.
    """
    values = [shape for name in children if letters(name) == {"v"} for shape in children[name]]
    outs = [shape for name in children if is_out_projection(name) for shape in children[name]]
    outs = [shape for shape in outs if len(shape) > stack + 1]
    fits = any(heads * head_dim in shape or {heads, head_dim} <= {*shape} for shape in outs)
    if key.shape in values and outs and not fits:
        return (
            f"{query} has {heads} heads of {head_dim} columns, but the output projection "
            f"{outs[0]} has no side of {heads * head_dim}; query heads that hold a gate too need "
            "query_dim=, and head_dim= is the width of a key head."
        )
    return None
