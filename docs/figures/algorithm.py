"""Algorithm 1 of Kimi K2 in one glance."""

from docs.figures.canvas import Canvas, Palette

TITLE = "Algorithm 1 of Kimi K2: the update of Muon, then QK-clip of the heads above the threshold"
W, H = 880, 372


def draw(colors: Palette) -> str:
    """Draws the two halves of a training step, from left to right.

    Args:
      colors: Of the picture.

    Returns:
      SVG.
    """
    c = Canvas(W, H, TITLE, colors)
    c.box(16, 134, 134, 104, colors.grey_fill, colors.line)
    _lines(c, 83, 164, ("forward and", "backward pass"), bold=True)
    _lines(c, 83, 208, ("one batch",), color=colors.faint)

    c.text(190, 34, "Muon: every matrix W", color=colors.blue, bold=True, size=15)
    steps = (
        ("momentum", "M ← β M + G"),
        ("Newton–Schulz", "O ≈ U Vᵀ of M"),
        ("match AdamW", "O ← 0.2 √max(n, m) O"),
        ("update", "W ← W − η (O + λ W)"),
    )
    for i, (name, equation) in enumerate(steps):
        x = 190 + 172 * i
        c.box(x, 50, 156, 74, colors.blue_fill, colors.blue)
        c.text(x + 78, 78, name, anchor="middle", bold=True)
        c.text(x + 78, 104, equation, anchor="middle", size=13)
        if i:
            c.arrow([(x - 16, 87), (x, 87)])
    c.arrow([(83, 134), (83, 87), (190, 87)])
    c.text(96, 80, "gradient G", color=colors.faint, size=13)

    c.text(190, 232, "QK-clip: every attention head h", color=colors.orange, bold=True, size=15)
    steps = (
        ("largest logit", "Sʰ = max qᵢᵀkⱼ / √dₕ", "over batch and positions"),
        ("factor of a head", "γʰ = τ / Sʰ if Sʰ > τ", "else 1: no bit changes"),
        ("scale query, key", "Wqʰ ← √γʰ Wqʰ", "Wkʰ ← √γʰ Wkʰ"),
    )
    for i, (name, equation, second) in enumerate(steps):
        x = 190 + 172 * i + (172 if i == 2 else 0)
        c.box(x, 248, 156, 94, colors.orange_fill, colors.orange)
        c.text(x + 78, 274, name, anchor="middle", bold=True, size=14)
        c.text(x + 78, 300, equation, anchor="middle", size=13)
        c.text(x + 78, 324, second, anchor="middle", size=12 if i < 2 else 13)
    c.arrow([(346, 295), (362, 295)])
    c.arrow([(518, 295), (706, 295)])
    c.text(612, 286, "one factor for each head", anchor="middle", color=colors.faint, size=13)
    c.arrow([(83, 238), (83, 295), (190, 295)])
    c.text(96, 288, "logits QKᵀ", color=colors.faint, size=13)
    c.arrow([(784, 124), (784, 248)])
    c.text(774, 180, "new query and", anchor="end", color=colors.faint, size=13)
    c.text(774, 198, "key weights", anchor="end", color=colors.faint, size=13)
    return c.svg()


def _lines(
    c: Canvas, x: float, y: float, lines: tuple[str, ...], *, color: str | None = None,
    bold: bool = False,
) -> None:  # fmt: skip
    for i, line in enumerate(lines):
        c.text(x, y + 20 * i, line, anchor="middle", color=color, bold=bold)
