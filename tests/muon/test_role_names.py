"""Roles by name: which names go to AdamW at any rank, and which resemble them but do not."""

import jax
import jax.numpy as jnp
import pytest

import muonclip_jax as mc
from muonclip_jax._muon.roles.names import adamw_role, core
from muonclip_jax._muon.roles.role_table import ADAMW_ROLES


def optimizers(tree, **arguments):
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return {row.path: row.optimizer for row in mc.routing_table(shapes, **arguments).rows}


MODULES = (
    "embed embedding embeddings embedder wte wpe tok_embeddings token_emb embed_tokens patch_embed "
    "word_embeddings pos_embed pos_embedding pos_emb Embed_0 position_embeddings value_embeds "
    "positional_embedding relative_position_bias_table relpos_bias rel_pos_h abs_pos_enc "
    "lm_head unembed output_head logits_dense to_logits vocab_proj router moe_gate mlp_router "
    "norm norm1 ln ln_1 ln_f query_ln LayerNorm_0 RMSNorm_3 input_layernorm final_norm enorm bn1 "
    "q_a_layernorm kv_a_norm dwconv depthwise_conv mhc_attention hc_head layer_scale "
    "FourierEmbs_0 fourier_features routing gate_logits centroids attention_sink query_feat"
).split()


@pytest.mark.parametrize("name", MODULES)
def test_module_names_go_to_adamw_at_any_rank(name):
    for shape in ((8,), (4, 8), (2, 4, 8)):
        assert optimizers({name: {"kernel": shape}}) == {f"{name}/kernel": "adamw"}


PARAMETERS = (
    "bias scale embedding q_bias router_bias e_score_correction_bias expert_bias dt_bias "
    "attn_scale gamma layer_scale ls1 ls2 lambda_1 sinks attention_sinks A_log D "
    "time_decay class_token cls mask_token register_tokens probe input_embedding "
    "embedding_table pos_table pre_norm offset static_alpha gate_factor resid_lambdas "
    "persistent_memory_k prefix_key initial_state h0 mu_k x_r decay_rate alibi_slopes theta pi "
    "value_residual_mix ia3_l scaling coefficients"
).split()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_names_go_to_adamw_at_any_rank(name):
    for shape in ((8,), (4, 8), (2, 4, 8)):
        assert optimizers({"block": {name: shape}}) == {f"block/{name}": "adamw"}


OTHERS = (
    "gate_proj wi_gate up_proj o_proj wi_0 Dense_0 normalizer slender embark token_mixing head_mix "
    "position_wise_ff pre_logits adaLN_modulation multi_head types scaler routers_mlp biased d "
    "time_mixing converter conv_free tabled output_dense classify depth decay decay_proj "
    "persistent prefixes mask_projection initial fourier_layer route_mlp"
).split()


@pytest.mark.parametrize("name", OTHERS)
def test_other_names_go_to_muon(name):
    assert optimizers({name: {"kernel": (8, 24)}}) == {f"{name}/kernel": "muon"}


@pytest.mark.parametrize("name", "head classifier output score action_head".split())
def test_heads_are_heads_only_outside_of_blocks(name):
    assert optimizers({name: {"kernel": (8, 24)}}) == {f"{name}/kernel": "adamw"}
    for block in ("layers_0", "attention", "decoder/blocks", "mlp"):
        tree = {f"{block}/{name}/kernel": (8, 24)}
        assert optimizers(tree) == {f"{block}/{name}/kernel": "muon"}


def test_output_beside_queries_is_no_head():
    tree = {name: {"kernel": (8, 8)} for name in ("query", "key", "value", "output")}
    assert set(optimizers(tree).values()) == {"muon"}


def test_case_matters_for_the_skip_vector():
    assert optimizers({"mixer": {"D": (8, 24), "d": (8, 24)}}) == {
        "mixer/D": "adamw",
        "mixer/d": "muon",
    }


def test_short_bias_needs_a_matrix_beside_it():
    assert optimizers({"linear": {"w": (8, 24), "b": (4, 24)}})["linear/b"] == "adamw"
    assert optimizers({"lora": {"a": (8, 24), "b": (24, 8)}})["lora/b"] == "muon"
    assert optimizers({"attn": {"query_w": (8, 24), "query_b": (4, 6)}})["attn/query_b"] == "adamw"


def test_matrix_of_an_adaptive_norm_is_a_matrix():
    tree = {"norm": {"linear": {"kernel": (8, 48), "bias": (48,)}, "scale": (8,)}}
    assert optimizers(tree) == {
        "norm/linear/bias": "adamw",
        "norm/linear/kernel": "muon",
        "norm/scale": "adamw",
    }
    assert optimizers({"norm": {"weight": (6, 8)}}) == {"norm/weight": "adamw"}


def test_containers_around_a_parameter_do_not_hide_its_name():
    assert core(("q_proj", "weight", "0")) == ("q_proj", "weight")
    assert core(("ve", "0")) == ("ve", "0")
    assert optimizers({"ve": [(100, 8), (100, 8)]}) == {"ve/0": "adamw", "ve/1": "adamw"}


def test_every_role_has_a_source_and_a_place():
    for role in ADAMW_ROLES:
        assert role.source
        assert role.where in ("any", "near", "leaf", "top")


def test_first_role_in_the_table_counts():
    role, name = adamw_role(("embeddings", "LayerNorm", "scale")) or pytest.fail("no role")
    assert (role.name, name) == ("embedding", "embeddings")
