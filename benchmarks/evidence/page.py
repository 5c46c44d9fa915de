"""Generates docs/evidence.md from the results."""

import re
import textwrap
from collections.abc import Mapping
from typing import Any

from benchmarks.evidence.experiments import EXPERIMENTS
from benchmarks.evidence.summaries import SEEDS
from benchmarks.evidence.training import (
    BATCH_SIZE,
    HEAD_DIM,
    HEADS,
    LAYERS,
    SEQ_LEN,
    VALIDATION_BYTES,
    WIDTH,
    Run,
)
from benchmarks.report import markdown

FILL = 150  # characters per line, as in the other pages
Results = Mapping[str, Mapping[str, Any]]

HEAD = f"""# Evidence

We tested published claims about Muon and QK-clip in small trainings. For each claim, a rule in code
has one or more conditions on the recorded trainings. The verdict is *reproduced* if all conditions
hold, *partly* if some do, and *not reproduced* if none does. Each verdict links to its section.

{{table}}

**The scale is small.** Unless stated otherwise the model has {LAYERS} layers, width {WIDTH} and
{HEADS} heads of {HEAD_DIM}. It reads bytes of Python's standard library, {BATCH_SIZE} x {SEQ_LEN}
per step, for {Run(0.0, 0).steps} steps on two CPU cores. A claim that fails here may hold for a
model of a billion parameters and a trillion tokens.

- **Models:** `gqa` has grouped queries, {HEADS} query heads on {HEADS // 2} key heads. It is the
  model if none is named. `mha` has {HEADS} key heads. `mla` has latent attention.
- **Seeds:** {len(SEEDS)} for each training. Exceptions: {{exceptions}}, two of them to find the
  learning rates.
- **Loss** is in nats per byte, on {VALIDATION_BYTES:,} bytes that no training reads.
- **±** is one standard deviation over seeds.
- **Same seed** compares trainings with the same initial weights and the same text at each step.
- **Muon** is Algorithm 1 of Kimi K2 without QK-clip: no Nesterov momentum, scale
  0.2 √max(n_in, n_out), weight decay 0.1. A matrix has n_in inputs and n_out outputs.
- **Clip** is QK-clip.
- **Rate** is the learning rate.
- **Learning rates** have a linear warmup over 5 % of the steps, then a linear decay to 0.

```
pip install -e '.[examples]'
python -m benchmarks.evidence all    # hours; an interrupted run continues
```

The records are in [benchmarks/evidence/results](../benchmarks/evidence/results), and
`python -m benchmarks.evidence page` generates this page from them.
`tests/benchmarks/test_evidence.py` recomputes every figure and verdict. Versions: {{versions}}.
muonclip-jax 0.1.0 is a version before the first release.
"""

SECTION = """
## {title}

{result}

![{title}](../benchmarks/evidence/results/{name}.png)

{details}

Claim: {claim} Source: {source}. Command: `{command}`, {date}.
"""
FOUND = {
    "reproduced": "Reproduced",
    "partly": "Partly reproduced",
    "not reproduced": "Not reproduced",
}


def page(results: Results) -> str:
    """Generates docs/evidence.md."""
    versions = next(iter(results.values()))["versions"]
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    head = HEAD.format(table=table(results), versions=listed, exceptions=exceptions(results))
    parts = [wrapped(head)]
    for name, result in results.items():
        experiment = EXPERIMENTS[name]
        text = f"**{FOUND[result['verdict']]}.** {experiment.section(result['ours'])}"
        first, details = wrapped(text).split("\n\n", 1)
        shown = {"title": experiment.TITLE, "name": name, "result": first, "details": details}
        parts.append(SECTION.format(**{**result, **shown}))
    return "".join(parts)


def exceptions(results: Results) -> str:
    """Lists the experiments with another number of seeds than `SEEDS`."""
    numbers = {EXPERIMENTS[name].TITLE: len(result["seeds"]) for name, result in results.items()}
    listed = [f'{n} in "{title}"' for title, n in numbers.items() if n != len(SEEDS)]
    return "; ".join(listed)


def wrapped(text: str) -> str:
    """Wraps the lines of paragraphs and of items of lists, except tables and blocks of code."""
    return "\n\n".join(map(_wrapped, text.split("\n\n")))


def _wrapped(part: str) -> str:
    if part.startswith(("|", "```")):
        return part
    if part.startswith("- "):
        items = part.removeprefix("- ").split("\n- ")
        return "\n".join(_filled(f"- {item}", subsequent_indent="  ") for item in items)
    return _filled(part)


def _filled(text: str, **options: Any) -> str:
    text = " ".join(text.split())
    return textwrap.fill(text, FILL, break_on_hyphens=False, break_long_words=False, **options)


def anchor(title: str) -> str:
    """Returns the anchor of a section.

    Example:
      >>> anchor("Exploding logits, and QK-clip")
      'exploding-logits-and-qk-clip'
    """
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def table(results: Results) -> str:
    """Generates the table of claims."""
    rows = [
        [
            r["claim"],
            r["published"],
            EXPERIMENTS[name].one_line(r["ours"]),
            f"[{r['verdict']}](#{anchor(EXPERIMENTS[name].TITLE)})",
        ]
        for name, r in results.items()
    ]
    return markdown(["claim", "published", "here", "verdict"], rows)
