"""`steps-to-target` at the size of GPT-2 small, on tokens of a local file, for a GPU or a TPU."""

import dataclasses
import functools
import pathlib
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from benchmarks.evidence.optimizer_search import (
    ADAMW,
    CLIPPED,
    MUON,
    Protocol,
    Target,
    geometric,
)
from examples.language_model import data
from examples.language_model.models import gqa

# modded-nanogpt, records/track_3_optimization: tokens a step, their sequences, the target and the
# standard deviation over seeds that its rule 3 assumes.
STEP_TOKENS, SEQ_LEN, TARGET, SPREAD = 2**19, 1024, 3.28, 0.0013
VOCABULARY = 50_304  # of its model: GPT-2's 50,257 tokens, rounded up to a multiple of 128
VALIDATION_TOKENS = 20 * STEP_TOKENS
ROWS = 16  # sequences of a micro-batch: their logits take 3.3 GB in float32
# llm.c and modded-nanogpt: a header of 256 int32, of which the first is this number.
MAGIC, HEADER_BYTES = 20_240_520, 1024


@dataclasses.dataclass(frozen=True)
class Tokens(Target):
    """A training of a model with the sizes of GPT-2 small: RoPE, RMSNorm and SwiGLU, no tied head.

    Attributes:
      tokens: Path of the tokens.
    """

    tokens: str = ""

    resumable: ClassVar[bool] = True
    batch_size: ClassVar[int] = STEP_TOKENS // SEQ_LEN
    micro_batches: ClassVar[int] = STEP_TOKENS // SEQ_LEN // ROWS
    seq_len: ClassVar[int] = SEQ_LEN
    validation_bytes: ClassVar[int] = VALIDATION_TOKENS
    validation_rows: ClassVar[int] = ROWS
    sizes: ClassVar[tuple[int, ...]] = (12, 768, 12, 12, 64, 2048)  # layers, width, heads, hidden
    vocabulary: ClassVar[int] = VOCABULARY
    dtype: ClassVar[Any] = jnp.bfloat16

    def model(self) -> nn.Module:
        """Builds the model."""
        return gqa.GQA(*self.sizes, vocabulary=self.vocabulary, dtype=self.dtype)

    def corpus(self) -> data.Corpus:
        """Opens the tokens."""
        return load(self.tokens, self.vocabulary, self.seq_len)


def protocol(path: pathlib.Path | str, run: type[Tokens] = Tokens) -> Protocol:
    """Returns the protocol on the tokens of a file."""
    return Protocol(
        run=run(0.0, 0, tokens=str(path)),
        target=TARGET,
        spread=SPREAD,
        budgets=geometric(2048, 16_384, 8),
        # Rates and steps of modded-nanogpt's results 2 and 12; of Kimi K2 the rate of AdamW.
        first={ADAMW: (12, 0.0015), CLIPPED: (6, 0.0015), MUON: (6, 0.03)},
        seeds=(0, 1, 2),
        tuning_seeds=(100,),
        factor=2.0,
    )


@functools.cache
def load(path: str, vocabulary: int, seq_len: int) -> data.Corpus:
    """Opens a file of tokens without reading it into memory.

    Args:
      path: `.npy`, uint16 [n]; or `.bin`, uint16 with the header of llm.c or without one.
      vocabulary: Size of the vocabulary; each token is less.
      seq_len: Tokens in a sequence.

    Returns:
      The tokens; the last tenth, at most twice `VALIDATION_TOKENS`, is the validation part.

    Raises:
      ValueError: if the file is not uint16 [n], is too short, or has a token that is too large.
    """
    tokens = np.load(path, mmap_mode="r") if path.endswith(".npy") else _binary(path)
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        got = f"{tokens.dtype} {list(tokens.shape)}"
        raise ValueError(f"--tokens {path}: got {got}, expected uint16 [n]; convert the tokens.")
    validation = min(len(tokens) // data.VALIDATION_SHARE, 2 * VALIDATION_TOKENS)
    if validation < seq_len + 1:
        needed = data.VALIDATION_SHARE * (seq_len + 1)
        raise ValueError(f"--tokens {path}: got {len(tokens)} tokens, expected {needed} at least.")
    if (largest := int(tokens.max())) >= vocabulary:
        raise ValueError(
            f"--tokens {path}: got token {largest}, expected less than {vocabulary}; tokenize the"
            " text with GPT-2's vocabulary."
        )
    cut = len(tokens) - validation
    return data.Corpus(path, tokens[:cut], tokens[cut:], sha256="")


def _binary(path: str) -> np.ndarray:
    """Maps a binary file of uint16, behind its header if it has one."""
    head = np.fromfile(path, np.int32, 1)
    offset = HEADER_BYTES if head.size and head[0] == MAGIC else 0
    return np.memmap(path, np.uint16, "r", offset)
