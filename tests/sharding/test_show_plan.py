"""`sharding_plan` prints what `muon` with the same arguments does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax._orthogonalize import matrices
from muonclip_jax._orthogonalize.newton_schulz import Orthogonalizer
from muonclip_jax._sharding import plan
from muonclip_jax._sharding.placement import PASS_SHARDINGS

SHAPES = {"embed": (16, 32), "up": (3, 32, 64), "down": (3, 64, 32), "norm": (3, 32)}
SPECS = {"embed": P("x"), "up": P(None, "x"), "down": P(None, None, "x"), "norm": P()}
SHOWN = (
    "mesh x=8; per device and step {flops} FLOPs, 0.0 MB sent\n"
    "matrices  rows    columns  on each device    FLOPs     MB sent  leaves\n"
    "6         32 / x  64       exchange: 1 full  {flops}  0.0      down and 1 more"
)


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("x",), axis_types=(kind,))


def placed(mesh):
    return {
        name: jax.device_put(jnp.ones(shape), NamedSharding(mesh, SPECS[name]))
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_arrays_and_their_shapes_have_the_same_plan(kind, abstract, dtype):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda x: x.astype(dtype), placed(mesh))
        shardings = jax.tree.map(lambda x: x.sharding, params) if kind == AxisType.Auto else None
        if abstract:
            params = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
            )
        # Five steps in Gram form, twice as many columns as rows: 42 m³ by `gram_cost`.
        assert str(mc.sharding_plan(params, shardings=shardings)) == SHOWN.format(
            flops=f"{42 * 32**3:.3g}"
        )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_it_is_the_plan_that_muon_carries_out(kind, monkeypatch):
    mesh, plans = mesh_of(kind), []
    make_plan = plan.make_plan

    def watched(*args, **settings):
        plans.append(make_plan(*args, **settings))
        return plans[-1]

    monkeypatch.setattr(plan, "make_plan", watched)
    with jax.set_mesh(mesh):
        params = placed(mesh)
        shardings = jax.tree.map(lambda x: x.sharding, params) if kind == AxisType.Auto else None
        settings: dict = {"ns_dtype": jnp.bfloat16, "shardings": shardings}
        tx = mc.muon(0.1, "polar_express", **settings)
        jax.jit(tx.update)(params, tx.init(params), params)
        shown = mc.sharding_plan(params, ns_coeffs="polar_express", **settings)
    assert shown.groups == plans[0].groups
    assert shown.leaves == plans[0].leaves
    assert len(plans) == 2


def test_dimension_numbers_decide_what_a_matrix_is():
    mesh = mesh_of(AxisType.Explicit)
    params = {"q": jax.device_put(jnp.ones((32, 8, 4)), NamedSharding(mesh, P(None, "x")))}
    whole = {"q": mc.MuonDimensionNumbers(0, (1, 2))}
    assert mc.sharding_plan(params, whole).groups[0].column_axes == ("x",)
    per_head = {"q": mc.MuonDimensionNumbers(0, 2)}
    assert mc.sharding_plan(params, per_head).groups[0].strategy() == "local"
    assert mc.sharding_plan(params, overrides=whole).groups[0].column_axes == ("x",)
    assert mc.sharding_plan(params, overrides={"q": None}).groups == ()


ONE_DEVICE = """\
one device; per step {total} FLOPs
matrices  rows  columns  on each device  FLOPs     MB sent  leaves
6         32    64       local           {total}  0.0      down and 1 more"""
BY_XLA = """\
mesh x=8, without `shardings`: XLA decides how matrices move; {total} FLOPs per step on all devices
{fix}
matrices  rows  columns  on each device  FLOPs     MB sent  leaves
6         32    64       XLA decides     {total}  unknown  down and 1 more"""


def calls(monkeypatch, params):
    """Counts the calls of Newton-Schulz in an update of `muon` without shardings."""
    shapes, call = [], Orthogonalizer.__call__
    monkeypatch.setattr(
        Orthogonalizer, "__call__", lambda o, x, eps: shapes.append(x) or call(o, x, eps)
    )
    tx = mc.muon(0.1)
    jax.eval_shape(lambda g: tx.update(g, tx.init(g), g)[0], params)
    return len(shapes)


def test_on_one_device_a_line_is_a_call(monkeypatch):
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    total = f"{6 * 42 * 32**3:.3g}"
    assert str(mc.sharding_plan(params)) == ONE_DEVICE.format(total=total)
    alone = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("x",)), P())
    assert str(mc.sharding_plan(jax.device_put(params, alone))) == ONE_DEVICE.format(total=total)
    assert calls(monkeypatch, params) == 1
    monkeypatch.setattr(matrices, "MAX_BATCH_BYTES", 3 * 32 * 64 * 4)
    assert len(mc.sharding_plan(params).groups) == calls(monkeypatch, params) == 2


@pytest.mark.parametrize("abstract", [False, True])
def test_on_an_auto_mesh_without_shardings_xla_decides(abstract, monkeypatch):
    params = placed(mesh_of())
    if abstract:
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
        )
    plan = mc.sharding_plan(params)
    assert str(plan) == BY_XLA.format(total=f"{6 * 42 * 32**3:.3g}", fix=PASS_SHARDINGS)
    assert plan.by_xla
    assert calls(monkeypatch, params) == len(plan.groups)


def test_nothing_for_muon_has_no_groups():
    assert mc.sharding_plan({"norm": {"scale": jnp.ones(3)}}).groups == ()


def test_a_matrix_without_a_place_is_refused():
    mesh = mesh_of()
    shardings = jax.tree.map(lambda x: x.sharding, placed(mesh))
    params = {**placed(mesh), "gate": np.ones((8, 8), np.float32)}
    with pytest.raises(ValueError, match="sharding_plan: 1 of 3 leaves cannot") as error:
        mc.sharding_plan(params, shardings=shardings)
    assert "  gate: float32[8, 8]: `shardings` has none at this path" in str(error.value)
