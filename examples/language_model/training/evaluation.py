"""The validation loss, and a warning if it has risen by the end of a run."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from examples.language_model import data
from examples.language_model.training import mesh
from examples.language_model.training.step import TrainState, make_loss

VALIDATION_BYTES = 2**17
VALIDATION_BATCH = 16  # sequences
RISE = 0.01  # of the validation loss, relative to its lowest value, that causes a warning


def make_evaluation(
    model: nn.Module, corpus: data.Corpus, seq_len: int, shardings: mesh.Shardings
) -> Callable[[TrainState], float]:
    """Builds the measurement of the loss on held-out text.

    Args:
      model: The model.
      corpus: Text; the sequences are evenly spaced in its validation part.
      seq_len: Bytes in a sequence.
      shardings: Of the parameters and the text.

    Returns:
      A function from a state to nats per byte, over `VALIDATION_BYTES` or the entire validation
      part if that is shorter.
    """
    text = data.evenly_spaced(corpus.validation, max(1, VALIDATION_BYTES // seq_len), seq_len)
    parts = [text[i : i + VALIDATION_BATCH] for i in range(0, len(text), VALIDATION_BATCH)]
    loss_fn = make_loss(model)
    loss = jax.jit(lambda *arguments: loss_fn(*arguments)[0], out_shardings=shardings.replicated)

    def mean(state, part):
        text = mesh.shard(part, shardings.text(part.shape))
        return float(loss(state.params, text, state.balance))

    return lambda state: sum(mean(state, part) * len(part) for part in parts) / len(text)


def validation_rise(losses: Sequence[tuple[int, float]]) -> str | None:
    """Describes a validation loss that has risen by the end of a run.

    Args:
      losses: Step and validation loss in nats per byte, in order of the steps.

    Returns:
      One line with both losses and what to change; None if the last loss is at most 1 % above the
      lowest one before it.
    """
    *earlier, (last_step, last) = losses
    if not earlier:
        return None
    step, lowest = min(earlier, key=lambda pair: pair[1])
    if last <= lowest * (1 + RISE):
        return None
    return (
        f"validation loss rose from {lowest:.3f} at step {step} to {last:.3f} at step {last_step};"
        " use more text, fewer --steps, or a lower --learning-rate"
    )
