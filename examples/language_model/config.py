"""The settings of a run: one frozen data class, and the command-line flags made from it."""

import argparse
import math
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from typing import NoReturn

from examples.language_model.flag_types import LARGEST_SEED, cluster, integer, mesh, path, positive
from examples.language_model.models.presets import DEFAULT, PRESETS

NAME = "language_model"  # before every error and warning
MODULE = "examples.language_model"  # after `python -m`

MODELS = tuple(PRESETS)
OPTIMIZERS = ("muonclip", "muon", "adamw")
SCHEDULES = ("linear", "cosine")

# The best of the values tried at the other defaults. Validation loss in nats per byte, seed 0:
# muonclip 0.007: 1.490, 0.01: 1.485 (threshold 20); adamw 0.003: 1.947, 0.004: 1.784, 0.006: 1.818.
LEARNING_RATES = {"muonclip": 0.01, "muon": 0.01, "adamw": 0.004}

DTYPES = ("float32", "bfloat16")


class BadInput(ValueError):
    """A flag or a file that the user has to change; the message names the fault and the fix."""


class Failed(RuntimeError):
    """The run cannot continue; the message names the step, the reason and the fix."""


def _presets() -> str:
    return "; ".join(f"{', '.join(names)} for {model}" for model, names in PRESETS.items())


def _rates() -> str:
    return ", ".join(f"{rate} for {name}" for name, rate in LEARNING_RATES.items())


