"""Parameters whose names or shapes suggest another role: the parameters beside them decide."""

import pytest

from tests.support.role_checks import roles_of, warnings_of


def doubts_of(tree):
    """Returns the warnings by the path with which they begin."""
    return {text.split(" (")[0]: text for text in warnings_of(tree)}


# Several matrices beside their bias


@pytest.mark.parametrize("name", ["wi", "gate_up_proj"])
@pytest.mark.parametrize("bias", [{}, {"bias": (2, 256)}])
def test_fused_gate_and_up_are_two_matrices_with_and_without_a_bias(name, bias):
    tree = {"mlp": {name: {"kernel": (64, 2, 256), **bias}}}
    assert roles_of(tree)[f"mlp/{name}/kernel"] == (2, 64, 256)
    assert not warnings_of(tree)


def test_fused_kernels_with_a_bias_and_any_name_are_split_by_the_kernel_beside_them():
    mlp = {"wi_kernel": (64, 2, 256), "wi_bias": (2, 256), "x": {"kernel": (64, 2, 256)}}
    mlp |= {"wo_kernel": (256, 64), "y": {"kernel": (64, 2, 256), "bias": (2, 256)}}
    assert {roles_of(mlp)[path] for path in ("wi_kernel", "x/kernel", "y/kernel")} == {(2, 64, 256)}
    fused = {"in_proj": {"kernel": (64, 3, 4, 16), "bias": (3, 4, 16)}}
    raw = {"in_proj": {"kernel": (64, 3, 4, 16)}}
    for projection, out in ((fused, (4, 16, 64)), (fused, (64, 64)), (raw, (4, 16, 64))):
        tree = {"attn": {**projection, "out_proj": {"kernel": out}}}
        assert roles_of(tree)["attn/in_proj/kernel"] == (3, 64, 64)
        assert not warnings_of(tree)


def test_few_outputs_that_nothing_explains_are_doubted_with_both_overrides():
    for shape, one, each in (
        ((64, 2, 256), "-3, (-2, -1)", "-3, -1"),
        ((64, 3, 4, 16), "-4, (-3, -2, -1)", "-4, (-2, -1)"),
    ):
        tree = {"x": {"kernel": shape, "bias": shape[1:]}}
        text = doubts_of(tree)["x/kernel"]
        assert f'"x/kernel": mc.MuonDimensionNumbers({one})' in text
        assert f'"x/kernel": mc.MuonDimensionNumbers({each})' in text


def test_few_outputs_with_the_sizes_of_heads_are_one_matrix():
    gate = {"gating_w": (64, 2, 32), "gating_b": (2, 32)}
    for beside in ({"query_w": (64, 2, 32), "output_w": (2, 32, 64)}, {"back": (2, 32, 64)}):
        tree = {"attention": {**gate, **beside}}
        assert roles_of(tree)["attention/gating_w"] == (1, 64, 64)
        assert not warnings_of(tree)


@pytest.mark.parametrize("shape", [(8, 2, 64, 256), (2, 8, 64, 256), (4, 2, 64, 256)])
def test_gate_and_up_of_experts_are_a_matrix_for_each(shape):
    experts = max(shape[:2])
    for name in ("gating_einsum", "wi", "gate_up_proj"):
        tree = {"moe": {name: shape, "linear": (experts, 256, 64)}, "norm": {"scale": (64,)}}
        assert roles_of(tree)[f"moe/{name}"] == (2 * experts, 64, 256)
        assert not warnings_of(tree)


# A first axis of 1 in a numbered layer


@pytest.mark.parametrize("layer", ["layers_0", "blocks/0", "layers"])
def test_a_first_axis_of_one_in_a_numbered_layer_is_for_broadcasting(layer):
    lead = (5,) if layer == "layers" else ()
    tree = {f"{layer}/norm/scale": (*lead, 64), f"{layer}/modulation": (*lead, 1, 6, 64)}
    tree |= {f"{layer}/q/kernel": (*lead, 64, 64), f"{layer}/I": (*lead, 1, 8, 64)}
    assert roles_of(tree)[f"{layer}/modulation"] == "adamw"
    assert "for broadcasting" in doubts_of(tree)[f"{layer}/I"]
    assert len(doubts_of(tree)) == 1


