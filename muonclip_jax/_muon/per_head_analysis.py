"""Heads that an analysis shows."""

from collections.abc import Collection, Sequence

from muonclip_jax._orthogonalize.split import Split
from muonclip_jax._program.analysis import Analysis


def analysis_splits(
    caller: str,
    analysis: Analysis,
    paths: Sequence[tuple[str, ...]],
    shapes: Sequence[tuple[int, ...]],
    decided: Collection[int],
) -> dict[int, Split]:
    """Splits."""
    raise NotImplementedError
