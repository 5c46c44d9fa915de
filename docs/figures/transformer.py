"""The optimizer of each parameter of a transformer, by `mc.routing_table`."""

from typing import Any

import jax
import jax.numpy as jnp

import muonclip_jax as mc
from docs.figures.canvas import Canvas, Palette

TITLE = "A transformer: Muon for projections, MLPs and experts; AdamW for the other parameters"
W, H = 880, 372
D, HEADS, HEAD_DIM, EXPERTS, HIDDEN, WORDS = 512, 8, 64, 16, 1024, 32000


def parameters() -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes of one layer and of what is around it, by the chapters of the picture."""
    shapes = {
        "embed": {"embedding": (WORDS, D)},
        "attn": {
            "norm/scale": (D,),
            "query/kernel": (D, HEADS, HEAD_DIM),
            "key/kernel": (D, HEADS, HEAD_DIM),
            "value/kernel": (D, HEADS, HEAD_DIM),
            "out/kernel": (HEADS, HEAD_DIM, D),
        },
        "moe": {
            "norm/scale": (D,),
            "router/kernel": (D, EXPERTS),
            "experts/up": (EXPERTS, D, HIDDEN),
            "experts/down": (EXPERTS, HIDDEN, D),
        },
        "lm_head": {"kernel": (D, WORDS)},
    }
    return {
        module: {name: jax.ShapeDtypeStruct(x, jnp.float32) for name, x in leaves.items()}
        for module, leaves in shapes.items()
    }


def draw(colors: Palette) -> str:
    """Draws a box for each parameter, with the color of its optimizer.

    Args:
      colors: Of the picture.

    Returns:
      SVG.
    """
    c = Canvas(W, H, TITLE, colors)
    params = parameters()
    nested = {module: _nested(leaves) for module, leaves in params.items()}
    routes = {row.path: row for row in mc.routing_table(nested, consistent_rms=0.2).rows}
    titles = {
        "embed": "embedding", "attn": "attention", "moe": "mixture of experts",
        "lm_head": "output head",
    }  # fmt: skip
    for i, (module, leaves) in enumerate(params.items()):
        x, height = 16 + 218 * i, 48 + 48 * len(leaves)
        top = 44 + (288 - height) / 2
        c.box(x, top, 194, height, colors.background, colors.line)
        c.text(x + 97, top + 26, titles[module], anchor="middle", bold=True)
        for j, name in enumerate(leaves):
            _parameter(c, x + 12, top + 40 + 48 * j, name, routes[f"{module}/{name}"])
        if i:
            c.arrow([(x - 24, 188), (x, 188)])
    c.text(450, 26, "× layers", anchor="middle", color=colors.faint)
    c.line([(234, 32), (234, 26), (410, 26)], colors.line, 1)
    c.line([(490, 26), (646, 26), (646, 32)], colors.line, 1)
    _legend(c)
    return c.svg()


def _nested(leaves: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        node = tree
        for name in above:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def _parameter(c: Canvas, x: float, y: float, name: str, route: Any) -> None:
    fill, edge = _colors(c.colors, route.optimizer)
    c.box(x, y, 170, 40, fill, edge)
    c.text(x + 10, y + 17, name, size=13, bold=True)
    matrices = "AdamW" if route.optimizer == "adamw" else f"Muon: {route.parts[0]}"
    c.text(x + 10, y + 33, matrices.replace(" x ", " × "), size=12, color=edge)


def _colors(colors: Palette, optimizer: str) -> tuple[str, str]:
    if optimizer == "muon":
        return colors.blue_fill, colors.blue
    return colors.orange_fill, colors.orange


def _legend(c: Canvas) -> None:
    for x, optimizer, text in (
        (228, "muon", "Muon: number of matrices × inputs × outputs"),
        (580, "adamw", "AdamW"),
    ):
        fill, edge = _colors(c.colors, optimizer)
        c.box(x, 344, 16, 16, fill, edge)
        c.text(x + 24, 357, text, size=13)