@dataclass(frozen=True)
class Config:
    """Settings of one run; each field is the flag of the same name.

    The defaults were chosen for the lowest validation loss that 2 CPU cores reach in about 85 s of
    processor time. For the same number of bytes, many small batches beat few large ones: 200 steps
    of 16 sequences of 256 bytes gave 1.76 nats per byte, 400 of 8 gave 1.61, and 600 of 8
    sequences of 128 bytes, with three quarters of the bytes, 1.58. An embedding with entries of
    unit variance gave 1.51. The threshold is the highest value tried that clips in most steps: 20
    clips in 179 of 600 steps (1.485), 15 in 361 (1.479). Without the clip (muon) the largest logit
    is 42 and the loss 1.500. All of this is for gqa; mla with the same settings, not tuned, reaches
    1.524 and clips in 379 steps.

    Attributes:
      model: Architecture, one of `MODELS`.
      preset: Name of its sizes in `presets.PRESETS`.
      optimizer: One of `OPTIMIZERS`; all three record the max logits, only muonclip clips.
      per_head: Whether Muon orthogonalizes each head of the queries, keys and values alone. With
        muonclip and the cosine schedule it is the recipe of Kimi K3.
      schedule: One of `SCHEDULES`, see `training.optimizer`.
      steps: Optimizer steps. The learning rate is 0 after the last one.
      batch_size: Sequences for each optimizer step, over all micro-batches.
      seq_len: Bytes in a sequence.
      learning_rate: Peak of the schedule; None uses the default of the optimizer.
      threshold: Largest attention logit that QK-clip allows, before softmax.
      dtype: Of the computation; parameters, moments and the loss are always float32.
      seed: Of the initial parameters and of the batches.
      data: Text file, or folder of text files; None uses the source of Python's standard library.
      out: Run folder; None uses the next free `runs/<model>-<optimizer>`.
      checkpoint_every: Steps between checkpoints.
      resume: Whether to continue the run in `out`.
      no_progress: Whether to hide the progress bar, or without a terminal the progress lines.
      quiet: Whether to print errors, warnings and the last line only.
      profile: Steps to trace for TensorBoard's profiler; 0 traces none.
      accumulate: Micro-batches for each optimizer step; 1 does not split the batch.
      mesh: Sizes of the mesh axes, 1 where not named; None puts all devices on fsdp.
      simulate_devices: Number of simulated CPU devices; None uses the real devices.
      distributed: Address of process 0, number of processes, and rank of this one, each None where
        JAX detects the cluster; None is a run of one process.
      aot_topology: TPU slice or GPU cluster for which to compile a step and print its cost, instead
        of training; needs libtpu or JAX's CUDA plugin, but no TPU and no GPU.
      analyze: Whether to print the analysis of the model (`mc.analyze`) instead of training.
      given: Names of the flags that were passed; not a flag itself.
    """

    model: str = field(default="gqa", metadata={"help": "architecture", "choices": MODELS})
    preset: str = field(default=DEFAULT, metadata={"help": f"sizes of the model: {_presets()}"})
    optimizer: str = field(
        default="muonclip",
        metadata={"help": "only muonclip clips, all three record", "choices": OPTIMIZERS},
    )
    per_head: bool = field(
        default=False,
        metadata={"help": "each head of queries, keys and values is a matrix of its own (Kimi K3)"},
    )
    schedule: str = field(
        default="linear",
        metadata={
            "help": "decay of the learning rate; cosine is Kimi K3's, after a warmup of 1%%",
            "choices": SCHEDULES,
        },
    )
    steps: int = field(
        default=600,
        metadata={
            "help": "optimizer steps; the learning rate decays to 0 after the last",
            "type": integer(1),
        },
    )
    batch_size: int = field(
        default=8, metadata={"help": "sequences for each optimizer step", "type": integer(1)}
    )
    seq_len: int = field(default=128, metadata={"help": "bytes in a sequence", "type": integer(1)})
    learning_rate: float | None = field(
        default=None,
        metadata={"help": f"peak of the schedule (default: {_rates()})", "type": positive},
    )
    threshold: float = field(
        default=15.0,
        metadata={
            "help": "largest attention logit that QK-clip allows; 1e30 never clips",
            "type": positive,
        },
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "of the computation; parameters stay float32", "choices": DTYPES},
    )
    seed: int = field(
        default=0,
        metadata={"help": "of the parameters and the batches", "type": integer(0, LARGEST_SEED)},
    )
    data: pathlib.Path | None = field(
        default=None,
        metadata={
            "help": "text file, or folder of them (default: Python's standard library)",
            "type": path,
        },
    )
    out: pathlib.Path | None = field(
        default=None,
        metadata={
            "help": "run folder (default: runs/<model>-<optimizer>, or the next free -2, -3)",
            "type": path,
        },
    )
    checkpoint_every: int = field(
        default=100, metadata={"help": "steps between checkpoints", "type": integer(1)}
    )
    resume: bool = field(
        default=False,
        metadata={
            "help": "continue the run in --out, or in the last default folder; flags that are not"
            " passed keep the values of that run"
        },
    )
    no_progress: bool = field(
        default=False,
        metadata={"help": "hide the progress bar, or in a log the progress lines"},
    )
    quiet: bool = field(
        default=False, metadata={"help": "print errors, warnings and the last line only"}
    )
    profile: int = field(
        default=0,
        metadata={"help": "steps to trace for TensorBoard's profiler; 0: none", "type": integer(0)},
    )
    accumulate: int = field(
        default=1,
        metadata={
            "help": "micro-batches for each optimizer step; 1 does not split the batch",
            "type": integer(1),
        },
    )
    mesh: dict[str, int] | None = field(
        default=None,
        metadata={
            "help": "mesh axes, such as data=2,fsdp=4,tensor=2,expert=2; -1 for one axis is the"
            " number of remaining devices (default: fsdp=-1)",
            "type": mesh,
        },
    )
    simulate_devices: int | None = field(
        default=None,
        metadata={
            "help": "number of simulated CPU devices, to try a mesh",
            "type": integer(1, 1024),
        },
    )
    distributed: tuple[str | None, int | None, int | None] | None = field(
        default=None,
        metadata={
            "help": "run as one of several processes; JAX detects Cloud TPU, Slurm, Open MPI and"
            " Kubernetes, elsewhere pass HOST:PORT,PROCESSES,RANK",
            "nargs": "?",
            "const": (None, None, None),
            "type": cluster,
        },
    )
    aot_topology: str | None = field(
        default=None,
        metadata={
            "help": "compile a step for a TPU slice such as v5p:2x2x1, or for hosts x GPUs of each"
            " (h100, h200, b200) such as h100:8x8, print its cost and exit; needs libtpu or the"
            " CUDA plugin of JAX, but no TPU and no GPU"
        },
    )
    analyze: bool = field(
        default=False,
        metadata={
            "help": "print the role of each parameter and the attention that the program of the"
            " model shows, and exit"
        },
    )
    given: frozenset[str] = frozenset()

    @property
    def peak(self) -> float:
        """The learning rate at the end of the warmup."""
        return self.learning_rate or LEARNING_RATES[self.optimizer]

    @property
    def tau(self) -> float:
        """The threshold of QK-clip; infinity for optimizers that only record."""
        return self.threshold if self.optimizer == "muonclip" else math.inf


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; argparse prints its usage block before them."""

    def error(self, message: str) -> NoReturn:
        """Exits with code 2 and one line."""
        exit_with(BadInput(f"{message}; --help lists every flag"))


def exit_with(error: BadInput) -> NoReturn:
    """Exits with code 2 and the error as one line, even if a path or a flag has several lines."""
    line = " ".join(str(error).splitlines())
    print(f"{NAME}: {line}", file=sys.stderr)
    raise SystemExit(2)


def warn(text: str) -> None:
    """Prints a warning as one line on stderr."""
    line = " ".join(text.splitlines())
    print(f"{NAME}: warning: {line}", file=sys.stderr)


def _flags() -> list[Field]:
    return [setting for setting in fields(Config) if setting.name != "given"]


def parser() -> Parser:
    """Builds the command line: one flag for each field of `Config` except `given`."""
    result = Parser(
        prog=f"python -m {MODULE}",
        description="Trains a byte-level transformer and plots its loss and attention logits.",
        allow_abbrev=False,
    )
    for setting in _flags():
        options = dict(setting.metadata)
        if setting.default is False:
            options["action"] = "store_true"
        elif setting.default is not None:
            options["help"] += " (default: %(default)s)"
        flag = "--" + setting.name.replace("_", "-")
        result.add_argument(flag, default=setting.default, **options)
    return result


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Reads the settings from the command line.

    Args:
      arguments: Flags and values; None reads the arguments of the process.

    Returns:
      Settings that are valid on their own. Files are not read: with `--resume`,
      `opening.resumed` completes and checks the settings.

    Raises:
      SystemExit: with code 2 and one line on stderr, if a flag is unknown or a value invalid.
    """
    absent = object()
    values = argparse.Namespace(**{setting.name: absent for setting in _flags()})
    parser().parse_args(arguments, values)
    given = {name: value for name, value in vars(values).items() if value is not absent}
    config = Config(**given, given=frozenset(given))
    try:
        if not config.resume:
            check(config)
    except BadInput as error:
        exit_with(error)
    return config


def check(config: Config) -> None:
    """Raises `BadInput` if two settings contradict each other."""
    if config.preset not in PRESETS[config.model]:
        raise BadInput(
            f"argument --preset: got {config.preset!r}, expected one of"
            f" {', '.join(PRESETS[config.model])} for --model {config.model}"
        )
    if config.per_head and config.optimizer == "adamw":
        raise BadInput("argument --per-head: got --optimizer adamw, expected muonclip or muon")
    if config.batch_size % config.accumulate:
        raise BadInput(
            f"argument --accumulate: got {config.accumulate}, expected a divisor of"
            f" --batch-size {config.batch_size}: micro-batches have equal sizes"
        )
