"""`--aot-topology` prints the cost of a step or an error with the fix, and writes no file."""

import importlib.util
import subprocess
import sys

import jax
import pytest

from benchmarks import gpu
from benchmarks.compiled import Cost
from benchmarks.roofline import Roofline
from examples.language_model import program
from examples.language_model.config import BadInput, Config
from examples.language_model.measurement import ahead, cost_table
from examples.language_model.training import loop, mesh
from tests.support.program_command import MODULE, environment

LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not LIBTPU, reason="needs libtpu: pip install '.[tpu]'")


def run(folder, *arguments):
    """Starts the program in a process of its own: libtpu must be loaded before JAX is used."""
    return subprocess.run(
        [sys.executable, *MODULE, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_missing_libtpu_is_named_with_its_pip_command(monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    hide = lambda name: None if name == "libtpu" else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        program.main(["--aot-topology", "v5p:2x2x1"])
    assert error.value.code == 2
    assert capsys.readouterr().err == (
        "language_model: --aot-topology: libtpu is not installed; run pip install '.[tpu]'\n"
    )
    assert not list(tmp_path.iterdir())


def test_missing_cuda_plugin_is_named_with_its_pip_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "PLUGIN", False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        program.main(["--aot-topology", "h100:8x8"])
    assert error.value.code == 2
    assert capsys.readouterr().err == (
        "language_model: --aot-topology: the CUDA plugin of JAX is not installed;"
        " run pip install '.[cuda]'\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("a100:8x8", "expected a TPU slice such as v5p:2x2x1, or one of h100, h200, b200 with"),
        ("h100:64", "expected the number of hosts and of the GPUs of each, such as h100:8x8"),
    ],
)
def test_unknown_gpu_or_size_is_one_line(capsys, topology, message):
    with pytest.raises(SystemExit):
        program.main(["--aot-topology", topology])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"language_model: --aot-topology {topology}: {message}")


@pytest.mark.skipif(not gpu.PLUGIN, reason=gpu.INSTALL)
@pytest.mark.nightly
@pytest.mark.parametrize("kind", sorted(gpu.GPUS))
def test_step_is_compiled_for_gpus_that_are_not_attached(tmp_path, kind):
    done = run(tmp_path, "--aot-topology", f"{kind}:2x2", "--dtype", "bfloat16")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"{kind}:2x2: 4 GPUs, mesh fsdp=4"
    gibibytes = round(gpu.GPUS[kind].memory_bytes / 2**30)
    assert any(line.endswith(f"of the {gibibytes} GiB of a GPU: fits") for line in lines)
    rows = [line.split("  ")[1:] for line in lines if line.startswith("  ")]
    names = [next(cell for cell in row if cell) for row in rows]
    assert {"matrix products", "all-to-all", "roofline", "products", "between hosts"} <= {*names}
    assert "within hosts" not in names  # fsdp spans both hosts
    assert "mesh fsdp=4; per device and step" in done.stdout
    assert not list(tmp_path.iterdir())


@needs_libtpu
@pytest.mark.nightly
@pytest.mark.parametrize("model", ["gqa", "mla", "moe"])
def test_step_is_compiled_for_devices_that_are_not_attached(tmp_path, model):
    done = run(tmp_path, "--aot-topology", "v5p:2x2x1", "--model", model)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "v5p:2x2x1: 4 chips, mesh fsdp=4"
    assert lines[1].startswith(f"{model} small, ")
    assert any(line.endswith("of the 95 GiB of a chip: fits") for line in lines)
    assert "mesh fsdp=4; per device and step" in done.stdout
    for name in ("arguments", "temporary memory", "matrix products", "all-to-all"):
        assert any(line.split("  ")[1].startswith(name) for line in lines[1:] if line[:2] == "  ")
    assert not list(tmp_path.iterdir())


@needs_libtpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["v9z:2x2"], "--aot-topology v9z:2x2: not supported by libtpu"),
        (
            ["v5p:2x2x1", "--batch-size", "6"],
            "--batch-size: got 6 with 1 micro-batches on 4 devices, expected a multiple of 4",
        ),
        (
            ["v5p:4x4x4", "--mesh", "fsdp=8,expert=8"],
            "argument --mesh: got fsdp=8,expert=8, which does not fit the topology of these chips;"
            " each size must be a product of sides of their torus",
        ),
    ],
)
def test_invalid_topology_batch_or_mesh_is_one_line(tmp_path, arguments, message):
    done = run(tmp_path, "--aot-topology", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line


class Program:
    """Stands for a lowered step that does not compile."""

    def __init__(self, text):
        self.text = text

    def compile(self, compiler_options):
        assert compiler_options is None  # for CPU
        raise jax.errors.JaxRuntimeError(self.text)


def test_step_that_does_not_fit_shows_the_reason_of_the_compiler():
    """The first line of libtpu 0.0.42.1 for a product that was too large."""
    reason = "Ran out of memory on HBM, the total memory required exceeds available HBM (95.74G)."
    lowered = Program(f"RESOURCE_EXHAUSTED: {reason}\nmore")
    lines = cost_table.compile_and_format(lowered, mesh.make_mesh(None))
    assert lines == [f"  does not fit; use more devices, or a larger --accumulate: {reason}"]


def test_other_errors_of_the_compiler_are_raised():
    with pytest.raises(jax.errors.JaxRuntimeError, match="UNIMPLEMENTED"):
        cost_table.compile_and_format(Program("UNIMPLEMENTED: this"), mesh.make_mesh(None))


@pytest.mark.parametrize(
    ("model", "devices", "expert"), [("gqa", 8, 1), ("moe", 8, 2), ("moe", 6, 2), ("moe", 4, 1)]
)
def test_expert_axis_is_smaller_than_the_fsdp_axis(model, devices, expert):
    made = ahead.default_mesh(loop.make_model(Config(model=model)), jax.devices()[:devices])
    assert dict(made.shape) == {"data": 1, "fsdp": devices // expert, "tensor": 1, "expert": expert}


def test_expert_axis_that_the_torus_lacks_is_not_used(monkeypatch):
    def make(sizes, devices):
        if sizes is not None:
            raise BadInput("no such side")
        return "all on fsdp"

    monkeypatch.setattr(ahead, "make_mesh", make)
    assert ahead.default_mesh(loop.make_model(Config(model="moe")), range(64)) == "all on fsdp"


@pytest.mark.parametrize(
    ("batch", "accumulate", "taken", "notes"),
    [
        (8, 1, 8, []),
        (32, 2, 32, []),
        (8, 4, 32, ["--batch-size: 32 instead of 8, 1 per device and micro-batch"]),
    ],
)
def test_only_the_default_batch_grows_with_the_devices(batch, accumulate, taken, notes):
    config = Config(batch_size=batch, accumulate=accumulate)
    fitted, printed = ahead.fit_batch(config, mesh.make_mesh(None))
    assert (fitted.batch_size, printed) == (taken, notes)


def test_batch_size_that_was_passed_must_be_divisible():
    with pytest.raises(BadInput, match=r"on 8 devices, expected a multiple of 8"):
        ahead.fit_batch(Config(batch_size=12), mesh.make_mesh(None))


COST = Cost(2.5e9, {"all-to-all": 3}, {"all-to-all": 1.5e6}, 0.0, 0.002, 0, 10**9, 2 * 10**9)


def test_table_lists_memory_flops_and_collectives():
    assert cost_table.cost_table(COST, 16) == [
        "  arguments           1,000.0 MB",
        "  temporary memory    2,000.0 MB",
        "  total memory        2.8 of the 16 GiB of a chip: fits",
        "  matrix products     2.5e+09 FLOPs",
        "  compiler's estimate 2 ms, without communication",
        "  all-to-all          3 with 1.50 MB",
    ]


def test_table_shows_that_a_step_does_not_fit():
    assert (
        "  total memory        2.8 of the 2 GiB of a chip: does not fit"
        in cost_table.cost_table(COST, 2)
    )


def test_table_has_no_total_for_an_unknown_device():
    assert not any("total" in line for line in cost_table.cost_table(COST, None))


def test_roofline_lists_rates_and_links():
    least = Roofline({"bf16": 989e9, "tf32": 494e9}, 45e6, 5e6, 2e-3, 1e-4, 1e-4)
    assert cost_table.roofline_table(least, gpu.GPUS["h100"]) == [
        "  roofline            at the rates of the data sheet; nothing was executed",
        "    products          2 ms at bf16 989, tf32 494 TFLOP/s",
        "    within hosts      0.1 ms for 45.00 MB at 450 GB/s of a GPU",
        "    between hosts     0.1 ms for 5.00 MB at 50 GB/s of a GPU",
    ]


def test_roofline_of_one_host_has_no_network():
    least = Roofline({"bf16": 989e9}, 45e6, 0.0, 1e-3, 1e-4, 0.0)
    lines = cost_table.roofline_table(least, gpu.GPUS["h100"])
    assert not any("between hosts" in line for line in lines)
