"""The sharding plan: full matrices are exchanged once, orthogonalized, and returned."""

from docs.figures.canvas import Canvas, Palette

TITLE = "Four devices exchange the shards of four matrices, orthogonalize one each, and return them"
W, H = 880, 330
DEVICES, SIDE = 4, 46
SHARED = (("A", "blue"), ("B", "orange"), ("C", "green"), ("D", "red"))


def draw(colors: Palette) -> str:
    """Draws what each device holds before, between and after the two all-to-alls.

    Args:
      colors: Of the picture.

    Returns:
      SVG.
    """
    c = Canvas(W, H, TITLE, colors)
    columns = (
        (120, "a quarter of each matrix"),
        (396, "one full matrix"),
        (672, "a quarter of each update"),
    )
    for x, title in columns:
        c.text(x + 92, 28, title, anchor="middle", bold=True)
    for device in range(DEVICES):
        y = 48 + 62 * device
        c.text(16, y + 29, f"device {device}", color=colors.faint)
        for x, _ in (columns[0], columns[2]):
            c.box(x, y, 184, 54, colors.grey_fill)
            for j in range(DEVICES):
                _matrix(c, x + 8 + 44 * j, y + 9, j, device)
        x = columns[1][0]
        c.box(x, y, 184, 54, colors.grey_fill)
        _matrix(c, x + 8, y + 9, device, None)
        c.text(x + 54, y + 32, "Newton–Schulz", size=13)
    for x in (318, 594):
        for device in range(DEVICES):
            for other in range(DEVICES):
                start, end = 75 + 62 * device, 75 + 62 * other
                c.line([(x - 8, start), (x + 70, end)], colors.line, 0.8)
        c.text(x + 31, 318, "all-to-all", anchor="middle", color=colors.faint, size=13)
    c.text(488, 318, "no communication", anchor="middle", color=colors.faint, size=13)
    return c.svg()


def _matrix(c: Canvas, x: float, y: float, matrix: int, shard: int | None) -> None:
    """A matrix of four shards of rows: all of it, or only one shard filled."""
    _, name = SHARED[matrix]
    color = getattr(c.colors, name)
    for row in range(DEVICES):
        filled = shard is None or row == shard
        fill = color if filled else c.colors.background
        c.cell(x, y + 9 * row, 36, 9, fill, c.colors.line)
