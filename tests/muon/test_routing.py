"""The optimizer of each leaf: a committed table, the rules, and updates that agree with it."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support.role_checks import shapes_of

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "routing.txt"


# Two scanned layers of a transformer in Flax's names, with a mixture of experts and a convolution.
MODEL = {
    "embed": {"embedding": (256, 32)},
    "pos_embedding": (64, 32),
    "blocks": {
        "attn": {
            "query": {"kernel": (2, 32, 4, 8), "bias": (2, 4, 8)},
            "key": {"kernel": (2, 32, 2, 8), "bias": (2, 2, 8)},
            "value": {"kernel": (2, 32, 2, 8)},
            "out": {"kernel": (2, 4, 8, 32), "bias": (2, 32)},
        },
        "attn_norm": {"scale": (2, 32)},
        "ln_2": {"scale": (2, 32), "bias": (2, 32)},
        "mlp": {
            "gate": {"kernel": (2, 32, 64)},
            "up": {"kernel": (2, 32, 64)},
            "down": {"kernel": (2, 64, 32)},
        },
        "moe": {
            "gate": {"kernel": (2, 32, 8)},
            "experts": {"gate": (2, 8, 32, 16), "up": (2, 8, 32, 16), "down": (2, 8, 16, 32)},
            "shared_experts": {"up": {"kernel": (2, 32, 16)}},
        },
    },
    "router": {"kernel": (32, 8)},
    "Conv_0": {"kernel": (3, 32, 64), "bias": (64,)},
    "short_conv": {"kernel": (4, 1, 64)},
    "depthwise_conv": {"kernel": (4, 2, 64)},
    "LayerNorm_0": {"scale": (32,)},
    "temperature": (),
    "lm_head": {"kernel": (32, 256)},
}


def test_golden_table():
    """The committed table; after a deliberate change, write it anew and read the difference."""
    assert str(mc.routing_table(shapes_of(MODEL))) + "\n" == GOLDEN.read_text()


def test_updates_agree_with_the_table():
    """Under Muon an update has flat singular values; under Adam's first step, one magnitude."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), shapes_of(MODEL)
    )
    tx = mc.muon(1.0, "polar_express_6", nesterov=False)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    rows = mc.routing_table(params).rows
    assert {row.optimizer for row in rows} == {"muon", "adamw"}
    for row, u in zip(rows, jax.tree.leaves(updates), strict=True):
        magnitudes = np.abs(np.asarray(u))
        if row.optimizer == "adamw":
            # |g| / (|g| + eps) in float32. Measured: 1.1e-4.
            np.testing.assert_allclose(magnitudes, 1.0, rtol=1e-3, err_msg=row.path)
            continue
        # Orthogonal, so the squares add up to the number of singular values times scale squared.
        total = row.num_matrices * min(row.n_in, row.n_out) * row.scale**2
        np.testing.assert_allclose(np.sum(magnitudes**2), total, rtol=0.02, err_msg=row.path)


def _optimizer(tree):
    return {row.path: row.optimizer for row in mc.routing_table(shapes_of(tree)).rows}


@pytest.mark.parametrize(
    "name",
    "embed embedding embeddings embedder wte wpe tok_embeddings pos_embed pos_embedding Embed_0 "
    "position_embeddings lm_head unembed output_head logits_dense router moe_gate norm norm1 ln "
    "ln_1 ln_f query_ln LayerNorm_0 RMSNorm_3 input_layernorm final_norm q_a_layernorm dwconv "
    "depthwise_conv".split(),
)
def test_role_names_go_to_adamw_at_any_rank(name):
    for shape in ((8,), (4, 8), (2, 4, 8)):
        assert _optimizer({name: {"kernel": shape}}) == {f"{name}/kernel": "adamw"}


@pytest.mark.parametrize(
    "name", "gate_proj wi_gate up_proj o_proj wi_0 Dense_0 gate normalizer slender embark".split()
)
def test_other_names_go_to_muon(name):
    assert _optimizer({name: {"kernel": (4, 8)}}) == {f"{name}/kernel": "muon"}


@pytest.mark.parametrize("leaf", ["bias", "scale", "embedding"])
def test_leaf_names_go_to_adamw_at_any_rank(leaf):
    assert _optimizer({"layer": {leaf: (2, 4, 8)}}) == {f"layer/{leaf}": "adamw"}


@pytest.mark.parametrize("experts", ["experts", "expert_0", "shared_experts", "expert"])
def test_gate_beside_experts_is_a_router(experts):
    tree = {"moe": {"gate": {"kernel": (4, 8)}, experts: {"gate": (2, 4, 8), "up": (2, 4, 8)}}}
    assert _optimizer(tree) == {
        "moe/gate/kernel": "adamw",
        f"moe/{experts}/gate": "muon",
        f"moe/{experts}/up": "muon",
    }


def _matrices(tree, path):
    rows = {row.path: row for row in mc.routing_table(shapes_of(tree)).rows}
    return rows[path].num_matrices, rows[path].n_in, rows[path].n_out


def test_attention_kernels_are_one_matrix_each():
    tree = {"attn": {"query": {"kernel": (32, 4, 8)}, "out": {"kernel": (4, 8, 32)}}}
    assert _matrices(tree, "attn/query/kernel") == (1, 32, 32)
    assert _matrices(tree, "attn/out/kernel") == (1, 32, 32)


def test_stacked_flat_attention_kernels_stay_stacks():
    tree = {"attn": {"query": {"kernel": (6, 32, 64)}, "out": {"kernel": (6, 64, 32)}}}
    assert _matrices(tree, "attn/query/kernel") == (6, 32, 64)
    assert _matrices(tree, "attn/out/kernel") == (6, 64, 32)


def test_out_without_a_query_is_no_attention():
    assert _matrices({"mlp": {"out": {"kernel": (3, 8, 16)}}}, "mlp/out/kernel") == (3, 8, 16)


def test_dimension_numbers_override_the_rules():
    tree = shapes_of({"embed": (8, 4), "up": {"kernel": (4, 8), "bias": (8,)}})
    table = mc.routing_table(
        tree, {"embed": mc.MuonDimensionNumbers(1, 0), "up": None}, consistent_rms=0.5
    )
    embed, bias, kernel = table.rows
    assert (embed.optimizer, embed.n_in, embed.n_out) == ("muon", 4, 8)
    np.testing.assert_allclose(embed.scale, 0.5 * np.sqrt(8))
    assert bias.optimizer == kernel.optimizer == "adamw"
    assert {row.reason for row in table.rows} == {"given"}


def test_integer_leaves_raise_with_their_paths():
    tree = {
        "a": {"ids": jax.ShapeDtypeStruct((3, 4), jnp.int32)},
        "b": [jax.ShapeDtypeStruct((), jnp.bool_)],
        "w": jax.ShapeDtypeStruct((3, 4), jnp.float32),
    }
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole text follows
        mc.routing_table(tree)
    assert str(error.value) == (
        "routing_table: 2 of 3 leaves are neither floating nor complex.\n"
        "  a/ids: int32[3, 4].\n"
        "  b/0: bool[].\n"
        "Pass the parameters alone: of an NNX model `nnx.state(model, nnx.Param)`, of an Equinox "
        "model `eqx.filter(model, eqx.is_inexact_array)`. Keep other leaves out of the optimizer "
        "with `optax.masked` or `optax.partition`."
    )
