"""The training program on eight devices: the mesh, the shardings, and equality with one device."""

import dataclasses
import itertools
import math
import pathlib
import re
import subprocess
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks.compiled import compiled_cost
from examples.language_model import config
from examples.language_model.config import BadInput
from examples.language_model.models import logical_axes
from examples.language_model.models.logical_axes import AXES
from examples.language_model.run_folder import files
from examples.language_model.training import loop, mesh
from examples.language_model.training.step import make_loss
from tests.support.program_command import COMMAND, environment
from tests.support.tiny_run import CONFIG, CORPUS, TEXT, drawn, trainer

EIGHT = {"data": 2, "fsdp": 2, "tensor": 2}
EXPERT = {"fsdp": 2, "tensor": 2, "expert": 2}


# The flag


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data=8", {"data": 8}),
        ("data=2,fsdp=-1", {"data": 2, "fsdp": -1}),
        ("expert=2,tensor=1,data=2,fsdp=2", {"expert": 2, "tensor": 1, "data": 2, "fsdp": 2}),
    ],
)
def test_mesh_flag_is_parsed(text, sizes):
    assert config.parse(["--mesh", text]).mesh == sizes


BAD_MESHES = ["", "8", "data", "data=", "data=0", "data=-2", "data=1.5", "rows=2", "data=2,", "=2"]


@pytest.mark.parametrize("text", [*BAD_MESHES, "data=2,data=4", "data=2;fsdp=2", " data=2"])
def test_invalid_mesh_flag_is_one_line(capsys, text):
    with pytest.raises(SystemExit) as leave:
        config.parse([f"--mesh={text}"])
    assert leave.value.code == 2
    assert capsys.readouterr().err == (
        f"language_model: argument --mesh: got {text!r}, expected axes among data, fsdp, tensor,"
        " expert, each once with its size or -1 for all remaining devices, such as"
        " data=2,fsdp=-1; --help lists every flag\n"
    )


def test_two_sizes_of_minus_one_are_invalid(capsys):
    with pytest.raises(SystemExit):
        config.parse(["--mesh=data=-1,fsdp=-1"])
    assert "got 'data=-1,fsdp=-1', expected -1 for one axis at most" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        (None, (1, 8, 1, 1)),
        ({"tensor": 8}, (1, 1, 8, 1)),
        ({"tensor": 2, "data": -1}, (4, 1, 2, 1)),
        ({"expert": 2, "fsdp": 4, "data": -1}, (1, 4, 1, 2)),
    ],
)
def test_mesh_has_all_four_axes_and_all_devices(sizes, shape):
    made = mesh.make_mesh(sizes)
    assert made.axis_names == ("data", "fsdp", "tensor", "expert")
    assert made.devices.shape == shape


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 3, "fsdp": -1}, {"data": 16}])
def test_mesh_that_does_not_match_the_devices_raises(sizes):
    got = ",".join(f"{name}={size}" for name, size in sizes.items())
    with pytest.raises(BadInput) as error:
        mesh.make_mesh(sizes)
    assert str(error.value) == (
        f"argument --mesh: got {got}, but there are 8 devices; expected sizes whose product is 8,"
        " or -1 for one of them"
    )


def test_commands_of_the_page_parse():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "training_program.md").read_text()
    commands = re.findall(
        r"python -m examples\.language_model (.*--simulate-devices.*)$", page, re.M
    )
    parsed = [config.parse(command.split()) for command in commands]
    assert [one.mesh for one in parsed] == [None, EIGHT, EXPERT]


def program(folder, *flags):
    """The whole program at a tiny size, on eight simulated devices."""
    (folder / "text").write_bytes(TEXT)
    sizes = "--preset tiny --data text --batch-size 8 --seq-len 16 --steps 2 --out run".split()
    return subprocess.run(
        [*COMMAND, "--simulate-devices", "8", *sizes, *flags],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--mesh", "data=3"], "argument --mesh: got data=3, but there are 8 devices; "),
        (["--distributed"], "argument --distributed: coordinator_address should be defined.; "),
    ],
    ids=["mesh", "no cluster"],
)
def test_missing_devices_are_an_error_without_a_folder(tmp_path, flags, line):
    ended = program(tmp_path, *flags)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"language_model: {line}")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
