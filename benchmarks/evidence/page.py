"""Tells the results: docs/evidence.md, and the table of the README."""

import textwrap
from collections.abc import Mapping
from typing import Any

from benchmarks.evidence import measures
from benchmarks.evidence.experiments import EXPERIMENTS
from benchmarks.evidence.tasks import (
    BATCH_SIZE,
    HEAD_DIM,
    HEADS,
    LAYERS,
    SEQ_LEN,
    VALIDATION_BYTES,
    WIDTH,
    Run,
)

FILL = 150  # columns, as in the other pages
Results = Mapping[str, Mapping[str, Any]]

HEAD = f"""# Evidence

What the papers claim, tried on our own code, in small. Each experiment has a command, its seeds,
every one of its trainings, and a verdict by a rule that is written in code.

{{table}}

**Read it with its size in mind.** The models have {LAYERS} layers, width {WIDTH} and {HEADS} heads
of {HEAD_DIM}. They read bytes of Python's standard library, {BATCH_SIZE} x {SEQ_LEN} a step, for
{Run(0.0, 0).steps} steps unless it says otherwise, and are judged on {VALIDATION_BYTES:,} bytes
that are never trained on. Two CPU cores did all of it. What a model of a billion parameters does
over a trillion tokens, no such run can show; that a claim fails here does not say that it fails
there.

± is one standard deviation over seeds. Losses are nats per byte, on those bytes. "Same seed"
compares trainings that have the same first weights and the same text at each step. Muon is
algorithm 1 of Kimi K2 without its clip: no Nesterov, scale 0.2 √max(n_in, n_out), decay 0.1.
Learning rates rise over 5 % of the steps and fall to 0.

```
pip install -e '.[examples]'
python -m benchmarks.evidence all    # hours; what is done is kept, and it goes on after a stop
```

The trainings are in [benchmarks/evidence/results](../benchmarks/evidence/results). This page is
written from there, and `tests/benchmarks/test_evidence.py` computes every figure and verdict again
from the trainings. Versions: {{versions}}.
"""

SECTION = """
## {title}

![{title}](../benchmarks/evidence/results/{name}.png)

{text}

*{claim}* {source}. Published: {published}. Here: **{verdict}**. `{command}`, {date}.
"""


def page(results: Results) -> str:
    """Writes docs/evidence.md."""
    versions = next(iter(results.values()))["versions"]
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [HEAD.format(table=table(results), versions=said)]
    for name, result in results.items():
        experiment = EXPERIMENTS[name]
        title, text = experiment.TITLE, wrapped(experiment.tell(result["ours"]))
        parts.append(SECTION.format(**{**result, "title": title, "name": name, "text": text}))
    return "".join(parts)


def wrapped(text: str) -> str:
    """Fills the lines of the paragraphs, but not those of the tables."""
    parts = text.split("\n\n")
    return "\n\n".join(x if x.startswith("|") else textwrap.fill(x, FILL) for x in parts)


def table(results: Results) -> str:
    """Writes the table of claims."""
    rows = [
        [EXPERIMENTS[name].TITLE, r["published"], EXPERIMENTS[name].short(r["ours"]), r["verdict"]]
        for name, r in results.items()
    ]
    return measures.table(["claim", "published", "here", "verdict"], rows)
