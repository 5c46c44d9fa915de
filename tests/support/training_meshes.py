"""Two meshes of eight devices, and trainers on a mesh that write nothing."""

import dataclasses
import pathlib

import jax

from examples.language_model.training import loop
from tests.support.tiny_run import CONFIG, CORPUS

EIGHT = {"data": 2, "fsdp": 2, "tensor": 2}
EXPERT = {"fsdp": 2, "tensor": 2, "expert": 2}


def trainer_on(sizes, count=8, **changes):
    """A trainer on a mesh of the first `count` devices."""
    settings = dataclasses.replace(CONFIG, mesh=sizes, batch_size=8, **changes)
    made = loop.make_model(settings)
    devices = jax.devices()[:count]
    return loop.Trainer(settings, CORPUS, pathlib.Path("unused"), made, devices=devices)
