"""The counted FLOPs and bytes of a training step follow published sizes and formulas."""

import json
import math

import jax
import pytest

from benchmarks import model_parts, optimizer_share, report

# Parameters, and those that a token multiplies with: without the embedding, and 9 of 384 experts.
PUBLISHED = {
    "GPT-2 small": (124.4e6, 124.4e6),
    "Llama 2 7B": (6.738e9, 6.607e9),
    "Llama 3.1 405B": (405.8e9, 403.7e9),
    "Kimi K2": (1.026e12, 32.6e9 - 1.2e9),
}
STEPS = 5  # of Newton–Schulz

every_model = pytest.mark.parametrize("name", optimizer_share.MODELS)


def result_of(name):
    return json.loads((report.RESULTS / "optimizer_share.json").read_text())["models"][name]


def matrices(name):
    """Short side, long side and number of the matrices that Muon trains."""
    for part in model_parts.MODELS[name].parts().values():
        for path, x in jax.tree_util.tree_leaves_with_path(part.params):
            names = jax.tree_util.keystr(path)
            if "embed" not in names and "lm_head" not in names and "router" not in names:
                n, m = sorted(x.shape[-2:])
                yield n, m, part.count * math.prod(x.shape[:-2])


@every_model
def test_models_have_the_published_numbers_of_parameters(name):
    parts = model_parts.MODELS[name].parts().values()
    held = sum(part.count * x.size for part in parts for x in jax.tree.leaves(part.params))
    assert held == pytest.approx(PUBLISHED[name][0], rel=0.01)


@every_model
def test_passes_cost_six_flops_for_each_token_and_parameter(name):
    result = result_of(name)
    expected = 6 * PUBLISHED[name][1] * result["tokens"]
    assert result["model"]["flops"] == pytest.approx(expected, rel=0.03)


@every_model
def test_updates_cost_what_newton_schulz_costs(name):
    optimizers = result_of(name)["optimizers"]
    standard = sum(many * STEPS * (4 * m / n + 2) * n**3 for n, m, many in matrices(name))
    assert optimizers["optax"]["flops"] == pytest.approx(standard, rel=0.03)
    assert optimizers["adamw"]["flops"] < optimizers["ours"]["flops"] < standard


@every_model
def test_adamw_reads_and_writes_parameters_and_moments_once(name):
    result = result_of(name)
    bytes_ = 7 * 4 * result["parameters"]  # reads w, g, m, v; writes w, m, v
    assert result["optimizers"]["adamw"]["bytes"] == pytest.approx(bytes_, rel=0.01)


def test_the_bound_on_flops_holds_for_dense_models_and_not_for_experts():
    def overhead(name):
        result = result_of(name)
        return result["optimizers"]["optax"]["flops"] / result["model"]["flops"]

    for name in optimizer_share.MODELS:
        bound = STEPS * model_parts.MODELS[name].width / model_parts.MODELS[name].tokens
        assert result_of(name)["bound"] == pytest.approx(bound, rel=1e-3)
        assert (overhead(name) < bound) == (name != "Kimi K2")


@pytest.mark.nightly
def test_parts_of_a_small_model_compile_for_the_attached_device(tmp_path, monkeypatch):
    small = model_parts.Dense(2, 64, 4, 2, 128, 512, True, False, 1024, 128)
    monkeypatch.setattr(optimizer_share, "MODELS", {"small": small})
    optimizer_share.main(["--attached", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "optimizer_share.json").read_text())["models"]["small"]
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    products = 6 * 1024 * (2 * layer + 64 * 512)
    assert products < result["model"]["flops"] < 1.3 * products
