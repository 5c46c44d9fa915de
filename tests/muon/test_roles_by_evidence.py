"""Names and shapes that look like another role: parameters beside them decide, or it warns."""

import pytest

import muonclip_jax as mc
from tests.support.role_checks import roles_of, shapes_of, warnings_of


def is_warned(tree, path, text=""):
    """Returns whether a warning names a parameter and has a text."""
    return any(w.startswith(f"{path} (") and text in w for w in warnings_of(tree))


# One letter


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("names", ["g u d", "G U D"])
def test_one_letter_gates_are_matrices_beside_a_transposed_one(lead, names):
    gate, up, down = names.split()
    mlp = {gate: (*lead, 64, 128), up: (*lead, 64, 128), down: (*lead, 128, 64)}
    tree = {"m": mlp, "tok": (256, 64)}
    count = lead[0] if lead else 1
    assert roles_of(tree) == {
        f"m/{gate}": (count, 64, 128),
        f"m/{up}": (count, 64, 128),
        f"m/{down}": (count, 128, 64),
        "tok": "adamw",
    }
    assert not warnings_of(tree)


def test_one_letter_gains_are_vectors_and_large_ones_are_doubted():
    tree = {"m": {"g": (3, 64), "u": (3, 64, 128), "d": (3, 128, 64)}, "tok": (256, 64)}
    assert roles_of(tree)["m/g"] == "adamw"
    assert not warnings_of(tree)
    assert is_warned({"m": {"g": (64, 128)}}, "m/g")


def test_a_short_bias_with_the_sides_of_its_matrix_is_doubted():
    assert is_warned({"mlp": {"w": (64, 128), "b": (64, 128), "c": (128, 64)}}, "mlp/b")
    assert not is_warned({"mlp": {"w": (3, 64, 128), "b": (3, 128)}}, "mlp/b")


def test_a_lone_v_beside_w_is_no_value_projection():
    tree = {"tok": (256, 64), "to_bytes": (64, 256), "mlp": {"w": (64, 256), "v": (256, 64)}}
    assert roles_of(tree)["mlp/v"] == (1, 256, 64)
    experts = {"w": (8, 64, 256), "v": (8, 64, 256), "o": (8, 256, 64), "sel": (64, 8)}
    assert roles_of({"moe": experts, "tok": (1000, 64)})["moe/sel"] == "adamw"


# Axes that are no layers or experts


def test_a_square_output_projection_is_no_stack_of_vectors():
    heads = dict.fromkeys(("ask", "tell", "what"), (32, 4, 8))
    tree = {"mix": {**heads, "back": (32, 32)}, "tok": (256, 32)}
    assert roles_of(tree)["mix/back"] == (1, 32, 32)
    assert is_warned(tree, "mix/back", '"mix/back": None')


def test_vectors_of_stacked_layers_beside_unstacked_parameters():
    layers = {"q": (6, 64, 4, 16), "o": (6, 4, 16, 64), "x": (6, 64, 256), "n": (6, 64)}
    assert roles_of({**layers, "last": (64,)})["n"] == "adamw"


def test_stacks_in_doubt_make_no_router():
    tree = {"ff": {"up": (32, 2, 64), "gate_up": (32, 2, 64), "w_out": (64, 32)}}
    assert roles_of(tree) == {
        "ff/up": (2, 32, 64),
        "ff/gate_up": (2, 32, 64),
        "ff/w_out": (1, 64, 32),
    }
    small = {"mix": {"ask": (64, 16, 32), "tell": (64, 16, 32), "back": (16, 64)}}
    assert is_warned(small, "mix/back", "experts")


def test_gate_and_up_on_the_middle_axis():
    assert roles_of({"m": {"w1": (64, 2, 256), "w2": (256, 64)}})["m/w1"] == (2, 64, 256)
    experts = {"pick": (64, 8), "w1": (8, 64, 2, 256), "w2": (8, 256, 64)}
    assert roles_of({"m": experts})["m/w1"] == (16, 64, 256)
    alone = {"m": {"x": (64, 2, 256)}}
    (text,) = warnings_of(alone)
    assert "mc.MuonDimensionNumbers(-3, -1)" in text
    assert "mc.MuonDimensionNumbers(-3, (-2, -1))" in text
    assert "mc.MuonDimensionNumbers(-2, -1)" not in text


