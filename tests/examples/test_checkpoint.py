"""The checkpoints of the training program: what is kept, restored, and found damaged."""

import json
import random
import shutil
import sys
import types
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from examples.language_model.config import BadInput, Failed
from examples.language_model.run_folder import checkpoint, digests
from examples.language_model.run_folder.checkpoint import Checkpoints, Damaged

STATE = {"a": jnp.arange(3.0), "b": [jnp.ones((2, 2), jnp.bfloat16), jnp.int32(7)]}
SHAPES = jax.eval_shape(lambda: STATE)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    with Checkpoints(folder, b"settings") as checkpoints:
        checkpoints.save(5, STATE)
    return folder


@pytest.fixture
def saved(written, tmp_path):
    """A folder with one checkpoint, of step 5."""
    return shutil.copytree(written, tmp_path / "checkpoints")


def opened(folder, settings=b"settings"):
    return Checkpoints(folder, settings)


def newest(checkpoints):
    found = checkpoints.restore_newest(SHAPES)
    assert found is not None
    return found


def test_restored_state_is_bitwise_identical(saved):
    with opened(saved) as checkpoints:
        chex.assert_trees_all_equal(checkpoints.restore(5, SHAPES), STATE)


def test_restored_state_is_sharded_as_the_target(saved):
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    specs = {"a": P(), "b": [P("x"), P()]}
    target = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        SHAPES,
        specs,
        is_leaf=lambda x: isinstance(x, P),
    )
    with opened(saved) as checkpoints:
        restored = checkpoints.restore(5, target)
    chex.assert_trees_all_equal(restored, STATE)
    assert restored["b"][0].sharding == NamedSharding(mesh, P("x"))


def test_digest_does_not_depend_on_the_sharding():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    x = jnp.arange(12.0).reshape(3, 4)
    sharded = jax.device_put(x, NamedSharding(mesh, P(None, "x")))
    assert digests.leaf_digests({"x": sharded}) == digests.leaf_digests({"x": x})


@pytest.mark.parametrize(
    "other",
    [jnp.arange(4.0), jnp.arange(3), jnp.arange(3.0)[None], jnp.array([0.0, 1.0, -2.0])],
    ids=["shape", "dtype", "rank", "value"],
)
def test_digest_depends_on_shape_dtype_and_every_value(other):
    assert digests.leaf_digests([other]) != digests.leaf_digests([STATE["a"]])


def test_digests_of_zero_and_minus_zero_differ():
    assert digests.leaf_digests([jnp.float32(0.0)]) != digests.leaf_digests([jnp.float32(-0.0)])


def test_saved_state_may_be_donated_at_once(tmp_path):
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"a": jnp.zeros((512, 512))}
    with Checkpoints(tmp_path) as checkpoints:
        for n in range(3):
            checkpoints.save(n, state)
            state = bump(state)
    with Checkpoints(tmp_path) as checkpoints:
        for n in range(3):
            restored = checkpoints.restore(n, {"a": jax.ShapeDtypeStruct((512, 512), jnp.float32)})
            assert (restored["a"] == n).all()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"a": jnp.arange(4.0)}, "a was float32[3], now float32[4]"),
        ({"a": jnp.arange(3)}, "a was float32[3], now int32[3]"),
        ({"c": jnp.zeros(1)}, "c was absent, now float32[1]"),
        ({"b": [jnp.ones((2, 2)), jnp.int32(7)]}, "b/0 was bfloat16[2, 2], now float32[2, 2]"),
    ],
    ids=["shape", "kind", "extra", "precision"],
)
def test_other_leaves_raise_with_their_paths(saved, change, line):
    with opened(saved) as checkpoints, pytest.raises(BadInput) as error:
        checkpoints.restore(5, STATE | change)
    assert str(error.value) == f"--resume {saved / '5'}: {line}; pass another --out"


