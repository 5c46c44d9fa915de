"""Each bad flag or file exits with code 2 and one line, without JAX, and creates no file."""

import os
import pathlib
import socket
import subprocess

import pytest

from examples.language_model import config
from tests.support.program_command import COMMAND, environment

TEXT = "some text that can be trained on\n" * 100


def run(arguments, folder):
    """Runs the program where an import of JAX fails, with a time limit."""
    poison = folder.parent / f"{folder.name}-poison"
    poison.mkdir(exist_ok=True)
    (poison / "jax.py").write_text("raise ImportError('bad input imports no JAX')\n")
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=folder,
        env=environment(poison),
        capture_output=True,
        text=True,
        timeout=60,
    )


def tree(folder):
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def assert_bad_input(arguments, folder, *fragments):
    before = tree(folder)
    result = run(arguments, folder)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.endswith("\n")
    for fragment in fragments:
        assert fragment in result.stderr
    assert tree(folder) == before


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def missing(folder):
    return folder / "absent.txt"


def broken_link(folder):
    (folder / "link").symlink_to("nowhere")
    return folder / "link"


def loop_of_links(folder):
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    return folder / "a"


def file_as_folder(folder):
    (folder / "file").write_text(TEXT)
    return folder / "file" / "inside"


@pytest.mark.parametrize("make", [missing, broken_link, loop_of_links, file_as_folder])
def test_missing(tmp_path, make):
    path = make(tmp_path)
    assert_bad_input(["--data", path], tmp_path, f"--data {path}: not found", "pass a text file")


@pytest.mark.parametrize("size", [0, 1, 33])
def test_too_short(tmp_path, size):
    path = tmp_path / "short.txt"
    path.write_text(TEXT[:size])
    arguments = ["--data", path, "--seq-len", "16"]
    assert_bad_input(
        arguments, tmp_path, f"{path}: got {size} bytes, expected at least 34", "pass more text"
    )


def test_too_short_for_the_default_length_names_it(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("a")
    assert_bad_input(["--data", path], tmp_path, "at least 258", "--seq-len below 128")


def fifo(folder):
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def device(folder):
    return pathlib.Path("/dev/zero")


def unix_socket(folder):
    with socket.socket(socket.AF_UNIX) as server:
        here = pathlib.Path.cwd()
        os.chdir(folder)  # the path of a socket has at most 108 bytes
        try:
            server.bind("socket")
        finally:
            os.chdir(here)
    return folder / "socket"


@pytest.mark.parametrize("make", [fifo, device, unix_socket])
def test_not_regular(tmp_path, make):
    path = make(tmp_path)
    assert_bad_input(["--data", path], tmp_path, f"--data {path}: not a regular file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything; see test_data")
def test_unreadable(text, tmp_path):
    text.chmod(0)
    assert_bad_input(["--data", text], tmp_path, f"--data {text}: cannot be read", "permissions")


@pytest.mark.parametrize(
    ("content", "byte"),
    [(b"ab\0" + TEXT.encode(), "byte 2 is 0x00"), (TEXT.encode() + b"\xff", "byte 3300 is 0xff")],
    ids=["nul", "not_utf8"],
)
def test_not_text(tmp_path, content, byte):
    path = tmp_path / "binary"
    path.write_bytes(content)
    assert_bad_input(["--data", path], tmp_path, f"--data {path}: not text, {byte}", "pass UTF-8")


@pytest.mark.parametrize("content", [None, b"a\0b"], ids=["empty", "binary"])
def test_folder(tmp_path, content):
    folder = tmp_path / "folder"
    folder.mkdir()
    if content is not None:
        (folder / "file").write_bytes(content)
    assert_bad_input(["--data", folder], tmp_path, f"--data {folder}: no text file in this folder")


INTEGERS = ("--steps", "--batch-size", "--seq-len", "--accumulate", "--checkpoint-every")


RATES = ("--learning-rate", "--threshold")
BAD_VALUES = [
    *[(flag, "0", "an integer from 1 to 2147483647") for flag in INTEGERS],
    *[(flag, "nan", "a finite number above 0") for flag in RATES],
    ("--seed", "-1", "an integer from 0 to 4294967295"),
]


@pytest.mark.parametrize(("flag", "value", "expected"), BAD_VALUES)
def test_numbers(tmp_path, flag, value, expected):
    line = f"argument {flag}: got {value!r}, expected {expected}"
    assert_bad_input([f"{flag}={value}"], tmp_path, line)


MORE_BAD_VALUES = [
    *[(f, v) for f in INTEGERS for v in ("-3", "2.5", "many", "", "1e3", "nan", "99999999999")],
    *[(f, v) for f in RATES for v in ("inf", "-inf", "0", "-0.1", "fast", "", "-nan")],
    *[("--seed", v) for v in ("4294967296", "1.0", "", "nan")],
]


@pytest.mark.parametrize(("flag", "value"), MORE_BAD_VALUES)
def test_more_numbers(capsys, flag, value):
    with pytest.raises(SystemExit) as leave:
        config.parse([f"{flag}={value}"])
    assert leave.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"argument {flag}: got {value!r}, expected " in line


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_smallest_and_largest_seed_are_valid(seed):
    assert config.parse(["--seed", str(seed)]).seed == seed


def test_micro_batches_must_divide_the_batch(tmp_path):
    arguments = ["--batch-size", "8", "--accumulate", "3"]
    line = "argument --accumulate: got 3, expected a divisor of --batch-size 8"
    assert_bad_input(arguments, tmp_path, line)


def test_adamw_has_no_matrices_per_head(tmp_path):
    line = "argument --per-head: got --optimizer adamw, expected muonclip or muon"
    assert_bad_input(["--per-head", "--optimizer", "adamw"], tmp_path, line)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--model", "rnn"], ["--model", "rnn", "gqa"]),
        (["--optimizer", "sgd"], ["--optimizer", "sgd", "muonclip", "muon", "adamw"]),
        (["--speed", "3"], ["--speed", "--help"]),
        (["--step", "3"], ["--step", "--help"]),
        (["stray"], ["stray", "--help"]),
        (["--steps"], ["--steps", "expected one argument"]),
        (["--stray\nline"], ["--stray line"]),
    ],
    ids=["model", "optimizer", "flag", "abbreviation", "argument", "no_value", "two_lines"],
)
def test_choices(tmp_path, arguments, fragments):
    assert_bad_input(arguments, tmp_path, *fragments)


