"""Prints the parameters and the attention that the program of a model shows; computes nothing."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import muonclip_jax as mc
from examples.language_model.config import Config
from examples.language_model.training.step import make_loss

BATCH = 2  # with one sequence, the batch would be an axis of size 1


def report(config: Config, model: nn.Module) -> str:
    """Reads the loss of the model on shapes.

    Args:
      config: Settings.
      model: The model.

    Returns:
      The table of roles, then the attention, names that differ, and warnings.
    """
    text = jax.ShapeDtypeStruct((BATCH, config.seq_len + 1), jnp.uint8)
    variables = jax.eval_shape(
        lambda: nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    )
    balance = variables.get("balance", {})
    return str(mc.analyze(make_loss(model), variables["params"], text, balance))
