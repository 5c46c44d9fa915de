"""Sections of a kernel: adjacent columns that are queries, keys, values or something else."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

HEADS = ("heads", "kv_heads", "groups")


class Section(NamedTuple):
    """Adjacent columns of a kernel.

    Attributes:
      name: `queries`, `keys`, `values` or `gates`.
      size: Their number along the axis that the sections divide.
      per_head: Whether each head is a matrix of its own; otherwise the section is one matrix.
    """

    name: str
    size: int
    per_head: bool


class Sections(NamedTuple):
    """The sections of one layer's kernel.

    Attributes:
      axes: The names that each axis of the kernel flattens. A literal number counts projections.
      sizes: The size of each name.
      sections: The sections, in order.
      along: The name that they divide; empty for one section.
    """

    axes: tuple[tuple[str, ...], ...]
    sizes: Mapping[str, int]
    sections: tuple[Section, ...]
    along: str = ""

    def joined(self) -> "Sections":
        """Joins adjacent sections of full heads: cutting between them changes no matrix.

        Example:
          >>> axes, sizes = (("inputs",), ("heads", "head_dim")), {"heads": 3, "head_dim": 4}
          >>> each = [Section(name, 1, True) for name in ("queries", "keys", "values")]
          >>> Sections(axes, sizes | {"inputs": 8}, tuple(each), "heads").joined().sections
          (Section(name='queries+keys+values', size=3, per_head=True),)
        """
        if self.along == "head_dim":
            return self
        found: list[Section] = []
        for per_head, group in itertools.groupby(self.sections, lambda section: section.per_head):
            members = list(group)
            if per_head:
                names = "+".join(dict.fromkeys(section.name for section in members))
                members = [Section(names, sum(section.size for section in members), True)]
            found += members
        return self._replace(sections=tuple(found), along=self.along if len(found) > 1 else "")


def one_section(axes: Sequence[tuple[str, ...]], sizes: Mapping[str, int], name: str) -> Sections:
    """Describes a kernel of which each head is a matrix."""
    return Sections(tuple(axes), sizes, (Section(name, 0, True),))
