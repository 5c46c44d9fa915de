"""Programs of more than twelve families, written in the style of public code."""

import jax
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support import (
    program_families_decisions,  # noqa: F401 - adds families
    program_families_experts,  # noqa: F401
    program_families_language,  # noqa: F401
    program_families_recurrent,  # noqa: F401
    program_families_science,  # noqa: F401
    program_families_vision,  # noqa: F401
)
from tests.support.by_day import by_day
from tests.support.program_checks import check_max_logits, wrong_roles, wrong_sites
from tests.support.program_families import MORE

NAMES = by_day(
    sorted(MORE),
    "continuous_filters",
    "deep_seek",
    "detection",
    "differential",
    "experts_choose_tokens",
    "flow",
    "interactions",
    "matrix_memory",
    "next_item",
    "soft_actor_critic",
    "spectral_norm",
    "two_streams",
    "unet",
)
# A product of learned queries and their kernel, without data, is no query kernel: an error.
REFUSED = "pooling_one_example_at_a_time"
ATTENDING = [name for name in sorted(MORE) if MORE[name].sites and name != REFUSED]


def analyzed(name):
    family = MORE[name]
    return mc.analyze(family.fn, jax.eval_shape(family.params), *family.args)


@pytest.mark.parametrize("name", NAMES)
def test_roles_and_sites(name):
    analysis = analyzed(name)
    wrong = wrong_roles(MORE[name], analysis) + wrong_sites(MORE[name], analysis)
    assert not wrong, "\n".join([*wrong, str(analysis)])


@pytest.mark.parametrize("name", by_day(ATTENDING, "unet"))
def test_max_logits_loss_and_gradients(name):
    check_max_logits(MORE[name])


def test_queries_without_data_are_an_error():
    family = MORE[REFUSED]
    with pytest.raises(ValueError, match="its queries come from no parameter"):
        mc.with_max_logits(family.fn, expect=1)(family.params(), *family.args)


def test_there_are_programs_of_many_groups():
    groups = {family.group for family in MORE.values()}
    assert len(MORE) >= 65
    assert len(groups) >= 18


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["deberta", "two_streams", "unet", "perceiver", "shared_keys"])
def test_clip_brings_logits_to_the_threshold(name):
    """Every part of the logits is bilinear in the clipped kernels, or there is an error."""
    family = MORE[name]
    params, analysis = family.params(), analyzed(name)
    count = sum(site.num_layers for site in analysis.attention)
    fn = jax.jit(mc.with_max_logits(family.fn, expect=count))
    _, stats = fn(params, *family.args)
    if name == "shared_keys":
        with pytest.raises(ValueError, match="shares elements of"):
            mc.qk_clip(params, stats, analysis, threshold=0.1)
        return
    first = jax.tree.leaves(stats)[-1 if name == "perceiver" else 0]
    threshold = 0.5 * float(first.min())
    clipped, info = mc.qk_clip(params, stats, analysis, threshold=threshold)
    assert info.clipped_heads > 0
    assert threshold > 0
    after = jax.tree.leaves(fn(clipped, *family.args)[1])
    np.testing.assert_allclose(
        np.asarray(after[-1 if name == "perceiver" else 0]).max(), threshold, rtol=1e-4
    )
