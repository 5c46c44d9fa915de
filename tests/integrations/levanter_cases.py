"""The parameters of Levanter's models as lines of text, and stand-ins of haliax made of them.

One line is: model | path of the layer | parameter | axes | layer and its axes | what trains it.
"""

import dataclasses
import functools
import pathlib
import warnings

import jax
import numpy as np

import muonclip_jax as mc

GOLDEN = pathlib.Path(__file__).with_name("levanter_roles.txt")
# Attributes of a layer of haliax that name axes.
ATTRIBUTES = ("In", "Out", "Vocab", "Experts", "Spatial", "axis")
Axis = dataclasses.make_dataclass("Axis", ["name", "size"], frozen=True)


def pytree(*children, static):
    """Makes a class whose children are attributes of a pytree, as in Equinox."""
    return functools.partial(
        jax.tree_util.register_dataclass, data_fields=children, meta_fields=static
    )


@pytree("array", static=["axes"])
@dataclasses.dataclass
class Named:
    array: object
    axes: tuple = ()


@pytree("blocks", static=["Block"])
@dataclasses.dataclass
class Stacked:
    blocks: object
    Block: object


@functools.cache
def layer_class(attributes):
    fields = ["weight", "bias", *attributes]
    cls = dataclasses.make_dataclass("Layer", fields)
    return pytree("weight", "bias", static=list(attributes))(cls)


def names(axes):
    axes = axes if isinstance(axes, tuple | list | dict) else (axes,)
    return tuple(a if isinstance(a, str) else a.name for a in axes)


def is_layer(node):
    known = hasattr(node, "weight") and any(hasattr(node, name) for name in ATTRIBUTES)
    return known or hasattr(node, "axes")


def shown(axes):
    return " ".join(f"{axis.name}={axis.size}" for axis in axes)


def lines(model, params, **arguments):
    """Describes each parameter: its layer, its axes, and what trains it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = {row.path: row for row in mc.routing_table(params, **arguments).rows}
    found = []
    for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_layer):
        kind = " ".join(
            f"{name}={','.join(names(getattr(node, name)))}"
            for name in ATTRIBUTES
            if hasattr(node, name)
        )
        groups = getattr(node, "groups", 1)
        kind += f" groups={groups}" if groups > 1 else ""
        for inner, leaf in jax.tree_util.tree_leaves_with_path(node, is_leaf=is_named):
            spell = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
            layer, parameter = spell(path), spell(inner)
            # A named array is a dataclass with one child; the children of others have names.
            row = next(
                row
                for end in ("/0", "/array", "")
                if (row := rows.pop("/".join(filter(None, (layer, parameter))) + end, None))
            )
            axes = shown(leaf.axes) if is_named(leaf) else f"shape={leaf.shape}"
            role = f"muon {row.parts[0]}" if row.optimizer == "muon" else row.optimizer
            found.append(" | ".join((model, layer, parameter, axes, kind, role)))
    assert not rows, f"not described: {[*rows]}"
    return sorted(found)


def is_named(node):
    return hasattr(node, "axes")


def stand_in(golden):
    """Builds the parameters of one model out of its lines."""
    tree = {}
    for line in golden:
        _, layer, parameter, axes, kind, _ = line.split(" | ")
        if axes.startswith("shape="):
            shape = axes.removeprefix("shape=").strip("(),").split(", ")
            tree[layer] = np.zeros([int(n) for n in shape], np.float32)
            continue
        axes = tuple(Axis(n, int(size)) for n, size in (a.split("=") for a in axes.split()))
        array = Named(np.zeros([a.size for a in axes], np.float32), axes)
        if not parameter:
            tree[layer] = array
            continue
        if layer not in tree:
            attributes = dict(a.split("=") for a in kind.split())
            tree[layer] = layer_class(tuple(attributes))(None, None, **parsed(attributes))
        setattr(tree[layer], parameter, array)
    return Stacked(tree, Axis("layers", 2))


def parsed(attributes):
    sized = {k: tuple(Axis(n, 0) for n in v.split(",") if n) for k, v in attributes.items()}
    if "groups" not in attributes:
        return sized
    groups = int(attributes["groups"])  # a depthwise convolution has one per input
    return {**sized, "groups": groups, "In": Axis(attributes["In"], groups)}
