"""Paths of parameters: keys that hold whole paths are split, others are not."""

from typing import Any

import flax.linen as nn
import flax.struct
import pytest

from muonclip_jax._common.folding import fold
from muonclip_jax._common.paths import leaf_paths, without_boxes


@pytest.mark.parametrize(
    ("key", "components"),
    [
        ("a/~/b", ("a", "b")),
        ("a/b", ("a", "b")),
        ("x.0.w", ("x", "0", "w")),
        ("block_0/attention/key.weights", ("block_0", "attention", "key", "weights")),
        (("a", 0, "b"), ("a", "0", "b")),
        (("a/~/b", "w"), ("a", "b", "w")),
        ("a.~.b", ("a", "b")),
        ("v1.5", ("v1", "5")),
        ("0.5", ("0.5",)),
        ("0.weight", ("0", "weight")),
        ("mlp/~/linear_0.w", ("mlp", "linear_0", "w")),
        (("a/~/b", "c.~.d", 0), ("a", "b", "c", "d", "0")),
        ("a..b", ("a..b",)),
        ("w[0,0] 32x0e,1x0e", ("w[0,0] 32x0e,1x0e",)),
        ("/", ("/",)),
        ("~", ("~",)),
    ],
)
def test_keys_that_are_paths_are_split(key, components):
    assert leaf_paths({key: 1.0}) == [components]


def test_paths_that_collide_stay_apart():
    tree = {"a": {"b": 1.0}, "a/b": 2.0, "c/d": 3.0}
    assert leaf_paths(tree) == [("a", "b"), ("a/b",), ("c", "d")]


@flax.struct.dataclass
class Attention:
    query: Any
    key: Any
    value: Any


def test_an_attribute_value_with_siblings_is_no_box():
    assert leaf_paths({"attn": Attention(1.0, 2.0, 3.0)})[-1] == ("attn", "value")
    assert leaf_paths({"up": nn.Partitioned(1.0, names=())}) == [("up",)]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("attn/q/kernel/value", "attn/q/kernel"),
        ("attn/value/kernel/raw_value", "attn/value/kernel"),
        ("wq/value/_value", "wq"),
        ("attn/value", "attn/value"),
        ("memory/value", "memory/value"),
        ("kernel", "kernel"),
        ("value", "value"),
    ],
)
def test_boxes_are_left_out(path, expected):
    assert without_boxes([tuple(path.split("/"))]) == [tuple(expected.split("/"))]


def test_a_component_of_all_paths_is_a_box_unless_it_has_siblings():
    assert without_boxes([("a", "x", "data"), ("a", "y", "data")]) == [("a", "x"), ("a", "y")]
    siblings = [("q", "kernel"), ("q", "value")]
    assert without_boxes(siblings) == siblings


def test_equal_layers_fold_into_runs_of_numbers():
    numbers = [0, 1, 2, 5, 11]
    paths = [(f"h_{n}", "w") for n in numbers] + [("h_3", "w"), ("b",)]
    folded = fold(paths, ["matrix"] * len(numbers) + ["other", "matrix"])
    assert folded == [
        (("h_{0…2,5,11}", "w"), [0, 1, 2, 3, 4]),
        (("h_3", "w"), [5]),
        (("b",), [6]),
    ]


def test_a_single_layer_keeps_its_number():
    assert fold([("h_7", "w")], ["matrix"]) == [(("h_7", "w"), [0])]
