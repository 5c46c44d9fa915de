"""Equations as SVG, which a browser shows without a script, a font or a network."""

import html
import re
from typing import Any

from docutils import nodes
from ziamath.config import config
from ziamath.zmath import Latex

_EM = 20  # a drawing has this many pixels for 1 em of the text around it
_SIZE = re.compile(r'width="([\d.]+)" height="([\d.]+)" viewBox="\S+ (\S+) \S+ \S+"')

config.svg2 = False  # no identifiers, which several equations of a page would share
config.math.color = "currentColor"  # the color of the text, light or dark


def setup(app: Any) -> dict[str, bool]:
    """Registers the renderer with Sphinx as `html_math_renderer = "svg"`."""
    app.add_html_math_renderer("svg", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(draw(node.astext(), inline=True))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="equation">{draw(node.astext(), inline=False)}</div>')
    raise nodes.SkipNode


def draw(latex: str, *, inline: bool) -> str:
    """Draws one equation, in units of the text around it.

    Args:
      latex: The equation.
      inline: Whether it is part of a line, and aligned with its baseline.

    Returns:
      An SVG element. Screen readers read the LaTeX.

    Raises:
      ValueError: if nothing was drawn.
    """
    svg = Latex(latex, size=_EM, inline=inline).svg()
    size = _SIZE.search(svg)
    if size is None:
        raise ValueError(f"equation {latex!r}: got {svg[:80]!r}, expected an SVG with a size.")
    width, height, top = (float(number) / _EM for number in size.groups())
    style = f"width:{width:.3f}em;height:{height:.3f}em;vertical-align:{-(height + top):.3f}em"
    label = html.escape(" ".join(latex.split()), quote=True)
    attributes = f'role="img" aria-label="{label}" style="{style}"'
    return svg.replace("<svg ", f"<svg {attributes} ", 1)
