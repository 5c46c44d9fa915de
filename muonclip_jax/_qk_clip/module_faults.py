"""Lists mismatches between one attention module, its head layout and its max logits."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp

from muonclip_jax._head_layouts.layout_evidence import (
    misnamed_modules,
    second_pair,
    undeclared_kernels,
)
from muonclip_jax._head_layouts.module_names import (
    is_gain,
    letters,
    names_bias,
    names_fused_bias,
    words,
)
from muonclip_jax._qk_clip.matching import AttentionModule, Path

_IF_ADAPTERS = "Pass all parameters: a clip of adapters alone cannot keep the logits down."
_IF_UNKNOWN = (
    "List a leaf with the columns of the heads in `scaled_leaves` of the head layout, any other "
    "leaf in `kept_leaves`."
)
_IF_HIDDEN = (
    "Mask all of a module's queries and keys or none; or train without the clip (threshold=None), "
    "and call mc.qk_clip on all parameters after optax.apply_updates."
)
IF_NORM = (
    "A norm between projection and logits cancels the clip: the logits keep their size and the "
    "weights shrink to zero. Leave these modules out with ignore=, or watch them with "
    "threshold=float('inf'), not traced; if the children are no such norms, pass qk_norm=()."
)
_IF_AMBIGUOUS = (
    "Declare it in the head layout: qk_norm=() if nothing normalizes queries or keys between "
    "projection and logits, otherwise the names of the children that do, such as qk_norm={names}."
)

_IF_BIAS = (
    "The clip reaches the threshold only if the bias is scaled with the kernel. Keep the bias in "
    "the module of the projection; or pass scaled_leaves={scaled} for arrays beside the kernels, "
    "the name of the kernels first. To leave biases as they are, pass kept_leaves={kept}."
)

_IF_MISNAMED = "Correct the layout, or confirm it with kept_leaves={names}."
IF_SECOND_PAIR = (
    "A module has one max_logits and one layout, so that a second pair is not scaled. Make each "
    "pair of queries and keys a module of its own, with its own max logits."
)
_IF_NO_PAIR = IF_SECOND_PAIR + " If they are not part of the logits, pass kept_leaves={names}."


class Fault(NamedTuple):
    """One mismatch: the path of the module, a description, and the fix."""

    path: Path
    text: str
    fix: str = ""


def module_faults(module: AttentionModule, *, report_only: bool = False) -> list[Fault]:
    """Lists all mismatches of one attention module.

    Args:
      module: The module, with the head layout that describes it and its max logits.
      report_only: Whether nothing is clipped, so that norms of queries and keys are no fault.

    Returns:
      The faults; none if the clip is right.
    """
    faults = [] if report_only else list(_norm_faults(module))
    faults += _name_faults(module, report_only=report_only)
    faults += _bias_faults(module)
    return [*faults, *(list(_leaf_faults(module)) or _shape_faults(module))]


def fits(module: AttentionModule, *, report_only: bool = False) -> bool:
    """Returns whether a module has no fault. Arguments: see `module_faults`."""
    return not module_faults(module, report_only=report_only)


def _norm_faults(module: AttentionModule) -> Iterator[Fault]:
    """Lists norms of queries and keys, and norms with ambiguous names."""
    declared = module.head_layout.qk_norm
    if declared is None:
        named, unnamed = _norms(module)
    else:
        named, unnamed = [name for name in declared if name in module.children], []
        for name in declared:
            if name not in module.children:
                yield Fault(module.path, f"no child {name!r}, which qk_norm names.")
    for name in named:
        yield Fault(module.path, f"{name!r} normalizes queries or keys.", IF_NORM)
    for name in unnamed:
        fix = _IF_AMBIGUOUS.format(names=(name.partition("/")[0],))
        yield Fault(module.path, f"{name!r} may normalize queries or keys.", fix)


def _norms(module: AttentionModule) -> tuple[list[str], list[str]]:
    """Returns paths of norms of queries or keys, then of norms with ambiguous names."""
    named: dict[str, None] = {}
    unnamed: dict[str, None] = {}
    for path in module.paths:
        # The name of a container may complete the name of its norm: query/norm, norm/key.
        pairs = [path[0], *map("_".join, itertools.pairwise(path))]
        shown = [module.head_layout.normalizes(name) for name in pairs]
        own = [module.head_layout.normalizes(name) for name in path]
        first = next((i for i, letters in enumerate(shown) if letters), None)
        if first is not None:
            named["/".join(path[: first + 1])] = None
        elif own[0] == "":
            unnamed[path[0]] = None
        elif path[0] in module.head_layout.modules and "" in own:
            unnamed["/".join(path[: own.index("") + 1])] = None
    scales = [name for name in module.children if "scale" in words(name)]
    pair = [name for name in scales if letters(name) in ({"q"}, {"k"})]
    if not named and {letter for name in pair for letter in letters(name)} == {"q", "k"}:
        unnamed |= dict.fromkeys(pair)
    if not named:
        unnamed |= dict.fromkeys(_gains(module))
    return [*named], [*unnamed]


def _gains(module: AttentionModule) -> list[str]:
    """Returns children that may be gains of a norm of queries or keys: smaller than kernels."""
    rank = min((len(leaf.shape) for leaf in module.kernels.values()), default=0)
    return [
        name
        for name, shapes in module.children.items()
        if is_gain(name) and all(0 < len(shape) < rank for shape in shapes)
    ]


def _name_faults(module: AttentionModule, *, report_only: bool) -> Iterator[Fault]:
    """Lists names that contradict the layout, and queries and keys that it does not mention."""
    layout = module.head_layout
    others = undeclared_kernels(layout, module.kernels, module.children)
    misnamed = [*misnamed_modules(layout, others)]
    names = *layout.kept_leaves, *(better for _, better in misnamed)
    for text, _ in misnamed:
        yield Fault(module.path, text, _IF_MISNAMED.format(names=names))
    pair = second_pair(others)
    if pair and not misnamed and not report_only:
        text = f"{' and '.join(map(repr, pair))} look like a second pair of queries and keys."
        names = (*layout.kept_leaves, *pair)
        yield Fault(module.path, text, _IF_NO_PAIR.format(names=names))


def _bias_faults(module: AttentionModule) -> Iterator[Fault]:
    """Lists biases of queries or keys beside the modules of the projections."""
    layout = module.head_layout
    paths = {leaf.path for leaves in module.leaves.values() for leaf in leaves}
    declared = {*layout.modules, *layout.kept_leaves, *paths}
    found = [
        name
        for name in module.children
        if (names_bias(name) or names_fused_bias(name)) and name not in declared
    ]
    kernel = ("kernel",) if layout.scaled_leaves[0] in found else ()
    names = {
        "scaled": tuple(dict.fromkeys((*kernel, *layout.scaled_leaves, *found))),
        "kept": (*layout.kept_leaves, *found),
    }
    for name in found:
        text = f"{name!r} looks like a bias of queries or keys."
        yield Fault(module.path, text, _IF_BIAS.format(**names))


def _leaf_faults(module: AttentionModule) -> Iterator[Fault]:
    """Lists leaves that are hidden or unknown, and kernels that are missing or not numbers."""
    layout = module.head_layout
    hidden = [path for path in module.hidden if path.rpartition("/")[2] not in layout.kept_leaves]
    if hidden:
        text = f"{', '.join(hidden)} hidden by a mask (MaskedNode), other leaves are not."
        yield Fault(module.path, text, _IF_HIDDEN)
        return
    for child, leaves in module.leaves.items():
        names = [leaf.name for leaf in leaves]
        if names.count(layout.scaled_leaves[0]) != 1:
            there = ", ".join(sorted(names)) or "no leaves"
            text = f"{child} has {there}, not one {layout.scaled_leaves[0]!r}."
            adapters = set(names) <= {*layout.scaled_leaves[1:], *layout.kept_leaves}
            yield Fault(module.path, text, _IF_ADAPTERS if names and adapters else "")
        for leaf in leaves:
            if leaf.name not in (*layout.scaled_leaves, *layout.kept_leaves):
                text = f"{leaf.path} is in neither scaled_leaves nor kept_leaves."
                yield Fault(module.path, text, _IF_UNKNOWN)
            elif leaf.name in layout.scaled_leaves and not jnp.issubdtype(leaf.dtype, jnp.floating):
                text = f"{leaf.path} is {leaf.dtype.name}, which cannot be scaled."
                yield Fault(module.path, text)


def _shape_faults(module: AttentionModule) -> list[Fault]:
    """Lists leaves and max logits with shapes that do not fit each other."""
    texts = list(_rank_faults(module)) or list(_stack_faults(module))
    if not texts:
        heads = module.heads(module.max_logits[0])
        texts = list(
            module.head_layout.faults(module.kernels, module.stack, heads, module.children)
        )
    return [Fault(module.path, text) for text in texts]


def _rank_faults(module: AttentionModule) -> Iterator[str]:
    """Lists leaves and max logits with too few or too many axes."""
    layout, stat = module.head_layout, module.head_layout.stat
    patterns = layout.patterns
    first = module.kernels[layout.modules[0]]
    low = [name for name in layout.modules if module.stack_of(name) < 0]
    for name in low:
        yield f"{module.kernels[name]} has fewer axes than {str(patterns[name])!r}."
    if low:
        return
    for child, leaf in module.scaled:
        if leaf.name == first.name and module.stack_of(child) != module.stack:
            axes = f"{str(patterns[child])!r} and {str(patterns[layout.modules[0]])!r}"
            yield f"{leaf} and {first} have unequal numbers of stack axes under {axes}."
        elif not layout.fits(child, leaf.shape, module.stack):
            yield f"{leaf} has no rank that fits {first} and stack_axis={layout.stack_axis}."
    for entry in module.max_logits:
        if not all(-entry.ndim <= axis < entry.ndim for axis in (*module.stat_axes, module.stack)):
            axes = ", ".join(["layers"] * module.stack + ["batch", "heads"])
            yield f"{stat} {entry.shape} has too few axes for {first}: expected [{axes}]."


def _stack_faults(module: AttentionModule) -> Iterator[str]:
    """Lists unequal sizes of stacks, columns or heads that should be equal."""
    layout, stat = module.head_layout, module.head_layout.stat
    first = module.kernels[layout.modules[0]]
    stack, _ = layout.split(first.shape, module.stack)
    for child, leaf in module.scaled:
        kernel = module.kernels[child]
        sizes = layout.column_shape(child, leaf.shape, module.stack)
        if sizes[0] != stack:
            yield f"{first} stacks {stack} layers, {leaf} stacks {sizes[0]}."
        elif sizes != layout.column_shape(child, kernel.shape, module.stack):
            yield f"{leaf} does not have the columns of {kernel}."
    heads = module.heads(module.max_logits[0])
    for entry in module.max_logits:
        sizes = tuple(entry.shape[axis] for axis in module.stat_axes)
        if sizes != stack:
            yield f"{first} stacks {stack} layers, its {stat} {entry.shape} stacks {sizes}."
        if module.heads(entry) != heads:
            yield f"calls have {stat} of {heads} and of {module.heads(entry)} heads."
