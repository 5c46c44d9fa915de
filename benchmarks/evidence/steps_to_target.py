"""Steps to a fixed validation loss, in the manner of modded-nanogpt's optimizer track.

Model, data and batch are fixed, and each optimizer has its own tuned learning rate. Its rules:
https://github.com/KellerJordan/modded-nanogpt/tree/master/records/track_3_optimization
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import optax
from matplotlib.figure import Figure
from optax import contrib
from scipy import stats

import muonclip_jax as mc
from benchmarks.evidence import plotting
from benchmarks.evidence.runner import Measure
from benchmarks.evidence.summaries import loss_of, mean_or_infinity, mean_sd, over_seeds, seeds_of
from benchmarks.evidence.token_efficiency import crossing
from benchmarks.evidence.training import (
    ADAM_B2,
    SEQ_LEN,
    Run,
    dimension_numbers,
    finite,
)
from benchmarks.report import markdown

TITLE = "Steps to a fixed loss"
CLAIM = (
    "Muon reaches a fixed validation loss in fewer steps than AdamW, and NorMuon in fewer than"
    " Muon; each with its own tuned learning rate."
)
SOURCE = "modded-nanogpt, records/track_3_optimization, results 2, 10 and 12"
PUBLISHED = "steps to 3.28 on FineWeb: AdamW 5,625 (one run), Muon 3,325, NorMuon 3,250 (20 runs)"
ADAMW, OPTAX, MUON, NORMUON = "AdamW", "optax.contrib.muon", "mc.muon", "mc.muon, NorMuon"
CLIPPED, THRESHOLD = "mc.muonclip", 30.0
LEVEL = 0.01  # of the tests
PASSING = 3.09  # standard errors below the target; modded-nanogpt, rule 3: p < 0.001, one-sided
# Arguments of `mc.muon`; the two baselines and `mc.muonclip` are built from none.
VARIANTS: dict[str, dict[str, Any]] = {
    ADAMW: {},
    OPTAX: {},
    MUON: {},
    "mc.muon, per head": {"per_head": mc.MultiHeadLayout(value="value")},
    NORMUON: {"neuron_b2": 0.95},
    "mc.muon, cautious decay": {"cautious_weight_decay": True},
    "mc.muon, Sinkhorn": {
        "overrides": {"embed/embedding": mc.Sinkhorn(-2), "lm_head/kernel": mc.Sinkhorn(-1)}
    },
    CLIPPED: {},
}


@dataclasses.dataclass(frozen=True)
class Target(Run):
    """A training with one of the optimizers.

    Attributes:
      variant: One of `VARIANTS`.
    """

    variant: str = MUON

    validation_bytes: ClassVar[int] = 2**15

    def transformation(self, shapes: Any, learning_rate: Any) -> optax.GradientTransformation:
        """Builds the optimizer: weight decay on every parameter, and else its defaults."""
        if self.variant == ADAMW:
            return optax.adamw(learning_rate, b2=ADAM_B2, weight_decay=self.weight_decay)
        if self.variant == CLIPPED:
            return mc.muonclip(
                learning_rate, weight_decay=self.weight_decay, adam_b2=ADAM_B2, threshold=None
            )
        settings: dict[str, Any] = {
            "weight_decay": self.weight_decay,
            "adam_weight_decay": self.weight_decay,
            "adam_b2": ADAM_B2,
        }
        if self.variant == OPTAX:
            numbers = dimension_numbers(shapes)
            return contrib.muon(learning_rate, muon_weight_dimension_numbers=numbers, **settings)
        return mc.muon(learning_rate, **settings, **VARIANTS[self.variant])

    def measure(self) -> dict[str, Any]:
        """Trains, and returns the validation loss."""
        return {"validation_loss": self.train()[1]}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What all optimizers share, and where the search for their rates and steps starts.

    Attributes:
      run: A training; each optimizer changes its variant, rate and steps.
      target: Validation loss to reach, nats per token.
      budgets: Steps of a training, each a full schedule; ascending.
      first: Index of the first budget, and learning rate, of AdamW, of `mc.muonclip` and of the
        others.
      seeds: Of the trainings that count.
      tuning_seeds: Of the trainings that choose the rates; none of `seeds`.
      factor: Between two learning rates of the search.
    """

    run: Target
    target: float
    budgets: tuple[int, ...]
    first: Mapping[str, tuple[int, float]]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    factor: float

    def start(self, name: str) -> tuple[int, float]:
        """Returns where the search of an optimizer starts."""
        return self.first.get(name, self.first[MUON])


def geometric(first: int, last: int, parts: int) -> tuple[int, ...]:
    """Returns budgets from first to last, with `parts` of them in a doubling."""
    count = round(parts * math.log2(last / first))
    return tuple(round(first * 2 ** (i / parts)) for i in range(count + 1))


BYTES = Protocol(
    run=Target(0.0, 0),
    target=2.2,
    budgets=geometric(64, 1024, 4),
    first={ADAMW: (10, 0.008), CLIPPED: (4, 0.016), MUON: (3, 0.032)},
    seeds=(0, 1, 2, 3, 4),
    tuning_seeds=(100, 101),
    factor=2**0.5,
)