def test_program_trains_on_simulated_devices_and_prints_the_mesh(tmp_path):
    ended = program(tmp_path, "--mesh", "fsdp=2,tensor=-1", "--no-progress")
    assert ended.returncode == 0, ended.stderr
    laid_out = "mesh fsdp=2, tensor=4\nkv_heads: size 2 is not divisible by tensor=4; replicated"
    assert laid_out in ended.stdout
    assert (tmp_path / "run" / "summary.json").exists()


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


# Shardings


def on(sizes, count=8, **changes):
    """A trainer on a number of devices that writes nothing."""
    settings = dataclasses.replace(CONFIG, mesh=sizes, batch_size=8, **changes)
    made = loop.make_model(settings)
    devices = jax.devices()[:count]
    return loop.Trainer(settings, CORPUS, pathlib.Path("unused"), made, devices=devices)


def specs(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): x.sharding.spec for k, x in leaves}


def test_weights_of_experts_are_sharded_over_expert():
    weights = specs(on(EXPERT, model="moe").target.params)
    assert weights["moe_blocks/moe/experts/up"] == P(None, "expert", "fsdp", "tensor")
    assert weights["moe_blocks/moe/experts/down"] == P(None, "expert", "tensor", "fsdp")
    assert weights["moe_blocks/moe/shared/up/kernel"] == P(None, ("fsdp", "expert"), "tensor")
    assert weights["moe_blocks/attn/q_b/kernel"] == P(None, ("fsdp", "expert"), "tensor")
    assert weights["moe_blocks/moe/router/kernel"] == P(None, ("fsdp", "expert"), None)


@pytest.mark.parametrize("optimizer", ["muonclip", "adamw"])
def test_moments_are_sharded_as_their_parameters_and_the_rest_replicated(optimizer):
    target = on(EIGHT, optimizer=optimizer).target
    weights, moments = specs(target.params), specs(target.opt_state)
    found = set()
    for path, spec in moments.items():
        names = [name for name in weights if path.endswith(name)]
        assert spec == (weights[names[0]] if names else P()), path
        found.update(names)
    assert found == weights.keys()
    assert set(specs(target.ever_clipped).values()) == {P()}


def test_no_device_holds_a_full_parameter_at_initialization():
    made = on(EIGHT)
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
    made = on(EIGHT, accumulate=2)
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


# The same numbers


def advance(made, steps):
    """Trains from weights without zeros; weights, losses and largest logits."""
    with jax.set_mesh(made.shardings.mesh):
        state = made._initialize()
        params = drawn(made.model, 0.3)["params"]
        state = state._replace(params=jax.device_put(params, made.shardings.params))
        step, results = made._jit_train_step(), []
        for n in range(1, steps + 1):
            state, metrics = step(state, made._text(made._draw(n)), made.config.tau)
            results.append(jax.device_get((state.params, metrics)))
    return results


def assert_same(ours, reference, rtol):
    """Largest relative error of a leaf, in the Frobenius norm; loss, and what the clip saw."""
    (params, metrics), (expected, seen) = ours, reference
    errors = jax.tree.map(lambda x, y: np.linalg.norm(x - y) / np.linalg.norm(y), params, expected)
    assert max(jax.tree.leaves(errors)) < rtol, errors
    assert metrics["qk_clip/clipped_heads"] == seen["qk_clip/clipped_heads"]
    names = ("loss", "max_logits")
    chex.assert_trees_all_close(*({n: m[n] for n in names} for m in (metrics, seen)), rtol=rtol)


