"""Steps to a fixed validation loss, in the manner of modded-nanogpt's optimizer track.

Model, data and batch are fixed, and each optimizer has its own tuned learning rate. Its rules:
https://github.com/KellerJordan/modded-nanogpt/tree/master/records/track_3_optimization
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.evidence import plotting
from benchmarks.evidence.optimizer_search import (
    ADAMW,
    CLIPPED,
    MUON,
    NORMUON,
    OPTAX,
    PASSING,
    PER_HEAD,
    THRESHOLD,
    VARIANTS,
    Protocol,
    Target,
    geometric,
    line,
)
from benchmarks.evidence.runner import Measure
from benchmarks.evidence.summaries import joined, mean_sd, over_seeds
from benchmarks.evidence.training import SEQ_LEN, finite
from benchmarks.report import markdown

TITLE = "Steps to a fixed loss"
CLAIM = (
    "Muon reaches a fixed validation loss in fewer steps than AdamW, and NorMuon in fewer than"
    " Muon; each with its own tuned learning rate."
)
SOURCE = "modded-nanogpt, records/track_3_optimization, results 2, 10 and 12"
PUBLISHED = "steps to 3.28 on FineWeb: AdamW 5,625 (one run), Muon 3,325, NorMuon 3,250 (20 runs)"
LEVEL = 0.01  # of the tests
BYTES = Protocol(
    run=Target(0.0, 0),
    target=2.3,
    spread=0.034,
    budgets=geometric(64, 1024, 4),
    first={ADAMW: (9, 0.0056), CLIPPED: (4, 0.022), MUON: (3, 0.064)},
    seeds=(0, 1, 2, 3, 4),
    tuning_seeds=(100, 101),
    factor=2**0.5,
)


def study(measure: Measure, protocol: Protocol = BYTES) -> dict[str, Any]:
    """Finds the best rate of each optimizer, then the steps to the target for each seed."""
    lines = {name: line(measure, protocol, name) for name in VARIANTS}
    for one in lines.values():
        passing = (int(steps) for steps, loss in one["budgets"].items() if protocol.passes(loss))
        one["passes"] = next(passing, None)
        one["times_adamw"], one["p_adamw"] = compared(one["each"], lines[ADAMW]["each"])
        one["times_muon"], one["p_muon"] = compared(one["each"], lines[MUON]["each"])
    return {"target": protocol.target, "spread": pooled(lines.values()), "lines": lines}


def pooled(lines: Iterable[Mapping[str, Any]]) -> float | None:
    """Returns the standard deviation of the loss over seeds, pooled over all budgets."""
    known = [one for line in lines for one in line["budgets"].values() if one["mean"] is not None]
    freedom = sum(one["n"] - 1 for one in known)
    return finite(math.sqrt(sum((one["n"] - 1) * one["sd"] ** 2 for one in known) / freedom))


def compared(
    steps: Sequence[float | None], reference: Sequence[float | None]
) -> tuple[dict[str, Any], float | None]:
    """Returns the ratio of steps at equal seeds, and the p-value of a paired t-test of its log.

    Example:
      >>> ratio, p = compared([50.0, 60.0, 55.0], [100.0, 118.0, 112.0])
      >>> ratio["mean"], p < 0.01
      (0.49985, True)
    """
    from scipy import stats  # not for all experiments: the import takes longer than JAX's

    pairs = list(zip(steps, reference, strict=True))
    if any(x is None or y is None for x, y in pairs) or steps == reference:
        return over_seeds(None if x is None or y is None else x / y for x, y in pairs), None
    ours, theirs = ([math.log(pair[i] or math.nan) for pair in pairs] for i in (0, 1))
    p = stats.ttest_rel(ours, theirs).pvalue
    return over_seeds(math.exp(x - y) for x, y in zip(ours, theirs, strict=True)), finite(p, 2)


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: Muon needs fewer steps than AdamW and NorMuon fewer than Muon, at `LEVEL`."""
    lines = ours["lines"]
    return plotting.judge(
        fewer(lines[MUON], "adamw") == "fewer", fewer(lines[NORMUON], "muon") == "fewer"
    )