def study(measure: Measure, protocol: Protocol = BYTES) -> dict[str, Any]:
    """Finds the best rate of each optimizer, then the steps to the target for each seed."""
    lines = {name: line(measure, protocol, name) for name in VARIANTS}
    spread = pooled(lines.values())
    for one in lines.values():
        one["passes"] = first_passing(one["budgets"], protocol.target, spread)
        one["times_adamw"], one["p_adamw"] = compared(one["each"], lines[ADAMW]["each"])
        one["times_muon"], one["p_muon"] = compared(one["each"], lines[MUON]["each"])
    return {"target": protocol.target, "spread": spread, "lines": lines}


def line(measure: Measure, protocol: Protocol, name: str) -> dict[str, Any]:
    """Measures one optimizer: its rate, its losses by budget, and its steps to the target."""
    at, start = protocol.start(name)
    threshold = THRESHOLD if name == CLIPPED else None
    run = dataclasses.replace(protocol.run, variant=name, threshold=threshold)
    tuning = tuned(measure, dataclasses.replace(run, steps=protocol.budgets[at]), start, protocol)
    rate = min(tuning, key=lambda rate: mean_or_infinity(tuning[rate]))
    run = dataclasses.replace(run, learning_rate=rate)
    losses = climb(measure, run, at, protocol)
    steps = sorted(losses)
    each = [
        finite(crossing(steps, [losses[n][i] for n in steps], protocol.target))
        for i in range(len(protocol.seeds))
    ]
    return {
        "learning_rate": rate,
        "tuning": {f"{rate:g}": loss for rate, loss in tuning.items()},
        "budgets": {str(n): over_seeds(map(finite, losses[n])) for n in steps},
        "each": each,
        "steps": over_seeds(each),
        "unreached": [s for s, one in zip(protocol.seeds, each, strict=True) if one is None],
        "diverged": [
            *(f"rate {rate:g}" for rate, loss in tuning.items() if loss["mean"] is None),
            *(f"{n} steps" for n in steps if math.inf in losses[n]),
        ],
    }


def tuned(
    measure: Measure, run: Target, start: float, protocol: Protocol
) -> dict[float, dict[str, Any]]:
    """Trains at neighboring rates until the best of them is not at an end.

    Returns:
      The loss over the tuning seeds by rate, in ascending order.
    """
    losses: dict[float, dict[str, Any]] = {}
    wanted = [-1, 0, 1]
    while True:
        rates = [float(f"{start * protocol.factor**i:.3g}") for i in wanted]
        at = [dataclasses.replace(run, learning_rate=rate) for rate in rates]
        measure([one for line in at for one in seeds_of(line, protocol.tuning_seeds)])
        losses = {
            one.learning_rate: loss_of(measure(seeds_of(one, protocol.tuning_seeds))) for one in at
        }
        best = min(losses, key=lambda rate: mean_or_infinity(losses[rate]))
        if best == rates[0]:
            wanted = [wanted[0] - 1, *wanted]
        elif best == rates[-1]:
            wanted = [*wanted, wanted[-1] + 1]
        else:
            return losses


def climb(measure: Measure, run: Target, at: int, protocol: Protocol) -> dict[int, list[float]]:
    """Trains with neighboring budgets until the losses of all seeds are on both sides.

    Returns:
      The losses of the seeds by budget, infinity if a training diverged.
    """
    losses: dict[int, list[float]] = {}

    def reached(index: int) -> list[bool]:
        steps = protocol.budgets[index]
        records = measure(seeds_of(dataclasses.replace(run, steps=steps), protocol.seeds))
        found = (record["validation_loss"] for record in records)
        losses[steps] = [math.inf if loss is None else loss for loss in found]
        return [loss <= protocol.target for loss in losses[steps]]

    up = at
    while not all(reached(up)) and up + 1 < len(protocol.budgets):
        up += 1
    down = at
    while any(reached(down)) and down > 0:
        down -= 1
    return losses


def pooled(lines: Any) -> float | None:
    """Returns the standard deviation of the loss over seeds, pooled over all budgets."""
    known = [one for line in lines for one in line["budgets"].values() if one["mean"] is not None]
    freedom = sum(one["n"] - 1 for one in known)
    return finite(math.sqrt(sum((one["n"] - 1) * one["sd"] ** 2 for one in known) / freedom))


def first_passing(
    budgets: Mapping[str, Mapping[str, Any]], target: float, spread: float | None
) -> int | None:
    """Returns the least budget with a mean loss below the target by `PASSING` standard errors."""
    for steps, loss in budgets.items():
        if loss["mean"] is not None and spread is not None:
            if (target - loss["mean"]) * loss["n"] ** 0.5 >= PASSING * spread:
                return int(steps)
    return None


