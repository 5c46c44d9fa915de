"""The role of each parameter of small models of many families."""

import pytest

import muonclip_jax as mc
from tests.support import program_models_more  # noqa: F401 - adds families
from tests.support.program_models import FAMILIES

NAMES = sorted(FAMILIES)


def described(role, axes):
    """Writes a role as the families do."""
    sides = ""
    if role.dimension_numbers is not None:
        pairs = ((s,) if isinstance(s, int) else s for s in role.dimension_numbers)
        sides = ">".join("".join(axes[d] for d in side) for side in pairs)
    return role.optimizer, sides, role.reason


@pytest.mark.parametrize("name", NAMES)
def test_roles_of_every_parameter(name):
    family = FAMILIES[name]
    analysis = mc.analyze(family.fn, family.params(), *family.args)
    wrong = []
    for path, text in family.spec.items():
        axes, expected = text.split(":")
        optimizer, sides, reason = described(analysis.roles[path], axes)
        if ">" in expected and " " not in expected:
            right = (optimizer, sides) == ("muon", expected)
        else:
            side, _, why = expected.partition(" ") if ">" in expected else ("", "", expected)
            wanted = "unknown" if why.startswith("?") else "adamw"
            why = why.removeprefix("?")
            right = optimizer == wanted and reason.startswith(why) and side in ("", sides)
        if not right:
            wrong.append(f"{path} {axes}: {optimizer} {sides} ({reason}), expected {expected}")
    assert not wrong, "\n".join([*wrong, str(analysis)])


@pytest.mark.parametrize("name", [name for name in NAMES if FAMILIES[name].sites])
def test_attention_sites(name):
    family = FAMILIES[name]
    analysis = mc.analyze(family.fn, family.params(), *family.args)
    found = {site.path: site for site in analysis.attention}
    assert found.keys() == family.sites.keys(), analysis
    for path, (heads, kv_heads, head_dim, layers, *notes) in family.sites.items():
        site = found[path]
        got = site.num_heads, site.num_kv_heads, site.head_dim, site.num_layers
        assert got == (heads, kv_heads, head_dim, layers), site
        flags = {"qk_norm": site.qk_norm, "soft_cap": site.soft_cap, "sink": site.sink}
        assert {k for k, there in flags.items() if there} == {*notes}
        assert not site.faults


@pytest.mark.parametrize("name", [n for n in NAMES if not FAMILIES[n].sites])
def test_models_without_attention_have_none(name):
    family = FAMILIES[name]
    assert not mc.analyze(family.fn, family.params(), *family.args).attention
