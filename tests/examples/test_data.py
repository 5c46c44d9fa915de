"""The text of the training program: reading, splitting and batches."""

import hashlib
import os

import numpy as np
import pytest

from examples.language_model import data
from examples.language_model.config import BadInput

TEXT = bytes(range(1, 101)) * 10  # 1,000 bytes; data.split does not look at the encoding


def windows(text, seed, step):
    return data.batch(text, seed, step, batch_size=4, seq_len=16)


def test_batch_depends_on_seed_and_step_only():
    text = data.split("a", TEXT, 0, seq_len=16).train
    first = windows(text, seed=3, step=7)
    windows(text, seed=3, step=8)
    np.testing.assert_array_equal(windows(text, seed=3, step=7), first)


@pytest.mark.parametrize("change", [{"seed": 4}, {"step": 8}], ids=["seed", "step"])
def test_another_seed_or_step_gives_another_batch(change):
    text = data.split("a", TEXT, 0, seq_len=16).train
    base = {"seed": 3, "step": 7}
    assert (windows(text, **base) != windows(text, **(base | change))).any()


def test_swapped_seed_and_step_give_another_batch():
    text = data.split("a", TEXT, 0, seq_len=16).train
    assert (windows(text, seed=1, step=2) != windows(text, seed=2, step=1)).any()


def test_largest_seed_is_accepted():
    text = data.split("a", TEXT, 0, seq_len=16).train
    assert windows(text, seed=2**32 - 1, step=1).shape == (4, 17)


def test_sequences_are_consecutive_bytes_of_the_text():
    text = data.split("a", TEXT, 0, seq_len=16).train
    for row in windows(text, seed=0, step=1):
        assert row.tobytes() in text.tobytes()


def test_every_position_can_be_drawn():
    text = np.arange(20, dtype=np.uint8)
    drawn = {int(row[0]) for step in range(50) for row in windows(text, seed=0, step=step)}
    assert drawn == {0, 1, 2, 3}


def test_parts_are_disjoint_and_cover_the_text():
    corpus = data.split("a", TEXT, 0, seq_len=16)
    assert corpus.train.tobytes() + corpus.validation.tobytes() == TEXT
    assert len(corpus.validation) == 100


@pytest.mark.parametrize("seq_len", [1, 16, 100])
def test_shortest_text_gives_one_sequence_to_each_part(seq_len):
    corpus = data.split("a", TEXT[: 2 * (seq_len + 1)], 0, seq_len)
    assert len(corpus.train) == len(corpus.validation) == seq_len + 1


def test_one_byte_less_raises_with_both_numbers():
    with pytest.raises(
        BadInput, match=r"^a: got 33 bytes, expected at least 34 .* --seq-len below 16$"
    ):
        data.split("a", TEXT[:33], 0, seq_len=16)


def test_validation_sequences_reach_from_the_first_to_the_last_byte():
    text = np.arange(100, dtype=np.uint8)
    rows = data.evenly_spaced(text, 5, seq_len=9)
    assert rows.shape == (5, 10)
    assert rows[0, 0] == 0
    assert rows[-1, -1] == 99


def test_validation_sequences_do_not_overlap():
    rows = data.evenly_spaced(np.arange(100, dtype=np.uint8), 1_000, seq_len=9)
    assert len(np.unique(rows)) == rows.size == 100


def test_folder_is_joined_by_relative_path(tmp_path):
    for name in ("b.txt", "a/z.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    corpus = data.load(tmp_path, seq_len=1)
    assert corpus.train.tobytes() + corpus.validation.tobytes() == b"a.txta/z.txtb.txt"


def test_files_of_a_folder_that_are_not_text_are_counted(tmp_path):
    (tmp_path / "good.txt").write_text("text " * 10)
    (tmp_path / "zero.bin").write_bytes(b"a\0b")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "broken").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    corpus = data.load(tmp_path, seq_len=1)
    assert corpus.skipped == 4
    assert len(corpus.train) + len(corpus.validation) == 50


@pytest.mark.parametrize(
    ("text", "offset"),
    [(b"ab\0c", 2), (b"abc\xff", 3), (b"a\xffb\0", 1), (b"\0\xff", 0), (b"\xc3\xa9\xc3", 2)],
)
def test_first_bad_byte_is_reported(tmp_path, text, offset):
    path = tmp_path / "text"
    path.write_bytes(text)
    with pytest.raises(BadInput, match=f"byte {offset} is {text[offset]:#04x}"):
        data.load(path, seq_len=1)


@pytest.mark.parametrize("where", ["file", "folder"])
def test_unreadable_file_raises(tmp_path, monkeypatch, where):
    # Without chmod, which does not stop root, as whom containers often run.
    path = tmp_path / "text"
    path.write_text("text")

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(BadInput, match=rf"^--data {path}: cannot be read \(Permission denied\)"):
        data.load(path if where == "file" else tmp_path, seq_len=1)


def test_folder_that_cannot_be_listed_raises(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(BadInput, match=rf"^--data {tmp_path}: cannot be read"):
        data.load(tmp_path, seq_len=1)


@pytest.fixture(scope="module")
def standard_library():
    return data.load(None, seq_len=128)


def test_standard_library_is_large_enough_to_train_on(standard_library):
    assert len(standard_library.train) > 5_000_000
    assert len(standard_library.validation) > 500_000


def test_standard_library_is_the_same_each_time(standard_library):
    assert data.load(None, seq_len=128).sha256 == standard_library.sha256


def test_standard_library_has_no_third_party_source(standard_library):
    source = standard_library.train.tobytes() + standard_library.validation.tobytes()
    assert b"class TextWrapper" in source  # textwrap.py
    assert b"def newton_schulz" not in source


# A batch that is sharded over processes


def draw(step):
    text = data.split("a", TEXT, 0, seq_len=16).train
    return data.batch(text, 3, step, batch_size=8, seq_len=16)


def test_batch_has_the_bytes_of_the_published_runs():
    digest = hashlib.sha256(draw(7).tobytes()).hexdigest()
    assert digest == "2564ae21ff70ba2f2ebc9ae881b562575a95ee595763ded33a0f305d2b748820"


@pytest.mark.parametrize("indices", [slice(2, 5), np.array([0, 3, 7]), slice(0, 0)])
def test_selected_sequences_are_those_of_the_full_batch(indices):
    text = data.split("a", TEXT, 0, seq_len=16).train
    some = data.batch(text, 3, 7, batch_size=8, seq_len=16, indices=indices)
    np.testing.assert_array_equal(some, draw(7)[indices])


@pytest.mark.parametrize("done", [0, 3, 9, 10])
def test_reading_ahead_starts_after_the_finished_steps(done):
    with data.read_ahead(draw, done, steps=10) as batches:
        read = list(batches)
    assert len(read) == 10 - done
    for step, batch in enumerate(read, start=done + 1):
        np.testing.assert_array_equal(batch, draw(step))


def test_reading_ahead_draws_few_batches_in_advance():
    drawn = []
    with data.read_ahead(lambda step: drawn.append(step) or draw(step), 0, 1_000_000) as batches:
        next(batches)
    assert 1 <= len(drawn) <= 2 * data.READ_AHEAD


def test_error_while_reading_ahead_reaches_the_loop():
    def fail(step):
        raise OSError(f"step {step}")

    with data.read_ahead(fail, 0, 5) as batches, pytest.raises(OSError, match="step 1"):
        next(batches)
