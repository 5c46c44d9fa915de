"""QK-clip for the attention of Levanter: slots for the max logits, and the clip of the model."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import muonclip_jax as mc
from muonclip_jax.integrations.levanter.framework import hooks
from muonclip_jax.integrations.levanter.gradient_slot import arrived_once, attach, joined

Attention: Any = hooks.Attention

_LAYOUT = mc.MultiHeadLayout(kernel="kv_heads groups head_dim inputs")


class MaxLogits(hooks.CustomGradientAccumulation):
    """The slot of one attention module, for all layers of a stack.

    Attributes:
      value: The max logits, with the axes of layers, key heads and query heads of a group.
      count: How often they arrived; 1 if all is well.
    """

    value: Any
    count: Any

    def accumulate(self, other: "MaxLogits") -> "MaxLogits":
        """Joins the max logits of two micro-batches."""
        arrays = joined(self.arrays, other.arrays)
        return MaxLogits(*(hooks.named(x, self.value.axes) for x in arrays))

    @property
    def arrays(self) -> tuple[jax.Array, jax.Array]:
        """The arrays of `gradient_slot`."""
        return self.value.array, self.count.array


def _is_attention(node: Any) -> bool:
    return isinstance(node, Attention)


def attentions(model: Any) -> list[tuple[str, Any]]:
    """Lists the attention modules of a model with their paths.

    Raises:
      ValueError: if there are none, or others, whose max logits are not known.
    """
    found = _nodes(model, _is_attention)
    others = [
        f"{path} ({type(node).__name__})"
        for path, node in _nodes(model, lambda x: type(x).__name__.endswith("Attention"))
        if not _nodes(node, _is_attention)
    ]
    if others or not found:
        what = f"{', '.join(others)}: not a" if others else f"{type(model).__name__} has no"
        raise ValueError(
            f"MuonClipTrainer: {what} levanter.layers.attention.Attention, from which the max "
            "logits come. Set qk_clip_threshold to null to train without the clip."
        )
    return found


def _nodes(tree: Any, is_wanted: Callable[[Any], bool]) -> list[tuple[str, Any]]:
    """Lists nodes of a pytree with their paths."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_wanted)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return [(name(path), node) for path, node in nodes if is_wanted(node)]


def _projections(path: str, attention: Any) -> dict[str, Any]:
    """Returns the layers of queries and keys, which are `Linear`."""
    layers = {"query": attention.q_proj, "key": attention.k_proj}
    for name, layer in layers.items():
        if not isinstance(layer, hooks.Linear):
            raise ValueError(
                f"MuonClipTrainer: {path}: {name} projection is {type(layer).__name__}, expected "
                "haliax.nn.Linear. Set qk_clip_threshold to null to train without the clip."
            )
    return layers


def _stack(layer: Any) -> tuple[Any, ...]:
    """Lists the axes that stack the layers of a `Linear`."""
    own = {axis.name for axis in (*_tuple(layer.In), *_tuple(layer.Out))}
    return tuple(axis for axis in layer.weight.axes if axis.name not in own)


def _tuple(axes: Any) -> tuple[Any, ...]:
    return tuple(axes) if isinstance(axes, tuple | list) else (axes,)


def empty_slot(path: str, attention: Any) -> MaxLogits:
    """Makes the slot of an attention module."""
    query = _projections(path, attention)["query"]
    zeros = hooks.zeros((*_stack(query), *_tuple(query.Out)[:-1]), dtype=jnp.float32)
    return MaxLogits(zeros, zeros)


def with_slots(model: Any, slots: Sequence[MaxLogits]) -> Any:
    """Gives each attention module its slot."""
    remaining = iter(slots)

    def recording(node: Any) -> Any:
        if not _is_attention(node):
            return node
        return _copy(_recording_class(type(node)), node, max_logits=next(remaining))

    return jax.tree.map(recording, model, is_leaf=_is_attention)


def _copy(cls: type, node: Any, **changes: Any) -> Any:
    """Copies a module, as another class, without its constructor."""
    new = object.__new__(cls)
    fields = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    for name, value in {**fields, **changes}.items():
        object.__setattr__(new, name, value)
    return new


@functools.cache
def _recording_class(cls: Any) -> Any:
    """Makes the subclass of an attention class that records its max logits."""

    class Recording(cls):
        max_logits: Any = None
        mask: Any = None

        def __call__(self, x: Any, mask: Any, **options: Any) -> Any:
            return cls.__call__(_copy(Recording, self, mask=mask), x, mask, **options)

        def _compute_qkv(self, x: Any, **options: Any) -> Any:
            query, key, value = cls._compute_qkv(self, x, **options)
            s = _max_logits(query, key, self.mask, self.config)
            array = attach(query.array, self.max_logits.arrays, s)
            return hooks.named(array, query.axes), key, value

    return Recording


def _max_logits(query: Any, key: Any, mask: Any, config: Any) -> jax.Array:
    """Computes the max logits of queries and keys after norms and rotary embeddings.

    A soft cap of the logits comes after them.

    Returns:
      `[key_heads, group]`, float32.
    """
    last = ("kv_head", "q_heads_per_group", "head_size")
    batch = tuple(axis for axis in query.axes if axis.name not in ("position", *last))
    query = query.rearrange((*batch, "position", *last))
    key = key.rearrange((*batch, "position", "kv_head", "head_size"))
    *_, t, heads, groups, width = query.array.shape
    largest = mc.max_attention_logit(
        query.array.reshape(-1, t, heads * groups, width),
        key.array.reshape(-1, t, heads, width),
        scale=config.scaling_factor,
        **_visible(mask, config, query, batch),
    )
    return jnp.max(largest, axis=0).reshape(heads, groups)


