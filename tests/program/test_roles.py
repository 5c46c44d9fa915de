"""The role of each parameter of small models of many families."""

import pytest

import muonclip_jax as mc
from tests.support import program_models_more  # noqa: F401 - adds families
from tests.support.program_checks import wrong_roles, wrong_sites
from tests.support.program_models import FAMILIES


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_roles_and_attention_layers(name):
    family = FAMILIES[name]
    analysis = mc.analyze(family.fn, family.params(), *family.args)
    wrong = wrong_roles(family, analysis) + wrong_sites(family, analysis)
    assert not wrong, "\n".join([*wrong, str(analysis)])
