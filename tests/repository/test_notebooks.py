"""The notebooks as committed: each in step with its `.py`, short, small, clean and seeded.

`make notebooks` executes them, with their assertions.
"""

import ast
import base64
import os
import pathlib
import re
import subprocess
import sys

import jupytext
import nbformat
import pytest

import muonclip_jax as mc
from website.repository import address, colab_badge

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NAMES = ("quick_start", "any_model", "newton_schulz", "exploding_logits", "sharding")
MOST_CELLS, MOST_BYTES = 15, 200_000

every_notebook = pytest.mark.parametrize("name", NAMES)


def _read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def _sources(name, kind="code"):
    return [cell.source for cell in _read(name).cells if cell.cell_type == kind]


def _outputs(name):
    return [out for cell in _read(name).cells for out in cell.get("outputs", ())]


def _printed(name):
    return "".join(out.text for out in _outputs(name) if out.output_type == "stream")


def test_the_notebooks_are_these():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)
    assert {path.stem for path in FOLDER.glob("*.py")} == {*NAMES, "refresh"}


@every_notebook
def test_a_notebook_and_its_pair_are_in_step(name):
    pair = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    both = ([(c.cell_type, c.source) for c in nb.cells] for nb in (_read(name), pair))
    assert next(both) == next(both)


@every_notebook
def test_a_notebook_is_valid_short_and_small(name):
    nbformat.validate(_read(name))
    assert len(_read(name).cells) <= MOST_CELLS
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES


@every_notebook
def test_a_notebook_was_run_from_top_to_bottom(name):
    counts = [c.execution_count for c in _read(name).cells if c.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


@every_notebook
def test_outputs_are_text_and_pictures_without_errors_or_warnings(name):
    kinds = {(out.output_type, out.get("name")) for out in _outputs(name)}
    assert kinds == {("stream", "stdout"), ("display_data", None)}
    assert "arning" not in _printed(name)
    for out in _outputs(name):
        if out.output_type == "display_data":
            assert base64.b64decode(out.data["image/png"]).startswith(b"\x89PNG")


@every_notebook
def test_the_first_cell_opens_the_notebook_in_colab_if_the_repository_has_an_address(name):
    first = _read(name).cells[0]
    assert first.cell_type == "markdown"
    badge = colab_badge(name, address())
    assert first.source.startswith(f"{badge}\n\n# " if badge else "# ")


@every_notebook
def test_the_first_code_cell_installs_only_what_is_missing(name):
    *before, guard = ast.parse(_sources(name)[0]).body
    assert all(isinstance(statement, ast.Import | ast.Assign) for statement in before)
    assert not any(isinstance(n, ast.Call) for statement in before for n in ast.walk(statement))
    assert isinstance(guard, ast.If)
    assert ast.unparse(guard.test) == "importlib.util.find_spec('muonclip_jax') is None"
    assert _sources(name)[0] == _sources(NAMES[0])[0]


@every_notebook
def test_a_notebook_is_seeded_and_says_where_it_runs(name):
    source = "\n".join(_sources(name))
    assert "SEED = 0" in source
    assert re.search(r"(jax\.random\.key|default_rng)\(SEED\)", source)
    assert not re.search(r"\bnp\.random\.(?!default_rng\(SEED\))", source)
    assert "print(jax.devices())" in source
    assert "Device(" in _printed(name)


@every_notebook
def test_a_notebook_uses_public_names_and_defines_none_of_them(name):
    source = (FOLDER / f"{name}.py").read_text()
    tree = ast.parse(source)
    used = set(re.findall(r"\bmc\.(\w+(?:\.\w+)?)", source))
    assert used
    for path in used:
        owner = mc
        for part in path.split("."):
            owner = getattr(owner, part)
    defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert not defined & set(mc.__all__)
    assert "muonclip_jax._" not in source


@every_notebook
def test_numbers_in_the_prose_are_in_the_code_or_the_outputs(name):
    known = set(_numbers("\n".join(_sources(name)) + _printed(name)))
    for cell in _sources(name, "markdown"):
        for paragraph in re.sub(r"\]\(.*?\)", "]", cell).split("\n\n"):
            if "arXiv" not in paragraph:  # a number of the paper that it names
                prose = re.sub(r"\w*[A-Za-z_]\w*", " ", paragraph)  # names such as K2 and float32
                assert set(_numbers(prose)) <= known, paragraph


def _numbers(text):
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", text)]


def test_two_exchanges_were_counted_for_each_group_of_the_plan():
    printed = _printed("sharding")
    groups = printed.count("  exchange: ")
    assert groups == 2
    assert f"'mc.muon': {{'all-to-all': {2 * groups}}}" in printed


def test_the_readme_lists_the_notebooks():
    readme = (ROOT / "README.md").read_text()
    for name in NAMES:
        assert f"[{name}](notebooks/{name}.ipynb)" in readme


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "devices"),
    [*((name, 8) for name in NAMES if name != "sharding"), ("sharding", 1)],
)
def test_a_notebook_runs_on_another_number_of_devices(name, devices):
    # The backend starts first, so that no notebook can ask for its own number.
    code = f"""
import jax, runpy
jax.config.update("jax_num_cpu_devices", {devices})
assert jax.device_count() == {devices}
runpy.run_path("notebooks/{name}.py")
"""
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