def fewer(line: Mapping[str, Any], than: str) -> str:
    """Compares with `adamw` or `muon`: `fewer` or `more` steps at `LEVEL`, or `equal`."""
    p, times = line[f"p_{than}"], line[f"times_{than}"]["mean"]
    if p is None or p >= LEVEL:
        return "equal"
    return "fewer" if times < 1 else "more"


def one_line(ours: Mapping[str, Any]) -> str:
    """Summarizes the result in one line."""
    texts = (f"{name} {mean_sd(one['steps'], 0)}" for name, one in ours["lines"].items())
    target = f"steps to {ours['target']:g}, with the defaults of optax"
    return f"{target}: {'; '.join(texts)} (Algorithm 1 of Kimi K2)"


COLUMNS = (
    "optimizer",
    "best rate",
    "steps to the target",
    "passes with",
    "times AdamW's",
    "p, against AdamW",
    "times `mc.muon`'s",
    "p, against `mc.muon`",
    "runs that failed",
)


def table(ours: Mapping[str, Any]) -> str:
    """Generates the table of optimizers."""
    rows = [
        [
            name,
            f"{one['learning_rate']:g}",
            reached(one["steps"], 0),
            str(one["passes"] or "none"),
            "" if name == ADAMW else reached(one["times_adamw"], 2),
            p_value(one["p_adamw"]),
            "" if name == MUON else reached(one["times_muon"], 3),
            p_value(one["p_muon"]),
            failures(one),
        ]
        for name, one in ours["lines"].items()
    ]
    return markdown(COLUMNS, rows)


def reached(over: Mapping[str, Any], digits: int) -> str:
    """Formats a mean over seeds, each of which needs a number of steps."""
    return "see runs that failed" if over["mean"] is None else mean_sd(dict(over), digits)


def p_value(p: float | None) -> str:
    """Formats a p-value; a comparison with itself has none."""
    return "" if p is None else f"{p:.2g}"


def failures(line: Mapping[str, Any]) -> str:
    """Lists seeds without a number of steps, and trainings that diverged."""
    found = [
        *(f"seed {seed} never reaches it" for seed in line["unreached"]),
        *(f"seed {seed} reaches it with the fewest steps tried" for seed in line["at_once"]),
        *(f"diverged: {name}" for name in line["diverged"]),
    ]
    return ", ".join(found) or "none"


def listed(ours: Mapping[str, Any], found: str) -> list[str]:
    """Lists the optimizers with fewer, more or equally many steps than `mc.muon`."""
    labels = {OPTAX: f"`{OPTAX}`", CLIPPED: f"`{CLIPPED}`", PER_HEAD: "one matrix per head"}
    return [
        labels.get(name) or name.removeprefix(f"{MUON}, ")
        for name, one in ours["lines"].items()
        if name not in (ADAMW, MUON) and fewer(one, "muon") == found
    ]


def effects(ours: Mapping[str, Any]) -> str:
    """Compares every optimizer with plain `mc.muon`, in sentences."""
    fewest, most, rest = (listed(ours, found) for found in ("fewer", "more", "equal"))
    texts = []
    for names, which in ((fewest, "fewer"), (most, "more")):
        if names:
            needs = "needs" if len(names) == 1 else "need"
            steps = f"{which} steps than plain `{MUON}` (p < {LEVEL:g})"
            texts.append(f"{joined(names)} {needs} {steps}.")
    if rest:
        texts.append(f"{len(BYTES.seeds)} seeds show no difference for {joined(rest)}.")
    return " ".join(text[0].upper() + text[1:] for text in texts)


