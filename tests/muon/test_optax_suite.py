"""optax's own Muon tests, run against our names."""

import types

import jax
import pytest
from optax import contrib
from optax.contrib import _common_test, _muon_test

import muonclip_jax as mc

# optax tests optimizers on single vectors too.
pytestmark = pytest.mark.filterwarnings("ignore:.*are one vector:UserWarning")


def _orthogonalize_via_newton_schulz(
    x, ns_coeffs, ns_steps=5, preconditioning="frobenius", eps=1e-8, dimension_numbers=None
):
    """optax's signature for `newton_schulz`; its tests only give it two-axis matrices."""
    del dimension_numbers
    return mc.newton_schulz(x, ns_coeffs, steps=ns_steps, preconditioning=preconditioning, eps=eps)


_OURS = types.SimpleNamespace(
    muon=mc.muon,
    scale_by_muon=mc.scale_by_muon,
    scale_by_shape=mc.scale_by_shape,
    MuonDimensionNumbers=mc.MuonDimensionNumbers,
    orthogonalize_via_newton_schulz=_orthogonalize_via_newton_schulz,
)


def _two_axes_only(params):
    """optax's default route, where ours also sends stacks of matrices to Muon."""
    return jax.tree.map(lambda x: mc.MuonDimensionNumbers() if x.ndim == 2 else None, params)


def _muon_with_optax_route(learning_rate, **kwargs):
    kwargs.setdefault("muon_weight_dimension_numbers", _two_axes_only)
    return mc.muon(learning_rate, **kwargs)


@pytest.fixture(autouse=True)
def our_names(monkeypatch, request):
    ours = types.SimpleNamespace(**vars(_OURS))
    if request.node.name.startswith("test_dim_nums_combinations"):
        ours.muon = _muon_with_optax_route  # it expects a three-axis leaf under Adam
    monkeypatch.setattr(_muon_test, "_muon", ours)
    monkeypatch.setattr(contrib, "muon", mc.muon)


class TestOptaxMuon(_muon_test.MuonTest):
    pass


for _name in dir(TestOptaxMuon):
    # Private layout: optax's reshape helper has no counterpart here.
    if _name.startswith("test_reshape_inverse"):
        setattr(TestOptaxMuon, _name, None)


class TestOptaxCommon(_common_test.ContribTest):
    pass


for _name in dir(TestOptaxCommon):
    _params = getattr(getattr(TestOptaxCommon, _name), "__x_params_repr__", "'muon'")
    if _name.startswith("test_") and "'muon'" not in _params:
        setattr(TestOptaxCommon, _name, None)
