"""Nothing runs what it reads, importing does nothing, and nothing leads out of a run folder."""

import ast
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from examples.language_model.run_folder.checkpoint import Checkpoints
from tests.support.strict import STRICT

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("muonclip_jax", "examples", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)

# Each executes the content of a file or an argument.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "pickle.load", "torch.load"}
ARGUMENTS = {"shell": True, "allow_pickle": True}


def faults(source):
    """Forbidden code in a source, each with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names]
            yield from (f"{node.lineno}: {n}" for n in names if n.split(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS | METHODS:
                yield f"{node.lineno}: {called}"
            for keyword in node.keywords:
                value = keyword.value
                known = isinstance(value, ast.Constant) and keyword.arg in ARGUMENTS
                if known and value.value == ARGUMENTS[str(keyword.arg)]:
                    yield f"{node.lineno}: {keyword.arg}={value.value}"


def test_nothing_executes_data():
    assert {str(path): found for path in SOURCES if (found := list(faults(path.read_text())))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "import json, shelve",
        "eval('1')",
        "exec(text)",
        "os.system('ls')",
        "yaml.load(file)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run('ls', shell=True)",
    ],
)
def test_the_scan_sees_it(source):
    assert len(list(faults(source))) == 1


@pytest.mark.parametrize("source", ["model.eval()", "np.load(path)", "re.compile('a')"])
def test_the_scan_passes_what_is_harmless(source):
    assert list(faults(source)) == []


def test_import_opens_no_socket_writes_no_file_and_changes_no_setting():
    code = """
import sys
import jax
before = dict(jax.config.values)
seen = []
def hook(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.fork")) or writes:
        seen.append((event, str(arguments)))
sys.addaudithook(hook)
import muonclip_jax as mc
mc.linen, mc.nnx
import jax._src.xla_bridge as bridge
assert not bridge._backends, "started a backend"
assert not seen, seen
assert before == jax.config.values
"""
    run = subprocess.run(
        [sys.executable, "-B", *STRICT, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["1e3", "-5", "+5", "5.", "\u0665", "5\n", " 5", "..", "0x5"])
def test_checkpoint_names_are_plain_integers(tmp_path, name):
    (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / name / "file").write_text("")
    assert Checkpoints(tmp_path).steps() == []


@pytest.mark.parametrize("target", ["../outside", "inside"], ids=["outside", "inside"])
def test_links_are_not_followed(tmp_path, target):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    linked = folder / target
    linked.mkdir()
    (linked / "file").write_text("kept")
    for name in ("5", "6.orbax-checkpoint-tmp"):
        (folder / name).symlink_to(target)
    checkpoints = Checkpoints(folder)
    assert checkpoints.steps() == []
    checkpoints.save(5, {"a": np.int32(1)})
    checkpoints.wait()
    assert (linked / "file").read_text() == "kept"
    assert not (folder / "5").is_symlink()