def compared(
    steps: Sequence[float | None], reference: Sequence[float | None]
) -> tuple[dict[str, Any], float | None]:
    """Returns the ratio of steps at equal seeds, and the p-value of a paired t-test of its log.

    Example:
      >>> ratio, p = compared([50.0, 60.0, 55.0], [100.0, 118.0, 112.0])
      >>> ratio["mean"], p < 0.01
      (0.49985, True)
    """
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
    return f"steps to {ours['target']:g}: {'; '.join(texts)}"


COLUMNS = (
    "optimizer",
    "best rate",
    "steps to the target",
    "passes with",
    "times AdamW's",
    "p",
    "times `mc.muon`'s",
    "p",
    "failures",
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
    """Formats a mean over seeds, of which none may have missed the target."""
    return "not reached" if over["mean"] is None else mean_sd(dict(over), digits)


def p_value(p: float | None) -> str:
    """Formats a p-value; a comparison with itself has none."""
    return "" if p is None else f"{p:.2g}"


def failures(line: Mapping[str, Any]) -> str:
    """Lists the seeds that never reached the target, and the trainings that diverged."""
    unreached = [f"seed {seed} not reached" for seed in line["unreached"]]
    return ", ".join([*unreached, *(f"diverged: {name}" for name in line["diverged"])]) or "none"


def listed(ours: Mapping[str, Any], than: str, found: str) -> str:
    """Lists the optimizers with fewer, more or equally many steps."""
    reference = {"adamw": ADAMW, "muon": MUON}[than]
    names = [
        name
        for name, one in ours["lines"].items()
        if name not in (ADAMW, reference) and fewer(one, than) == found
    ]
    return ", ".join(names) or "none"


def section(ours: Mapping[str, Any]) -> str:
    """Describes the result in a paragraph and a table."""
    run, line = BYTES.run, ours["lines"][MUON]
    fewest, most, rest = (listed(ours, "muon", found) for found in ("fewer", "more", "equal"))
    tuning = " and ".join(map(str, BYTES.tuning_seeds))
    return f"""\
`mc.muon` reaches {ours["target"]:g} nats per byte in {reached(line["times_adamw"], 2)} times the
steps of AdamW (p = {p_value(line["p_adamw"])}). Fewer steps than `mc.muon` need, at p < {LEVEL:g}:
{fewest}; more: {most}; no difference that {len(BYTES.seeds)} seeds can show: {rest}.

The protocol is that of modded-nanogpt's [optimizer
track](https://github.com/KellerJordan/modded-nanogpt/tree/master/records/track_3_optimization):
model, data and batch are fixed, a step has one forward and backward pass, and no training stops
because of its own loss. The model is `gqa`, the batch {run.batch_size} x {SEQ_LEN} bytes. Each
optimizer has the best rate for seeds {tuning}, on a grid of factor √2 that is extended until the
best is inside. It then trains with seeds {BYTES.seeds[0]} to {BYTES.seeds[-1]}. Each number of
steps is a training with a full schedule, and numbers are added until each seed has losses on both
sides of the target. Between them the loss is linear in the logarithm of the steps. p is of a paired
t-test of that logarithm at equal seeds, two-sided, not corrected for the number of comparisons.
"Passes with" is modded-nanogpt's rule: the fewest steps tried whose mean loss is {PASSING:g}
standard errors below the target (p < 0.001, one-sided), with a deviation of {ours["spread"]:.3f}
over seeds, pooled over all trainings.

All have decay {run.weight_decay:g}, and otherwise the defaults of `optax.contrib.muon`: Nesterov
and the scale √max(1, n_out / n_in). `{CLIPPED}` is Algorithm 1 of Kimi K2 with τ = {THRESHOLD:g}:
no Nesterov, another scale. The rates of AdamW in it, and of Sinkhorn-balanced momentum, are the
rate of the matrices.

{table(ours)}

`python -m benchmarks.evidence steps-to-target --tokens PATH` runs the same protocol at the size of
GPT-2 small, on one GPU or TPU. PATH has tokens as uint16, `.npy` or `.bin`, with the header of
modded-nanogpt's files or without. Its target, 3.28, and its batch, 524,288 tokens, are
modded-nanogpt's; the model is ours. It has been tested with a tiny model and file. Nobody has run
it at full size."""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws the loss over the steps of the schedule, and the steps to the target."""
    ours = result["ours"]
    figure, (left, right) = plotting.panels(2, size=(5.2, 3.8))
    for (name, one), color in zip(ours["lines"].items(), plotting.COLORS, strict=True):
        kept = {int(n): loss["mean"] for n, loss in one["budgets"].items() if loss["mean"]}
        left.plot(*zip(*kept.items(), strict=True), color=color, marker="o", ms=3, label=name)
    left.axhline(ours["target"], color=plotting.LIMIT, linestyle="dashed", linewidth=1)
    left.set(xscale="log", xlabel="steps of the schedule", title="validation loss; dashed: target")
    left.legend(frameon=False, fontsize="small")
    known = {name: one["steps"] for name, one in ours["lines"].items() if one["steps"]["mean"]}
    plotting.bars(right, known)
    right.set(xlabel="steps", title="steps to the target")
    return figure
