"""How each leaf is sharded: from its type or from the user; an error if it is unknown."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax._orthogonalize.matrices import Axes
from muonclip_jax._sharding.placement import find_placement, shardings_by_path
from tests.support.sharding_cases import KINDS, each_kind, make_mesh

SAY = "Pass the shardings of the parameters: shardings=jax.tree.map(lambda x: x.sharding, params)."
PUT = "Put all leaves on one mesh: params = jax.device_put(params, shardings)."
SPECS = {"a": P("x", "y"), "b": P(None, ("y", "x"))}


class Pair(NamedTuple):
    first: Any
    second: Any


def read(tree, shardings=None):
    """Reads the placements of matrices, while tracing as in a training step."""
    axes = [Axes(tuple(range(x.ndim - 2)), (x.ndim - 2,), (x.ndim - 1,)) for x in tree.values()]
    found = []

    def step(tree):
        passed = shardings_by_path("scale_by_muon", shardings)
        found.append(find_placement("scale_by_muon", tree, axes, passed))
        return tree

    jax.eval_shape(step, tree)
    return found[0]


def put(mesh, specs=SPECS, shape=(8, 16)):
    """Returns ones that are sharded over a mesh, and their shardings."""
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    return {n: jax.device_put(jnp.ones(shape), s) for n, s in shardings.items()}, shardings


def spec_of(found):
    return {leaf.path: leaf.spec for leaf in found.leaves}


EXPECTED = {"a": (("x",), ("y",)), "b": ((), ("y", "x"))}


# What is read.


def test_shardings_of_an_explicit_mesh_are_in_its_types():
    mesh = make_mesh((2, 4), "explicit")
    found = read(put(mesh)[0])
    assert spec_of(found) == EXPECTED
    assert found.specs == (P("x", "y"), P(None, ("y", "x")))
    assert found.sizes == {"x": 2, "y": 4}
    # The types of jax 0.10.0 do not have it: then it is the default of JAX.
    assert found.platform in ("cpu", None)


def test_shardings_of_an_auto_mesh_are_passed():
    mesh = make_mesh((2, 4), "auto")
    found = read(*put(mesh))
    assert spec_of(found) == EXPECTED
    assert found.mesh is mesh
    assert found.platform == "cpu"


def test_shardings_may_be_passed_for_leaves_that_are_on_no_mesh_yet():
    _, shardings = put(make_mesh((2, 4), "auto"))
    assert spec_of(read({"a": jnp.ones((8, 16)), "b": jnp.ones((8, 16))}, shardings)) == EXPECTED


def test_a_mesh_with_both_kinds_of_axes_needs_types_and_shardings():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Explicit))
    tree, shardings = put(mesh, {"a": P("x", "y"), "b": P("y", "x"), "c": P(("x", "y"), None)})
    found = read(tree, shardings)
    assert spec_of(found) == {"a": (("x",), ("y",)), "b": (("y",), ("x",)), "c": (("x", "y"), ())}
    assert found.mesh == mesh.abstract_mesh


def test_shardings_may_repeat_types():
    mesh = make_mesh((2, 4), "explicit")
    assert spec_of(read(*put(mesh))) == EXPECTED


def test_mesh_axes_of_one_device_shard_nothing():
    found = read(put(make_mesh((1, 8), "explicit"))[0])
    assert spec_of(found) == {"a": ((), ("y",)), "b": ((), ("y",))}


def test_types_that_name_axes_of_one_device_need_a_plan():
    # JAX takes no product over a named axis, were it of one device.
    found = read(put(make_mesh((1, 1), "explicit"))[0])
    assert spec_of(found) == {"a": ((), ()), "b": ((), ())}


def test_leaves_under_adamw_may_be_anything_in_shardings():
    tree, shardings = put(make_mesh((2, 4), "auto"))
    assert spec_of(read(tree, shardings | {"bias": None, "scale": "anything"})) == EXPECTED


def test_leaves_of_lists_and_named_tuples_are_found_by_their_paths():
    sharding = NamedSharding(make_mesh((2, 4), "auto"), P("x"))
    shardings = [None, {"w": sharding}, Pair(sharding, None)]
    assert shardings_by_path("muon", shardings) == {"1/w": sharding, "2/first": sharding}


def test_outside_of_jit_the_mesh_has_its_devices():
    mesh = make_mesh((2, 4), "explicit")
    tree, _ = put(mesh)
    found = find_placement("scale_by_muon", tree, [Axes((), (0,), (1,))] * 2, {})
    assert found is not None
    assert found.mesh is mesh


def test_an_abstract_mesh_is_enough():
    mesh = AbstractMesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    shapes = {name: jax.ShapeDtypeStruct((8, 16), jnp.float32) for name in SPECS}
    found = read(shapes, shardings)
    assert spec_of(found) == EXPECTED
    assert found.platform is None


# What needs no plan.


def test_one_device_needs_no_plan():
    tree, shardings = put(make_mesh((1, 1), "auto"))
    assert read(tree, shardings) is None
    assert read(tree) is None


def test_shardings_of_arrays_that_are_on_no_mesh_need_no_plan():
    tree = {"a": jnp.ones((8, 16)), "b": jnp.ones((8, 16))}
    assert read(tree, jax.tree.map(lambda x: x.sharding, tree)) is None


def test_no_mesh_and_no_shardings_need_no_plan():
    assert read({"a": jnp.ones((8, 16))}) is None


def test_an_auto_mesh_without_shardings_is_left_to_xla():
    mesh = make_mesh((2, 4), "auto")
    with jax.set_mesh(mesh):
        assert read(put(mesh)[0]) is None


@each_kind
@pytest.mark.parametrize("names", [{"x"}, {"x", "y"}])
def test_in_the_users_own_shard_map_every_device_has_full_matrices(kind, names):
    mesh = make_mesh((2, 4), kind)
    _, shardings = put(mesh, {"a": P("x")})
    seen = []

    def step(x):
        seen.append(read({"a": x}, shardings))
        return x

    run = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P(), axis_names=names)
    jax.eval_shape(run, jnp.ones((8, 16)))
    assert seen == [None]


def test_an_empty_tree_needs_no_plan():
    assert read({}, {"a": NamedSharding(make_mesh((8,), "auto"), P("x"))}) is None


# Errors: the full text, as it is all that a user sees.


def refusal(tree, shardings=None):
    with pytest.raises(ValueError, match="cannot be planned") as error:
        read(tree, shardings)
    return str(error.value).splitlines()


def test_a_path_without_a_sharding():
    tree, shardings = put(make_mesh((2, 4), "auto"))
    assert refusal({**tree, "c": tree["a"]}, shardings) == [
        "scale_by_muon: 1 of 3 leaves cannot be planned.",
        "  c: float32[8, 16]: `shardings` has none at this path; its first one is at a.",
        SAY,
    ]


def test_something_else_than_a_named_sharding():
    tree, shardings = put(make_mesh((2, 4), "auto"))
    assert refusal(tree, {**shardings, "b": P("x")}) == [
        "scale_by_muon: 1 of 2 leaves cannot be planned.",
        f"  b: float32[8, 16]: got {P('x')}, expected a NamedSharding.",
        SAY,
    ]


@pytest.mark.parametrize(
    ("build", "arguments"),
    [(mc.muon, (0.1,)), (mc.scale_by_muon, ()), (mc.muonclip, (0.1,)), (mc.sharding_plan, ({},))],
)
def test_shardings_that_are_no_pytree_raise_a_type_error(build, arguments):
    with pytest.raises(TypeError, match=r"shardings must be a pytree of NamedSharding .* got 'x'"):
        build(*arguments, shardings="x")


def test_a_sharding_that_is_not_even():
    mesh = make_mesh((2, 4), "auto")
    tree, shardings = {"a": jnp.ones((6, 12))}, {"a": NamedSharding(mesh, P(None, ("x", "y")))}
    assert refusal(tree, shardings) == [
        "scale_by_muon: 1 of 1 leaves cannot be planned.",
        "  a: float32[6, 12]: P(None, ('x', 'y')) does not shard it evenly.",
        SAY,
    ]


def test_an_unconstrained_axis():
    mesh = make_mesh((2, 4), "auto")
    tree, shardings = {"a": jnp.ones((8, 16))}, {"a": NamedSharding(mesh, P(P.UNCONSTRAINED, "x"))}
    assert refusal(tree, shardings) == [
        "scale_by_muon: 1 of 1 leaves cannot be planned.",
        "  a: float32[8, 16]: P(UNCONSTRAINED, 'x') leaves an axis unconstrained.",
        SAY,
    ]


def test_a_sharding_of_more_axes():
    mesh = make_mesh((2, 4), "auto")
    tree, shardings = {"a": jnp.ones((8, 16))}, {"a": NamedSharding(mesh, P(None, "x", "y"))}
    assert refusal(tree, shardings) == [
        "scale_by_muon: 1 of 1 leaves cannot be planned.",
        "  a: float32[8, 16]: P(None, 'x', 'y') has more entries than it has axes.",
        SAY,
    ]


def test_types_and_user_disagree():
    tree, shardings = put(make_mesh((2, 4), "explicit"))
    assert refusal(tree, {**shardings, "b": shardings["a"]}) == [
        "scale_by_muon: 1 of 2 leaves cannot be planned.",
        "  b: float32[8, 16]: it is P(None, ('y', 'x')) by its type, and P('x', 'y') in "
        "`shardings`.",
        SAY,
    ]


def test_types_and_user_disagree_on_the_explicit_axis_of_a_mixed_mesh():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Explicit))
    tree, _ = put(mesh, {"a": P("x", "y")})
    assert refusal(tree, {"a": NamedSharding(mesh, P("x"))}) == [
        "scale_by_muon: 1 of 1 leaves cannot be planned.",
        "  a: float32[8, 16]: it is P(None, 'y') by its type, and P('x',) in `shardings`.",
        SAY,
    ]


def test_a_mixed_mesh_without_shardings():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Explicit))
    assert refusal(put(mesh, {"a": P("x", "y")})[0]) == [
        "scale_by_muon: 1 of 1 leaves cannot be planned.",
        "  a: float32[8, 16]: its type does not show how it is sharded over the Auto axes of "
        "{'x': 2, 'y': 4}.",
        SAY,
    ]


def test_a_leaf_that_is_on_no_mesh():
    tree, _ = put(make_mesh((2, 4), "explicit"))
    assert refusal({**tree, "c": jnp.ones((8, 16))}) == [
        "scale_by_muon: 1 of 3 leaves cannot be planned.",
        "  c: float32[8, 16]: it is on no mesh, and other leaves are.",
        PUT,
    ]


def test_a_leaf_that_is_not_yet_on_the_explicit_mesh():
    _, shardings = put(make_mesh((2, 4), "explicit"))
    tree = {name: jnp.ones((8, 16)) for name in shardings}
    assert refusal(tree, shardings) == [
        "scale_by_muon: 2 of 2 leaves cannot be planned.",
        "  a: float32[8, 16]: it is not on the Explicit mesh of `shardings`.",
        "  b: float32[8, 16]: it is not on the Explicit mesh of `shardings`.",
        PUT,
    ]


def test_leaves_on_several_meshes():
    one, two = make_mesh((2, 4), "auto"), make_mesh((4, 2), "auto")
    tree, shardings = put(one)
    assert refusal(tree, {**shardings, "b": NamedSharding(two, P("x"))}) == [
        "scale_by_muon: 1 of 2 leaves cannot be planned.",
        f"  b: is on {two}, a is on {one}.",
        PUT,
    ]


def test_one_error_names_all_leaves_and_each_fix_once():
    mesh = make_mesh((2, 4), "auto")
    tree = {name: jnp.ones((6, 6)) for name in "abcde"}
    explicit = NamedSharding(make_mesh((2, 4), "explicit"), P("x"))
    shardings = {"a": NamedSharding(mesh, P("y")), "b": "x", "d": NamedSharding(mesh, P("x"))}
    assert refusal(tree, {**shardings, "e": explicit}) == [
        "scale_by_muon: 4 of 5 leaves cannot be planned.",
        "  a: float32[6, 6]: P('y',) does not shard it evenly.",
        "  b: float32[6, 6]: got x, expected a NamedSharding.",
        "  c: float32[6, 6]: `shardings` has none at this path; its first one is at a.",
        "  e: float32[6, 6]: it is not on the Explicit mesh of `shardings`.",
        SAY,
        PUT,
    ]


@pytest.mark.parametrize("build", [mc.muon, mc.muonclip])
def test_an_optimizer_raises_at_its_first_update(build):
    params = {"block": {"kernel": jnp.ones((8, 16))}, "bias": jnp.ones(8)}
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    tx = build(0.1, shardings={"other": NamedSharding(mesh, P("x"))})
    with pytest.raises(ValueError, match="cannot be planned") as error:
        tx.update(params, tx.init(params), params, max_logits={})
    assert str(error.value).splitlines() == [
        f"{build.__name__}: 1 of 1 leaves cannot be planned.",
        "  block/kernel: float32[8, 16]: `shardings` has none at this path; its first one is at "
        "other.",
        SAY,
    ]


def test_kinds_cover_the_axis_types_that_a_user_can_ask_for():
    assert set(KINDS.values()) == set(AxisType) - {AxisType.Manual}
