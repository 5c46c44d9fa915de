"""The plan that a user prints is the plan that `muon` carries out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax import _sharded

SHAPES = {"embed": (16, 32), "up": (3, 32, 64), "down": (3, 64, 32), "norm": (3, 32)}
SPECS = {"embed": P("x"), "up": P(None, "x"), "down": P(None, None, "x"), "norm": P()}
SHOWN = (
    "mesh x=8; per device and step {flops} FLOPs, 0.0 MB sent\n"
    "matrices  rows    columns  on each device  FLOPs     MB sent  leaves\n"
    "6         32 / x  64       move: 1 whole   {flops}  0.0      down and 1 more"
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
def test_shardings_are_read_off_arrays_and_off_their_shapes(kind, abstract):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        params = placed(mesh)
        if abstract:
            params = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
            )
        # Five steps in Gram form, twice as many columns as rows: 42 m³ by `gram_cost`.
        assert str(mc.sharding_plan(params)) == SHOWN.format(flops=f"{42 * 32**3:.3g}")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_it_is_the_plan_that_muon_carries_out(kind, monkeypatch):
    mesh, plans = mesh_of(kind), []
    make_plan = _sharded.make_plan

    def watched(*args, **settings):
        plans.append(make_plan(*args, **settings))
        return plans[-1]

    monkeypatch.setattr(_sharded, "make_plan", watched)
    with jax.set_mesh(mesh):
        params = placed(mesh)
        shardings = jax.tree.map(lambda x: x.sharding, params) if kind == AxisType.Auto else None
        settings: dict = {"ns_dtype": jnp.bfloat16, "shardings": shardings}
        tx = mc.muon(0.1, "polar_express", **settings)
        jax.jit(tx.update)(params, tx.init(params), params)
        shown = mc.sharding_plan(params, ns_coeffs="polar_express", **settings)
    assert shown == plans[0]
    assert len(plans) == 2


def test_dimension_numbers_decide_what_a_matrix_is():
    params = {"q": jax.device_put(jnp.ones((32, 8, 4)), NamedSharding(mesh_of(), P(None, "x")))}
    whole = {"q": mc.MuonDimensionNumbers(0, (1, 2))}
    assert mc.sharding_plan(params, whole).groups[0].columns == ("x",)
    per_head = {"q": mc.MuonDimensionNumbers(0, 2)}
    assert mc.sharding_plan(params, per_head).groups[0].strategy() == "local"


def test_one_device_has_nothing_to_divide():
    params = {"up": jnp.ones((4, 8))}
    assert mc.sharding_plan(params).groups == ()
    alone = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("x",)), P("x"))
    assert mc.sharding_plan({"up": jax.device_put(params["up"], alone)}).groups == ()


def test_a_matrix_without_a_place_is_refused():
    mesh = mesh_of()
    params = {**placed(mesh), "gate": np.ones((8, 8), np.float32)}
    with pytest.raises(ValueError, match="sharding_plan: 1 of 3 leaves cannot") as error:
        mc.sharding_plan(params)
    assert "  gate: float32[8, 8]: `shardings` has none at this path" in str(error.value)
