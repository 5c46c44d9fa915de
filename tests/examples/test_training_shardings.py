"""How the training program shards parameters, moments and batches over a mesh."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from examples.language_model.models import logical_axes
from examples.language_model.models.logical_axes import AXES
from examples.language_model.training import loop, mesh
from tests.support.tiny_run import CONFIG
from tests.support.training_meshes import EIGHT, EXPERT, trainer_on

# The rules


@pytest.mark.parametrize(
    ("names", "shape", "sizes", "spec"),
    [
        (("embed", "mlp"), (16, 24), EIGHT, P("fsdp", "tensor")),
        (("layers", "embed", "heads", "head_dim"), (2, 16, 4, 8), EIGHT, P(None, "fsdp", "tensor")),
        (("vocab", "embed"), (256, 16), EIGHT, P("tensor", "fsdp")),
        (("embed", "latent"), (16, 12), EIGHT, P("fsdp")),
        (("latent", "heads"), (12, 48), EIGHT, P("fsdp", "tensor")),
        (("experts", "embed", "mlp"), (4, 16, 8), EXPERT, P("expert", "fsdp", "tensor")),
        (("embed", "mlp"), (16, 24), EXPERT, P(("fsdp", "expert"), "tensor")),
        ((None, "batch", None), (1, 8, 17), EIGHT, P(None, ("data", "fsdp"))),
        (("batch",), (8,), EXPERT, P(("fsdp", "expert"))),
        (("expert_batch", "experts"), (8, 4), EXPERT, P("fsdp", "expert")),
        (("embed_batch", None, "embed"), (8, 16, 16), EIGHT, P("data", None, "fsdp")),
        ((), (16,), EIGHT, P()),
    ],
)
def test_rules_give_the_partition_spec(names, shape, sizes, spec):
    divided, notes = logical_axes.partition(names, shape, mesh.make_mesh(sizes))
    assert tuple(divided) == (*spec, *[None] * (len(shape) - len(spec)))
    assert notes == ()


@pytest.mark.parametrize(
    ("name", "size", "sizes", "spec", "note"),
    [
        ("kv_heads", 2, {"tensor": 8}, None, "by tensor=8; replicated instead"),
        (
            "batch",
            6,
            {"data": 2, "fsdp": 4},
            "data",
            "by data=2,fsdp=4; sharded over data=2 instead",
        ),
        (
            "batch",
            12,
            {"data": 2, "fsdp": 4},
            "fsdp",
            "by data=2,fsdp=4; sharded over fsdp=4 instead",
        ),
        (
            "embed",
            6,
            {"fsdp": 2, "expert": 4},
            "fsdp",
            "by fsdp=2,expert=4; sharded over fsdp=2 instead",
        ),
        ("batch", 1, None, None, "by fsdp=8; replicated instead"),
    ],
)
def test_size_that_is_not_divisible_falls_back_to_the_next_rule(name, size, sizes, spec, note):
    divided, (line,) = logical_axes.partition((name,), (size,), mesh.make_mesh(sizes))
    assert divided == P(spec)
    assert line.startswith(f"{name}: size {size} is not divisible by ")
    assert line.endswith(note)


def test_rules_and_axes_have_the_same_names():
    whole = {"head_dim", "rope", "router", "layers"}
    assert {name for name, _ in logical_axes.RULES} == AXES.keys() - whole


@pytest.mark.parametrize("model", ["gqa", "mla", "moe"])
def test_every_matrix_of_a_model_has_names(model):
    made = loop.make_model(dataclasses.replace(CONFIG, model=model))
    boxed = jax.eval_shape(made.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    specs = jax.tree_util.tree_leaves_with_path(nn.get_partition_spec(boxed))
    for path, spec in specs:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "norm" not in name:
            assert spec, name
            assert set(spec) <= AXES.keys(), name


# Placement


def specs(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): x.sharding.spec for k, x in leaves}


def test_weights_of_experts_are_sharded_over_expert():
    weights = specs(trainer_on(EXPERT, model="moe").target.params)
    assert weights["moe_blocks/moe/experts/up"] == P(None, "expert", "fsdp", "tensor")
    assert weights["moe_blocks/moe/experts/down"] == P(None, "expert", "tensor", "fsdp")
    assert weights["moe_blocks/moe/shared/up/kernel"] == P(None, ("fsdp", "expert"), "tensor")
    assert weights["moe_blocks/attn/q_b/kernel"] == P(None, ("fsdp", "expert"), "tensor")
    assert weights["moe_blocks/moe/router/kernel"] == P(None, ("fsdp", "expert"), None)


@pytest.mark.parametrize("optimizer", ["muonclip", "adamw"])
def test_moments_are_sharded_as_their_parameters_and_the_rest_replicated(optimizer):
    target = trainer_on(EIGHT, optimizer=optimizer).target
    weights, moments = specs(target.params), specs(target.opt_state)
    found = set()
    for path, spec in moments.items():
        names = [name for name in weights if path.endswith(name)]
        assert spec == (weights[names[0]] if names else P()), path
        found.update(names)
    assert found == weights.keys()
    assert set(specs(target.ever_clipped).values()) == {P()}


def test_no_device_holds_a_full_parameter_at_initialization():
    made = trainer_on(EIGHT)
    shardings = jax.tree.map(lambda x: x.sharding, made.target)
    with jax.set_mesh(made.shardings.mesh):
        compiled = jax.jit(made.initial_state, out_shardings=shardings).lower().compile()
        state = made._initialize()
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    text = compiled.as_text()
    assert text is not None
    for x in jax.tree.leaves(made.target.params):
        if not x.sharding.is_fully_replicated:
            whole = f"f32[{','.join(map(str, x.shape))}]"
            part = f"f32[{','.join(map(str, x.sharding.shard_shape(x.shape)))}]"
            assert whole not in text
            assert part in text


def test_every_micro_batch_is_sharded():
    made = trainer_on(EIGHT, accumulate=2)
    text = made._text(made._draw(1))
    assert text.shape == (2, 4, CONFIG.seq_len + 1)
    assert {shard.data.shape for shard in text.addressable_shards} == {(2, 1, 17)}


@pytest.mark.parametrize("rows", [[2, 3, 6, 7], [0], range(8)])
def test_process_draws_only_the_sequences_of_its_devices(rows):
    class Sharding:
        def addressable_devices_indices_map(self, shape):
            return {row: (slice(None), slice(row, row + 1), slice(None)) for row in rows}

    sharding: Any = Sharding()
    assert mesh.local_sequences(sharding, (2, 8, 17)).tolist() == list(rows)
