"""Generates docs/evidence.md from the results."""

import textwrap
from collections.abc import Mapping
from typing import Any

from benchmarks.evidence.experiments import EXPERIMENTS
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

Small trainings that test published claims with this library. Each experiment has a command, its
seeds, the record of every training, and a verdict computed by a rule in code.

{{table}}

**The scale is small.** Unless stated otherwise the models have {LAYERS} layers, width {WIDTH} and
{HEADS} heads of {HEAD_DIM}. They read bytes of Python's standard library, {BATCH_SIZE} x {SEQ_LEN}
per step, for {Run(0.0, 0).steps} steps, and the validation loss is measured on
{VALIDATION_BYTES:,} bytes that no training reads. All of it ran on two CPU cores. Such runs cannot
show what a model of a billion parameters does over a trillion tokens. A claim that fails here may
hold there.

± is one standard deviation over seeds. Losses are nats per byte on the validation bytes. "Same
seed" compares trainings with the same initial weights and the same text at each step. Muon is
Algorithm 1 of Kimi K2 without QK-clip: no Nesterov, scale 0.2 √max(n_in, n_out), decay 0.1.
Learning rates have a linear warmup over 5 % of the steps and then a linear decay to 0. "Clip" is
QK-clip.

```
pip install -e '.[examples]'
python -m benchmarks.evidence all    # hours; an interrupted run continues
```

The records are in [benchmarks/evidence/results](../benchmarks/evidence/results). This page is
generated from them (`python -m benchmarks.evidence page`). `tests/benchmarks/test_evidence.py`
recomputes every figure and verdict.
Versions: {{versions}}.
"""

SECTION = """
## {title}

![{title}](../benchmarks/evidence/results/{name}.png)

{text}

Claim: {claim} Source: {source}. Published: {published}. Verdict: **{verdict}**.
Command: `{command}`, {date}.
"""


def page(results: Results) -> str:
    """Generates docs/evidence.md."""
    versions = next(iter(results.values()))["versions"]
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [HEAD.format(table=table(results), versions=listed)]
    for name, result in results.items():
        experiment = EXPERIMENTS[name]
        title, text = experiment.TITLE, wrapped(experiment.section(result["ours"]))
        parts.append(SECTION.format(**{**result, "title": title, "name": name, "text": text}))
    return "".join(parts)


def wrapped(text: str) -> str:
    """Wraps the lines of paragraphs, except tables."""
    parts = text.split("\n\n")
    return "\n\n".join(
        x if x.startswith("|") else textwrap.fill(x, FILL, break_on_hyphens=False) for x in parts
    )


def table(results: Results) -> str:
    """Generates the table of claims."""
    rows = [
        [
            EXPERIMENTS[name].TITLE,
            r["published"],
            EXPERIMENTS[name].one_line(r["ours"]),
            r["verdict"],
        ]
        for name, r in results.items()
    ]
    return markdown(["claim", "published", "here", "verdict"], rows)
