"""The counted FLOPs and bytes of a training step follow published sizes and formulas."""

import json
import math

import jax
import jax.numpy as jnp
import optax
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


def test_loops_are_an_error_because_the_compiler_counts_them_once():
    def repeated(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0]

    compiler = optimizer_share.Compiler(jax.devices()[0])
    with pytest.raises(RuntimeError, match="with 1 loops"):
        compiler.count(repeated, jax.ShapeDtypeStruct((8, 8), jnp.float32))


@pytest.mark.nightly
def test_a_small_layer_compiles_to_its_flops():
    tokens, d, hidden, keys = 128, 64, 256, 32
    small = model_parts.Dense(2, d, 4, 2, hidden, 512, True, False, 8 * tokens, tokens)
    compiler, parts = optimizer_share.Compiler(jax.devices()[0]), small.parts()
    kernels = {"attention": 2 * d * d + 2 * d * keys, "mlp": 3 * d * hidden}
    for name, parameters in kernels.items():
        flops, _ = compiler.passes(parts[name])
        assert 6 * parameters * tokens < flops < 1.2 * 6 * parameters * tokens
        assert parts[name].passes == 8
        assert sum(many for _, many in optimizer_share.parameters(parts[name]).items()) == len(
            parts[name].params["attn" if name == "attention" else "mlp"]
        )
    numbers = optax.contrib.MuonDimensionNumbers(0, 1)
    standard = STEPS * (4 * hidden / d + 2) * d**3
    for name, lowest in {"adamw": 0.0, "ours": 0.5, "optax": 1.0}.items():
        flops, _ = compiler.update(name, (d, hidden), numbers)
        assert lowest * standard < flops < (lowest + 0.5) * standard, name