def section(ours: Mapping[str, Any]) -> str:
    """Describes the result in a paragraph and a table."""
    run, line, normuon = BYTES.run, ours["lines"][MUON], ours["lines"][NORMUON]
    return f"""\
`mc.muon` reaches {ours["target"]:g} nats per byte in {reached(line["times_adamw"], 2)} times the
steps of AdamW (p = {p_value(line["p_adamw"])}). {effects(ours)}

The ratio of modded-nanogpt is {3325 / 5625:.2f} (3,325 / 5,625). Such short trainings are no fair
test of AdamW, and here the batches are small too.

Why "partly": the verdict needs p < {LEVEL:g} twice. For Muon against AdamW p is
{p_value(line["p_adamw"])}, and for NorMuon against Muon it is {p_value(normuon["p_muon"])}. In [The
Muon family](#the-muon-family) the scale, the momentum and the model are others, so its results can
differ.

The protocol comes from modded-nanogpt's [optimizer
track](https://github.com/KellerJordan/modded-nanogpt/tree/master/records/track_3_optimization).
{protocol(ours["spread"])}

All have decay {run.weight_decay:g}, and otherwise the defaults of `optax.contrib.muon`: Nesterov
and the scale √max(1, n_out / n_in). `{CLIPPED}` is Algorithm 1 of Kimi K2 with τ = {THRESHOLD:g},
without Nesterov and with another scale. With this scale Muon trains more slowly here, as in [Fewer
tokens than AdamW](#fewer-tokens-than-adamw). In each row with Muon, AdamW trains the other
parameters at the rate of the matrices, and so does Sinkhorn-balanced momentum in its row.

{table(ours)}

The same protocol can run on [tokens of your
own](benchmarks.md#steps-to-a-fixed-loss-on-your-tokens) at the size of GPT-2 small."""


def protocol(spread: float) -> str:
    """Describes the protocol of the trainings on bytes in a list."""
    run, seeds = BYTES.run, BYTES.seeds
    tuning = " and ".join(map(str, BYTES.tuning_seeds))
    return f"""
- **Fixed:** model, data and batch. The model is `gqa` with {run.layers} layers, and the batch is
  {run.batch_size} x {SEQ_LEN} bytes.
- **A step** has one forward and one backward pass.
- **Rate:** each optimizer has the best rate for seeds {tuning}. The grid has the factor √2, and is
  extended until the best rate is inside.
- **Trainings:** with that rate, seeds {seeds[0]} to {seeds[-1]}. Each number of steps is a training
  with a full schedule, and none stops because of its own loss.
- **Numbers of steps** are added until one passes and one is too small for every seed. We
  interpolate the loss linearly in the logarithm of the steps.
- **p** is of a paired t-test of that logarithm at equal seeds, two-sided. It is not corrected for
  several comparisons.
- **Passes with** is modded-nanogpt's rule: the fewest steps tried whose mean loss is {PASSING:g}
  standard errors below the target (p < 0.001, one-sided). The standard error assumes a standard
  deviation of {BYTES.spread:g} over seeds. The measured one, pooled over all trainings, is
  {spread:.3f}."""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws the loss over the steps of the schedule, and the steps to the target, in one color."""
    ours, names = result["ours"], list(result["ours"]["lines"])
    figure, (left, right) = plotting.panels(2, size=(5.2, 3.8))
    for row, (one, color) in enumerate(zip(ours["lines"].values(), plotting.COLORS, strict=False)):
        kept = {int(n): loss["mean"] for n, loss in one["budgets"].items() if loss["mean"]}
        left.plot(list(kept), list(kept.values()), color=color, marker="o", markersize=3)
        if (steps := one["steps"])["mean"]:
            right.errorbar(steps["mean"], row, xerr=steps["sd"], color=color, fmt="o", capsize=3)
    left.axhline(ours["target"], color=plotting.LIMIT, linestyle="dashed", linewidth=1)
    left.set(xscale="log", xlabel="steps of the schedule", title="validation loss; dashed: target")
    budgets = sorted({int(n) for one in ours["lines"].values() for n in one["budgets"]})
    left.set_xticks(budgets[::2], [str(n) for n in budgets[::2]])
    left.set_xticks([], minor=True)
    right.set_yticks(range(len(names)), names)
    right.set(xlabel="steps", title="steps to the target", ylim=(len(names) - 0.5, -0.5))
    return figure
