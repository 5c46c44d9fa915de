"""The checkpoints of the training program: what is kept, restored and refused."""

import chex
import jax
import jax.numpy as jnp
import pytest

from lm.checkpoint import Checkpoints
from lm.config import BadInput

STATE = {"a": jnp.arange(3.0), "b": [jnp.ones((2, 2), jnp.bfloat16), jnp.int32(7)]}


@pytest.fixture
def saved(tmp_path):
    """A folder with one checkpoint, of step 5."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(5, STATE)
    return tmp_path / "checkpoints"


def test_checkpoint_comes_back_bit_for_bit(saved):
    with Checkpoints(saved) as checkpoints:
        chex.assert_trees_all_equal(checkpoints.restore(5, jax.eval_shape(lambda: STATE)), STATE)


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
def test_other_leaves_are_refused_with_their_paths(saved, change, line):
    with Checkpoints(saved) as checkpoints, pytest.raises(BadInput) as error:
        checkpoints.restore(5, STATE | change)
    assert str(error.value) == f"--resume {saved / '5'}: {line}; give another --out"


def test_damaged_checkpoint_is_refused_with_its_path(saved):
    (saved / "5" / "_METADATA").write_bytes(b"{")
    with (
        Checkpoints(saved) as checkpoints,
        pytest.raises(BadInput, match=f"{saved / '5'}: damaged"),
    ):
        checkpoints.restore(5, STATE)


def test_empty_folder_with_a_number_is_left_out_with_a_warning(saved):
    (saved / "999").mkdir()
    with Checkpoints(saved) as checkpoints, pytest.warns(UserWarning, match="999: holds no"):
        assert checkpoints.steps() == [5]


def test_empty_folder_with_the_number_of_a_step_does_not_stop_its_save(saved):
    (saved / "6").mkdir()
    with Checkpoints(saved) as checkpoints, pytest.warns(UserWarning, match="6: holds no"):
        checkpoints.save(6, STATE)
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.steps() == [5, 6]


def test_foreign_names_and_links_are_left_out(saved, tmp_path):
    (saved / "abc").mkdir()
    (saved / "file").write_text("")
    (saved / "7").symlink_to(saved / "5")
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.steps() == [5]


def test_leftover_of_a_killed_save_is_removed(saved):
    leftover = saved / "9.orbax-checkpoint-tmp"
    leftover.mkdir()
    with Checkpoints(saved):
        assert not leftover.exists()
