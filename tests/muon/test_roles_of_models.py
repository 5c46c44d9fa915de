"""Roles in many kinds of models: none is silently wrong, also where parameters are missing."""

import random
import re

import jax
import jax.numpy as jnp
import pytest

import muonclip_jax as mc
from tests.support.role_cases import MODELS


def rows_of(name):
    for line in MODELS[name].splitlines():
        path, shape, right = line.split()
        yield path, tuple(int(n) for n in shape.split(",") if n != "-"), right


def table_of(rows, **arguments):
    """Routes parameters whose keys are whole paths."""
    tree = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape, *_ in rows}
    return mc.routing_table(tree, **arguments)


def result_of(route):
    if route.optimizer == "adamw":
        return "A"
    return f"{route.num_matrices}x{route.n_in}x{route.n_out}"


def is_warned(route, table):
    """Returns whether a warning of this pytree of flat keys names the parameter or its layers."""
    for text in table.warnings:
        pattern = re.escape(text.split(" ")[0])
        if re.fullmatch(re.sub(r"\\\{.*?\\\}", r"\\d+", pattern), route.path):
            return True
    return False


@pytest.mark.parametrize("name", MODELS)
def test_no_parameter_is_silently_wrong(name):
    rows = list(rows_of(name))
    right = {path: right for path, _, right in rows}
    table = table_of(rows)
    wrong, warned = [], []
    for route in table.rows:
        expected = right[route.path]
        doubtful = is_warned(route, table)
        if result_of(route) != expected.rstrip("W") and not doubtful:
            wrong.append(f"{route.path} {route.shape}: {result_of(route)}, right is {expected}")
        if doubtful and not expected.endswith("W"):
            warned.append(route.path)
    assert not wrong, "\n".join(wrong)
    assert not warned


# Parameters that nothing beside them shows to be heads, routers or vectors: no rule can know these.
ALONE = {
    "final_layer/linear/kernel",
    "layers/ffn/assign/kernel",
    "Dense_1/kernel",
    *(f"layers_0/seq/{name}" for name in ("Lambda_re", "Lambda_im", "P", "B")),
    *(f"layers_1/seq/{name}" for name in ("A_re", "A_im", "B_re")),
    "layers/0/ffw/w_out",
    "decoder/kernel",
}


@pytest.mark.parametrize("name", MODELS)
def test_missing_parameters_do_not_change_a_role_silently(name):
    rows = list(rows_of(name))
    full = {route.path: result_of(route) for route in table_of(rows).rows}
    subsets = {
        "matrices": [row for row in rows if full[row[0]] != "A"],
        "no biases": [row for row in rows if row[0].split("/")[-1] not in ("b", "bias")],
        "no norms": [row for row in rows if "norm" not in row[0] and "ln" not in row[0]],
        **{row[0]: [row] for row in rows},
    }
    changed = []
    for subset, kept in subsets.items():
        table = table_of(kept) if kept else mc.RoutingTable(())
        for route in table.rows:
            same = result_of(route) == full[route.path]
            if not (same or is_warned(route, table) or subset in ALONE):
                changed.append(f"{subset}: {route.path} {full[route.path]}, now {result_of(route)}")
    assert not changed, "\n".join(changed)


NAMES = (
    "layers layers_0 layers_1 blocks 0 1 attn query key value out q_proj o_proj wo wi q_einsum "
    "kv_einsum attn_vec_einsum qkv gate up down norm q_norm conv Conv_0 kernel w weight bias b "
    "scale experts moe embed lm_head D lora_a wq_b wq_a gating_einsum linear dense w1 b1 query_w"
).split()


def test_any_names_and_shapes_have_a_role():
    draw = random.Random(0)
    for _ in range(300):
        count = draw.randint(1, 8)
        paths = {"/".join(draw.choices(NAMES, k=draw.randint(1, 5))) for _ in range(count)}
        shapes = [draw.choices([0, 1, 2, 3, 4, 8, 16, 64], k=draw.randint(0, 5)) for _ in paths]
        table = table_of(list(zip(sorted(paths), map(tuple, shapes), strict=True)))
        assert {row.optimizer for row in table.rows} <= {"muon", "adamw"}
        assert len(table.rows) == len(paths)
