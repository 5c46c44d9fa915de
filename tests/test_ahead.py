"""What a step would cost on a TPU slice: refused with a cure, or printed; nothing is written."""

import importlib.util
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec as P

import train_lm
from lm import ahead
from lm.compiled_cost import Cost

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not LIBTPU, reason="needs libtpu: pip install '.[tpu]'")


def run(folder, *arguments):
    """Starts the program in a process of its own, as libtpu wants to be there before JAX."""
    command = [sys.executable, EXAMPLES / "train_lm.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)


def test_without_libtpu_the_cure_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
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
def test_a_step_is_compiled_for_chips_that_are_not_there(tmp_path):
    done = run(tmp_path, "--aot-topology", "v5p:2x2x1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "v5p:2x2x1: 4 chips, weights and batch divided among them"
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
    ],
)
def test_what_cannot_be_compiled_is_refused_in_one_line(tmp_path, arguments, said):
    done = run(tmp_path, "--aot-topology", *arguments)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("params/blocks/mlp/up/kernel", (8, 16, 48), P(None, None, "fsdp")),
        ("params/blocks/attn/out/kernel", (8, 3, 5, 48), P(None, None, None, "fsdp")),
        ("params/embed/embedding", (256, 16), P("fsdp", None)),
        ("params/blocks/mlp/up/kernel", (8, 3, 5), P(None, None, None)),
        ("params/final_norm/scale", (16,), P(None)),
        ("opt_state/count", (), P()),
    ],
)
def test_a_weight_is_divided_along_its_longest_side(path, shape, spec):
    mesh = Mesh(np.array(jax.devices()[:8]), ("fsdp",))
    keys = tuple(jax.tree_util.DictKey(name) for name in path.split("/"))
    placed = ahead._placed(keys, jax.ShapeDtypeStruct(shape, np.float32), mesh)
    assert placed.sharding is not None
    assert placed.sharding.spec == spec


def test_the_table_has_what_a_chip_does():
    cost = Cost(2.5e9, {"all-to-all": 3}, {"all-to-all": 1.5e6}, 0.0, 0.002, 0, 10**7, 2 * 10**6)
    assert ahead._table(cost) == [
        "  arguments           10.0 MB",
        "  temporary memory    2.0 MB",
        "  matrix products     2.5e+09 FLOPs",
        "  compiler's estimate 2 ms, without links",
        "  all-to-all          3 of 1.50 MB",
    ]
