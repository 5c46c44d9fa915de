"""Evidence that a head layout would scale wrong columns, although all sizes divide.

The names and shapes of the other children of an attention module contradict the layout. The module
then raises, and the user confirms or corrects the layout; nothing here chooses a layout.
"""

from collections.abc import Collection, Iterator, Mapping

from muonclip_jax._head_layouts.head_layout import Children, HeadLayout, Leaf, Shape
from muonclip_jax._head_layouts.module_names import (
    is_latent,
    is_norm,
    is_out_projection,
    letters,
    names_fused_bias,
    names_keys_and_values,
    normalizes,
    words,
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


def confirmation(kept: tuple[str, ...], name: str) -> str:
    """Returns the fix for a child that contradicts a layout.

    Args:
      kept: `kept_leaves` of the layout.
      name: The child.
    """
    return f"correct the layout, or confirm it with kept_leaves={(*kept, name)}."


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
    layout: HeadLayout,
    query: Leaf,
    stack: int,
    heads: int,
    head_dim: int,
    key: Leaf,
    children: Children,
) -> str | None:
    """Describes query heads that seem to hold a gate too, counted as part of `head_dim`.

    If values have the shape of keys, attention outputs heads of `head_dim` columns, and these are
    a side of the output projection.

    Args:
      layout: The layout.
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
    out = out_without_heads(layout, children, stack, heads, head_dim)
    if key.shape in values and out:
        return (
            f"{query} has {heads} heads of {head_dim} columns, but the output projection "
            f"{out[1]} has no side of {heads * head_dim}; query heads that hold a gate too need "
            "query_dim=, and head_dim= is the width of a key head."
        )
    return None


def out_without_heads(
    layout: HeadLayout, children: Children, stack: int, heads: int, width: int
) -> tuple[str, Shape] | None:
    """Finds an output projection whose inputs are not the values of all heads.

    Args:
      layout: The layout; children in its `kept_leaves` are something else.
      children: All children of the attention module.
      stack: Number of stack axes.
      heads: Number of query heads.
      width: Width of a value head.

    Returns:
      Its name and shape; None if one output projection has these inputs, or there is none.
    """
    pattern = layout.patterns[layout.modules[0]]

    def fits(shape: Shape) -> bool:
        layer = layout.split(shape, stack)[1]
        if len(layer) == len(pattern.axes) == 2:  # inputs are on the same side in all kernels
            return layer[pattern.input_axis] == heads * width
        return heads * width in layer or {heads, width} <= {*layer}

    outs = [
        (name, shape)
        for name in children
        if is_out_projection(name) and name not in (*layout.modules, *layout.kept_leaves)
        for shape in children[name]
        if len(shape) > stack + 1
    ]
    return None if not outs or any(fits(shape) for _, shape in outs) else outs[0]


def other_latent_sizes(
    children: Children, kept: Collection[str], stack: int, ranks: tuple[int, int], rope_dim: int
) -> Iterator[tuple[str, str]]:
    """Compares the down-projections of MLA, and the projection of its shared key, with a layout.

    With latent vectors of r_q and r columns, down-projections have r_q outputs for queries, and r
    or, with the shared rotary key, r + rope for keys and values.

    Args:
      children: All children of the attention module.
      kept: Names of children that the user declared to be something else.
      stack: Number of stack axes.
      ranks: r_q and r, the inputs of the up-projections.
      rope_dim: Width of the rotary key that all heads share.

    Yields:
      The name of each child that has none of the sizes, and its description.
    """
    for name, shapes in children.items():
        shown, found = letters(name), [shape for shape in shapes if len(shape) > stack + 1]
        if not found or name in kept or is_norm(name) or not shown & {"q", "k"}:
            continue
        if is_latent(name) and "b" not in words(name):
            r = (ranks[0] if "q" in shown else 0) + (ranks[1] if "k" in shown else 0)
            expected = (r, r + rope_dim) if "k" in shown else (r,)
        elif {"rope", "pe"} & {*words(name)} and "k" in shown:
            expected = (rope_dim,)
        else:
            continue
        if not any(size in shape for size in expected for shape in found):
            sizes = " or ".join(map(str, dict.fromkeys(expected)))
            yield name, f"{name!r} {found[0]} has no axis of {sizes}"


def values_beside_qkv(
    layout: HeadLayout, kernels: Mapping[str, Leaf], children: Children, n_in: int
) -> str | None:
    """Finds a value projection beside the kernel of queries, keys and values.

    Args:
      layout: The layout.
      kernels: Its kernel, by module name.
      children: All children of the attention module.
      n_in: Number of inputs, which values have too.

    Returns:
      Its name, or None.
    """
    values = (n for n in undeclared_kernels(layout, kernels, children) if letters(n) == {"v"})
    values = (n for n in values if not any(word.startswith("embed") for word in words(n)))  # tables
    return next((n for n in values if any(n_in in shape for shape in children[n])), None)
