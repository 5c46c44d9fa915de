"""The sources of the site: every page and public name, links, pictures, one repository address."""

import inspect
import json
import re

import matplotlib
import pytest

import muonclip_jax as mc
from docs.figures import heads_over_time
from docs.figures.__main__ import FIGURES, IMAGES
from docs.figures.canvas import DARK, LIGHT
from tests.support.pages import ROOT, numbers, result, table
from website import api, badges, package_readme, pages, repository
from website.docstrings import translated
from website.links import for_site, github_anchor, targets, without_comments, without_folders

TEXTS = {".cff", ".ipynb", ".md", ".py", ".toml", ".yml"}


def public_names(module):
    """Full names of the functions and classes that a module defines."""
    return {
        f"{module.__name__}.{name}"
        for name, x in vars(module).items()
        if not name.startswith("_") and getattr(x, "__module__", None) == module.__name__
    }


def test_every_public_name_has_one_entry_in_the_api_reference():
    modules = {"linen", "nnx"}
    expected = {f"muonclip_jax.{name}" for name in set(mc.__all__) - modules}
    expected |= public_names(mc.linen) | public_names(mc.nnx)
    assert sorted(api.entries()) == sorted(expected)


def test_every_public_function_has_an_example():
    for name in api.entries():
        x = mc
        for part in name.split(".")[1:]:
            x = getattr(x, part)
        if inspect.isfunction(x):
            assert ">>> " in (inspect.getdoc(x) or ""), name


def test_the_api_reference_has_every_integration():
    text = api.with_docstrings((api.FOLDER / "integrations.md").read_text())
    for name in api.integrations():
        assert f".. integration:: {name}\n" in text
    assert "- Every module" not in text


def test_an_entry_becomes_its_docstring():
    text = api.with_docstrings("# Title\n\n- `muonclip_jax.muon`\n- `muonclip_jax.MLALayout`\n")
    assert "## muon\n" in text
    assert ".. autofunction:: muonclip_jax.muon\n```" in text
    assert ".. autoclass:: muonclip_jax.MLALayout\n   :members:\n" in text


def test_every_page_is_in_the_navigation(tmp_path):
    pages.collect(tmp_path)
    start = (tmp_path / "index.md").read_text()
    written = {p.relative_to(tmp_path).with_suffix("").as_posix() for p in tmp_path.rglob("*.md")}
    listed = set(re.findall(r"^[\w/]+$", start, re.MULTILINE))
    assert written - {"index"} <= listed
    for path in tmp_path.rglob("*.md"):
        prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        assert "<!--" not in prose, path


def test_a_page_outside_of_the_navigation_raises(tmp_path, monkeypatch):
    monkeypatch.setitem(pages.NAVIGATION, "Guides", ())
    with pytest.raises(ValueError, match=r"lacks docs/choosing\.md, "):
        pages.collect(tmp_path)


@pytest.mark.parametrize(
    ("link", "address", "expected"),
    [
        ("choosing.md#a", None, "../guide/choosing.md#a"),
        ("../benchmarks/report.py", None, "../files/report.py"),
        ("../Makefile", "https://host/a/b", "https://host/a/b/blob/main/Makefile"),
        ("../benchmarks", "https://host/a/b", "https://host/a/b/tree/main/benchmarks"),
        ("https://arxiv.org", "https://host/a/b", "https://arxiv.org"),
        ("#here", None, "#here"),
        ("page/cell-3.png", "https://host/a/b", "page/cell-3.png"),
    ],
)
def test_links_lead_to_the_site_or_to_the_repository(link, address, expected):
    known = {"docs/choosing.md": "guide/choosing.md", "benchmarks/report.py": "files/report.py"}
    text = f"[text]({link})\n\n```\n[text]({link})\n```\n"
    got = for_site(text, "docs/page.md", "other/page.md", known, address)
    assert got == f"[text]({expected})\n\n```\n[text]({link})\n```\n"


def test_links_of_a_page_are_listed():
    text = "[a](x.md#y) [![b](../z.svg)](https://host) [c](#d)\n```\n[e](f.md)\n```\n"
    assert targets(text, "docs/page.md") == ["docs/x.md", "z.svg"]


def test_links_to_folders_become_text():
    text = "[a](../benchmarks/evidence/results), [b](../benchmarks/report.py)"
    assert without_folders(text) == "a, [b](../benchmarks/report.py)"


def test_comments_are_removed_outside_of_blocks():
    text = "<!-- table: x -->\n| 8<!-- y --> |\n```\n<!-- kept -->\n```\n"
    assert without_comments(text) == "| 8 |\n```\n<!-- kept -->\n```\n"


def test_anchors_are_those_of_github():
    assert github_anchor("Linen: `scan`, remat & co") == "linen-scan-remat--co"


def test_docstrings_are_translated():
    lines = [
        "Sums *args, `a*b`s as `mc.muon`.",
        "",
        "| a | b |",
        "|---|---|",
        "| `x|y` | 1 |",
        ">>> f(*x)",
        "1",
    ]
    assert translated(lines) == [
        r"Sums \*args, `a*b`\ s as `mc.muon <muonclip_jax.muon>`.",
        "",
        ".. list-table::",
        "   :header-rows: 1",
        "",
        "   * - a",
        "     - b",
        "   * - `x|y`",
        "     - 1",
        "",
        ">>> f(*x)",
        "1",
    ]


