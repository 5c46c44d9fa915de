"""The cost of a step of the training program on TPU slices, compiled ahead of time.

    pip install "muonclip-jax[tpu]"
    python -m benchmarks.tpu_train_step

Writes results/tpu_train_step.json and prints the table of examples/cloud_tpu/README.md. With
`--aot-topology` the training program prints the figures: memory, FLOPs and communication of one
chip in one step.
"""

import dataclasses
import json
import pathlib
import re
import shlex
import subprocess
import sys
from typing import Any

from benchmarks import aot, report, tpu

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a slice.

    Attributes:
      accelerator: Name of the slice in gcloud and xpk.
      topology: Name of the slice in libtpu: generation, and chips along each axis of the torus.
      model: Architecture.
      preset: Its sizes.
      flags: Other flags of the training program.
    """

    accelerator: str
    topology: str
    model: str
    preset: str
    flags: str

    @property
    def command(self) -> str:
        """The command that prints the figures."""
        return (
            f"python -m examples.language_model --model {self.model} --preset {self.preset}"
            f" {self.flags} --aot-topology {self.topology}"
        )


SLICES = {"v5litepod-16": "v5e:4x4", "v6e-16": "v6e:4x4", "v5p-32": "v5p:2x2x4"}
FLAGS = {"gqa": "--dtype bfloat16 --seq-len 2048 --batch-size 64"}
FLAGS["moe"] = FLAGS["gqa"] + " --accumulate 2"
CASES = {
    f"{model}-{topology.split(':')[0]}": Case(accelerator, topology, model, "medium", flags)
    for model, flags in FLAGS.items()
    for accelerator, topology in SLICES.items()
}
CASES["kimi-k2"] = Case(
    "v5p-2048", "v5p:8x8x16", "moe", "kimi-k2", "--dtype bfloat16 --seq-len 4096 --batch-size 1024"
)


def measure(case: Case) -> dict[str, Any]:
    """Runs the training program in its own process: libtpu must be loaded before JAX is used."""
    words = [sys.executable, *shlex.split(case.command)[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    return dataclasses.asdict(case) | {"command": case.command} | parse(done.stdout)


def parse(output: str) -> dict[str, Any]:
    """Reads the figures of one chip from the output of the training program."""

    def number(pattern: str) -> float | None:
        found = re.findall(pattern, output, re.MULTILINE)
        return float(found[0].replace(",", "")) if found else None

    collectives = re.findall(r"^  ([a-z]+-[a-z-]+) +(\d+) with ([\d,.]+) MB$", output, re.MULTILINE)
    return {
        "chips": number(r"^\S+: (\d+) chips"),
        "mesh": re.findall(r"^\S+: \d+ chips, mesh (.*)$", output, re.MULTILINE)[0],
        "parameters": number(r"([\d,]+) parameters"),
        "fits": ": fits\n" in output,
        "used_gib": number(r"^  total memory +([\d.]+) of"),
        "chip_gib": number(r"^  total memory .* the (\d+) GiB of a chip"),
        "refused": "".join(re.findall(r"^  does not fit; [^:]*: (.*)$", output, re.MULTILINE)),
        "flops": number(r"^  matrix products +([\d.e+]+) FLOPs"),
        "muon_flops": number(r"^mesh .* per device and step ([\d.e+]+) FLOPs"),
        "counts": {kind: int(count) for kind, count, _ in collectives},
        "sent_mb": {kind: float(size.replace(",", "")) for kind, _, size in collectives},
    }


def table(results: dict[str, Any]) -> str:
    """Formats the results as the table of examples/cloud_tpu/README.md."""
    head = (
        "slice",
        "model",
        "mesh",
        "memory per chip, GiB",
        "TFLOPs per chip",
        "Muon's share of them",
        "GB sent per chip",
    )
    return report.markdown(
        head, [row(results["cases"][name]) for name in CASES if name in results["cases"]]
    )


def row(case: dict[str, Any]) -> list[str]:
    """Formats one case as the cells of a line."""
    cells = [
        f"{case['accelerator']}, {case['chips']:g} chips, `{case['topology']}`",
        f"`{case['model']}` `{case['preset']}`, {case['parameters'] / 1e6:,.0f} M",
        case["mesh"],
    ]
    if case["refused"]:
        return [*cells, f"**does not fit**: {case['refused']}", "", "", ""]
    verdict = "" if case["fits"] else ": **does not fit**"
    return [
        *cells,
        f"{case['used_gib']:.1f} of {case['chip_gib']:g}{verdict}",
        f"{case['flops'] / 1e12:.1f}",
        f"{100 * case['muon_flops'] / case['flops']:.1f} %",
        f"{sum(case['sent_mb'].values()) / 1e3:.1f}",
    ]


def main(arguments: list[str] | None = None) -> None:
    """Compiles the cases one after the other, and writes the results."""
    parser = report.parser("tpu_train_step", "The cost of a train step on TPU slices.")
    parser.add_argument("--case", choices=CASES, nargs="*", help="compile only these")
    options = parser.parse_args(arguments)
    if not tpu.LIBTPU:
        parser.error(tpu.INSTALL)
    path = options.out / "tpu_train_step.json"
    results = aot.head("tpu_train_step") | {"cases": {}}
    if options.case and path.exists():  # the other cases are kept
        results["cases"] = json.loads(path.read_text())["cases"]
    for name in options.case or CASES:
        results["cases"][name] = report.rounded(measure(CASES[name]))
        report.write_json(path, results)
    print(table(results))


if __name__ == "__main__":
    main()