def test_stacks_of_one_matrix_are_matrices():
    tree = {"layers_0": {"mlp": {"up": (1, 64, 256), "down": (1, 256, 64)}, "norm/scale": (64,)}}
    assert roles_of(tree)["layers_0/mlp/up"] == (1, 64, 256)
    assert roles_of({"layers": {"mix": (1, 64, 256)}})["layers/mix"] == (1, 64, 256)
    unnamed = {"layers_0": {"x": (1, 64, 256), "y": (1, 256, 64)}}
    assert not warnings_of(tree)
    assert "sides of a matrix" in doubts_of(unnamed)["layers_0/x"]


# Tables and vectors beside kernels


ATTENTION = {f"attn/{name}/kernel": (64, 64) for name in ("q", "k", "v", "o")}


@pytest.mark.parametrize("name", ["Er", "memories", "gq"])
@pytest.mark.parametrize("lead", [(), (5,)])
def test_arrays_that_are_no_kernel_are_doubted_in_a_model_of_kernels(name, lead):
    layer = "layers" if lead else "layers_0"
    shapes = {**ATTENTION, f"attn/{name}": (33, 16), "norm/scale": (64,)}
    tree = {f"{layer}/{path}": (*lead, *shape) for path, shape in shapes.items()}
    text = doubts_of(tree)[f"{layer}/attn/{name}"]
    assert "no kernel" in text
    assert f'overrides={{"{layer}/attn/{name}": None}}' in text
    assert len(doubts_of(tree)) == 1


@pytest.mark.parametrize(
    "extra",
    [
        {"attn/x": (64, 8), "attn/y": (8, 64)},
        {"attn/x_proj": (64, 64)},
        {"attn/mix": (64, 64), "attn/mix_bias": (64,)},
        {"moe/w1": (4, 64, 32), "moe/w2": (4, 32, 64)},
        {"moe/experts": (4, 64, 32), "moe/other": (4, 64, 32)},
        {"attn/x_down": (64, 8), "attn/x_up": (8, 96), "attn/y/kernel": (96, 64)},
        {"attn/uvqk": (64, 256), "attn/norm/scale": (64,), "attn/y/kernel": (128, 64)},
    ],
)
def test_arrays_with_evidence_of_a_matrix_are_not_doubted_beside_kernels(extra):
    layer = {f"layers_0/{k}": shape for k, shape in {**ATTENTION, **extra}.items()}
    assert not warnings_of({**layer, "x/kernel": (64, 64)})


@pytest.mark.parametrize("name", ["Wz", "W_hh", "w1", "fc", "lin", "proj_matrix"])
def test_arrays_with_the_name_of_a_matrix_are_not_doubted_beside_kernels(name):
    layer = {
        "q/kernel": (64, 64),
        "k/kernel": (64, 64),
        "norm/scale": (64,),
        f"cell/{name}": (64, 64),
    }
    assert not warnings_of({"layers_0": layer, "layers_1": layer})


@pytest.mark.parametrize("name", ["pos_enc", "position_encoding", "pe", "learned_pos"])
def test_a_positional_table_named_weight_is_not_doubted(name):
    """`equinox.nn.Embedding` and `torch.nn.Embedding` have a `weight`."""
    layer = {"q/weight": (64, 64), "k/weight": (64, 64), "norm/weight": (64,)}
    tree = {f"{name}/weight": (50, 64), "layers": {"0": layer, "1": layer}}
    assert roles_of(tree)[f"{name}/weight"] == "adamw"
    assert not warnings_of(tree)


