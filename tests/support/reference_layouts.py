"""NumPy oracle of head layouts: every number of every kernel is placed by an explicit loop.

Imports nothing of the package.
"""

import itertools

import numpy as np

from tests.support import reference_attention as reference


def place(pattern, array, names):
    """Writes an array with named axes as a kernel: one index of the kernel per number.

    Names of a pattern within parentheses share an axis, the first varies slowest.
    """
    axes, group = [], None
    for token in pattern.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            group = []
        elif token == ")":
            axes.append(group)
            group = None
        elif group is None:
            axes.append([token])
        else:
            group.append(token)
    axes = [axis for axis in axes if all(name in names for name in axis)]
    size = dict(zip(names, array.shape, strict=True))
    shape = [int(np.prod([size[name] for name in axis])) for axis in axes]
    kernel = np.full(shape, np.nan, np.float32)
    for index in itertools.product(*map(range, array.shape)):
        at = dict(zip(names, index, strict=True))
        where = []
        for axis in axes:
            position = 0
            for name in axis:
                position = position * size[name] + at[name]
            where.append(position)
        kernel[tuple(where)] = array[index]
    return kernel


def scaled(heads, factors, columns=None):
    """Multiplies the first columns of each head, `[..., heads, width]`, in one rounding."""
    out = np.array(heads)
    for h, factor in enumerate(factors):
        if factor != 1:
            part = slice(columns)
            old = np.asarray(heads[..., h, part], np.float32)
            out[..., h, part] = old * np.float32(factor)
    return out


def factors(maxima, key_heads, tau, alpha, rule):
    """Factors of query heads and of key heads."""
    gammas = [reference.gamma(s, tau) for s in maxima]
    return reference.query_and_key_factors(gammas, key_heads, alpha, rule)
