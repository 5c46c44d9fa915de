"""The table, the JSON text and the comparison of analyses, and what reading costs."""

import json
import time

import jax
import jax.numpy as jnp
import pytest

import muonclip_jax as mc
from benchmarks.compiled import compiled_cost
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
    with pytest.raises(ValueError, match="no analysis of version 1"):
        mc.Analysis.from_json(json.dumps(json.loads(analysis.to_json()) | {"version": 2}))


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


@pytest.mark.nightly
@pytest.mark.parametrize(("scan", "limit"), [(False, 5.0), (True, 1.0)], ids=["loop", "scan"])
def test_sixty_layers_are_read_in_seconds_of_the_processor(scan, limit, no_typecheck):
    family = FAMILIES["gpt_scanned"]
    shape = lambda x: jax.ShapeDtypeStruct((60, *x.shape[1:]), x.dtype)  # noqa: E731
    params = jax.eval_shape(family.params)
    params["h"] = jax.tree.map(shape, params["h"])
    tap = {} if scan else {"tap": lambda path, logits: None}
    start = time.process_time()
    found = mc.analyze(family.fn, params, *family.args, **tap)
    assert time.process_time() - start < limit
    assert sum(site.num_layers for site in found.attention) == 60


def test_max_logits_add_few_operations_and_no_memory():
    def fn(p, x):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[n]) for n in "qkv")
        logits = jnp.where(jnp.tri(256, dtype=bool), jnp.einsum("bthk,bshk->bhts", q, k), -1e30)
        out = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(logits), v)
        return jnp.einsum("bthk,hkd->btd", out, p["o"]).sum()

    kernel = jax.ShapeDtypeStruct((512, 8, 64), jnp.float32)
    params = dict.fromkeys("qkv", kernel) | {"o": jax.ShapeDtypeStruct((8, 64, 512), jnp.float32)}
    x = jax.ShapeDtypeStruct((2, 256, 512), jnp.float32)
    compiled = [
        jax.jit(jax.value_and_grad(f, has_aux=aux)).lower(params, x).compile()
        for f, aux in ((fn, False), (mc.with_max_logits(fn, expect=1), True))
    ]
    plain, more = ((c.cost_analysis() or {})["flops"] for c in compiled)
    assert plain < more < 1.002 * plain
    plain, more = (compiled_cost(c).temporary_bytes for c in compiled)
    assert plain is not None
    assert more is not None
    assert more < 1.001 * plain