def test_all_other_leaves_are_listed_and_no_older_step_is_restored(saved):
    shutil.copytree(saved / "5", saved / "4")
    with opened(saved) as checkpoints, pytest.raises(BadInput) as error:
        checkpoints.restore_newest({"a": jnp.arange(4.0), "b": STATE["b"], "c": jnp.zeros(1)})
    assert str(error.value).startswith(f"--resume {saved / '5'}: a was ")
    assert "; c was absent" in str(error.value)


# Damage


def test_flipped_bits_are_detected(saved, tmp_path):
    """One bit in each of 60 places: the restored state is right, or `Damaged` is raised."""
    draw = random.Random(0)
    files = [path.relative_to(saved) for path in sorted(saved.rglob("*")) if path.stat().st_size]
    files = [path for path in files if (saved / path).is_file()]
    found = 0
    with opened(saved) as checkpoints:
        for n in range(60):
            path = saved / files[n % len(files)]
            whole = path.read_bytes()
            flipped = bytearray(whole)
            flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            try:
                chex.assert_trees_all_equal(checkpoints.restore(5, SHAPES), STATE)
            except Damaged:
                found += 1
            path.write_bytes(whole)
        chex.assert_trees_all_equal(checkpoints.restore(5, SHAPES), STATE)
    assert found > 20  # the others are in times and names that orbax does not read


@pytest.mark.parametrize("damage", ["truncated", "longer", "absent"])
def test_damaged_file_is_named(saved, damage):
    path = saved / "5" / "manifest.ocdbt"
    whole = path.read_bytes()
    path.unlink()
    if damage != "absent":
        path.write_bytes(whole[:-1] if damage == "truncated" else whole + b"!")
    with opened(saved) as checkpoints, pytest.raises(Damaged) as error:
        checkpoints.restore(5, SHAPES)
    assert str(error.value) == "files differ from those written: manifest.ocdbt"


def test_leaf_with_other_bytes_is_named(saved):
    """The files are intact, but belong to another state."""
    with opened(saved) as checkpoints:
        checkpoints.save(6, STATE | {"a": STATE["a"].at[1].add(1.0)})
        checkpoints.wait()
        path = saved / "6" / "digests.json"
        content = json.loads(path.read_bytes()) | {"leaves": digests.leaf_digests(STATE)}
        path.write_bytes(digests.seal(content))
        with pytest.raises(Damaged, match=r"^leaves differ from those saved: a$"):
            checkpoints.restore(6, SHAPES)


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"[]", b'{"a": 1}'],
    ids=["absent", "empty", "torn", "list", "other"],
)
def test_digests_that_cannot_be_read_are_damage(saved, content):
    path = saved / "5" / "digests.json"
    path.unlink() if content is None else path.write_bytes(content)
    with opened(saved) as checkpoints, pytest.raises(Damaged, match=r"^digests\.json: "):
        checkpoints.restore(5, SHAPES)


def test_flipped_bit_of_a_shape_is_damage_and_not_another_model(saved):
    path = saved / "5" / "digests.json"
    content = path.read_bytes()
    assert content.count(b'"shape": [3]') == 1
    path.write_bytes(content.replace(b'"shape": [3]', b'"shape": [2]'))
    with opened(saved) as checkpoints, pytest.raises(Damaged, match="changed since it was written"):
        checkpoints.restore(5, SHAPES)


def test_checkpoint_under_another_number_is_damage(saved):
    (saved / "5").rename(saved / "999")
    with opened(saved) as checkpoints, pytest.raises(Damaged, match="belongs to another step"):
        checkpoints.restore(999, SHAPES)


def test_checkpoint_of_a_run_with_other_settings_is_damage(saved):
    with (
        opened(saved, b"others") as checkpoints,
        pytest.raises(Damaged, match="with other settings"),
    ):
        checkpoints.restore(5, SHAPES)


def test_newest_intact_step_is_restored_with_one_warning(saved, capsys):
    for number in ("6", "7"):
        shutil.copytree(saved / "5", saved / number)
    with opened(saved) as checkpoints:
        step, state = newest(checkpoints)
    assert step == 5
    chex.assert_trees_all_equal(state, STATE)
    (line,) = capsys.readouterr().err.splitlines()
    why = "(digests.json: belongs to another step, or to a run with other settings)"
    assert line == (
        f"language_model: warning: {saved}: step 7 is damaged {why}, step 6 is damaged {why};"
        " resuming from step 5 instead"
    )


