"""Kernels of attention and the matrices that `per_head` makes of them, as positions in the kernel.

The positions come from explicit loops over named axes; nothing here asks the package for them.
"""

from typing import Any, NamedTuple

import numpy as np

import muonclip_jax as mc
from tests.support.reference_layouts import place

FLAT, OUTPUTS_FIRST = "inputs (heads head_dim)", "(heads head_dim) inputs"


class Kernel(NamedTuple):
    """A kernel, and the position of each number of each of its matrices, inputs x outputs."""

    shape: tuple[int, ...]
    matrices: list[np.ndarray]


class Case(NamedTuple):
    """A head layout and an attention module that it describes."""

    layout: Any
    kernels: dict[str, Kernel]

    def tree(self, leaf_of):
        """Builds the parameters, the kernel of each child from its description."""
        return {"attn": {name: {"kernel": leaf_of(k)} for name, k in self.kernels.items()}}


def kernel(pattern, names, sizes, matrices, stack=(), stack_axis=0):
    """Describes a kernel.

    `matrices` maps the positions of one layer, by `names`, to its matrices.
    """
    count = int(np.prod(sizes))
    placed = place(pattern, np.arange(count, dtype=np.float32).reshape(sizes), names)
    layers = [placed + count * layer for layer in range(int(np.prod(stack)))]
    whole = np.stack(layers).reshape(*stack, *placed.shape)
    whole = np.moveaxis(whole, range(len(stack)), range(stack_axis, stack_axis + len(stack)))
    position = np.argsort(whole.ravel()).reshape(len(layers), *sizes)
    return Kernel(whole.shape, [m for layer in position for m in matrices(layer)])


def by_head(part=slice(None), group=1):
    """Matrices of [inputs, heads, head_dim]: each head, or each group of adjacent heads."""

    def matrices(x):
        x = x[..., part]
        starts = range(0, x.shape[1], group)
        return [x[:, h : h + group].reshape(len(x), -1) for h in starts]

    return matrices


def as_one(part=slice(None)):
    """One matrix of [inputs, heads, head_dim]."""
    return lambda x: [x[..., part].reshape(len(x), -1)]


EACH, ONE = by_head(), as_one()


def both(*functions):
    return lambda x: [m for f in functions for m in f(x)]


NAMES = ("inputs", "heads", "head_dim")


def projections(pattern, d=6, heads=4, key_heads=2, width=3, value=EACH, **stacks):
    """Queries, keys and values in kernels of their own."""
    return {
        "query": kernel(pattern, NAMES, (d, heads, width), by_head(), **stacks),
        "key": kernel(pattern, NAMES, (d, key_heads, width), by_head(), **stacks),
        "value": kernel(pattern, NAMES, (d, key_heads, width), value, **stacks),
    }


def grouped(pattern):
    """Query heads on two axes, kv_heads and groups."""
    names = ("inputs", "kv_heads", "groups", "head_dim")
    heads = lambda x: by_head()(x.reshape(len(x), -1, x.shape[-1]))  # noqa: E731
    key = pattern.replace("groups ", "")
    return {
        "query": kernel(pattern, names, (6, 2, 2, 3), heads),
        "key": kernel(key, ("inputs", "kv_heads", "head_dim"), (6, 2, 3), by_head()),
        "value": kernel(key, ("inputs", "kv_heads", "head_dim"), (6, 2, 3), by_head()),
    }


def keys_and_values(pattern, values):
    """Gemma's `kv_einsum`, and its queries."""

    def matrices(x):  # [2, inputs, heads, head_dim]
        return by_head()(x[0]) + values(x[1])

    names = ("2", *NAMES)
    return {
        "q": kernel("heads inputs head_dim", NAMES, (6, 4, 3), by_head()),
        "kv": kernel(pattern, names, (2, 6, 2, 3), matrices),
    }


def sectioned(pattern, values, queries=EACH, keys=EACH):
    """4 queries, 2 keys, 2 values, each 3 wide, in one kernel."""

    def matrices(x):
        return queries(x[:, :4]) + keys(x[:, 4:6]) + values(x[:, 6:])

    return {"qkv": kernel(pattern, NAMES, (6, 8, 3), matrices)}


def interleaved(values):
    """For each of 2 keys, its 2 queries, itself and its value."""

    def matrices(x):
        x = x.reshape(6, 2, 4, 3)
        keys = [x[:, k, i] for k in range(2) for i in range(3)]
        return keys + values(x[:, :, 3])

    return {"qkv": kernel(FLAT, NAMES, (6, 8, 3), matrices)}


def three(pattern, values):
    """Queries, keys and values of 4 heads along an axis of their own."""

    def matrices(x):  # [3, inputs, heads, head_dim]
        return by_head()(x[0]) + by_head()(x[1]) + values(x[2])

    return {"qkv": kernel(pattern, ("3", *NAMES), (3, 6, 4, 3), matrices)}


