"""The largest logit of every head, without and with QK-clip, as `mc.plot_max_logits` draws it.

    python -m docs.figures.heads_over_time    # trains, and writes heads_over_time.json

`make figures` draws what the last training wrote.
"""

import io
import json
import math
import pathlib
from typing import Any

import jax
import matplotlib
import numpy as np
import optax
from cycler import cycler
from matplotlib.figure import Figure

import muonclip_jax as mc
from docs.figures.canvas import Palette

TITLE = "Largest attention logit of every head over 300 steps, without QK-clip and with it"
RECORD = pathlib.Path(__file__).with_suffix(".json")
THRESHOLD = 20.0


def train(threshold: float) -> mc.QKClipInfo:
    """Trains the model of `examples/train_in_linen.py`; returns the reports of all steps."""
    from examples import train_in_linen as example

    model, tx = example.Model(), mc.muonclip(example.LEARNING_RATE, threshold=None)

    def loss_fn(params, text):
        logits, sown = model.apply({"params": params}, text[:, :-1], mutable=["intermediates"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
        return loss[:, example.HALF - 1 :].mean(), sown

    def step(carry, key):
        params, state = carry
        grads, sown = jax.grad(loss_fn, has_aux=True)(params, example.draw(key))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        params, info = mc.qk_clip(params, sown, threshold=threshold)
        return (params, state), info

    params = model.init(jax.random.key(0), example.draw(jax.random.key(0)))["params"]
    keys = jax.vmap(jax.random.key)(np.arange(example.STEPS))
    return jax.jit(lambda start: jax.lax.scan(step, start, keys)[1])((params, tx.init(params)))


def write_record() -> None:
    """Trains twice and writes the max logits, [step, layer, head]."""
    runs = {"without": train(math.inf), "with": train(THRESHOLD)}
    record: dict[str, Any] = {"command": "python -m docs.figures.heads_over_time"}
    record |= {"jax": jax.__version__, "matplotlib": matplotlib.__version__}
    for name, info in runs.items():
        (logits,) = info.max_logits.values()
        record[name] = np.round(np.asarray(logits, float), 2).tolist()
    RECORD.write_text(json.dumps(record) + "\n")


def history(name: str) -> mc.QKClipInfo:
    """The reports of one training, layer by layer, as far as the plot reads them."""
    logits = np.asarray(json.loads(RECORD.read_text())[name], np.float32)  # [step, layer, head]
    layers = {f"layer {i + 1}": jax.numpy.asarray(logits[:, i]) for i in range(logits.shape[1])}
    largest = jax.numpy.asarray(logits.max(axis=(1, 2)))
    counts = jax.numpy.zeros(len(logits), np.int32)
    return mc.QKClipInfo(layers, layers, largest, largest, counts, largest, counts, counts, counts)


def draw(colors: Palette) -> str:
    """Draws both trainings beside each other.

    Args:
      colors: Of the picture.

    Returns:
      SVG.
    """
    settings: dict[Any, Any] = {
        "svg.hashsalt": "muonclip-jax", "text.color": colors.text, "axes.labelcolor": colors.text,
        "xtick.color": colors.text, "ytick.color": colors.text, "axes.edgecolor": colors.line,
        "axes.facecolor": colors.background, "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=[colors.blue, colors.orange]),
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(8.6, 3.4), layout="constrained", facecolor=colors.background)
        left, right = figure.subplots(1, 2)
        mc.plot_max_logits(history("without"), ax=left)
        mc.plot_max_logits(history("with"), threshold=THRESHOLD, ax=right)
        left.set_title("Muon without QK-clip")
        right.set_title("Muon with QK-clip")
        left.set_ylim(bottom=0)
        right.set_ylim(left.get_ylim())
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return svg.getvalue()


if __name__ == "__main__":
    write_record()
