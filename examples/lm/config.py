"""The settings of a run: one frozen data class, and the command-line flags made from it."""

import argparse
import math
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import NoReturn

from lm.presets import DEFAULT, PRESETS

MODELS = tuple(PRESETS)
OPTIMIZERS = ("muonclip", "muon", "adamw")

# Each the best of those tried at the other defaults. Validation loss in nats per byte, seed 0:
# muonclip 0.007: 1.490, 0.01: 1.485 (threshold 20); adamw 0.003: 1.947, 0.004: 1.784, 0.006: 1.818.
LEARNING_RATES = {"muonclip": 0.01, "muon": 0.01, "adamw": 0.004}

DTYPES = ("float32", "bfloat16")
MESH_AXES = ("data", "fsdp", "tensor", "expert")

LARGEST_INTEGER = 2**31 - 1  # optimizers count steps in int32
LARGEST_SEED = 2**32 - 1  # NumPy and JAX both take every seed up to here


class BadInput(ValueError):
    """A flag or a file that the user has to change; the text says what is wrong and the cure."""


class Failed(RuntimeError):
    """The run cannot go on; the text says at which step, why, and the cure."""


def integer(least: int, most: int = LARGEST_INTEGER) -> Callable[[str], int]:
    """Returns a parser of integers from `least` to `most`, for argparse."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected an integer from {least} to {most}"
            )
        return value

    return parse


def positive(text: str) -> float:
    """Parses a finite number above zero, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a finite number above 0")
    return value


def path(text: str) -> pathlib.Path:
    """Parses a path, for argparse; the empty text would silently mean the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("got an empty path, expected the name of a file or folder")
    return pathlib.Path(text)


def mesh(text: str) -> dict[str, int]:
    """Parses the sizes of mesh axes such as data=2,fsdp=-1, for argparse; -1 takes the rest."""
    pairs = [part.partition("=") for part in text.split(",")]
    sizes = {name: size for name, _, size in pairs}
    known = len(sizes) == len(pairs) and sizes.keys() <= set(MESH_AXES)
    if not (known and all(re.fullmatch("-1|[1-9][0-9]{0,8}", size) for size in sizes.values())):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected axes among {', '.join(MESH_AXES)}, each once with its size or"
            " -1 for all devices that are left, such as data=2,fsdp=-1"
        )
    if list(sizes.values()).count("-1") > 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected -1 for one axis at most")
    return {name: int(size) for name, size in sizes.items()}


def cluster(text: str) -> tuple[str, int, int]:
    """Parses HOST:PORT,PROCESSES,RANK, for argparse."""
    found = re.fullmatch(r"([^,]+:[0-9]+),([0-9]{1,6}),([0-9]{1,6})", text)
    if found and int(found[3]) < int(found[2]):
        return found[1], int(found[2]), int(found[3])
    raise argparse.ArgumentTypeError(
        f"got {text!r}, expected nothing, or HOST:PORT,PROCESSES,RANK of process 0, of all and of"
        " this one, which counts from 0"
    )


def _presets() -> str:
    return "; ".join(f"{', '.join(names)} for {model}" for model, names in PRESETS.items())


def _rates() -> str:
    return ", ".join(f"{rate} for {name}" for name, rate in LEARNING_RATES.items())


@dataclass(frozen=True)
class Config:
    """Settings of one run; each field is the flag of the same name.

    The defaults were chosen for the lowest validation loss that 2 CPU cores reach in about 85 s of
    processor time. At an equal number of bytes many small batches beat few large ones: 200 steps
    of 16 sequences of 256 bytes gave 1.76 nats per byte, 400 of 8 gave 1.61, and 600 of 8
    sequences of 128 bytes, three quarters of those bytes, 1.58. An embedding with unit rows gave
    1.51. The threshold is the highest of those tried that holds heads for most of the run: 20
    clips in 179 of 600 steps (1.485), 15 in 361 (1.479). Without the clip, that is with muon, the
    largest logit is 42 and the loss 1.500. All this is for gqa; mla, with the same settings and not
    tuned, reaches 1.524 and clips in 379 steps.

    Attributes:
      model: Architecture, one of `MODELS`.
      preset: Its sizes, by name; of `presets.PRESETS`.
      optimizer: One of `OPTIMIZERS`; all three record the largest logits, only muonclip clips.
      steps: Optimizer steps. The learning rate falls to zero at the last one.
      batch_size: Sequences for each optimizer step, over all micro-batches.
      seq_len: Bytes in a sequence.
      learning_rate: Peak of the schedule, per step; None takes the optimizer's own default.
      threshold: Largest attention logit that QK-clip allows, before softmax.
      dtype: To compute in; weights, their moments and the loss are float32 in any case.
      seed: Of the initial weights and of the order of the batches.
      data: Text file, or folder of text files; None takes Python's standard library.
      out: Run folder; None takes the next free `runs/<model>-<optimizer>`.
      checkpoint_every: Steps between checkpoints.
      resume: Whether to go on with the run in `out`.
      no_progress: Whether to hide the progress: a bar on a terminal, else a line now and then.
      quiet: Whether to print errors, warnings and the last line only.
      profile: Steps to trace for TensorBoard's profiler; 0 traces none.
      accumulate: Micro-batches for each optimizer step; 1 takes the batch in one piece.
      mesh: Sizes of the mesh axes, those not named being 1; None puts all devices on fsdp.
      simulate_devices: CPU devices to pretend that this process has; None takes the real ones.
      distributed: Host and port of process 0, processes, and rank of this one, each None where the
        cluster tells; None is a run of one process.
      aot_topology: TPU slice for which to compile a step and print what it costs, instead of
        training; needs libtpu, but no TPU.
      given: Names of the flags that were typed; no flag itself.
    """

    model: str = field(default="gqa", metadata={"help": "architecture", "choices": MODELS})
    preset: str = field(default=DEFAULT, metadata={"help": f"sizes of the model: {_presets()}"})
    optimizer: str = field(
        default="muonclip",
        metadata={"help": "only muonclip clips, all three record", "choices": OPTIMIZERS},
    )
    steps: int = field(
        default=600,
        metadata={"help": "optimizer steps; after the last the rate is 0", "type": integer(1)},
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
        metadata={"help": "to compute in; weights stay float32", "choices": DTYPES},
    )
    seed: int = field(
        default=0,
        metadata={"help": "of the weights and of the batches", "type": integer(0, LARGEST_SEED)},
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
            "help": "go on with the run in --out, or in the last default folder; flags that are not"
            " typed are those of that run"
        },
    )
    no_progress: bool = field(
        default=False,
        metadata={"help": "hide the bar, or in a log the lines, that say how far it is"},
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
            "help": "micro-batches for each optimizer step; 1 takes the batch in one piece",
            "type": integer(1),
        },
    )
    mesh: dict[str, int] | None = field(
        default=None,
        metadata={
            "help": "divide the work, such as data=2,fsdp=4,tensor=2,expert=2; -1 for one axis"
            " takes the devices that are left (default: fsdp=-1)",
            "type": mesh,
        },
    )
    simulate_devices: int | None = field(
        default=None,
        metadata={
            "help": "pretend to have so many devices on the CPU, to try a mesh",
            "type": integer(1, 1024),
        },
    )
    distributed: tuple[str | None, int | None, int | None] | None = field(
        default=None,
        metadata={
            "help": "one of several processes; Cloud TPU, Slurm, Open MPI and Kubernetes tell it"
            " the others, elsewhere give HOST:PORT,PROCESSES,RANK",
            "nargs": "?",
            "const": (None, None, None),
            "type": cluster,
        },
    )
    aot_topology: str | None = field(
        default=None,
        metadata={
            "help": "only print what a step costs on a TPU slice that need not be there, such as"
            " v5p:2x2x1; needs libtpu"
        },
    )
    given: frozenset[str] = frozenset()

    @property
    def peak(self) -> float:
        """The learning rate at the end of the warm-up."""
        return self.learning_rate or LEARNING_RATES[self.optimizer]

    @property
    def tau(self) -> float:
        """The threshold of the clip; infinity where it only records."""
        return self.threshold if self.optimizer == "muonclip" else math.inf


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; argparse puts its usage block before them."""

    def error(self, message: str) -> NoReturn:
        """Leaves with exit code 2 and one line."""
        refuse(BadInput(f"{message}; --help lists every flag"))


