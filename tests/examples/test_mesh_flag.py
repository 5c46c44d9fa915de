"""The flag `--mesh`: its values, its errors, and the mesh that it makes."""

import pathlib
import re
import subprocess

import pytest

from examples.language_model import config
from examples.language_model.config import BadInput
from examples.language_model.training import mesh
from tests.support.program_command import COMMAND, environment
from tests.support.tiny_run import TEXT
from tests.support.training_meshes import EIGHT, EXPERT


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data=8", {"data": 8}),
        ("data=2,fsdp=-1", {"data": 2, "fsdp": -1}),
        ("expert=2,tensor=1,data=2,fsdp=2", {"expert": 2, "tensor": 1, "data": 2, "fsdp": 2}),
    ],
)
def test_mesh_flag_is_parsed(text, sizes):
    assert config.parse(["--mesh", text]).mesh == sizes


BAD_MESHES = ["", "8", "data", "data=", "data=0", "data=-2", "data=1.5", "rows=2", "data=2,", "=2"]


@pytest.mark.parametrize("text", [*BAD_MESHES, "data=2,data=4", "data=2;fsdp=2", " data=2"])
def test_invalid_mesh_flag_is_one_line(capsys, text):
    with pytest.raises(SystemExit) as leave:
        config.parse([f"--mesh={text}"])
    assert leave.value.code == 2
    assert capsys.readouterr().err == (
        f"language_model: argument --mesh: got {text!r}, expected axes among data, fsdp, tensor,"
        " expert, each once with its size or -1 for all remaining devices, such as"
        " data=2,fsdp=-1; --help lists every flag\n"
    )


def test_two_sizes_of_minus_one_are_invalid(capsys):
    with pytest.raises(SystemExit):
        config.parse(["--mesh=data=-1,fsdp=-1"])
    assert "got 'data=-1,fsdp=-1', expected -1 for one axis at most" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        (None, (1, 8, 1, 1)),
        ({"tensor": 8}, (1, 1, 8, 1)),
        ({"tensor": 2, "data": -1}, (4, 1, 2, 1)),
        ({"expert": 2, "fsdp": 4, "data": -1}, (1, 4, 1, 2)),
    ],
)
def test_mesh_has_all_four_axes_and_all_devices(sizes, shape):
    made = mesh.make_mesh(sizes)
    assert made.axis_names == ("data", "fsdp", "tensor", "expert")
    assert made.devices.shape == shape


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 3, "fsdp": -1}, {"data": 16}])
def test_mesh_that_does_not_match_the_devices_raises(sizes):
    got = ",".join(f"{name}={size}" for name, size in sizes.items())
    with pytest.raises(BadInput) as error:
        mesh.make_mesh(sizes)
    assert str(error.value) == (
        f"argument --mesh: got {got}, but there are 8 devices; expected sizes whose product is 8,"
        " or -1 for one of them"
    )


def test_commands_of_the_page_parse():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "training_program.md").read_text()
    commands = re.findall(
        r"python -m examples\.language_model (.*--simulate-devices.*)$", page, re.M
    )
    parsed = [config.parse(command.split()) for command in commands]
    assert [one.mesh for one in parsed] == [None, EIGHT, EXPERT]


def program(folder, *flags):
    """The whole program at a tiny size, on eight simulated devices."""
    (folder / "text").write_bytes(TEXT)
    sizes = "--preset tiny --data text --batch-size 8 --seq-len 16 --steps 2 --out run".split()
    return subprocess.run(
        [*COMMAND, "--simulate-devices", "8", *sizes, *flags],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--mesh", "data=3"], "argument --mesh: got data=3, but there are 8 devices; "),
        (["--distributed"], "argument --distributed: coordinator_address should be defined.; "),
    ],
    ids=["mesh", "no cluster"],
)
def test_missing_devices_are_an_error_without_a_folder(tmp_path, flags, line):
    ended = program(tmp_path, *flags)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"language_model: {line}")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
def test_program_trains_on_simulated_devices_and_prints_the_mesh(tmp_path):
    ended = program(tmp_path, "--mesh", "fsdp=2,tensor=-1", "--no-progress")
    assert ended.returncode == 0, ended.stderr
    laid_out = "mesh fsdp=2, tensor=4\nkv_heads: size 2 is not divisible by tensor=4; replicated"
    assert laid_out in ended.stdout
    assert (tmp_path / "run" / "summary.json").exists()
