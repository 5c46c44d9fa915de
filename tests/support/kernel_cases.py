"""Small tiles for the TPU kernel, so that small matrices have several of them."""

import contextlib

from muonclip_jax._orthogonalize import tiles
from muonclip_jax._orthogonalize.tiles import DEFAULT_KIND, Regions


@contextlib.contextmanager
def small_tiles(side=128, chunk=128, smallest=130):
    """Lets the kernel run from a short side on, with tiles of one side.

    Matrices of one shape must not be computed with two settings: compiled programs are kept.
    """
    before = tiles.CHIPS[DEFAULT_KIND]
    regions = {side: Regions(chunk, *6 * [1])}
    tiles.CHIPS[DEFAULT_KIND] = before._replace(
        smallest=smallest, smallest_full=smallest, sides=regions, full_sides=regions
    )
    _clear()
    try:
        yield
    finally:
        tiles.CHIPS[DEFAULT_KIND] = before
        _clear()


def _clear():
    tiles.fastest.cache_clear()
    tiles.fastest_full.cache_clear()
