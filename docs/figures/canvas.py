"""Draws boxes, arrows, lines and text as SVG. Equal calls give equal bytes on every machine."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape


class Palette(NamedTuple):
    """Colors of a picture, light or dark."""

    background: str
    text: str
    faint: str
    line: str
    blue: str
    blue_fill: str
    orange: str
    orange_fill: str
    green: str
    green_fill: str
    red: str
    grey_fill: str


LIGHT = Palette(
    "#ffffff", "#1b1f24", "#57606a", "#8c959f", "#1d5479", "#e3f0f8",
    "#b45309", "#fdf0e0", "#1a7f37", "#e3f5e7", "#c1121f", "#f0f2f4",
)  # fmt: skip
DARK = Palette(
    "#131416", "#e6edf3", "#9aa4af", "#6e7781", "#8ecbf0", "#16344a",
    "#fbb36b", "#43290f", "#7ee08f", "#14361d", "#ff7b72", "#24292f",
)  # fmt: skip
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
_MONO = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


class Canvas:
    """A picture of a fixed size, in pixels, with the origin at its upper left corner."""

    def __init__(self, width: int, height: int, title: str, palette: Palette) -> None:
        """Starts an empty picture.

        Args:
          width: Width.
          height: Height.
          title: The text for screen readers.
          palette: Its colors.
        """
        self.colors = palette
        self._width, self._height, self._title = width, height, title
        self._parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, fill: str, edge: str = "none") -> None:
        """Draws a box with round corners."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6" '
            f'fill="{fill}" stroke="{edge}"/>'
        )

    def cell(self, x: float, y: float, w: float, h: float, fill: str, edge: str) -> None:
        """Draws a box with sharp corners, such as a shard of a matrix."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" '
            f'fill="{fill}" stroke="{edge}"/>'
        )

    def text(
        self, x: float, y: float, text: str, *, color: str | None = None, size: float = 14,
        anchor: str = "start", bold: bool = False, mono: bool = False,
    ) -> None:  # fmt: skip
        """Writes one line, its baseline at y."""
        style = f' font-family="{_MONO}"' if mono else ""
        style += ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" '
            f'fill="{color or self.colors.text}"{style} xml:space="preserve">{escape(text)}</text>'
        )

    def line(
        self, points: Iterable[Sequence[float]], color: str, width: float = 1.5, dash: str = "",
    ) -> None:  # fmt: skip
        """Draws straight lines from point to point."""
        at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<polyline points="{at}" fill="none" stroke="{color}" '
            f'stroke-width="{width:g}"{dashed}/>'
        )

    def arrow(self, points: Sequence[Sequence[float]], color: str | None = None) -> None:
        """Draws straight lines from point to point with a head at the last one."""
        color = color or self.colors.line
        (x0, y0), (x1, y1) = points[-2:]
        length = max(abs(x1 - x0), abs(y1 - y0))
        dx, dy = 7 * (x1 - x0) / length, 7 * (y1 - y0) / length
        self.line([*points[:-1], (x1 - dx, y1 - dy)], color)
        left, right = (x1 - dx - dy / 2, y1 - dy + dx / 2), (x1 - dx + dy / 2, y1 - dy - dx / 2)
        head = " ".join(f"{x:.1f},{y:.1f}" for x, y in ((x1, y1), left, right))
        self._parts.append(f'<polygon points="{head}" fill="{color}"/>')

    def svg(self) -> str:
        """Returns the file."""
        size = f'viewBox="0 0 {self._width} {self._height}" width="{self._width}"'
        start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{_FONT}" role="img">'
        back = f'<rect width="100%" height="100%" fill="{self.colors.background}"/>'
        title = f"<title>{escape(self._title)}</title>"
        return "\n".join([start, title, back, *self._parts, "</svg>", ""])
