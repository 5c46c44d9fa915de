"""The axis algebra, against index arrays of NumPy."""

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from muonclip_jax._program import axes
from muonclip_jax._program.axes import Axis, View

ELSEWHERE = -1  # what the other operand of a concatenation, or a pad, is filled with


def _transpose(draw, x):
    permutation = draw(st.permutations(range(x.ndim)))
    return np.transpose(x, permutation), lambda v: axes.transpose(v, permutation)


def _reshape(draw, x):
    factors = [p for n in x.shape for p in _primes(n)]
    factors = draw(st.permutations(factors)) if draw(st.booleans()) else factors
    shape = [1]
    for p in factors:
        shape = [*shape, p] if draw(st.booleans()) else [*shape[:-1], shape[-1] * p]
    return x.reshape(shape), lambda v: axes.reshape(v, tuple(shape), x.shape)


def _primes(n):
    p = next((p for p in range(2, n) if n % p == 0), n)
    return [p, *_primes(n // p)] if n > 1 else []


def _slice(draw, x):
    starts = [draw(st.integers(0, n - 1)) if draw(st.booleans()) else 0 for n in x.shape]
    stops = [
        draw(st.integers(a + 1, n)) if draw(st.booleans()) else n
        for a, n in zip(starts, x.shape, strict=True)
    ]
    strides = [draw(st.sampled_from([1, 1, 2])) for _ in x.shape]
    index = tuple(slice(*bounds) for bounds in zip(starts, stops, strides, strict=True))
    return x[index], lambda v: axes.slices(v, starts, strides)


def _concatenate(draw, x):
    axis = draw(st.integers(0, x.ndim - 1))
    before, after = draw(st.sampled_from([0, 1, 2, x.shape[axis]])), draw(st.integers(0, 2))
    parts = [
        np.full((*x.shape[:axis], n, *x.shape[axis + 1 :]), ELSEWHERE) for n in (before, after)
    ]
    out = np.concatenate([parts[0], x, parts[1]], axis)
    return out, lambda v: axes.piece(v, axis, before, x.shape[axis])


def _crop(draw, x):
    axis = draw(st.integers(0, x.ndim - 1))
    start = draw(st.integers(0, x.shape[axis] - 1))
    out = x[(slice(None),) * axis + (slice(start, None),)]
    return out, lambda v: axes.piece(v, axis, -start, x.shape[axis])


def _squeeze(draw, x):
    gone = [d for d, n in enumerate(x.shape) if n == 1]
    return np.squeeze(x, tuple(gone)), lambda v: axes.squeeze(v, gone)


def _broadcast(draw, x):
    at = draw(st.integers(0, x.ndim))
    shape = [*x.shape[:at], draw(st.integers(1, 3)), *x.shape[at:]]
    dimensions = [d for d in range(len(shape)) if d != at]
    out = np.broadcast_to(np.expand_dims(x, at), shape)
    return out, lambda v: axes.broadcast(v, dimensions, x.shape)


def _reverse(draw, x):
    gone = [d for d in range(x.ndim) if draw(st.booleans())]
    return np.flip(x, tuple(gone)), lambda v: axes.reverse(v, gone, x.shape)


RULES = [
    _transpose,
    _reshape,
    _reshape,
    _slice,
    _concatenate,
    _crop,
    _squeeze,
    _broadcast,
    _reverse,
]


@st.composite
def chains(draw):
    """Draws an array of indices after a chain of operations, and the rules back through them."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=3))
    out, back = np.arange(math.prod(shape)).reshape(shape), []
    for rule in draw(st.lists(st.sampled_from(RULES), min_size=1, max_size=6)):
        if out.ndim and out.size < 3000:
            out, step = rule(draw, out)
            back.append(step)
    return tuple(shape), out, back


def pulled(out, back):
    view = axes.identity(out.shape, range(out.ndim))
    for step in reversed(back):
        if view is not None:
            view = step(view)
    return view


@given(chains())
def test_views_are_the_indices_or_lose_axes(chain):
    shape, out, back = chain
    view = pulled(out, back)
    if view is None:
        assert (out == ELSEWHERE).all()
        return
    grid = dict(enumerate(np.indices(out.shape))) if out.ndim else {}
    # The lost axis is not used: the other axes are exact.
    known = View(tuple(a if a.is_exact else Axis() for a in view.axes), view.parts)
    indices, there = axes.evaluate(known, grid)
    expected = np.unravel_index(np.maximum(out, 0), shape)
    inside = out != ELSEWHERE
    for found, right, axis in zip(indices, expected, view.axes, strict=True):
        if axis.is_exact:
            assert (np.broadcast_to(found, out.shape) == right)[inside].all()
    if view.is_exact:
        assert (np.broadcast_to(there, out.shape) == inside).all()


@given(chains())
def test_a_lost_axis_keeps_every_name_that_it_depends_on(chain):
    shape, out, back = chain
    view = pulled(out, back)
    if view is None or (out == ELSEWHERE).any():
        return
    indices = np.stack(np.unravel_index(out, shape))
    for name in range(out.ndim):
        moved = (np.diff(indices, axis=1 + name) != 0).any(tuple(range(1, out.ndim + 1)))
        for depends, axis in zip(moved, view.axes, strict=True):
            assert not depends or name in axis.names


def test_most_chains_are_exact():
    exact = []

    @given(chains())
    def collect(chain):
        view = pulled(*chain[1:])
        exact.append(view is None or view.is_exact)

    collect()
    assert sum(exact) > 0.8 * len(exact)


def test_heads_of_a_concatenated_query():
    """MLA: the kernel of the first 4 of 6 columns of each of 2 heads, flat."""
    view = axes.identity((2, 6), ["head", "column"])
    view = axes.piece(view, 1, 0, 4)
    assert view is not None
    view = axes.reshape(view, (2, 4), (8,))
    assert view is not None
    grid = dict(zip(("head", "column"), np.indices((2, 6)), strict=True))
    (index,), there = axes.evaluate(view, grid)
    assert index[there].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert there.tolist() == [[True] * 4 + [False] * 2] * 2


def test_evaluate_rejects_lost_axes():
    view = axes.reshape(axes.identity((2, 3), "ab"), (2, 3), (3, 2))
    assert not any(axis.is_exact for axis in axes.reshape(view, (3, 2), (2, 3)).axes)
    with pytest.raises(ValueError, match="is not exact"):
        axes.evaluate(axes.reshape(view, (3, 2), (2, 3)), {})
