"""Runs experiments. Writes results/NAME.json, results/NAME.png and docs/evidence.md."""

import argparse
import io
import json
import os
import pathlib
from typing import Any

from benchmarks import report
from benchmarks.evidence import FOLDER, gpt2_tokens, steps_to_target
from benchmarks.evidence.experiments import EXPERIMENTS
from benchmarks.evidence.page import page
from benchmarks.evidence.runner import Runner, versions

RESULTS = FOLDER / "results"
MEMORY = FOLDER / "done.jsonl"
PAGE = FOLDER.parents[1] / "docs" / "evidence.md"


def conclude(name: str, runner: Runner, **options: Any) -> dict[str, Any]:
    """Runs an experiment, except for its stored records; with the options of its `study`."""
    experiment = EXPERIMENTS[name]
    runner.records.clear()
    ours = experiment.study(runner, **options)
    seeds = {
        record["settings"]["seed"] for record in runner.records if "seed" in record["settings"]
    }
    return {
        "experiment": name,
        "claim": experiment.CLAIM,
        "source": experiment.SOURCE,
        "published": experiment.PUBLISHED,
        "command": f"python -m benchmarks.evidence {name}",
        "date": max(record["date"] for record in runner.records),
        "versions": versions(),
        "seeds": sorted(seeds),
        "ours": ours,
        "verdict": experiment.verdict(ours),
        "runs": list(runner.records),
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs the named experiments one after the other, and generates the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description="Small trainings that test claims."
    )
    choices = [*EXPERIMENTS, "all", "page"]
    parser.add_argument("names", nargs="+", choices=choices, metavar="NAME")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--memory", type=pathlib.Path, default=MEMORY)
    parser.epilog = (
        f"names: {', '.join(EXPERIMENTS)}; all; page, which only generates {PAGE.name}. Finished"
        f" trainings are kept in --memory, {MEMORY.name}, and checkpoints of long ones beside it."
    )
    parser.add_argument(
        "--tokens", type=pathlib.Path, help="of steps-to-target: GPT-2 small on uint16 tokens"
    )
    options = parser.parse_args(arguments)
    runner = Runner(options.memory, options.workers)
    if options.tokens:
        if options.names != ["steps-to-target"]:
            parser.error("--tokens is for steps-to-target alone")
        return on_tokens(options.tokens, runner, options.out)
    for name in EXPERIMENTS if "all" in options.names else options.names:
        if name != "page":
            run(name, runner, options.out)
    paths = {name: options.out / f"{name}.json" for name in EXPERIMENTS}
    if all(path.exists() for path in paths.values()):
        results = {name: json.loads(path.read_text()) for name, path in paths.items()}
        generated = PAGE if options.out == RESULTS else options.out / PAGE.name
        report.write(generated, page(results).encode())


def run(name: str, runner: Runner, out: pathlib.Path) -> None:
    """Runs an experiment, and writes its result and its plot."""
    result = conclude(name, runner)
    write(name, result, out / name)
    print(f"{name}: {result['verdict']}")


def on_tokens(path: pathlib.Path, runner: Runner, out: pathlib.Path) -> None:
    """Runs `steps-to-target` on tokens, writes its result and its plot, and prints its table."""
    name = "steps-to-target"
    result = conclude(name, runner, protocol=gpt2_tokens.protocol(path.resolve()))
    result["command"] += f" --tokens {path}"
    write(name, result, out / f"{name}-tokens")
    print(steps_to_target.table(result["ours"]))


def write(name: str, result: dict[str, Any], path: pathlib.Path) -> None:
    """Writes a result as path.json and its plot as path.png."""
    report.write_json(path.with_suffix(".json"), result, per_line="runs", indent=1)
    image = io.BytesIO()
    EXPERIMENTS[name].draw(result).savefig(image, format="png")
    report.write(path.with_suffix(".png"), image.getvalue())


if __name__ == "__main__":
    main()
