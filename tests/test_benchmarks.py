"""The benchmark of a step runs, compares equal work, and counts FLOPs as the formulas do."""

import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

import muonclip_jax as mc

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
N, M = 8, 24
WIDE, SQUARE = jnp.ones((N, M)), jnp.ones((N, N))

with pytest.MonkeyPatch.context() as patch:  # as `python benchmarks/muon_step.py` finds them
    patch.syspath_prepend(BENCHMARKS)
    muon_step, trees = map(importlib.import_module, ("muon_step", "trees"))

OTHERS = ("optax", "torch") if muon_step.TORCH else ("optax",)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    muon_step.main(["--quick", "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def results(out):
    return json.loads((out / "muon_step.json").read_text())


@pytest.fixture(params=sorted(trees.TREES))
def tree(request, results):
    return results["trees"][request.param]


def _flops(f, *arguments):
    return trees.dot_flops(jax.make_jaxpr(f)(*arguments).jaxpr)


def test_a_run_says_what_it_was(results):
    assert set(results) == {
        "command",
        "date",
        "versions",
        "machine",
        "load_before",
        "optimizers",
        "trees",
    }
    assert {"python", "muonclip-jax", "jax", "optax"} <= set(results["versions"])
    assert ("torch" in results["versions"]) == ("torch" in OTHERS)
    assert ("not installed" in results["optimizers"]["torch"]) == ("torch" not in OTHERS)


def test_ratios_are_those_of_the_figures(tree):
    by_optax, by_torch = tree["ours_by_optax"], tree.get("ours_by_torch")
    assert set(by_optax) == {
        "flops",
        "temporary_bytes",
        "compile_time",
        "wall_time",
        "wall_time_quartiles",
    }
    for key, figure in (("flops", "flops"), ("compile_time", "compile_seconds")):
        ratio = tree["ours"][figure] / tree["optax"][figure]
        assert by_optax[key] == pytest.approx(ratio, rel=1e-2)
    assert (by_torch is not None) == ("torch" in OTHERS)
    for ratios in filter(None, (by_optax, by_torch)):
        low, high = ratios["wall_time_quartiles"]
        assert 0 < low <= ratios["wall_time"] <= high


def test_figures_stand_beside_the_ratios(tree):
    for name in ("ours", *OTHERS):
        figures = {"flops", "flops_by_floor", "wall_seconds", "rate_by_square_product"}
        figures |= {"time_by_floor"}
        if name != "torch":
            figures |= {"temporary_bytes", "compile_seconds"}
        assert set(tree[name]) == figures
        ratio = tree[name]["flops"] / tree["floor_flops"]
        assert tree[name]["flops_by_floor"] == pytest.approx(ratio, rel=1e-3)


def test_the_optimizers_did_the_same_work(tree):
    assert set(tree["distance_from_ours"]) == set(OTHERS)
    assert tree["distance_from_ours"]["optax"] < 1e-4  # measured: 2.4e-6


def test_other_work_stops_the_run(monkeypatch):
    monkeypatch.setitem(muon_step.OPTIMIZERS, "optax", mc.muon(0.02, ns_steps=4))
    with pytest.raises(RuntimeError, match="optax does other work"):
        muon_step.time_in_turn(trees.TREES["gpt2_small"].quick(), 32)


def test_the_picture_is_small(out):
    image = (out / "muon_step.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) < 60_000


def test_a_product_is_counted_whatever_its_axes():
    assert _flops(jnp.matmul, SQUARE, WIDE) == 2 * N * N * M
    assert _flops(lambda x: jnp.tensordot(x, x, axes=[[0], [0]]), WIDE) == 2 * M * M * N
    assert _flops(jax.vmap(jnp.matmul), jnp.ones((5, M, N)), jnp.ones((5, N, N))) == 10 * M * N * N


def test_a_product_in_a_loop_is_counted_as_often_as_it_runs():
    def loop(x):
        inner = jax.jit(lambda x: SQUARE @ x)
        return jax.lax.fori_loop(0, 3, lambda i, x: jax.lax.scan(_twice(inner), x, None, 2)[0], x)

    def _twice(f):
        return lambda x, _: (f(f(x)), None)

    assert _flops(loop, WIDE) == 3 * 2 * 2 * (2 * N * N * M)
    assert (
        _flops(lambda x: jax.lax.map(lambda x: x @ x.T, x), jnp.ones((5, N, M))) == 10 * N * N * M
    )


def test_a_loop_of_unknown_length_is_refused():
    def loop(x, n):
        return jax.lax.fori_loop(0, n, lambda i, x: SQUARE @ x, x)

    with pytest.raises(ValueError, match="no fixed count"):
        _flops(loop, WIDE, 3)


@pytest.mark.parametrize("name", sorted(trees.TREES))
def test_optax_is_counted_as_the_unrolled_iteration(name, results):
    tree = trees.TREES[name].quick()
    expected = 0
    for batch, rows, columns in trees.matrices(tree.leaves(tree.counted)):
        n, m = sorted((rows, columns))
        expected += batch * 5 * (4 * n * n * m + 2 * n**3)  # X Xᵀ and Z X, A A
    assert results["trees"][name]["optax"]["flops"] == expected


def test_the_floor_is_half_of_every_hermitian_product():
    leaves = {"layer": {"square": jax.ShapeDtypeStruct((N, N), jnp.float32)}}
    assert trees.floor(leaves) == 20 * N**3
    leaves["layer"]["tall"] = jax.ShapeDtypeStruct((4 * N, N), jnp.float32)
    assert trees.floor(leaves) == (20 + 29) * N**3


def test_a_leaf_of_adamw_is_refused():
    with pytest.raises(ValueError, match="must go to Muon"):
        trees.matrices({"layer": {"scale": jax.ShapeDtypeStruct((N,), jnp.float32)}})
