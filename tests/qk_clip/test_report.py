"""A printed report, and the plot of heads over steps."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import muonclip_jax as mc


def report(*logits, **arguments):
    """The report of one clip of modules `a`, `b`, ..., with the given max logits."""
    names = [chr(ord("a") + i) for i in range(len(logits))]
    kernels = {name: {"kernel": jnp.ones((4, 2, 8))} for name in ("query", "key")}
    stats = {name: {"max_logits": jnp.asarray(x)} for name, x in zip(names, logits, strict=True)}
    return mc.qk_clip({name: kernels for name in names}, stats, **arguments)[1]


def test_print_shows_modules_by_their_largest_logit():
    assert str(report([50.0, 7.0], [400.0, 200.0])) == (
        "largest logit 400; 2 of 4 heads clipped\n"
        "module  largest logit  smallest gamma  clipped\n"
        "b       400            0.25            2 of 2\n"
        "a       50             1               0 of 2"
    )


def test_print_shows_what_needs_attention():
    ever = {"a": jnp.array([True, False])}
    text = str(report([200.0, jnp.nan], ever_clipped=ever))
    assert "heads with NaN or inf: 1\nheads clipped before and above the threshold again: 1" in text


def test_print_counts_the_heads_of_all_steps():
    one, two = report([400.0, 7.0]), report([50.0, 200.0])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), one, two)
    assert str(stacked).splitlines()[0] == "largest logit 400 over 2 steps; 2 of 2 heads clipped"


def test_print_accepts_arrays_of_numpy_and_no_modules():
    info = report([400.0, 7.0])
    assert str(jax.device_get(info)) == str(info)
    assert str(info._replace(max_logits={}, gamma={}, max_logit=np.float32(-np.inf))) == (
        "largest logit -inf; 0 of 0 heads clipped"
    )


def test_a_traced_report_is_its_repr():
    texts = []

    def step(stat):
        info = report(stat)
        texts.append((str(info), repr(info)))
        return info

    shapes = jax.eval_shape(step, jnp.zeros(2))
    assert texts[0][0] == texts[0][1]
    assert str(shapes) == repr(shapes)


def lines(ax):
    return [line.get_ydata() for line in ax.get_lines()]


def test_plot_has_a_line_for_each_head_and_the_largest():
    history = [report([80.0, 9.0]), report([120.0, 130.0])]
    ax = mc.plot_max_logits(history, threshold=100.0, ax=Figure().add_subplot(), steps=[10, 20])
    expected = [[80, 120], [9, 130], [80, 130], [100, 100]]
    np.testing.assert_array_equal(lines(ax), expected)
    np.testing.assert_array_equal(ax.get_lines()[0].get_xdata(), [10, 20])
    assert ax.get_legend_handles_labels()[1] == ["a", "threshold 100"]
    assert ax.get_legend() is not None


def test_plot_of_a_scan_is_the_plot_of_its_steps():
    history = [report([80.0, 9.0], [7.0, 8.0]), report([120.0, 130.0], [3.0, 4.0])]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *history)
    a, b = (mc.plot_max_logits(x, ax=Figure().add_subplot()) for x in (history, stacked))
    np.testing.assert_array_equal(lines(a), lines(b))


@pytest.mark.parametrize(
    ("history", "steps", "message"),
    [
        (lambda: [], None, "history is empty"),
        (lambda: [report([1.0, 2.0])], [1, 2], "steps has 2 numbers and history has 1 reports"),
        (lambda: [report([1.0, 2.0], [1.0, 2.0]), report([1.0, 2.0])], None, "report 1 lacks 'b'"),
    ],
)
def test_plot_rejects_what_does_not_fit(history, steps, message):
    with pytest.raises(ValueError, match=message):
        mc.plot_max_logits(history(), steps=steps)


def test_plot_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"muonclip-jax\[plots\]"):
        mc.plot_max_logits([report([1.0, 2.0])])


def test_metrics_instead_of_reports_raise(no_typecheck):
    metrics: Any = mc.qk_clip_metrics(report([1.0, 2.0]))
    with pytest.raises(TypeError, match="history has a dict, expected the QKClipInfo"):
        mc.plot_max_logits([metrics])