def test_arrays_of_a_model_without_modules_are_not_doubted():
    tree = {"layers_0": {"mix": (64, 96), "other": (96, 32)}, "x": {"kernel": (32, 32)}}
    assert not warnings_of(tree)


@pytest.mark.parametrize("name", ["rel_height", "relative_keys", "rpe", "sqk", "tau", "inv_temp"])
def test_tables_and_vectors_of_each_head_go_to_adamw_by_name(name):
    assert roles_of({"layers_0": {"attn": {name: (4, 16)}}})[f"layers_0/attn/{name}"] == "adamw"


# Kernels of dense layers below the names of vectors, tables and heads


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"linear_pos/kernel": (64, 64)}, "linear_pos/kernel"),
        ({"film/gamma/kernel": (32, 64), "film/gamma/bias": (64,)}, "film/gamma/kernel"),
        ({"rel_pos/Dense_0/kernel": (2, 64), "rel_pos/Dense_0/bias": (64,)}, "rel_pos/Dense_0/ke"),
        (
            {"layernorm_qkv/kernel": (64, 192), "layernorm_qkv/scale": (64,)},
            "layernorm_qkv/kernel",
        ),
        ({"layernorm_mlp/wo_kernel": (256, 64)}, "layernorm_mlp/wo_kernel"),
        ({"layernorm_mlp/wi_kernel": (64, 2, 256)}, "layernorm_mlp/wi_kernel"),
    ],
)
def test_dense_layers_below_the_names_of_vectors_are_matrices(tree, path):
    shapes = {f"layers_{i}/{name}": shape for i in range(2) for name, shape in tree.items()}
    found = {name: role for name, role in roles_of(shapes).items() if f"layers_0/{path}" in name}
    assert found
    assert "adamw" not in found.values()


def test_dense_layers_of_stacked_layers_below_the_name_of_a_norm_are_matrices():
    mlp = {"scale": (5, 64), "wi_kernel": (5, 64, 2, 256), "wi_bias": (5, 2, 256)}
    mlp |= {"wo_kernel": (5, 256, 64), "wo_bias": (5, 64)}
    for tree in (mlp, {path: shape for path, shape in mlp.items() if path != "scale"}):
        found = roles_of({"layers": {"layernorm_mlp": tree}})
        assert found["layers/layernorm_mlp/wi_kernel"] == (10, 64, 256)
        assert found["layers/layernorm_mlp/wo_kernel"] == (5, 256, 64)


def test_projections_below_the_name_of_a_norm_are_doubted():
    tree = {"layers_0/bn/down": (64, 48), "layers_0/bn/up": (48, 64), "x/kernel": (64, 64)}
    assert {"layers_0/bn/down", "layers_0/bn/up"} <= doubts_of(tree).keys()


@pytest.mark.parametrize("name", ["Gamma", "ada_norm", "position"])
def test_a_kernel_of_two_axes_below_the_name_of_a_vector_is_doubted(name):
    layer = {f"{name}/kernel": (32, 64), "up/kernel": (32, 64)}
    tree = {f"layers_{i}/{path}": shape for i in range(2) for path, shape in layer.items()}
    assert roles_of(tree)[f"layers_0/{name}/kernel"] == "adamw"
    (text,) = warnings_of(tree)
    assert "two axes of a kernel" in text


def test_kernels_of_norms_in_stacked_layers_are_vectors():
    for norm in ("attention_norm", "mlp_norm"):
        layer = {f"{norm}/kernel": (32, 64), "up/kernel": (32, 64, 256), "last/kernel": (64, 8)}
        assert roles_of(layer)[f"{norm}/kernel"] == "adamw"
        assert not any("norm" in text for text in warnings_of(layer))


