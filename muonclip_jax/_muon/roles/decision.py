"""The decision about one parameter, and the settings on which decisions depend."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from optax.contrib import MuonDimensionNumbers

from muonclip_jax._muon.family.sinkhorn import Sinkhorn

# The modules of a head layout by name: the axes of a kernel, each a tuple of names, and the axis at
# which layers are stacked.
HeadPatterns: TypeAlias = Mapping[str, tuple[tuple[tuple[str, ...], ...], int]]
Overrides: TypeAlias = Mapping[str, MuonDimensionNumbers | Sinkhorn | None]


class Decision(NamedTuple):
    """The optimizer of a parameter, with the reason.

    Attributes:
      numbers: The axes of its matrices; None assigns it to AdamW, or to `sinkhorn`.
      reason: Why.
      doubt: Why this may be wrong; empty if names and shapes decide it.
      matrix: The axes that a warning proposes for Muon.
      sinkhorn: Its override, if that is a `Sinkhorn`.
      groups: The axis of the outputs that groups of a convolution divide, and their number.
      other: Other axes that a warning proposes, with the case for which they are right.
    """

    numbers: MuonDimensionNumbers | None
    reason: str
    doubt: str = ""
    matrix: MuonDimensionNumbers = MuonDimensionNumbers(-2, -1)
    sinkhorn: Sinkhorn | None = None
    groups: tuple[int, int] | None = None
    other: tuple[str, MuonDimensionNumbers] | None = None


@dataclasses.dataclass(frozen=True)
class RoleSettings:
    """Everything that the user sets about the roles of parameters.

    Attributes:
      numbers: Dimension numbers of all parameters, or a function of them; None decides by role.
      overrides: See `muon`.
      outputs_first: Whether matrices are stored (outputs, inputs); None decides by evidence.
      scale_by_sides: Whether the scale of an update depends on which side is the inputs.
      heads: For each head layout, the modules that project into heads.
      per_head: See `muon`.
    """

    numbers: Any = None
    overrides: Overrides | None = None
    outputs_first: bool | None = None
    scale_by_sides: bool = True
    heads: tuple[HeadPatterns, ...] = ()
    per_head: Any = None

    @property
    def has_tables(self) -> bool:
        """Whether an override is `Sinkhorn`: of any pytree, even one that has no such leaf."""
        return any(isinstance(value, Sinkhorn) for value in (self.overrides or {}).values())


DEFAULTS = RoleSettings()
