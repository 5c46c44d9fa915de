"""Arguments that attention with max logits passes on, and arguments that raise."""

import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax._attention.attention import dot_product_attention
from tests.support.logit_cases import close, inputs, lengths


def test_implementation_reaches_jax_nn(monkeypatch):
    calls = []
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, *_, **options: calls.append(options) or q
    )
    dot_product_attention(*inputs(), implementation="cudnn")
    assert calls[0]["implementation"] == "cudnn"


def test_a_function_gets_four_axes_and_plain_options():
    seen = {}

    def attend(query, key, value, bias, mask, **options):
        seen.update(options, shapes=[np.shape(x) for x in (query, key, value, bias, mask)])
        return value.repeat(2, axis=2), jnp.full((1, 4), 7, jnp.bfloat16)

    q, key, value = (x[0] for x in inputs(h=16))
    bias = jnp.zeros((13, 13))
    count = lengths(9)
    out, max_logits = dot_product_attention(
        q, key, value[..., :3], bias, is_causal=True, query_seq_lengths=count, max_logit=attend
    )
    assert out.shape == (13, 4, 3)
    close(max_logits, np.full(4, 7))
    assert seen.pop("query_seq_lengths") is count
    assert seen == {
        "shapes": [(1, 13, 4, 16), (1, 13, 2, 16), (1, 13, 2, 3), (1, 1, 13, 13), ()],
        "scale": 0.25,
        "is_causal": True,
        "key_value_seq_lengths": None,
        "local_window_size": None,
    }


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        ((np.zeros((2, 13, 4, 8)), np.zeros((4,))), "((2, 13, 4, 8), (4,))"),
        ((np.zeros((2, 4, 13, 8)), np.zeros((2, 4))), "((2, 4, 13, 8), (2, 4))"),
        ((np.zeros((2, 13, 4, 8)),), "((2, 13, 4, 8),)"),
        (np.zeros((2, 13, 4, 8)), "ndarray"),
    ],
)
def test_results_of_a_function_are_checked(returned, got, no_typecheck):
    with pytest.raises(ValueError, match="passed as max_logit returned") as error:
        dot_product_attention(*inputs(), max_logit=lambda *_, **__: returned)
    assert str(error.value) == (
        f"dot_product_attention: the function passed as max_logit returned {got}, expected a tuple "
        "of the output (2, 13, 4, 8) and the max logits (2, 4)."
    )


@pytest.mark.parametrize("options", [{"implementation": "xla"}, {"return_residual": True}])
def test_options_that_do_not_reach_a_function_raise(options):
    function: Any = lambda *_, **__: None  # noqa: E731
    with pytest.raises(ValueError, match="do not reach a function passed as max_logit"):
        dot_product_attention(*inputs(), max_logit=function, **options)


def test_unknown_methods_raise():
    with pytest.raises(ValueError, match="max_logit") as error:
        dot_product_attention(*inputs(), max_logit="estimate")
    assert str(error.value) == (
        "dot_product_attention: max_logit must be one of 'exact', 'lse_bound', 'tokamax'; "
        "got 'estimate'."
    )


def test_missing_tokamax_raises_with_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    for name in [name for name in sys.modules if name.startswith("tokamax.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="tokamax") as error:
        dot_product_attention(*inputs(t=128, s=128), max_logit="tokamax")
    start, reason, end = re.split(r": (No module named 'tokamax.*)\. ", str(error.value))
    assert "tokamax" in reason
    assert start == (
        'dot_product_attention: max_logit="tokamax" needs the splash attention kernel of tokamax '
        "0.0.17 (Python 3.12 or later, jax 0.11.1 or later)"
    )
    assert end == 'Install it with `pip install tokamax==0.0.17`, or use max_logit="exact".'


def test_unsupported_arguments_of_tokamax_raise_together():
    q, key, value = inputs()
    q = q.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="does not support this") as error:
        dot_product_attention(
            q,
            key,
            value,
            jnp.zeros((13, 13)),
            jnp.ones((13, 13), bool),
            local_window_size=(-2, 1),
            implementation="xla",
            max_logit="tokamax",
        )
    assert str(error.value) == (
        'dot_product_attention: max_logit="tokamax" does not support this.\n'
        "  bias is set; leave it out.\n"
        "  mask is set; leave it out.\n"
        "  implementation is set; leave it out.\n"
        "  there are 13 queries and 13 keys; pad to multiples of 128.\n"
        "  query, key and value have dtypes bfloat16, float32, float32; cast them to one.\n"
        "  local_window_size leaves a query without a key.\n"
        'Or use max_logit="exact".'
    )


FAULTS = {
    "query (13, 4) and key (2, 13, 4, 8) need four axes": {"query": (13, 4)},
    "query has 4 heads, not a multiple of the 3 heads of key.": {"key": (2, 13, 3, 8)},
    "bias (1, 3, 13, 13) does not broadcast": {"bias": (3, 13, 13)},
    "mask (1, 1, 13, 5) does not broadcast": {"mask": (13, 5)},
    "value (2, 12, 4, 8) and key (2, 13, 4, 8) differ before the last axis": {
        "value": (2, 12, 4, 8)
    },
}


@pytest.mark.parametrize("message", FAULTS)
def test_wrong_shapes_raise(message, no_typecheck):
    shapes = {"query": (2, 13, 4, 8), "key": (2, 13, 4, 8), "value": (2, 13, 4, 8)}
    arguments: dict[str, Any] = {
        name: jnp.ones(shape, bool if name == "mask" else jnp.float32)
        for name, shape in (shapes | FAULTS[message]).items()
    }
    with pytest.raises(ValueError, match="dot_product_attention: ") as error:
        dot_product_attention(**arguments)
    assert message in str(error.value)


def test_mask_of_numbers_raises_with_both_fixes(no_typecheck):
    with pytest.raises(TypeError, match=r"^dot_product_attention: .*pass it as bias"):
        dot_product_attention(*inputs(), mask=jnp.zeros((13, 13)))


def test_other_errors_come_from_jax_nn():
    q, key, value = inputs()
    with pytest.raises(ValueError, match="query dtype should be float32"):
        dot_product_attention(q.astype(jnp.bfloat16), key, value)
