"""Draws every picture into docs/images: `NAME.svg` and, for dark pages, `NAME-dark.svg`."""

import pathlib

from docs.figures import algorithm, heads_over_time, newton_schulz, sharding, transformer
from docs.figures.canvas import DARK, LIGHT

IMAGES = pathlib.Path(__file__).parents[1] / "images"
FIGURES = {
    "algorithm": algorithm.draw,
    "heads_over_time": heads_over_time.draw,
    "newton_schulz_step": newton_schulz.draw,
    "sharding_plan": sharding.draw,
    "transformer": transformer.draw,
}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (IMAGES / f"{name}.svg").write_text(draw(LIGHT))
        (IMAGES / f"{name}-dark.svg").write_text(draw(DARK))
