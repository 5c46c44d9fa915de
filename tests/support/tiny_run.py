"""A tiny model, a tiny text and a short run, shared by the tests of the training program."""

import dataclasses
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tensorboardX.proto import event_pb2

from examples.language_model import data, program as language_model
from examples.language_model.config import Config
from examples.language_model.models import gqa
from examples.language_model.models.presets import PRESETS
from examples.language_model.run_folder import opening
from examples.language_model.training import loop

TINY = gqa.GQA(**PRESETS["gqa"]["tiny"])
CONFIG = Config(
    preset="tiny", steps=20, batch_size=4, seq_len=16, checkpoint_every=7, no_progress=True
)
TEXT = b"".join(b"def f_%d(x):\n    return x + %d\n" % (n, n) for n in range(100))
CORPUS = data.split("tiny", TEXT, 0, CONFIG.seq_len)


def drawn(model, spread, seed=0):
    """Weights and biases without the zeros of the start, so that every gradient has full rank."""
    text = jnp.zeros((1, 16), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), text))
    kept = {name: shapes[name] for name in ("params", "balance") if name in shapes}
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.float32(spread * random.normal(size=x.shape)), kept)


def trainer(path, **changes):
    """A trainer as `program.main` makes it, at a tiny size; `should_stop` is passed on."""
    should_stop = changes.pop("should_stop", lambda: False)
    devices = changes.pop("devices", jax.devices()[:1])
    config = dataclasses.replace(CONFIG, out=path, **changes)
    opening.open_run(config, CORPUS)
    return loop.Trainer(config, CORPUS, path, TINY, should_stop, devices)


def program(monkeypatch, folder, *common):
    """The program in this process, with a tiny model on one device, in a folder with a text."""
    monkeypatch.chdir(folder)
    first = jax.devices()[:1]
    monkeypatch.setattr("jax.devices", lambda: first)
    (folder / "text").write_bytes(TEXT)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    flags = "--preset tiny --data text --batch-size 4 --seq-len 16 --no-progress".split()
    yield lambda *arguments: language_model.main([*flags, *common, *arguments])
    for number, handler in before.items():
        signal.signal(number, handler)


def scalars(run):
    """By tag, the (step, value) of the events, as TensorBoard reads them.

    A start drops the events from its step on; a record that a kill has torn ends its file.
    """
    kept = []
    for path in sorted(run.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while len(content) >= 16 + (size := int.from_bytes(content[:8], "little")):
            event = event_pb2.Event.FromString(content[12 : 12 + size])
            if event.session_log.status == event_pb2.SessionLog.START:
                kept = [before for before in kept if before.step < event.step]
            kept.append(event)
            content = content[16 + size :]
    found = {}
    for event in kept:
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found