def refuse(error: BadInput) -> NoReturn:
    """Leaves with exit code 2 and the error as one line, whatever a path or a flag contains."""
    line = " ".join(str(error).splitlines())
    print(f"train_lm.py: {line}", file=sys.stderr)
    raise SystemExit(2)


def warn(text: str) -> None:
    """Says in one line on stderr what was not as it should be, though the program goes on."""
    line = " ".join(text.splitlines())
    print(f"train_lm.py: warning: {line}", file=sys.stderr)


def _flags() -> list[Field]:
    return [setting for setting in fields(Config) if setting.name != "given"]


def parser() -> Parser:
    """Builds the command line: one flag for each field of `Config` except `given`."""
    result = Parser(
        prog="train_lm.py",
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
      arguments: Flags and values; None takes those of the process.

    Returns:
      Settings that are valid on their own. Files are not read: with `--resume`,
      `rundir.resumed` completes and checks the settings.

    Raises:
      SystemExit: with code 2 and one line on stderr, if a flag is unknown or a value bad.
    """
    untyped = object()
    values = argparse.Namespace(**{setting.name: untyped for setting in _flags()})
    parser().parse_args(arguments, values)
    typed = {name: value for name, value in vars(values).items() if value is not untyped}
    config = Config(**typed, given=frozenset(typed))
    try:
        if not config.resume:
            check(config)
    except BadInput as error:
        refuse(error)
    return config


def check(config: Config) -> None:
    """Raises `BadInput` if two settings contradict each other."""
    if config.preset not in PRESETS[config.model]:
        raise BadInput(
            f"argument --preset: got {config.preset!r}, expected one of"
            f" {', '.join(PRESETS[config.model])} for --model {config.model}"
        )
    if config.batch_size % config.accumulate:
        raise BadInput(
            f"argument --accumulate: got {config.accumulate}, expected a divisor of"
            f" --batch-size {config.batch_size}: micro-batches have one size"
        )
