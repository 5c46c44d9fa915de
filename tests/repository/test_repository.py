"""Files beside the package: README blocks run, figures are the committed ones, CI is pinned."""

import ast
import contextlib
import io
import pathlib
import re

import pytest

import muonclip_jax as mc

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_first_block_of_the_readme_runs_as_it_stands():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(BLOCKS[0], "README.md", "exec"), {"__name__": "readme"})
    metrics = ast.literal_eval(printed.getvalue())
    assert 4.0 < metrics["loss"] < 7.0  # random bytes: log 256 is 5.5
    assert metrics["qk_clip/clipped_heads"] == 0


def test_pinned_train_step_is_in_the_readme():
    for line in (
        "tx = mc.muon(2e-4, weight_decay=0.1, consistent_rms=0.2)",
        "updates, opt_state = tx.update(grads, opt_state, params)",
        "params, info = mc.qk_clip(params, stats, threshold=100.0)",
    ):
        assert line in BLOCKS[0]


def test_names_in_the_readme_exist():
    names = set(re.findall(r"\bmc\.(\w+(?:\.\w+)?)", README))
    assert names
    for name in names:
        owner = mc
        for part in name.split("."):
            owner = getattr(owner, part)


def test_links_in_the_documents_lead_somewhere():
    for page in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (ROOT / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda p: p.name
)
def test_workflows_are_pinned_and_have_least_permissions(path):
    text = path.read_text()
    assert re.search(r"^permissions:\n  contents: read\n", text, re.MULTILINE)
    uses = re.findall(r"uses: (.*)", text)
    assert uses
    for action in uses:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)
    assert text.count("actions/checkout") == text.count("persist-credentials: false")
    assert "pull_request_target" not in text
    assert "github.event" not in text
