"""The effect of one Newton-Schulz step on singular values, and of five steps."""

import math
from collections.abc import Callable

import muonclip_jax as mc
from docs.figures.canvas import Canvas, Palette

TITLE = "One Newton-Schulz step multiplies small singular values; five steps bring all near one"
W, H = 880, 360
PRESET = "jordan"
VALUES = [10 ** (-3 + 3 * i / 120) for i in range(121)]  # singular values divided by the norm


def after(s: float, steps: int) -> float:
    """Maps a singular value by the first steps: p(s) = a s + b s³ + c s⁵ in each."""
    for a, b, c in mc.ns_coefficients(PRESET)[:steps]:
        s = a * s + b * s**3 + c * s**5
    return s


def draw(colors: Palette) -> str:
    """Draws one step on the left, all steps on the right.

    Args:
      colors: Of the picture.

    Returns:
      SVG.
    """
    canvas = Canvas(W, H, TITLE, colors)
    _one_step(canvas, 56, 52)
    _all_steps(canvas, 500, 52)
    return canvas.svg()


def _one_step(c: Canvas, left: float, top: float) -> None:
    def at(s: float, y: float) -> tuple[float, float]:
        return left + 340 * s, top + 250 * (1 - y / 1.3)

    c.text(left, 28, "One step", bold=True, size=15)
    a, b, d = mc.ns_coefficients(PRESET)[0]
    equation = f"p(s) = {a:.2f} s − {-b:.2f} s³ + {d:.2f} s⁵"
    c.text(left + 340, 28, equation, anchor="end", color=c.colors.faint, size=13)
    _frame(c, at, [0, 0.25, 0.5, 0.75, 1], [0, 0.5, 1], 1.3, str)
    c.line([at(s / 100, s / 100) for s in (0, 100)], c.colors.line, 1.2, "4 4")
    c.line([at(s / 100, after(s / 100, 1)) for s in range(101)], c.colors.blue, 2.5)
    for s in (0.05, 0.15, 0.25):
        c.arrow([at(s, s), at(s, after(s, 1) - 0.02)], c.colors.orange)
    c.text(*at(0.62, 0.53), "unchanged", color=c.colors.faint, size=13)
    c.text(
        *at(0.62, 0.24), f"small values: × {a:.2f}", color=c.colors.orange, size=13, anchor="middle"
    )
    c.text(left + 170, top + 290, "singular value s before", anchor="middle", size=13)


def _all_steps(c: Canvas, left: float, top: float) -> None:
    def at(s: float, y: float) -> tuple[float, float]:
        return left + 300 * (1 + math.log10(s) / 3), top + 250 * (0.5 - math.log10(y)) / 3.5

    c.text(left, 28, "Five steps", bold=True, size=15)
    _frame(c, at, [0.001, 0.01, 0.1, 1], [0.001, 0.01, 0.1, 1], 10**0.5, lambda x: f"{x:g}")
    steps = len(mc.ns_coefficients(PRESET))
    for k in range(steps + 1):
        color = c.colors.line if k == 0 else c.colors.blue
        c.line([at(s, after(s, k)) for s in VALUES], color, 1 + 0.4 * k, "4 4" if k == 0 else "")
        x, y = at(VALUES[0], after(VALUES[0], k))
        label = "0 steps" if k == 0 else f"{k}"
        c.text(x + 4, y - 6 if k else y - 4, label, color=c.colors.faint, size=12)
    low, high = (f(after(s, steps) for s in VALUES if s >= 0.003) for f in (min, max))
    c.text(
        left + 300,
        28,
        f"s ≥ 0.003 becomes {low:.2f} to {high:.2f}",
        anchor="end",
        color=c.colors.faint,
        size=13,
    )
    c.text(
        left + 150,
        top + 290,
        "singular value before, divided by the norm",
        anchor="middle",
        size=13,
    )


def _frame(
    c: Canvas, at: Callable[[float, float], tuple[float, float]], xs: list[float],
    ys: list[float], top: float, label: Callable[[float], str],
) -> None:  # fmt: skip
    (x0, y0), (x1, _) = at(xs[0], ys[0]), at(xs[-1], ys[0])
    c.line([(x0, at(xs[0], top)[1]), (x0, y0), (x1, y0)], c.colors.line, 1)
    for x in xs:
        c.text(at(x, ys[0])[0], y0 + 18, label(x), anchor="middle", color=c.colors.faint, size=12)
    for y in ys:
        c.text(x0 - 8, at(xs[0], y)[1] + 4, label(y), anchor="end", color=c.colors.faint, size=12)
    c.line([at(xs[0], 1), at(xs[-1], 1)], c.colors.line, 0.6, "2 3")