def test_blocks_between_fences_of_a_docstring_are_code():
    got = translated(["Text:", "", "  ```", "  f(*x)", "  ```", "*x"])
    expected = ["Text:", "", "  .. code-block:: python", "", "     f(*x)", "", r"\*x"]
    assert got == expected


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "heads_over_time"])
def test_a_picture_is_what_its_script_draws(name):
    assert (IMAGES / f"{name}.svg").read_text() == FIGURES[name](LIGHT)
    assert (IMAGES / f"{name}-dark.svg").read_text() == FIGURES[name](DARK)


@pytest.mark.nightly
def test_the_plot_of_heads_is_what_its_script_draws():
    record = json.loads(heads_over_time.RECORD.read_text())
    if matplotlib.__version__ != record["matplotlib"]:
        pytest.skip(f"drawn with matplotlib {record['matplotlib']}")
    assert (IMAGES / "heads_over_time.svg").read_text() == heads_over_time.draw(LIGHT)
    assert (IMAGES / "heads_over_time-dark.svg").read_text() == heads_over_time.draw(DARK)


# --- the address of the repository ----------------------------------------------------------------


def test_only_the_address_of_pyproject_is_in_the_repository():
    folders = ("docs", "notebooks", "website", "examples", "benchmarks", "muonclip_jax", ".github")
    files = [*ROOT.glob("*"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    for path in files:
        if path.suffix not in TEXTS:
            continue
        for address in re.findall(r"github\.com/muonclip[\w./-]*", path.read_text()):
            known = (repository.address() or "unset").removeprefix("https://")
            assert address.startswith(known), f"{path}: {address}"


def test_badge_of_an_address():
    badge = repository.colab_badge("sharding", "https://github.com/a/b")
    assert "/github/a/b/blob/main/notebooks/sharding.ipynb)" in badge
    assert repository.colab_badge("sharding", None) == ""
    assert repository.colab_badge("sharding", "https://example.org/a/b") == ""


def test_badges_are_written_into_both_files_of_a_notebook(tmp_path, monkeypatch):
    for suffix in (".py", ".ipynb"):
        source = ROOT / "notebooks" / f"sharding{suffix}"
        (tmp_path / source.name).write_text(source.read_text())
    monkeypatch.setattr(badges, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(badges, "address", lambda: "https://github.com/a/b")
    badges.write("sharding")
    badge = repository.colab_badge("sharding", "https://github.com/a/b")
    assert (tmp_path / "sharding.py").read_text().startswith(f"# %% [markdown]\n# {badge}\n#\n# # ")
    first = json.loads((tmp_path / "sharding.ipynb").read_text())["cells"][0]["source"]
    assert first[:2] == [f"{badge}\n", "\n"]
    monkeypatch.setattr(badges, "address", repository.address)
    badges.write("sharding")
    for suffix in (".py", ".ipynb"):
        name = f"sharding{suffix}"
        assert (tmp_path / name).read_text() == (ROOT / "notebooks" / name).read_text()


def test_links_of_the_readme_on_pypi_are_absolute():
    text = "![a](docs/images/algorithm.svg) [b](docs/choosing.md#b) [c](docs) [d](https://e)"
    got = package_readme.for_package(text, "https://host/a/b", "v1")
    expected = (
        "![a](https://host/a/b/raw/v1/docs/images/algorithm.svg)"
        " [b](https://host/a/b/blob/v1/docs/choosing.md#b)"
        " [c](https://host/a/b/tree/v1/docs) [d](https://e)"
    )
    assert got == expected
    readme = package_readme.for_package((ROOT / "README.md").read_text(), "https://host/a/b", "v1")
    assert not re.findall(r"\]\((?!https://|#)\S+\)", readme)


def test_changelog_and_citation_have_the_version_and_date_of_the_package():
    heading = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading
    assert heading[1] == mc.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {mc.__version__}\ndate-released: {heading[2]}\n" in citation


# --- numbers --------------------------------------------------------------------------------------


def test_figures_of_the_training_program_are_the_committed_ones():
    assert table("training_program.md", "demo") == [
        [run["optimizer"], f"{run['validation_loss']:.3f}", f"{run['largest_logit']:.1f}"]
        for run in result("train_lm")["runs"]
    ]


def test_ratios_of_the_benchmarks_are_the_committed_ones():
    distances = [t["distance_from_ours"]["optax"] for t in result("step_time")["trees"].values()]
    assert numbers("docs/benchmarks.md") == {"distance_from_optax": f"{max(distances):.0e}"}
    keys = ("flops", "wall_time", "temporary_bytes", "compile_time")
    assert table("benchmarks.md", "step_time") == [
        [
            f"`{name}`",
            *(f"{tree['ours_by_optax'][key]:.2f}" for key in keys),
            f"{tree['ours_by_torch']['wall_time']:.2f}",
        ]
        for name, tree in result("step_time")["trees"].items()
    ]
