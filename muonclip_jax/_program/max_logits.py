"""`with_max_logits`: a function of a model, with the max logits of its attention beside."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from muonclip_jax._program.closed import Closed
from muonclip_jax._program.describe import AttentionSite
from muonclip_jax._program.evaluate import Statistic, evaluate
from muonclip_jax._program.jaxprs import bare
from muonclip_jax._program.read import Program, call, read

_NAME = "max_logits"


def with_max_logits(
    fn: Callable[..., Any],
    *,
    expect: int,
    has_aux: bool = False,
    kernels: Mapping[str, Callable[..., Any]] | None = None,
    ignore: Sequence[str] = (),
) -> Callable[..., Any]:
    """Makes a function of a model return the max logits of its attention too.

    The model is not changed: the program of the call is traced, and the row maximum that each
    softmax subtracts anyway is one more result. The output and the gradients equal `fn` bit for
    bit. Max logits are taken before a soft cap, and without attention sinks.

    Use it for models and trainers that you do not own. In a model that you can edit,
    `linen.sow_max_logits` and `nnx.sow_max_logits` work with every kernel.

    Args:
      fn: A forward pass, a loss or a train step; its first argument are the parameters.
      expect: Number of attention layers of the model; a scan over layers counts each layer. A
        wrong number raises an error with the right one, and a table to check.
      has_aux: Whether `fn` returns a pair `(output, aux)`, as for `jax.value_and_grad`.
      kernels: For each kernel that cannot be read, by its name: a function that computes its max
        logits `[..., heads]` from its operands, at the cost of one more product. It gets one
        operand for each of its parameters without a default. So `{"flash": mc.max_attention_logit}`
        uses the first two, queries and keys; for a causal kernel with a scale of its own, use
        `functools.partial(mc.max_attention_logit, is_causal=True, scale=0.1)`. The name of a
        jitted function works too, and keeps it from being read.
      ignore: Names of such kernels that are no attention.

    Returns:
      A function with the arguments of `fn` that returns `(output, stats)`, or `(output, (aux,
      stats))` with `has_aux`. The pytree `stats` has `max_logits`, float32
      `[*layers, *batch, heads]`, at the path of each attention, as `qk_clip` accepts it; a tuple
      where several attentions share a path.

    Raises:
      TypeError: if `expect` is no integer.
      ValueError: when the function is called: if another number of attentions is found; if a kernel
        cannot be read and is neither in `kernels` nor in `ignore`; if the queries of an attention
        come from no parameter, or its heads or layers cannot be distinguished.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import muonclip_jax as mc
      >>> def fn(params, x):
      ...     q, k = (jnp.einsum("btd,dhk->bthk", x, params[name]) for name in ("query", "key"))
      ...     weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
      ...     return jnp.einsum("bhts,bshk->bthk", weights, k).sum()
      >>> params = {"query": jnp.ones((4, 2, 3)), "key": jnp.ones((4, 2, 3))}
      >>> fn = mc.with_max_logits(fn, expect=1)
      >>> out, stats = fn(params, jnp.ones((2, 5, 4)))
      >>> stats["max_logits"].tolist()  # batch, heads
      [[48.0, 48.0], [48.0, 48.0]]
    """
    if isinstance(expect, bool) or not isinstance(expect, int):
        raise TypeError(f"with_max_logits: expect must be an integer, got {expect!r}.")
    hooks = dict(kernels or {})

    @functools.wraps(fn)
    def wrapped(params: Any, *args: Any, **kwargs: Any) -> Any:
        traced = call(fn, params, args, kwargs)
        program = read(traced, hooks)
        _check(program, expect, hooks, (ignore,) if isinstance(ignore, str) else tuple(ignore))
        statistics = _statistics(program, hooks)
        jaxpr, consts = bare(traced.closed)
        outs, found = evaluate(jaxpr, consts, traced.arrays, statistics)
        out = jax.tree.unflatten(jax.tree.structure(traced.out), outs)
        stats = _nested([site.path for site in _counted(program)], found)
        if not has_aux:
            return out, stats
        if not (isinstance(out, tuple) and len(out) == 2):
            raise ValueError(
                "with_max_logits: has_aux=True, but fn returned no pair (output, aux)."
            )
        return out[0], (out[1], stats)

    return wrapped


def _counted(program: Program) -> list[AttentionSite]:
    """Returns the layers that have max logits."""
    readable = program.sites[: len(program.traced)]
    return [*readable, *program.sites[len(program.sites) - len(program.hooked) :]]


def _check(program: Program, expect: int, hooks: Mapping[str, Any], ignore: Sequence[str]) -> None:
    """Raises where attention may have been missed, or its heads be mistaken."""
    faults = []
    names = {site.opaque for site in program.sites if site.opaque}
    closed = program.sites[len(program.traced) : len(program.sites) - len(program.hooked)]
    for name in dict.fromkeys(site.opaque for site in closed):
        if name not in ignore:
            faults.append(
                f"the kernel {name!r} has two activations as operands and cannot be read. If it is "
                f"attention, pass kernels={{{name!r}: mc.max_attention_logit}} or another function "
                "of its operands that returns max logits [..., heads]; if it is not, pass "
                f"ignore=({name!r},)."
            )
    for name in (*hooks, *ignore):
        if name not in names:
            faults.append(f"no kernel named {name!r} has two activations as operands.")
    faults += [
        f"a softmax over a product of activations that is not understood: {place}. Sow its max "
        "logits in the model."
        for place in program.suspects
    ]
    for traced, site in zip(program.traced, program.sites, strict=False):
        faults += [f"attention {site.path or '(root)'}: {fault}." for fault in traced.faults]
    counted = _counted(program)
    count = sum(site.num_layers for site in counted)
    if count != expect:
        plural = "" if count == 1 else "s"
        faults.append(f"found {count} attention{plural}, expected expect={expect}.")
    if faults:
        table = [f"  {site.path or '(root)'}: {site}" for site in program.sites]
        found = ["The program has these attentions:", *(table or ["  none"])]
        raise ValueError("\n".join(["with_max_logits:", *(f"  {f}" for f in faults), *found]))


def _statistics(program: Program, hooks: Mapping[str, Any]) -> list[Statistic]:
    statistics = [
        Statistic(
            number,
            one.softmax.top.path,
            tuple(n for d, n in enumerate(one.softmax.shape) if d != one.softmax.axis),
            _without_keys(one.heads, one.softmax.axis),
            _without_keys(one.batch, one.softmax.axis),
            one.layers,
            {**one.softmax.caps, **one.softmax.sinks},
            one.softmax.base,
        )
        for number, one in enumerate(program.traced)
    ]
    start = len(statistics)
    for i, one in enumerate(program.hooked):
        kernel = functools.partial(_max_logits_of, one, hooks[one.node.params["name"]])
        layers = tuple(one.layers)
        statistics.append(Statistic(start + i, one.node.path, layers=layers, kernel=kernel))
    return statistics


def _max_logits_of(closed: Closed, fn: Callable[..., Any], *operands: Any) -> jax.Array:
    """Computes the max logits of a kernel from one operand per argument of a function."""
    taken = inspect.signature(fn).parameters.values()
    if not any(one.kind is one.VAR_POSITIONAL for one in taken):
        needed = [one.kind is not one.KEYWORD_ONLY and one.default is one.empty for one in taken]
        operands = operands[: sum(needed)]
    x = jnp.asarray(fn(*operands), jnp.float32)
    heads = math.prod(closed.heads)
    if heads and x.shape[-1:] != (heads,):
        raise ValueError(
            f"with_max_logits: kernels[{closed.node.params['name']!r}] returned max logits "
            f"{x.shape}, expected (..., {heads}): its queries have {heads} heads."
        )
    return x


def _without_keys(axes: Sequence[int], keys: int) -> tuple[int, ...]:
    """Returns axes of logits as axes of the row maxima, which have no axis of keys."""
    return tuple(axis if axis < keys else axis - 1 for axis in axes)


def _nested(paths: Sequence[str], found: Mapping[int, jax.Array]) -> dict[str, Any]:
    """Puts max logits at the paths of their attentions, as `sow` does."""
    tree: dict[str, Any] = {}
    for number, path in enumerate(paths):
        node = tree
        for part in path.split("/") if path else ():
            node = node.setdefault(part, {})
        node.setdefault(_NAME, []).append(found[number])

    def single(node: Any) -> Any:
        if isinstance(node, list):
            return node[0] if len(node) == 1 else tuple(node)
        return {key: single(value) for key, value in node.items()}

    return single(tree)
