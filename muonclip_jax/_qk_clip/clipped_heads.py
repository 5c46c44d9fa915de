"""Heads over several steps: which were ever clipped, and which are clipped in vain."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# A head that was clipped is at the threshold then. One update moves a logit by a few percent.
STUCK = 1.1


def stuck(
    gamma: Mapping[str, Float[Array, "..."]], ever_clipped: Mapping[str, Bool[Array, "..."]]
) -> dict[str, Bool[Array, "..."]]:
    """Marks heads that were clipped before and are now more than 10 % above the threshold.

    Args:
      gamma: Factor on the logits of this step, by module path.
      ever_clipped: What `heads_ever_clipped` returned at the step before.

    Returns:
      One boolean per head, by module path.
    """
    check_same_heads("qk_clip: ever_clipped", gamma, ever_clipped)
    return {path: (x < 1 / STUCK) & ever_clipped[path] for path, x in gamma.items()}


def check_same_heads(caller: str, now: Mapping[str, Array], before: Mapping[str, Array]) -> None:
    """Raises if two mappings are of other modules or shapes.

    Args:
      caller: Start of the message.
      now: Arrays of this step, by module path.
      before: Arrays that were kept.

    Raises:
      ValueError: naming each path that differs.
    """
    new, old = ({path: jnp.shape(x) for path, x in tree.items()} for tree in (now, before))
    differing = sorted(path for path in new | old if new.get(path) != old.get(path))
    if differing:
        lines = (
            f"  {path or '(root)'}: was {old.get(path, 'absent')}, is {new.get(path, 'absent')}"
            for path in differing
        )
        head = f"{caller}: the heads are not the heads of this model; start again with None."
        raise ValueError("\n".join([head, *lines]))
