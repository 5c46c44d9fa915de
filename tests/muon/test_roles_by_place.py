"""Roles by the place in the pytree: output heads, cells, adapters, noise, siblings."""

import jax
import jax.numpy as jnp
import pytest

import muonclip_jax as mc
from tests.support.golden_tables import unfolded


def table_of(tree):
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in tree.items()}
    return mc.routing_table(shapes)


def result_of(tree, path):
    """Returns `adamw` or the number of matrices and their sides, and the warning if any."""
    table = table_of(tree)
    row = next(row for row in table.rows if row.path == path)
    result = "adamw" if row.optimizer == "adamw" else (row.num_matrices, row.n_in, row.n_out)
    named = (text for text in table.warnings if path in unfolded(text.split(" (")[0]))
    return result, next(named, "")


# Output heads


@pytest.mark.parametrize(
    "tree",
    [
        {"medusa_heads/0/out/kernel": (512, 32000)},
        {"medusa_head/0/1/weight": (32000, 512), "medusa_head/0/0/linear/weight": (512, 512)},
        {"policy_head/Dense_1/kernel": (64, 10), "policy_head/Dense_0/kernel": (64, 64)},
    ],
)
def test_the_last_layer_below_a_head_is_a_head(tree):
    path, *others = tree
    assert result_of(tree, path) == ("adamw", "")
    assert all(result_of(tree, other)[0] != "adamw" for other in others)


LAYER = {"norm/scale": (64,), "attn/query/kernel": (64, 4, 16), "attn/out/kernel": (4, 16, 64)}
LAYER |= {"mlp/up/kernel": (64, 256), "mlp/down/kernel": (256, 64)}
BLOCK = {f"block_0/{path}": shape for path, shape in LAYER.items()}


@pytest.mark.parametrize(
    ("path", "shape", "doubt"),
    [
        ("block_0/readout/kernel", (64, 10), "no name confirms it"),
        ("readout", (64, 64), "no name confirms it"),
        ("MLP_0/Dense_1/kernel", (64, 28), "may be an output head"),
        ("decoder/linear_1/w", (64, 256), "may be an output head"),
        ("action_out_proj/kernel", (64, 256), "may be an output head"),
    ],
)
def test_what_may_be_an_output_head_is_doubted(path, shape, doubt):
    first = path.replace("_1/", "_0/")
    tree = {**BLOCK, **({first: (64, 64)} if first != path else {}), path: shape}
    assert doubt in result_of(tree, path)[1]


@pytest.mark.parametrize(
    "path", ["block_0/attn/out_proj/kernel", "time_mlp_out/kernel", "decoder/up/kernel"]
)
def test_hidden_layers_are_not_doubted(path):
    assert result_of({**BLOCK, path: (64, 64)}, path) == ((1, 64, 64), "")


def test_parallel_layers_with_outputs_that_nothing_reads_are_heads():
    tree = {"actor/MLP_0/Dense_0/kernel": (17, 64), "actor/MLP_0/Dense_1/kernel": (64, 64)}
    numbered = {**tree, "actor/Dense_0/kernel": (64, 6), "actor/Dense_1/kernel": (64, 6)}
    named = {**tree, "actor/mean/kernel": (64, 6), "actor/log_std/kernel": (64, 6)}
    for heads in (numbered, named):
        for path in list(heads)[2:]:
            optimizer, doubt = result_of(heads, path)
            assert optimizer == "adamw"
            assert "no name confirms it" in doubt


def test_a_dense_layer_inside_a_language_head_is_hidden():
    tree = {"embed/embedding": (100, 64), "lm_head/dense/kernel": (64, 64)}
    assert result_of(tree, "lm_head/dense/kernel") == ((1, 64, 64), "")
    del tree["embed/embedding"]
    optimizer, doubt = result_of(tree, "lm_head/dense/kernel")
    assert optimizer == "adamw"
    assert "equal sizes" in doubt


# Vectors of each head, noise


def test_noise_beside_a_mean_goes_to_adamw():
    tree = {"sigma/w": (32, 64), "mu/w": (32, 64), "Dense_0/kernel": (64, 64)}
    assert result_of(tree, "sigma/w") == ("adamw", "")
    assert "noise" in result_of({"sigma/w": (32, 64)}, "sigma/w")[1]


def test_the_bonus_of_each_head_is_a_vector_beside_receptance():
    tree = {"att/u": (4, 16), "att/w": (4, 16), "att/receptance/kernel": (64, 64)}
    assert result_of(tree, "att/u") == result_of(tree, "att/w") == ("adamw", "")
    assert "RWKV" in result_of({"att/u": (4, 16)}, "att/u")[1]


def test_a_matrix_of_states_is_doubted():
    assert "state-space" in result_of({"mixer/A": (64, 16)}, "mixer/A")[1]
    assert (
        result_of({"mixer/A": (64, 16), "mixer/dt_proj/kernel": (4, 64)}, "mixer/A")[0] == "adamw"
    )
    assert result_of({"lora/A": (64, 4), "lora/B": (4, 64)}, "lora/A")[0] == (1, 64, 4)


