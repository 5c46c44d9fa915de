"""The numbers on the pages of docs/ are the committed ones."""

import inspect
import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from muonclip_jax._head_layouts.head_layout import HeadLayout
from muonclip_jax._orthogonalize.choices import gram_cost, restart_windows, standard_cost
from muonclip_jax._qk_clip.head_factors import query_and_key_factors
from tests.support import reference
from tests.support.pages import ROOT, numbers, result, run_page, table
from tests.support.published_numbers import ABOVE_ONE, RANGES


def test_layouts_in_the_table_can_be_built():
    rows = table("qk_clip.md", "layouts")
    calls = [call.strip("`") for _, call in rows if call.startswith("`mc.")]
    assert len(calls) == 15
    for call in calls:
        assert isinstance(eval(call, {"mc": mc}), HeadLayout)


def test_shared_keys_in_the_table_are_what_the_rules_do():
    rows = table("qk_clip.md", "shared_keys")
    assert len(rows) == 3
    for name, queries, key, logits in rows:
        rule = name.split('"')[1]
        gamma = jnp.asarray([0.25, 1.0])
        query_factors, (key_factor,) = query_and_key_factors(gamma, 1, 0.5, rule)
        assert queries == ", ".join(f"{float(q):g}" for q in query_factors)
        assert key == f"{float(key_factor):g}"
        landed = np.asarray([400.0, 10.0]) * np.asarray(query_factors) * float(key_factor)
        assert logits == ", ".join(f"{x:g}" for x in landed)


def test_costs_of_the_statistic_are_the_committed_ones():
    row = result("max_logit_cost")["lengths"][-1]
    expected = {
        "positions": f"{row['length']}",
        "exact_full": f"{100 * (row['exact_flops_full'] - 1):.1f}",
        "exact_causal": f"{100 * (row['exact_flops_causal'] - 1):.1f}",
        "exact_memory": f"{row['exact_temporary_bytes'] / 2**20:.0f}",
    }
    assert numbers("docs/qk_clip.md") == expected
    assert (
        numbers("docs/choosing.md").items()
        >= {name: expected[name] for name in ("positions", "exact_causal")}.items()
    )
    assert row["lse_bound_flops_full"] == row["lse_bound_flops_causal"] == 1


def test_the_default_rule_is_the_one_the_page_says():
    rule = inspect.signature(mc.qk_clip).parameters["shared_key"].default
    names = [row[0] for row in table("qk_clip.md", "shared_keys")]
    assert [f'"{rule}"' in name for name in names] == ["default" in name for name in names]


# --- choosing.md ----------------------------------------------------------------------------------


def test_calls_in_the_table_build_optimizers():
    rows, page = table("choosing.md", "calls"), run_page("choosing.md")
    assert len(rows) == 9
    for _, call, *_ in rows:
        tx = eval(call.strip("`"), page)
        assert isinstance(tx, optax.GradientTransformationExtraArgs)


def test_defaults_in_the_table_are_those_of_the_optimizers():
    muon, clip = (inspect.signature(f).parameters for f in (mc.muon, mc.muonclip))
    for name, *cells in table("choosing.md", "defaults"):
        name = name.split("`")[1]
        shown: list[str | None] = [cell.split("`")[1] for cell in cells]
        if name == "threshold":
            assert name not in muon
            shown[0] = None
        assert shown == [repr(p[name].default) if name in p else None for p in (muon, clip)]


def test_presets_in_the_table_of_choices_arrive_where_it_says():
    rows = table("choosing.md", "presets")
    assert len(rows) == 4
    for _, choice, said in rows:
        name = choice.split('"')[1]
        assert said == "{:.3f} to {:.3f}".format(*RANGES[name][2])


def test_what_is_sent_without_a_plan_is_the_committed_ratio():
    stacks = result("sharded_step")["cases"]["stacks"]
    assert (stacks["layers"], stacks["side"], stacks["hidden"]) == (32, 4096, 11008)  # 7B
    times = f"{1 / stacks['ours_by_optax']['sent_bytes']:.0f}"
    assert numbers("docs/choosing.md")["sent_without_plan"] == times


def test_momentum_weighs_068_of_keller_jordans_at_step_2():
    beta = 0.95
    optax_ratio = (beta / (1 - beta**3)) / ((1 - beta) / (1 - beta**2))
    assert round(optax_ratio / (beta / (1 - beta)), 2) == 0.68


# --- guides/threshold.md --------------------------------------------------------------------------


def test_figures_of_the_demo_are_the_committed_ones():
    clip, plain, _ = result("train_lm")["runs"]
    expected = {
        "demo_steps_with_a_clip": f"{clip['steps_with_a_clip']}",
        "demo_steps": f"{clip['steps']}",
        "demo_logit": f"{clip['largest_logit']:.1f}",
        "demo_logit_unclipped": f"{plain['largest_logit']:.1f}",
        "demo_loss": f"{clip['validation_loss']:.3f}",
        "demo_loss_unclipped": f"{plain['validation_loss']:.3f}",
    }
    assert numbers("docs/guides/threshold.md").items() >= expected.items()