def test_no_intact_step_raises_and_starts_no_new_run(saved):
    (saved / "5").rename(saved / "6")
    with opened(saved) as checkpoints, pytest.raises(BadInput, match="no intact checkpoint: step"):
        checkpoints.restore_newest(SHAPES)


def test_no_checkpoint_is_none(tmp_path):
    with opened(tmp_path / "absent") as checkpoints:
        assert checkpoints.restore_newest(SHAPES) is None


# Folders


def test_damaged_later_step_does_not_displace_an_intact_one(saved):
    shutil.copytree(saved / "5", saved / "99")
    with opened(saved) as checkpoints:
        for step in (6, 7):
            checkpoints.save(step, STATE)
        checkpoints.wait()
        assert checkpoints.steps() == [5, 6, 7, 99]
        checkpoints.save(8, STATE)
        checkpoints.wait()
        assert checkpoints.steps() == [6, 7, 8, 99]


@pytest.mark.parametrize("make", ["empty", "full", "file", "link"])
def test_save_replaces_anything_with_its_number(saved, tmp_path, make):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("")
    path = saved / "6"
    {
        "empty": path.mkdir,
        "full": lambda: shutil.copytree(saved / "5", path),
        "file": path.touch,
        "link": lambda: path.symlink_to(elsewhere),
    }[make]()
    with opened(saved) as checkpoints:
        checkpoints.save(6, STATE)
    with opened(saved) as checkpoints:
        assert newest(checkpoints)[0] == 6
    assert (elsewhere / "kept").exists()


def test_other_names_files_and_links_are_ignored(saved, tmp_path, capsys):
    elsewhere = shutil.copytree(saved / "5", tmp_path / "elsewhere")
    (saved / "abc").mkdir()
    (saved / "file").write_text("")
    (saved / "999").mkdir()
    (saved / "998").write_text("")
    (saved / "997").symlink_to(elsewhere)
    (saved / "0005").mkdir()
    with opened(saved) as checkpoints:
        assert checkpoints.steps() == [5]
        assert newest(checkpoints)[0] == 5
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"language_model: warning: {saved / name}: not a checkpoint of this run; ignored"
        for name in ("0005", "997", "998", "999")
    ]


def test_leftover_of_a_killed_save_is_removed(saved):
    leftover = saved / "9.orbax-checkpoint-tmp"
    leftover.mkdir()
    with opened(saved):
        assert not leftover.exists()


def test_kill_while_an_old_step_is_removed_leaves_no_partial_checkpoint(saved, monkeypatch):
    def kill(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", kill)
    checkpoints = opened(saved)
    for step in (6, 7):
        checkpoints.save(step, STATE)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(8, STATE)
    monkeypatch.undo()
    with opened(saved) as checkpoints:
        assert checkpoints.steps() == [6, 7]
    assert sorted(path.name for path in saved.iterdir()) == ["6", "7"]


def test_tracebacks_of_a_closed_event_loop_are_dropped(monkeypatch):
    """Orbax causes some after a failed save or restore, besides the error that it raises."""
    seen = []
    monkeypatch.setattr("sys.unraisablehook", seen.append)
    checkpoint._ignore_closed_loops.__wrapped__()
    closed, other = (
        types.SimpleNamespace(exc_value=RuntimeError(text))
        for text in ("Event loop is closed", "something else")
    )
    hook: Any = sys.unraisablehook
    for unraisable in (closed, other):
        hook(unraisable)
    assert seen == [other]


def test_checkpoint_without_digests_is_never_renamed(saved, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", fail)
    checkpoints = opened(saved)
    checkpoints.save(6, STATE)
    with pytest.raises(Failed, match=r"^step 6: .* could not be written \(OSError: .*No space"):
        checkpoints.wait()
    with opened(saved) as checkpoints:
        assert checkpoints.steps() == [5]
    assert [path.name for path in saved.iterdir()] == ["5"]