def out_is_a_file(folder):
    (folder / "file").write_text("kept")
    return folder / "file"


def out_below_a_file(folder):
    return out_is_a_file(folder) / "run"


def out_with_a_name_too_long(folder):
    return folder / "made" / "and_removed" / ("x" * 300)


def out_is_a_broken_link(folder):
    return broken_link(folder)


@pytest.mark.parametrize(
    "make", [out_is_a_file, out_below_a_file, out_with_a_name_too_long, out_is_a_broken_link]
)
@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["new", "resume"])
def test_out(text, tmp_path, make, resume):
    path = make(tmp_path)
    arguments = ["--data", text, "--out", path, *resume]
    assert_bad_input(arguments, tmp_path, f"--out {path}: cannot be created", "pass a folder")


def test_empty_out(text, tmp_path):
    assert_bad_input(["--data", text, "--out", ""], tmp_path, "argument --out: got an empty path")


def test_bad_data_makes_no_run_folder(tmp_path):
    arguments = ["--data", "absent.txt", "--out", "run"]
    assert_bad_input(arguments, tmp_path, "--data absent.txt: not found")


@pytest.mark.parametrize("file", ["run.json", "metrics.jsonl", "summary.json", "checkpoints"])
def test_out_that_holds_a_run(text, tmp_path, file):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_text("{}")
    arguments = ["--data", text, "--out", "run"]
    assert_bad_input(arguments, tmp_path, "--out run: already holds a run", "--resume")


@pytest.mark.parametrize("content", [None, "", "[]", "{"], ids=["absent", "empty", "list", "torn"])
def test_resume_without_readable_settings(text, tmp_path, content):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    if content is not None:
        (tmp_path / "run" / "run.json").write_text(content)
    arguments = ["--data", text, "--out", "run", "--resume"]
    assert_bad_input(arguments, tmp_path, "run.json: not readable", "another --out")


def test_help_is_not_an_error(tmp_path):
    result = run(["--help"], tmp_path)
    assert result.returncode == 0
    assert result.stderr == ""
    for flag in (*INTEGERS, "--model", "--optimizer", "--learning-rate", "--threshold", "--seed"):
        assert flag in result.stdout
    for flag in ("--data", "--out", "--resume", "--no-progress"):
        assert flag in result.stdout
