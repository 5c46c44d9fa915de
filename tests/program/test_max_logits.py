"""`with_max_logits` against logits recorded in float64, and against the plain function."""

import pytest

from tests.support import program_models_more  # noqa: F401 - adds families
from tests.support.program_checks import check_max_logits
from tests.support.program_models import FAMILIES


@pytest.mark.parametrize("name", [name for name in sorted(FAMILIES) if FAMILIES[name].sites])
def test_max_logits_loss_and_gradients(name):
    check_max_logits(FAMILIES[name])