def test_numbers_to_watch_are_those_of_the_metrics():
    params = {"attn": {name: {"kernel": jnp.ones((4, 2, 2))} for name in ("query", "key")}}
    stats, ever = {"attn": {"max_logits": jnp.ones(2)}}, {"attn": jnp.zeros(2, bool)}
    _, info = mc.qk_clip(params, stats, ever_clipped=ever)
    rows = table("guides/threshold.md", "watched")
    watched = [name.strip("`") for name, *_ in rows if "qk_clip/" in name]
    assert len(watched) == 6
    assert set(watched) < set(mc.qk_clip_metrics(info))


# --- numerics.md ----------------------------------------------------------------------------------


def test_table_of_presets_is_the_table_of_the_published_numbers():
    rows = table("numerics.md", "presets")
    assert sorted(row[0].split('"')[1] for row in rows) == sorted(RANGES)
    for names, steps, slope, *ranges, above, _ in rows:
        name, *aliases = names.split('"')[1::2]
        expected_slope, *expected_ranges = RANGES[name]
        assert int(steps) == len(mc.ns_coefficients(name))
        assert int(slope) == expected_slope
        assert ranges == [f"{low:.3f} to {high:.3f}" for low, high in expected_ranges]
        expected = ["beyond 1e100" if p is None else f"{p:g}" for p in ABOVE_ONE[name]]
        assert above.split(", ") == expected
        for alias in aliases:
            assert mc.ns_coefficients(alias) == mc.ns_coefficients(name)


def test_a_safety_of_101_explodes_where_105_does_not():
    p = {
        safety: reference.polynomial(mc.polar_express_coefficients(1e-3, 5, safety=safety), 1.02)
        for safety in (1.01, 1.05)
    }
    np.testing.assert_allclose(p[1.01], 2e88, rtol=0.1)
    np.testing.assert_allclose(p[1.05], 1.11, atol=6e-3)
    slopes = [
        np.prod([a for a, _, _ in mc.polar_express_coefficients(1e-3, 5, safety=safety)])
        for safety in (1.01, 1.05)
    ]
    assert [round(slope) for slope in slopes] == [976, 804]


def test_the_aol_table_that_is_not_shipped_turns_the_sign():
    # NVIDIA-NeMo/Emerging-Optimizers, muon_utils.py, "aol"; unchanged.
    rows = (
        (4.0098, -7.0585, 2.4635),
        (3.4585, -5.5479, 2.5959),
        (2.7573, -3.2939, 1.4254),
        (2.7215, -3.0494, 1.3169),
    )
    s = np.linspace(0.001, 1, 100_000)
    p = reference.polynomial(rows, s)
    np.testing.assert_allclose(s[p < 0].min(), 0.884, atol=1e-3)
    assert np.all(p[s > 0.884] < 0)
    np.testing.assert_allclose(p[-1], -0.99, atol=0.01)
    with pytest.raises(ValueError, match="unknown preset 'aol'"):
        mc.ns_coefficients("aol")


def test_both_forms_cost_the_same_at_an_aspect_of_one_and_a_half():
    for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
        rows = mc.ns_coefficients("jordan")
        assert gram_cost(restart_windows(rows, dtype), 1.5) == standard_cost(rows, 1.5) == 40


def test_costs_in_the_page_are_the_formulas():
    rows = mc.ns_coefficients("jordan")
    for aspect, standard, *gram in table("numerics.md", "flops"):
        assert float(standard) == standard_cost(rows, float(aspect))
        costs = [
            gram_cost(restart_windows(rows, dtype), float(aspect))
            for dtype in (jnp.float32, jnp.bfloat16)
        ]
        assert [float(cell) for cell in gram] == costs


def test_gain_of_the_blocks_is_the_committed_one():
    ratios = [
        shape["blocks_by_plain"]
        for shape in result("mirrored_products")["shapes"]
        if shape["matrix"][0] >= 384
    ]
    expected = {"blocks_least": f"{min(ratios):.2f}", "blocks_most": f"{max(ratios):.2f}"}
    assert numbers("docs/numerics.md") == expected


def test_accuracy_is_the_committed_one():
    rows = result("newton_schulz_accuracy")["rows"]

    def figure(preset, method, key, dtype, spectrum):
        wanted = {"preset": preset, "method": method, "dtype": dtype, "spectrum": spectrum}
        wanted |= {"matrix": [128, 512], "blocks": 1}
        (row,) = [row for row in rows if wanted.items() <= row.items()]
        return row[key]

    spectra = ("gaussian", "1 .. 1e-4")
    table_rows = {tuple(row[:2]): row[2:] for row in table("numerics.md", "accuracy")}
    expected = {
        (f"`{preset}`", method): [
            *(f"{figure(preset, method, 'error', 'float32', s):.1e}" for s in spectra),
            *(f"{figure(preset, method, 'leakage_by_plain', 'bfloat16', s):.2f}" for s in spectra),
        ]
        for preset in RANGES
        for method in ("standard", "gram")
    }
    assert table_rows == expected


# --- references.md --------------------------------------------------------------------------------


def test_every_paper_that_is_named_anywhere_is_among_the_references():
    listed = (ROOT / "docs" / "references.md").read_text()
    folders = ("muonclip_jax", "examples", "docs", "tests")
    sources = [p for d in folders for p in (ROOT / d).rglob("*") if p.suffix in (".py", ".md")]
    for source in [*ROOT.glob("*.md"), *sources]:
        for number in re.findall(r"\b2[0-9](?:0[1-9]|1[0-2])\.\d{5}\b", source.read_text()):
            assert number in listed, f"{source.name}: arXiv {number}"
