"""The table, the JSON text and the comparison of analyses, and what reading costs."""

import json

import jax
import jax.numpy as jnp
import pytest

import muonclip_jax as mc
from tests.support.program_models import FAMILIES


@pytest.fixture(scope="module")
def analysis():
    family = FAMILIES["gpt_scanned"]
    with jax.numpy_rank_promotion("allow"):
        return mc.analyze(family.fn, family.params(), *family.args)


def test_table_shows_roles_then_attention(analysis):
    text = str(analysis)
    assert text.startswith("path")
    for line in (
        "h/attn/q  (3, 16, 4, 8)  muon       -3 -> (-2, -1)     4      contracted with activations",
        "3 attentions:",
        "  h/attn: 3 x 4 heads of 8 columns; queries h/attn/q; keys h/attn/k",
    ):
        assert line in text


def test_json_keeps_everything(analysis):
    restored = mc.Analysis.from_json(analysis.to_json())
    assert restored == analysis
    assert str(restored) == str(analysis)
    assert restored.dimension_numbers == analysis.dimension_numbers
    assert restored.attention[0].head_maps()[0].heads.tolist() == (
        analysis.attention[0].head_maps()[0].heads.tolist()
    )


def test_json_of_another_version_is_an_error(analysis):
    with pytest.raises(ValueError, match="no analysis of version 2"):
        mc.Analysis.from_json(json.dumps(json.loads(analysis.to_json()) | {"version": 1}))


def test_json_with_other_parameters_is_an_error(analysis):
    params = FAMILIES["gpt_scanned"].params()
    params["emb"] = jnp.zeros((3, 3))
    with pytest.raises(ValueError, match=r"emb: \(3, 3\), expected \(40, 16\)"):
        mc.Analysis.from_json(analysis.to_json(), params)


def test_json_without_the_structure_of_the_parameters():
    params = jax.tree_util.Partial(lambda: None, jnp.zeros((4, 8)))
    fn = lambda p, x: jnp.tanh(x @ p.args[0]).sum()  # noqa: E731
    found = mc.analyze(fn, params, jnp.zeros((2, 4)))
    restored = mc.Analysis.from_json(found.to_json())
    with pytest.raises(ValueError, match=r"Analysis.from_json\(text, params\)"):
        restored.dimension_numbers  # noqa: B018
    again = mc.Analysis.from_json(found.to_json(), params)
    assert jax.tree.structure(again.dimension_numbers) == jax.tree.structure(
        found.dimension_numbers
    )


def test_diff_lists_changes(analysis):
    assert analysis.diff(analysis) == ""
    family = FAMILIES["gpt_scanned"]
    params = family.params() | {"more": jnp.ones((4, 4))}
    other = mc.analyze(family.fn, params, *family.args)
    assert analysis.diff(other).startswith("more: absent -> (4, 4)")
    llama = FAMILIES["llama"]
    other = mc.analyze(llama.fn, llama.params(), *llama.args)
    assert "attention h/attn: only before" in analysis.diff(other)
