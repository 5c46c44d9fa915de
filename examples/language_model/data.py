"""Text as bytes: reading, checking, splitting, and batches that depend on (seed, step) only."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import stat
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np

from examples.language_model.config import BadInput

EVERY_SEQUENCE = slice(None)
READ_AHEAD = 4  # steps; drawing one takes far less time than training on it
VALIDATION_SHARE = 10  # the last tenth of the bytes is never trained on
# Third-party packages are not the standard library; test files hold tables of odd bytes.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text in two disjoint parts.

    Attributes:
      name: Its source, for messages.
      train: Bytes to train on, uint8 [n].
      validation: The bytes after them, uint8 [m].
      sha256: Digest of all bytes, compared on resume.
      skipped: Number of files of a folder that are not text.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    sha256: str
    skipped: int = 0


def load(path: pathlib.Path | None, seq_len: int) -> Corpus:
    """Reads a text and splits it.

    Args:
      path: File, or folder whose text files are joined in the order of their relative paths; None
        uses the source files of Python's standard library.
      seq_len: Bytes in a sequence; each part must hold one, and the next byte.

    Returns:
      The text; its last tenth, or one sequence if that is more, is the validation part.

    Raises:
      BadInput: if the file is missing, not text, or too short.
    """
    if path is None:
        return split("Python's standard library", *_standard_library(), seq_len)
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        return split(str(path), *_folder(path), seq_len)
    if not stat.S_ISREG(mode):
        # Never opened: reading a FIFO waits for a writer forever.
        raise BadInput(f"--data {path}: not a regular file; pass a text file or a folder of them")
    return split(str(path), _read(path), 0, seq_len)


def split(name: str, text: bytes, skipped: int, seq_len: int) -> Corpus:
    """Splits a text into a training and a validation part.

    Args:
      name: Source of the text.
      text: All bytes.
      skipped: Number of files that are not text.
      seq_len: Bytes in a sequence.

    Returns:
      The two parts.

    Raises:
      BadInput: if a part would not hold one sequence and the next byte.
    """
    needed = 2 * (seq_len + 1)
    if len(text) < needed:
        raise BadInput(
            f"{name}: got {len(text)} bytes, expected at least {needed} for one training and one"
            f" validation sequence; pass more text, or a --seq-len below {seq_len}"
        )
    data = np.frombuffer(text, np.uint8)
    cut = len(data) - max(len(data) // VALIDATION_SHARE, seq_len + 1)
    return Corpus(name, data[:cut], data[cut:], hashlib.sha256(text).hexdigest(), skipped)


def batch(
    text: np.ndarray,
    seed: int,
    step: int,
    batch_size: int,
    seq_len: int,
    indices: slice | np.ndarray = EVERY_SEQUENCE,
) -> np.ndarray:
    """Draws the sequences of one step.

    The result depends on the arguments only: there is no reader whose position could disagree with
    the step after a resume.

    Args:
      text: Bytes to draw from, uint8 [n].
      seed: Of the run.
      step: Counts from 1.
      batch_size: Sequences, B.
      seq_len: Bytes in a sequence, T.
      indices: Sequences to copy; a process copies the sequences of its devices.

    Returns:
      Sequences with the next byte of each, uint8 [B, T + 1], or the selected ones.
    """
    windows = np.lib.stride_tricks.sliding_window_view(text, seq_len + 1)
    starts = np.random.default_rng([seed, step]).integers(len(windows), size=batch_size)
    return windows[starts[indices]]


@contextlib.contextmanager
def read_ahead(draw: Callable[[int], np.ndarray], done: int, steps: int) -> Iterator[Any]:
    """Draws the batches of a run in the background.

    Args:
      draw: Maps a step, which counts from 1, to its text.
      done: Finished steps; the first batch belongs to the next step.
      steps: The last step.

    Yields:
      An iterator over the batches; the next few are drawn in advance.
    """
    import grain  # not at the top: it imports JAX, and errors in the input should come first

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=READ_AHEAD)
    source = grain.MapDataset.source(_Steps(draw, steps))
    batches = iter(source[done:].to_iter_dataset(options))
    try:
        yield batches
    finally:
        batches.close()


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The batches of a run as a random-access source for grain."""

    draw: Callable[[int], np.ndarray]
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> np.ndarray:
        return self.draw(int(index) + 1)


def evenly_spaced(text: np.ndarray, count: int, seq_len: int) -> np.ndarray:
    """Selects evenly spaced sequences from the entire text, for validation.

    Args:
      text: Bytes to select from, uint8 [m].
      count: Sequences, at most; fewer if they would overlap.
      seq_len: Bytes in a sequence, T.

    Returns:
      Sequences with the next byte of each, uint8 [count, T + 1].
    """
    windows = np.lib.stride_tricks.sliding_window_view(text, seq_len + 1)
    count = min(count, len(text) // (seq_len + 1))
    return windows[np.linspace(0, len(windows) - 1, count).astype(np.int64)]


def _mode(path: pathlib.Path) -> int:
    try:
        return path.stat().st_mode
    except PermissionError as error:
        raise _unreadable(error) from error
    except OSError as error:  # missing, a broken link, a loop of links, a file used as a folder
        raise BadInput(
            f"--data {path}: not found ({error.strerror}); pass a text file or a folder of them"
        ) from error


def _read(path: pathlib.Path) -> bytes:
    """Reads a file that must be text."""
    text = _bytes(path)
    bad = _first_bad_byte(text)
    if bad is not None:
        raise BadInput(
            f"--data {path}: not text, byte {bad} is {text[bad]:#04x}; pass UTF-8 without NUL bytes"
        )
    return text


def _bytes(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(error) from error


def _unreadable(error: OSError) -> BadInput:
    return BadInput(
        f"--data {error.filename}: cannot be read ({error.strerror}); change its permissions or"
        " remove it"
    )


def _first_bad_byte(text: bytes) -> int | None:
    """Returns the offset of the first byte that is NUL or not UTF-8; None if there is none."""
    end = text.find(b"\0")
    try:
        text[: end if end >= 0 else None].decode()
    except UnicodeDecodeError as error:
        return error.start
    return end if end >= 0 else None


def _folder(root: pathlib.Path) -> tuple[bytes, int]:
    texts, skipped = _join(root, _files(root))
    if not texts:
        raise BadInput(f"--data {root}: no text file in this folder; pass a folder with UTF-8 text")
    return texts, skipped


def _standard_library() -> tuple[bytes, int]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    sources = (file for file in _files(root, SKIPPED_FOLDERS) if file.suffix == ".py")
    return _join(root, sources)


def _files(root: pathlib.Path, skipped: frozenset[str] = frozenset()) -> Iterator[pathlib.Path]:
    def raise_error(error: OSError) -> NoReturn:  # os.walk skips folders that it cannot list
        raise _unreadable(error)

    for folder, inner, names in os.walk(root, onerror=raise_error):
        inner[:] = [name for name in inner if name not in skipped]
        yield from (pathlib.Path(folder, name) for name in names)


def _join(root: pathlib.Path, files: Iterator[pathlib.Path]) -> tuple[bytes, int]:
    """Joins the text files in the order of their relative paths, the same on every disk."""
    texts, skipped = [], 0
    for file in sorted(files, key=lambda file: file.relative_to(root).as_posix()):
        # A FIFO or a broken link is not text, and opening a FIFO would wait forever.
        text = _bytes(file) if file.is_file() else b"\0"
        if _first_bad_byte(text) is None:
            texts.append(text)
        else:
            skipped += 1
    return b"".join(texts), skipped
