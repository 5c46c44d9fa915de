"""Whatever the leaves and the mesh, a plan orthogonalizes every matrix once and shares the work."""

import math

import hypothesis
import hypothesis.strategies as st

from muonclip_jax._orthogonalize.matrices import Axes, sides
from muonclip_jax._sharding.placement import PlacedLeaf
from muonclip_jax._sharding.plan import make_plan
from tests.support.sharding_cases import F32, work

MESH_SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=3)


@st.composite
def trees(draw):
    """A mesh of up to three axes and leaves that it divides evenly, some large, in any order."""
    mesh = dict(zip("xyz", draw(MESH_SIZES), strict=False))
    leaves = [_leaf(draw, f"leaf_{i}", mesh) for i in range(draw(st.integers(1, 6)))]
    return mesh, leaves


def _leaf(draw, path, mesh):
    ndim = draw(st.integers(2, 4))
    order = draw(st.permutations(range(ndim)))
    rows = draw(st.integers(0, ndim - 2))
    columns = draw(st.integers(rows + 1, ndim - 1))
    axes = Axes(*(tuple(sorted(a)) for a in (order[:rows], order[rows:columns], order[columns:])))
    # Each mesh axis of more than one device divides an axis, or none.
    names = [n for n in draw(st.permutations(list(mesh))) if mesh[n] > 1]
    places = {n: draw(st.integers(-1, ndim - 1)) for n in names}
    spec = tuple(tuple(n for n in names if places[n] == a) for a in range(ndim))
    large = draw(st.sampled_from([1, 2, 3, 512]))
    shape = [draw(st.integers(1, 3)) * (1 if a in axes.batch else large) for a in range(ndim)]
    shape = tuple(n * parts(mesh, names) for n, names in zip(shape, spec, strict=True))
    return PlacedLeaf(path, shape, F32, axes, spec)


def parts(mesh, names):
    return math.prod(mesh[name] for name in names)


each_tree = hypothesis.given(trees())
many = hypothesis.settings(max_examples=200)


@many
@each_tree
def test_every_leaf_is_in_one_group_that_fits_it(tree):
    mesh, leaves = tree
    p = make_plan(leaves, mesh, work, lambda dtype: dtype)
    assert sorted(m.leaf for g in p.groups for m in g.members) == list(range(len(leaves)))
    for group, member in ((g, m) for g in p.groups for m in g.members):
        it = leaves[member.leaf]
        batch, rows, columns = (it.mesh_axes(a) for a in it.axes)
        matrices = member.count * parts(mesh, batch)
        assert matrices * group.m * group.n == math.prod(it.shape)
        lies = (*sides(it.shape, it.axes), rows, columns)
        if member.transposed:
            lies = (*reversed(lies[:2]), columns, rows)
        assert lies == (group.m, group.n, group.row_axes, group.column_axes)
        assert group.m <= group.n
        assert not {*group.replica_axes} & {*rows, *columns, *batch}


@many
@each_tree
def test_every_matrix_is_orthogonalized_once_and_work_is_shared(tree):
    mesh, leaves = tree
    for group in make_plan(leaves, mesh, work, lambda dtype: dtype).groups:
        pieces = parts(mesh, group.axes)
        share = -(-group.count // parts(mesh, group.replica_axes))
        assert share <= group.full * pieces + group.remainder < share + pieces
        assert group.full == 0 or group.full % group.chunk == 0
        if group.remainder and not group.in_place:
            assert pieces % group.sharers == 0
            assert group.remainder * group.sharers <= pieces
            assert group.n // parts(mesh, group.column_axes) % group.sharers == 0
        # Never more than whole matrices padded, never less than an equal share.
        each = work(group.m, group.n, F32)
        assert share * each / pieces <= group.flops * (1 + 1e-9)
        assert group.flops <= -(-share // pieces) * each


@hypothesis.given(trees(), st.randoms(use_true_random=False))
def test_the_order_of_leaves_does_not_matter(tree, random):
    mesh, leaves = tree

    def groups(leaves):
        p = make_plan(leaves, mesh, work, lambda dtype: dtype)
        plain = (
            (sorted((leaves[m.leaf].path, m.transposed) for m in g.members), g._replace(members=()))
            for g in p.groups
        )
        return sorted(plain, key=lambda pair: pair[0])

    assert groups(leaves) == groups(random.sample(leaves, len(leaves)))