def test_low_ranks_of_rwkv_are_matrices():
    tree = {f"blocks/0/{name}1": (64, 8) for name in "wgv"}
    tree |= {f"blocks/0/{name}2": (8, 64) for name in "wgv"} | {"blocks/0/ln/weight": (64,)}
    tree |= {"blocks/0/ffn/key/weight": (256, 64), "blocks/0/ffn/value/weight": (64, 256)}
    for name in "wgv":
        assert result_of(tree, f"blocks/0/{name}1")[0] == (1, 64, 8)
        assert result_of(tree, f"blocks/0/{name}2")[0] == (1, 8, 64)
    assert result_of(tree, "blocks/0/ffn/key/weight")[0] == (1, 64, 256)
    assert result_of(tree, "blocks/0/ffn/value/weight")[0] == (1, 256, 64)
    assert result_of({"h/g1": (4, 64), "h/g2": (4, 64)}, "h/g1")[0] == "adamw"


# Storage


@pytest.mark.parametrize("end", ["", "/weight", "/default/weight"])
def test_the_rank_of_one_adapter_is_its_short_side(end):
    assert result_of({f"q/lora_A{end}": (8, 512)}, f"q/lora_A{end}") == ((1, 512, 8), "")
    assert result_of({f"q/lora_A{end}": (512, 8)}, f"q/lora_A{end}") == ((1, 512, 8), "")
    assert result_of({f"q/lora_B{end}": (512, 8)}, f"q/lora_B{end}") == ((1, 8, 512), "")
    square = {f"q/lora_A{end}": (8, 512), f"q/lora_B{end}": (512, 8)}
    assert result_of(square, f"q/lora_B{end}") == ((1, 8, 512), "")


@pytest.mark.parametrize("end", ["_l0", "_l1_reverse", ""])
def test_weights_of_cells_are_stored_outputs_first(end):
    tree = {f"cell/weight_ih{end}": (48, 16), f"cell/weight_hh{end}": (64, 16)}
    assert result_of(tree, f"cell/weight_ih{end}") == ((1, 16, 48), "")
    assert result_of(tree, f"cell/weight_hh{end}") == ((1, 16, 64), "")


def test_gates_of_a_cell_are_a_matrix_each():
    path = "rnn/input_proj/weight"
    assert result_of({path: (96, 4, 64)}, path) == ((4, 96, 64), "")


@pytest.mark.parametrize("name", ["weight", "weight_v"])
def test_a_bias_shows_a_transposed_convolution(name):
    tree = {f"ups/0/{name}": (64, 32, 16), "ups/0/bias": (32,)}
    assert result_of(tree, f"ups/0/{name}") == ((1, 64, 512), "")


def test_the_first_convolution_of_one_channel_is_doubted():
    tree = {"stem/conv1/kernel": (3, 3, 1, 64), "stem/conv2/kernel": (3, 3, 64, 64)}
    assert "first convolution" in result_of({**tree, "up/kernel": (8, 64)}, "stem/conv1/kernel")[1]
    pointwise = {"stem/conv2/kernel": (1, 1, 32, 64), "up/kernel": (8, 64)}
    assert result_of({**tree, **pointwise}, "stem/conv1/kernel") == ("adamw", "")


def test_spectral_convolutions_are_doubted():
    path = "SpectralConv2d_0/kernel"
    assert "frequency" in result_of({path: (64, 64, 12, 12)}, path)[1]


def test_queries_by_a_convolution_of_one_pixel_are_a_matrix():
    tree = {f"attn/{x}/kernel": (1, 1, 64, 64) for x in "qkv"}
    assert result_of(tree, "attn/k/kernel") == ((1, 64, 64), "")


# Heads by siblings


def test_names_behind_a_prefix_are_queries_keys_and_values():
    tree = {f"transformer{x}_projection/weights": (64, 4, 8) for x in "qkv"}
    tree |= {"cond_norm/scale": (32,)}
    assert result_of(tree, "transformerk_projection/weights") == ((1, 64, 32), "")
    alone = {"mask_projection/weights": (64, 4, 8), "cond_norm/scale": (32,)}
    assert result_of(alone, "mask_projection/weights")[0] == (64, 4, 8)


def test_queries_stored_outputs_first_beside_values_stored_inputs_first():
    tree = {"attn/q_projection/weights": (5, 4, 8, 32), "attn/v_projection/weights": (5, 32, 4, 8)}
    tree |= {"attn/act_norm/scale": (5, 32)}
    for path in list(tree)[:2]:
        assert result_of(tree, path) == ((5, 32, 32), "")


def test_output_projections_stored_as_queries_one_module_below():
    tree = {f"attn/core/i_proj/{x}_proj/weight": (5, 64, 4, 16) for x in "qkv"}
    tree |= {"attn/core/o_proj/weight": (5, 64, 4, 16), "attn/norm/scale": (5, 64)}
    assert result_of(tree, "attn/core/o_proj/weight") == ((5, 64, 64), "")
    others = {path: shape for path, shape in tree.items() if "i_proj" not in path}
    assert result_of(others, "attn/core/o_proj/weight")[1]


def test_inputs_of_kernels_with_heads_are_inputs_of_the_kernels_beside_them():
    tree = {"ffw/wx_in": (64, 4, 16), "ffw/w_out": (4, 16, 64), "ffw/wb_in": (64, 2, 24)}
    tree |= {"embedding": (100, 64), "ffw/norm/scale": (64,)}
    assert result_of(tree, "ffw/wb_in") == ((1, 64, 48), "")
    del tree["ffw/w_out"]
    assert result_of(tree, "ffw/wb_in")[1]


def test_many_small_square_blocks_are_doubted():
    tree = {"xlstm/q_proj/kernel": (384, 4, 4), "xlstm/norm/scale": (384,)}
    assert "blocks of a diagonal" in result_of(tree, "xlstm/q_proj/kernel")[1]