@pytest.fixture(scope="module")
def on_one_device():
    """Twenty steps under MuonClip, without micro-batches, with a threshold in reach."""
    return advance(on(None, 1, threshold=0.8), 20)


MESHES = [
    pytest.param(EIGHT, 2, id="data, fsdp, tensor, in two micro-batches"),
    pytest.param(None, 1, id="fsdp", marks=pytest.mark.nightly),
    pytest.param({"data": 8}, 1, id="data", marks=pytest.mark.nightly),
    pytest.param({"tensor": 8}, 1, id="tensor, heads do not divide", marks=pytest.mark.nightly),
    pytest.param({"fsdp": 2, "tensor": -1}, 4, id="fsdp, tensor", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("sizes", "micro"), MESHES)
def test_eight_devices_train_as_one(on_one_device, sizes, micro):
    results = advance(on(sizes, threshold=0.8, accumulate=micro), 20)
    assert results[0][1]["qk_clip/clipped_heads"] > 0
    assert_same(results[0], on_one_device[0], rtol=1e-5)  # measured 7e-7
    assert_same(results[-1], on_one_device[-1], rtol=1e-4)  # measured 2e-6


def seen(made):
    """Loss, largest logits and loads of the experts on the first batch, with weights as above."""
    weights = drawn(made.model, 0.3)
    params = jax.device_put(weights["params"], made.shardings.params)
    balance = jax.device_put(weights["balance"], made.shardings.replicated)
    with jax.set_mesh(made.shardings.mesh):
        text = made._text(made._draw(1))[0]
        return jax.device_get(jax.jit(make_loss(made.model))(params, text, balance))


@pytest.mark.nightly
def test_experts_see_the_same_tokens_on_every_mesh():
    chex.assert_trees_all_close(
        seen(on(EXPERT, model="moe")), seen(on(None, 1, model="moe")), rtol=1e-5
    )


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("moe", EXPERT),
        ("moe", {"expert": 4, "fsdp": 2}),
        ("mla", {"fsdp": 4, "tensor": 2}),
    ],
)
def test_latent_heads_and_experts_train_as_on_one_device(model, sizes):
    ours = advance(on(sizes, model=model), 20)
    reference = advance(on(None, 1, model=model), 20)
    assert_same(ours[0], reference[0], rtol=1e-5)  # measured 2e-6
    assert_same(ours[-1], reference[-1], rtol=1e-4)  # measured 2e-6


def stopping_after(calls):
    count = itertools.count(1)
    return lambda: next(count) >= calls


@pytest.mark.nightly
def test_run_resumes_on_another_mesh(tmp_path):
    for devices in (8, 4, 1):
        part = trainer(
            tmp_path / "moved",
            optimizer="adamw",
            batch_size=8,
            resume=True,
            should_stop=stopping_after(2),
            devices=jax.devices()[:devices],
        )
        assert part.train() in (2, 4, 6)
    still = trainer(
        tmp_path / "still", optimizer="adamw", batch_size=8, should_stop=stopping_after(6)
    )
    assert still.train() == 6
    moved, still = (files.read_metrics(tmp_path / name) for name in ("moved", "still"))
    assert [line["step"] for line in moved] == [1, 2, 3, 4, 5, 6]
    for ours, reference in zip(moved, still, strict=True):
        np.testing.assert_allclose(ours["loss"], reference["loss"], rtol=1e-5)
        np.testing.assert_allclose(ours["max_logits"], reference["max_logits"], rtol=1e-5)


# Costs


def test_eight_devices_send_weights_and_gradients_and_not_activations():
    made = on(None, optimizer="adamw")
    text = made._text(made._draw(1))
    with jax.set_mesh(made.shardings.mesh):
        cost = compiled_cost(
            made._jit_train_step().lower(made.target, text, made.config.tau).compile()
        )
    size = 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(made.target.params))
    assert sum(cost.sent.values()) < 3 * size  # measured 1.8; 8.5 without `logical_axes.constrain`
