"""What a step would cost on a TPU slice: refused with a cure, or printed; nothing is written."""

import importlib.util
import pathlib
import subprocess
import sys

import jax
import pytest
import train_lm
from lm import ahead, training
from lm.config import BadInput, Config

from benchmarks.compiled import Cost

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not LIBTPU, reason="needs libtpu: pip install '.[tpu]'")


def run(folder, *arguments):
    """Starts the program in a process of its own, as libtpu wants to be there before JAX."""
    command = [sys.executable, EXAMPLES / "train_lm.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)


def test_without_libtpu_the_cure_is_named(monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    hide = lambda name: None if name == "libtpu" else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        train_lm.main(["--aot-topology", "v5p:2x2x1"])
    assert error.value.code == 2
    assert capsys.readouterr().err == (
        "train_lm.py: --aot-topology: libtpu is not installed; pip install '.[tpu]' has it\n"
    )
    assert not list(tmp_path.iterdir())


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("model", ["gqa", "mla", "moe"])
def test_a_step_is_compiled_for_chips_that_are_not_there(tmp_path, model):
    done = run(tmp_path, "--aot-topology", "v5p:2x2x1", "--model", model)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "v5p:2x2x1: 4 chips as fsdp=4"
    assert lines[1].startswith(f"{model} small, ")
    assert any(line.endswith("of the 95 GiB of a chip: fits") for line in lines)
    assert "mesh fsdp=4; per device and step" in done.stdout
    for name in ("arguments", "temporary memory", "matrix products", "all-to-all"):
        assert any(line.split("  ")[1].startswith(name) for line in lines[1:] if line[:2] == "  ")
    assert not list(tmp_path.iterdir())


@needs_libtpu
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["v9z:2x2"], "--aot-topology v9z:2x2: not known to libtpu"),
        (
            ["v5p:2x2x1", "--batch-size", "6"],
            "--batch-size 6 in 1 micro-batches does not divide among 4 chips; expected a multiple"
            " of 4",
        ),
        (
            ["v5p:4x4x4", "--mesh", "fsdp=8,expert=8"],
            "argument --mesh: got fsdp=8,expert=8, which cannot be laid on these chips; each size"
            " must be a product of sides of their torus",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_one_line(tmp_path, arguments, said):
    done = run(tmp_path, "--aot-topology", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert said in line


class Program:
    """Stands for a lowered step that the compiler refuses."""

    def __init__(self, text):
        self.text = text

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.text)


class Chip:
    """Stands for a device."""

    device_kind = "TPU v5"


def test_a_step_that_does_not_fit_is_told_by_the_words_of_the_compiler():
    """The first line of what libtpu 0.0.42.1 said to a product that was too large."""
    said = "Ran out of memory on HBM, the total memory required exceeds available HBM (95.74G)."
    lines = ahead._compiled(Program(f"RESOURCE_EXHAUSTED: {said}\nmore"), Chip)
    assert lines == [f"  does not fit; give more chips, or more --accumulate: {said}"]


def test_other_errors_of_the_compiler_are_not_hidden():
    with pytest.raises(jax.errors.JaxRuntimeError, match="UNIMPLEMENTED"):
        ahead._compiled(Program("UNIMPLEMENTED: this"), Chip)


@pytest.mark.parametrize(
    ("model", "chips", "expert"), [("gqa", 8, 1), ("moe", 8, 2), ("moe", 6, 2), ("moe", 4, 1)]
)
def test_experts_get_an_axis_of_their_own_below_that_of_the_weights(model, chips, expert):
    made = ahead.default_mesh(training.make_model(Config(model=model)), jax.devices()[:chips])
    assert dict(made.shape) == {"data": 1, "fsdp": chips // expert, "tensor": 1, "expert": expert}


def test_experts_get_an_axis_that_the_chips_are_wired_for(monkeypatch):
    def make(sizes, chips):
        if sizes is not None:
            raise BadInput("no such side")
        return "all on fsdp"

    monkeypatch.setattr(ahead.meshes, "make", make)
    assert ahead.default_mesh(training.make_model(Config(model="moe")), range(64)) == "all on fsdp"


@pytest.mark.parametrize(
    ("batch", "accumulate", "taken", "notes"),
    [
        (8, 1, 8, []),
        (32, 2, 32, []),
        (8, 4, 32, ["--batch-size: 32 instead of 8, 1 for each chip and micro-batch"]),
    ],
)
def test_only_the_default_batch_grows_with_the_chips(batch, accumulate, taken, notes):
    config = Config(batch_size=batch, accumulate=accumulate)
    divided, told = ahead._divided(config, ahead.meshes.make(None))
    assert (divided.batch_size, told) == (taken, notes)


def test_a_batch_that_was_asked_for_is_refused_if_it_does_not_divide():
    with pytest.raises(BadInput, match=r"among 8 chips; expected a multiple of 8"):
        ahead._divided(Config(batch_size=12), ahead.meshes.make(None))


COST = Cost(2.5e9, {"all-to-all": 3}, {"all-to-all": 1.5e6}, 0.0, 0.002, 0, 10**9, 2 * 10**9)


def test_the_table_has_what_a_chip_does():
    assert ahead._table(COST, 16) == [
        "  arguments           1,000.0 MB",
        "  temporary memory    2,000.0 MB",
        "  both                2.8 of the 16 GiB of a chip: fits",
        "  matrix products     2.5e+09 FLOPs",
        "  compiler's estimate 2 ms, without links",
        "  all-to-all          3 of 1.50 MB",
    ]


def test_the_table_says_what_does_not_fit():
    assert "  both                2.8 of the 2 GiB of a chip: does not fit" in ahead._table(COST, 2)


def test_the_table_is_silent_about_chips_that_it_does_not_know():
    assert not any("both" in line for line in ahead._table(COST, None))