def test_the_layer_before_a_tied_table_is_hidden():
    tree = {"embed/embedding": (300, 32), "predictions/dense/kernel": (64, 32), "x/kernel": (64, 8)}
    tied = {**tree, "predictions/bias": (300,)}
    normed = {**tree, "predictions/LayerNorm/scale": (32,)}
    assert roles_of(tied)["predictions/dense/kernel"] == (1, 64, 32)
    assert roles_of(normed)["predictions/dense/kernel"] == (1, 64, 32)
    assert "no name confirms it" in doubts_of(tree)["predictions/dense/kernel"]
    other = {**tied, "predictions/dense/kernel": (64, 10)}
    assert roles_of(other)["predictions/dense/kernel"] == "adamw"


@pytest.mark.parametrize("path", ["encoder/Conv_{}/kernel", "net2/conv/{}/conv/kernel"])
def test_the_first_convolution_of_mono_audio_is_doubted(path):
    tree = {path.format(0): (7, 1, 32), path.format(1): (7, 32, 64)}
    assert "first convolution" in doubts_of(tree)[path.format(0)]
    depthwise = {**tree, path.format(1): (7, 1, 32)}
    assert not warnings_of(depthwise)
    gains = {path.format(i): (32, 1, 1) for i in range(2)}
    assert not warnings_of(gains)


# Bottlenecks, which project down first


MODEL = {"embed/embedding": (300, 64), "norm/scale": (64,), "mlp/up/kernel": (64, 256)}
MODEL |= {"attn/q/kernel": (64, 64), "attn/k/kernel": (64, 64), "mlp/down/kernel": (256, 64)}


@pytest.mark.parametrize("module", ["adapter", "mla", "adapter_mlp"])
@pytest.mark.parametrize("ends", [("down", "up"), ("w_down", "w_up")])
@pytest.mark.parametrize("outputs_first", [False, True])
def test_down_and_up_of_a_bottleneck(module, ends, outputs_first):
    down, up = (f"{module}/{name}" for name in ends)
    shapes = {down: (64, 8), up: (8, 64)}
    if outputs_first:
        shapes = {f"{path}/weight": shape[::-1] for path, shape in shapes.items()}
        shapes |= {"x/weight": (48, 64), "x/bias": (48,)}
    found = roles_of({**MODEL, **shapes})
    assert {path: found[path] for path in found if module in path} == {
        path: (1, *((64, 8) if "down" in path else (8, 64))) for path in shapes if module in path
    }
    assert not any(module in text for text in warnings_of({**MODEL, **shapes}))


def test_down_and_up_of_an_mlp_that_is_narrow_inside():
    for module, beside in (("moe/experts/0", {}), ("glu", {"glu/gate": (48, 64)})):
        tree = {f"{module}/up": (48, 64), f"{module}/down": (64, 48), **beside}
        tree |= {path: shape for path, shape in MODEL.items() if "mlp" not in path}
        assert roles_of(tree)[f"{module}/up"] == (1, 64, 48)
        assert not any(text.startswith(module) for text in warnings_of(tree))
    tree = {**MODEL, "ffn/up": (48, 64), "ffn/down": (64, 48)}
    assert "as in a bottleneck" in doubts_of(tree)["ffn/up"]
    shown = {"ffn/up/weight": (48, 64), "x/weight": (48, 64), "x/bias": (48,)}
    assert not warnings_of({**MODEL, **shown, "ffn/down/weight": (64, 48)})


# Gains of two axes that number no layers


@pytest.mark.parametrize("gain", [(3, 64), (128, 64)])
def test_a_gain_for_each_modality_is_no_stack_of_layers(gain):
    layer = {**ATTENTION, "attn/norm/scale": gain}
    tree = {f"layers_{i}/{path}": shape for i in range(2) for path, shape in layer.items()}
    assert roles_of(tree)["layers_0/attn/q/kernel"] == (1, 64, 64)
    assert not warnings_of(tree)


def test_a_kernel_with_the_first_axis_of_a_gain_is_doubted():
    tree = {f"layers_0/{path}": shape for path, shape in ATTENTION.items()}
    tree["layers_0/attn/norm/scale"] = (64, 64)
    assert "first axis may be its inputs" in doubts_of(tree)["layers_0/attn/q/kernel"]
