"""The heads of one kernel as matrices: from the sections of a head layout to a `Split`."""

import math
from collections.abc import Sequence

from muonclip_jax._head_layouts.head_layout import HeadLayout, Leaf
from muonclip_jax._head_layouts.kernel_pattern import stack_axes
from muonclip_jax._head_layouts.sections import HEADS, Section, Sections
from muonclip_jax._orthogonalize.matrices import Axes
from muonclip_jax._orthogonalize.split import Part, Split

_GROUP = "heads of one matrix"


def head_split(layout: HeadLayout, kernel: Leaf, stack: int, sections: Sections) -> Split:
    """Splits a kernel into the matrices of its heads.

    Args:
      layout: The head layout.
      kernel: The kernel.
      stack: Number of its stack axes.
      sections: Its sections.

    Returns:
      The split. A section that is not split by head is one matrix for each layer.

    Raises:
      ValueError: if `heads_per_matrix` does not divide the heads of a section.

    Example:
      >>> import numpy as np
      >>> from muonclip_jax import MultiHeadLayout
      >>> layout = MultiHeadLayout(kernel="inputs (heads head_dim)", head_dim=4)
      >>> kernel = Leaf("kernel", "query/kernel", 0, (8, 12), np.dtype("float32"))
      >>> split = head_split(layout, kernel, 0, layout.sections({"query": kernel}, 0)["query"])
      >>> split.sizes, split.parts[0].axes
      (((8,), (3, 4)), Axes(batch=(1,), reduction=(0,), output=(2,)))
    """
    group = layout.heads_per_matrix
    if group is None:
        each = [section._replace(per_head=False) for section in sections.sections]
        sections = sections._replace(sections=tuple(each))
    else:
        sections = _in_groups(kernel, sections, group).joined()
    axes, sizes = [*sections.axes], dict(sections.sizes)
    for axis in sorted(a % len(kernel.shape) for a in stack_axes(layout.stack_axis, stack)):
        axes.insert(axis, (f"stack {axis}",))
        sizes[f"stack {axis}"] = kernel.shape[axis]
    unit = "heads" if group == 1 else f"x {group} heads"
    return _split(axes, sections._replace(sizes=sizes), unit)


def _in_groups(kernel: Leaf, sections: Sections, group: int) -> Sections:
    """Gives heads that are one matrix together an axis of their own, behind the heads."""
    names = [name for axis in sections.axes for name in axis]
    fastest = next(name for name in reversed(HEADS) if name in names)
    divides_heads = sections.along in HEADS
    counts = [s.size for s in sections.sections] if divides_heads else [sections.sizes[fastest]]
    if any(count % group for count in counts):
        shown = ", ".join(map(str, counts))
        raise ValueError(
            f"{kernel} has {shown} adjacent heads, expected multiples of heads_per_matrix={group}."
        )
    parts = [s._replace(size=s.size // (group if divides_heads else 1)) for s in sections.sections]
    axes = [_with_groups(axis, fastest, group) for axis in sections.axes]
    sizes = {**sections.sizes, fastest: sections.sizes[fastest] // group, _GROUP: group}
    return Sections(tuple(axes), sizes, tuple(parts), sections.along)


def _with_groups(axis: Sequence[str], fastest: str, group: int) -> tuple[str, ...]:
    """Adds the axis of the heads in a group behind the heads."""
    if group == 1 or fastest not in axis:
        return tuple(axis)
    at = axis.index(fastest) + 1
    return (*axis[:at], _GROUP, *axis[at:])


def _split(axes: Sequence[tuple[str, ...]], sections: Sections, unit: str) -> Split:
    """Builds the split, with no more axes than its parts need."""
    merged = [_merged(axis, sections) for axis in axes]
    names = [name for axis in merged for name in axis]
    sizes = tuple(
        tuple(math.prod(sections.sizes[n] for n in name) for name in axis) for axis in merged
    )
    several = len(sections.sections) > 1
    cut = next(i for i, name in enumerate(names) if not several or sections.along in name)
    parts = []
    for section in sections.sections:
        roles = [_role(name[0], section) for name in names]
        found = (tuple(i for i, r in enumerate(roles) if r == role) for role in Axes._fields)
        size = section.size if several else sum(sizes, ())[cut]
        name = section.name if several else ""
        parts.append(Part(name, size, Axes(*found), unit if section.per_head else ""))
    return Split(sizes, cut, tuple(parts))


def _merged(axis: Sequence[str], sections: Sections) -> list[tuple[str, ...]]:
    """Joins adjacent names of one axis that have the same role in every section."""
    found: list[tuple[str, ...]] = []
    for name in axis:
        last = found[-1][0] if found else ""
        is_cut = sections.along in (name, last) and len(sections.sections) > 1
        same = last and all(_role(name, s) == _role(last, s) for s in sections.sections)
        if same and not is_cut:
            found[-1] = (*found[-1], name)
        else:
            found.append((name,))
    return found


def _role(name: str, section: Section) -> str:
    """Returns the field of `Axes` to which an axis belongs."""
    if name == "inputs":
        return "reduction"
    if name in ("head_dim", _GROUP) or (name in HEADS and not section.per_head):
        return "output"
    return "batch"