def _visible(mask: Any, config: Any, query: Any, batch: tuple[Any, ...]) -> dict[str, Any]:
    """Translates a mask of Levanter to the arguments of `max_attention_logit`."""
    if mask is None:
        return {}
    position = query.resolve_axis("position")
    if isinstance(mask, hooks.AttentionMask):
        if config.sliding_window is not None:  # as `Attention` does
            mask = mask.with_sliding_window(config.sliding_window)
        if mask.explicit_mask is None and mask.causal_offset is None:
            window, radius = mask.sliding_window, mask.bidirectional_window
            sides = (window - 1, 0) if window is not None else None
            if radius is not None:
                sides = (min(radius, sides[0]), 0) if sides else (radius, radius)
            ids = mask.segment_ids
            if ids is not None:
                names = {"key_position": "position"}
                ids = tuple(_flat(x.rename(names), (*batch, position)) for x in ids)
            return {"is_causal": mask.is_causal, "local_window_size": sides, "segment_ids": ids}
    key_position = position.alias("key_position")
    mask = hooks.materialize_mask(mask, position, key_position)
    if mask is None:
        return {}
    heads = (query.resolve_axis("kv_head"), query.resolve_axis("q_heads_per_group"))
    names = {axis.name for axis in mask.axes}
    # The axes of the batch and of the heads are 1 where the mask has none of them.
    batch, heads = (x if {a.name for a in x} & names else () for x in (batch, heads))
    array = _flat(mask, (*batch, *heads, position, key_position))
    sizes = (math.prod(axis.size for axis in x) for x in (batch, heads))
    return {"mask": array.reshape(*sizes, position.size, key_position.size)}


def _flat(x: Any, axes: tuple[Any, ...]) -> jax.Array:
    """Broadcasts a named array to axes, and joins all but the last."""
    array = x.broadcast_to(axes).rearrange(axes).array
    return array.reshape(-1, array.shape[-1])


def clipped(
    model: Any, trainable: Any, slots: Sequence[MaxLogits], threshold: float
) -> tuple[Any, dict[str, jax.Array], dict[str, jax.Array]]:
    """Clips the queries and keys of all trainable attention modules.

    Args:
      model: The model after the update.
      trainable: The same with None in the place of frozen parameters.
      slots: Gradients of the slots.
      threshold: τ.

    Returns:
      The model, the metrics of the clip, and for each module the least and the largest count of
      its slot.
    """
    params, stats, counts = {}, {}, {}
    owned = attentions(trainable)
    for (path, node), (_, own), slot in zip(attentions(model), owned, slots, strict=True):
        if not _is_trained(path, own):
            continue
        if (node.q_norm, node.k_norm) != (None, None) and threshold != float("inf"):
            raise ValueError(
                f"MuonClipTrainer: {path}: queries or keys are normalized (qk_norm), so that "
                "smaller weights do not make logits smaller. Set qk_clip_threshold to null to "
                "train without the clip, or to .inf to log the max logits."
            )
        layers = _projections(path, node)
        params[path] = {name: _arrays(layer) for name, layer in layers.items()}
        s, count = arrived_once(slot.arrays), slot.count.array
        stats[path] = {"max_logits": s.reshape(*s.shape[:-2], -1)}
        counts[path] = jnp.stack([jnp.min(count), jnp.max(count)])
    if not params:
        raise ValueError(
            "MuonClipTrainer: no attention module has trainable queries and keys. Set "
            "qk_clip_threshold to null to train without the clip."
        )
    params, info = mc.qk_clip(params, stats, _LAYOUT, threshold=threshold)

    names = iter(attentions(model))

    def with_weights(node: Any) -> Any:
        if not _is_attention(node):
            return node
        path, _ = next(names)
        return _with_weights(node, params[path]) if path in params else node

    model = jax.tree.map(with_weights, model, is_leaf=_is_attention)
    return model, mc.qk_clip_metrics(info), counts


def _is_trained(path: str, attention: Any) -> bool:
    """Returns whether queries and keys are trainable; raises if only one of them is."""
    query, key = (bool(jax.tree.leaves(x)) for x in (attention.q_proj, attention.k_proj))
    if query != key:
        raise ValueError(
            f"MuonClipTrainer: {path}: only one of q_proj and k_proj is trainable, and a clip "
            "scales both. Set qk_clip_threshold to null to train without the clip."
        )
    return query


def _arrays(layer: Any) -> dict[str, jax.Array]:
    """Returns kernel and bias of a `Linear`, outputs before inputs as `_LAYOUT` has them."""
    axes = (*_stack(layer), *_tuple(layer.Out))
    arrays = {"kernel": layer.weight.rearrange((*axes, *_tuple(layer.In))).array}
    if layer.bias is not None:
        arrays["bias"] = layer.bias.rearrange(axes).array
    return arrays


def _with_weights(attention: Any, arrays: Mapping[str, Mapping[str, jax.Array]]) -> Any:
    """Puts clipped arrays back into an attention module."""
    layers = {}
    for name, layer in _projections("", attention).items():
        axes = (*_stack(layer), *_tuple(layer.Out))
        weight = hooks.named(arrays[name]["kernel"], (*axes, *_tuple(layer.In)))
        bias = layer.bias
        if bias is not None:
            bias = hooks.named(arrays[name]["bias"], axes).rearrange(bias.axes)
        layers[name] = dataclasses.replace(
            layer, weight=weight.rearrange(layer.weight.axes), bias=bias
        )
    where = lambda x: (x.q_proj, x.k_proj)  # noqa: E731
    return hooks.tree_at(where, attention, (layers["query"], layers["key"]))
