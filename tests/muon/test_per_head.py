"""`per_head`: the heads of attention are matrices of their own, for every head layout."""

import functools

import numpy as np
import pytest

import muonclip_jax as mc
from tests.support import reference
from tests.support.per_head_cases import CASES
from tests.support.training_cases import assert_same_way, gradients, train

STEPS = 2
SETTINGS = {"weight_decay": 0.3, "consistent_rms": None}

each_case = pytest.mark.parametrize("name", CASES)


def _start(kernel):
    return np.random.default_rng(9).normal(size=kernel.shape).astype(np.float32)


def _gradients(case):
    return [case.tree(lambda kernel: gradients(kernel.shape, STEPS)[t]) for t in range(STEPS)]


@functools.cache
def _trained(name):
    """Parameters after each step, with one matrix for each head."""
    case = CASES[name]
    tx = mc.muon(0.1, per_head=case.layout, **SETTINGS)
    return train(tx, case.tree(_start), _gradients(case))


@each_case
def test_every_matrix_follows_the_float64_reference(name):
    case, got = CASES[name], _trained(name)
    grads = _gradients(case)
    for child, kernel in case.kernels.items():
        start = _start(kernel).ravel()
        covered = np.concatenate([m.ravel() for m in kernel.matrices])
        assert sorted(covered) == [*range(start.size)]
        for positions in kernel.matrices:
            g = [x["attn"][child]["kernel"].ravel()[positions] for x in grads]
            w = start[positions]
            expected = reference.muon(w, g, learning_rate=0.1, **SETTINGS)
            way = [np.ravel(x["attn"][child]["kernel"])[positions] for x in got]
            assert_same_way(way, expected, w)
