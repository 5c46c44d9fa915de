"""Models of public packages against tests/golden: the nightly workflow installs the packages.

The tables of roles have their reasons beside them; `program_attention.txt` has the attention.
"""

import math
import re

import pytest

import muonclip_jax as mc
from tests.support.golden_tables import FOLDER, read, unfolded
from tests.support.program_packages import MODELS, UNKNOWN

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.filterwarnings("ignore"),  # warnings of the packages
]


@pytest.mark.parametrize("name", MODELS)
def test_roles_and_attention(name):
    fn, params, args = MODELS[name]()
    analysis = mc.analyze(fn, params, *args)
    roles = {path.removeprefix("params/"): path for path in analysis.roles}
    rows = {row.path.replace("/~", ""): row for row in read(name).rows}
    assert not roles.keys() - rows.keys()
    unknown, wrong = [], []
    for path, full in roles.items():
        role, shape = analysis.roles[full], analysis.shapes[full]
        assert shape == rows[path].shape, path
        if role.optimizer == "unknown":
            unknown.append(path)
        elif not _right(role, shape, rows[path]):
            wrong.append(f"{path} {shape}: {role}, right is {rows[path]}")
    assert not wrong, "\n".join([*wrong, str(analysis)])
    assert len(unknown) == UNKNOWN.get(name, 0), unknown
    assert all(path in "".join(analysis.warnings) for path in unknown)
    assert {site.path: _described(site) for site in analysis.attention} == _attention(name)
    assert not any(site.faults for site in analysis.attention)


def _right(role, shape, row):
    if role.optimizer not in row.optimizers:
        return False
    if role.optimizer == "adamw":
        return True
    sides = ((s,) if isinstance(s, int) else s for s in role.dimension_numbers)
    n_in, n_out = (math.prod(shape[d] for d in side) for side in sides)
    return (math.prod(shape) // (n_in * n_out), n_in, n_out) in row.matrices


def _described(site):
    sizes = site.num_heads, site.num_kv_heads, site.head_dim, site.num_layers
    notes = {name for name in ("qk_norm", "soft_cap", "sink") if getattr(site, name)}
    return *map(str, sizes), " ".join(sorted(notes)) or "-"


def _attention(name):
    lines = (FOLDER / "program_attention.txt").read_text().splitlines()
    rows = [re.split(r" {2,}", line) for line in lines if line.startswith(f"{name} ")]
    return {path: tuple(cells) for _, folded, *cells in rows for path in unfolded(folded)}