def latent(pattern, values, **stacks):
    """Heads of [2 nope, 1 rope] columns, and of [2 nope, 5 value] columns."""
    parts = both(by_head(slice(2)), values(slice(2, None)))
    return {
        "q_b": kernel(pattern, NAMES, (6, 4, 3), by_head(), **stacks),
        "kv_b": kernel(pattern, NAMES, (5, 4, 7), parts, **stacks),
    }


def _mla(**fields):
    return mc.MLALayout(nope_dim=2, rope_dim=1, value_dim=5, **fields)


def _multi_head(**fields):
    return mc.MultiHeadLayout(value="value", **fields)


def _fused(**fields):
    return mc.FusedQKVLayout(head_dim=3, **fields)


_KV: Any = {"query": "q", "key": "kv", "kernel": "heads inputs head_dim"}
CASES = {
    "three axes": Case(_multi_head(), projections("inputs heads head_dim")),
    "queries and keys only": Case(
        mc.MultiHeadLayout(), projections("inputs heads head_dim", value=as_one())
    ),
    "flat": Case(_multi_head(kernel=FLAT, head_dim=3), projections(FLAT)),
    "outputs first": Case(
        _multi_head(kernel=OUTPUTS_FIRST, head_dim=3), projections(OUTPUTS_FIRST)
    ),
    "stacked": Case(_multi_head(kernel=FLAT, head_dim=3), projections(FLAT, stack=(2, 3))),
    "stacked along axis 1": Case(
        _multi_head(kernel=OUTPUTS_FIRST, head_dim=3, stack_axis=1),
        projections(OUTPUTS_FIRST, stack=(2,), stack_axis=1),
    ),
    "axes of groups": Case(
        _multi_head(kernel="kv_heads groups head_dim inputs"),
        grouped("kv_heads groups head_dim inputs"),
    ),
    "pairs": Case(
        _multi_head(kernel=FLAT, head_dim=3, heads_per_matrix=2),
        {
            "query": kernel(FLAT, NAMES, (6, 4, 3), by_head(group=2)),
            "key": kernel(FLAT, NAMES, (6, 2, 3), by_head(group=2)),
            "value": kernel(FLAT, NAMES, (6, 2, 3), by_head(group=2)),
        },
    ),
    "gates beside queries": Case(
        mc.MultiHeadLayout(query_dim=3),
        {
            "query": kernel(
                "inputs heads head_dim",
                NAMES,
                (6, 4, 5),
                both(by_head(slice(3)), as_one(slice(3, None))),
            ),
            "key": kernel("inputs heads head_dim", NAMES, (6, 2, 3), by_head()),
        },
    ),
    "keys and values": Case(
        mc.MultiHeadLayout(key_kernel="2 heads inputs head_dim", **_KV),
        keys_and_values("2 heads inputs head_dim", by_head()),
    ),
    "keys, and values in one": Case(
        mc.MultiHeadLayout(
            key_kernel="inputs (heads 2 head_dim)", head_dim=3, split_values=False, **_KV
        ),
        keys_and_values("inputs (heads 2 head_dim)", as_one()),
    ),
    "fused": Case(_fused(num_kv_heads=2), sectioned(FLAT, by_head())),
    "fused, values in one": Case(
        _fused(num_kv_heads=2, split_values=False), sectioned(FLAT, as_one())
    ),
    "fused, outputs first": Case(
        _fused(num_kv_heads=2, kernel=OUTPUTS_FIRST), sectioned(OUTPUTS_FIRST, by_head())
    ),
    "fused, pairs": Case(
        _fused(num_kv_heads=2, heads_per_matrix=2),
        sectioned(FLAT, by_head(group=2), by_head(group=2), by_head(group=2)),
    ),
    "fused, three matrices": Case(
        _fused(num_kv_heads=2, heads_per_matrix=None),
        sectioned(FLAT, as_one(), as_one(), as_one()),
    ),
    "interleaved": Case(_fused(num_kv_heads=2, order="interleaved"), interleaved(by_head())),
    "interleaved, values in one": Case(
        _fused(num_kv_heads=2, order="interleaved", split_values=False), interleaved(as_one())
    ),
    "an axis of three": Case(
        _fused(kernel="inputs heads 3 head_dim"), three("inputs heads 3 head_dim", by_head())
    ),
    "an axis of three, values in one": Case(
        _fused(kernel="3 heads inputs head_dim", split_values=False),
        three("3 heads inputs head_dim", as_one()),
    ),
    "latent": Case(_mla(kernel=FLAT), latent(FLAT, by_head)),
    "latent, values in one": Case(
        _mla(kernel="inputs heads head_dim", split_values=False),
        latent("inputs heads head_dim", as_one),
    ),
    "latent, stacked": Case(_mla(kernel=OUTPUTS_FIRST), latent(OUTPUTS_FIRST, by_head, stack=(2,))),
    "latent, without rope": Case(
        mc.MLALayout(nope_dim=3, rope_dim=0, value_dim=4, kernel=FLAT),
        {
            "q_b": kernel(FLAT, NAMES, (6, 4, 3), by_head()),
            "kv_b": kernel(
                FLAT, NAMES, (5, 4, 7), both(by_head(slice(3)), by_head(slice(3, None)))
            ),
        },
    ),
}