def test_two_matrices_on_a_short_middle_axis_are_proposed():
    (text,) = warnings_of({"mixture": (64, 4, 16)})
    assert (
        'For 4 matrices of 64 x 16: overrides={"mixture": mc.MuonDimensionNumbers(-3, -1)}' in text
    )
    table = mc.routing_table(
        shapes_of({"mixture": (64, 4, 16)}), overrides={"mixture": mc.MuonDimensionNumbers(-3, -1)}
    )
    assert (table.rows[0].num_matrices, table.warnings) == (4, ())


def test_the_rank_beside_an_adapter_shows_its_heads():
    tree = {"attn": {"q": {"lora_a": (64, 4), "lora_b": (4, 8, 8)}}}
    assert roles_of(tree)["attn/q/lora_b"] == (1, 4, 64)
    assert not warnings_of(tree)
    other = {"attn": {"q": {"lora_a": (64, 2), "lora_b": (4, 8, 8)}}}
    assert is_warned(other, "attn/q/lora_b")


# Other look-alikes


def test_queries_beside_keys_are_no_learned_tokens():
    heads = dict.fromkeys(("queries", "keys", "values"), (64, 4, 16))
    tree = {"attn": {**heads, "mix": (4, 16, 64)}}
    assert set(roles_of(tree).values()) == {(1, 64, 64)}
    assert roles_of({"pool": {"queries": (32, 64), "keys": (64, 64)}})["pool/queries"] == "adamw"


def test_the_bias_of_a_router_is_no_bias_of_the_experts():
    experts = {"bias": (16,), "w1": (16, 128, 64), "w2": (16, 64, 128), "pick": (128, 16)}
    found = roles_of({"moe": experts})
    assert (found["moe/w1"], found["moe/w2"]) == ((16, 128, 64), (16, 64, 128))


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"E": (1000, 64), "b": {"x": (64, 256), "y": (256, 64)}, "H": (64, 1000)}, "E"),
        ({"E": (1000, 64), "b": {"x": (64, 256), "y": (256, 64)}, "H": (64, 1000)}, "H"),
        ({"Wx": (64, 512), "Wh": (128, 512), "Wy": (128, 10)}, "Wy"),
        ({"dec": {"w": (64, 10), "b": (10,)}, "enc": {"x": (32, 64)}}, "dec/w"),
        ({"moe": {"pick": (64, 8), "nets": [{"up": (64, 128)}] * 8}, "x": (64, 8)}, "moe/pick"),
        ({"down": [(3, 64, 64), (3, 64, 128)]}, "down/0"),
        ({"stem": (7, 80, 256), "up": (256, 64)}, "stem"),
        ({"mlp": {"w1": (256, 64), "w2": (64, 256)}}, "mlp/w1"),
        ({"attn": {"alpha_proj": (96, 6), "q": (96, 96)}}, "attn/alpha_proj"),
    ],
)
def test_roles_that_nothing_confirms_are_doubted(tree, path):
    assert is_warned(tree, path)


def test_matrices_of_a_state_space_model_under_raw_names():
    layer = {"A": (64, 16), "B": (64, 16), "C": (64, 16), "D": (64,), "step": (64,)}
    found = roles_of({"ssm": layer})
    assert {found[f"ssm/{name}"] for name in "ABC"} == {"adamw"}
    assert roles_of({"m": {"Alog": (256, 16)}}) == {"m/Alog": "adamw"}


def test_two_matrices_of_a_time_embedding_are_dense_layers():
    tree = {"t_emb": {"w1": (256, 96), "w2": (96, 96)}, "x": (96, 96)}
    assert roles_of(tree)["t_emb/w1"] == (1, 256, 96)
