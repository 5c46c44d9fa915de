"""A tiny model, a tiny text and a short run, shared by the tests of the training program."""

import dataclasses

import jax
from jax.experimental.compilation_cache import compilation_cache

from lm import data, gqa, rundir, training
from lm.config import Config

TINY = gqa.GQA(layers=2, width=16, heads=4, kv_heads=2, head_dim=8, hidden=24)
CONFIG = Config(steps=20, batch_size=4, seq_len=16, checkpoint_every=7, no_progress=True)
TEXT = b"".join(b"def f_%d(x):\n    return x + %d\n" % (n, n) for n in range(100))
CORPUS = data.split("tiny", TEXT, 0, CONFIG.seq_len)


def trainer(path, **changes):
    """A trainer as `train_lm.main` makes it, at a tiny size; `should_stop` is passed on."""
    should_stop = changes.pop("should_stop", lambda: False)
    config = dataclasses.replace(CONFIG, out=path, **changes)
    rundir.open_run(config, CORPUS)
    return training.Trainer(config, CORPUS, path, TINY, should_stop)


def compiled_once(folder):
    """Compiles each program once while a fixture lives; a run takes 1 s with it, 6 s without."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    _apply(settings)
    yield
    _apply(before)


def _apply(settings):
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # else JAX remembers from its first use whether there is one
