"""Evaluates a program with the row maxima of its attention as one more result.

Every equation is bound as it is, with its parameters. Calls, loops and branches that contain an
attention are built again, so that the maxima can leave them. Functions with a gradient rule of
their own stay as they are; for an attention in one of them, the maxima are computed beside it.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from muonclip_jax._program.jaxprs import CUSTOM, JIT, REMAT, bare, called, scan_counts
from muonclip_jax._program.logits import LOGIT_CHAIN

Path: TypeAlias = tuple[int, ...]
Stats: TypeAlias = dict[int, jax.Array]


class Statistic(NamedTuple):
    """The max logits of one attention.

    Attributes:
      number: Its number among all.
      path: The path of its row maximum, or of the kernel.
      shape: Sizes of the axes of the row maxima; an axis may count as several.
      heads: Those of these axes that are heads, outermost first.
      batch: Axes that stay in front of them.
      layers: Paths of the scans over layers.
      cuts: By path, which operands are kept: of a tanh or a clamp, or of a concatenation.
      base: The base of the exponentials: 2, or 0 for e.
      kernel: For a kernel, the function that computes its max logits from its operands.
    """

    number: int
    path: Path
    shape: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    layers: tuple[Path, ...] = ()
    cuts: Mapping[Path, tuple[int, ...]] = {}
    base: int = 0
    kernel: Any = None

    def reduce(self, rows: jax.Array) -> jax.Array:
        """Reduces row maxima to `[*batch, heads]`, float32.

        Args:
          rows: The row maxima.

        Returns:
          The max logits.
        """
        rest = [d for d in range(len(self.shape)) if d not in (*self.heads, *self.batch)]
        rows = jax.lax.stop_gradient(rows).reshape(self.shape)
        # Otherwise XLA joins both maxima, in one more pass over the logits, or in a softmax that is
        # rounded in another way.
        rows = jax.lax.optimization_barrier(rows)
        x = jnp.max(rows, axis=rest, keepdims=True)
        x = jnp.transpose(x, (*self.batch, *self.heads, *rest))
        x = x.reshape(*(self.shape[d] for d in self.batch), -1).astype(jnp.float32)
        return x * math.log(2) if self.base == 2 else x


def evaluate(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], statistics: Sequence[Statistic]
) -> tuple[list[Any], Stats]:
    """Evaluates a program.

    Args:
      jaxpr: The program.
      consts: Its constants.
      args: Its arguments.
      statistics: The max logits to collect.

    Returns:
      Its results, and the max logits by number, `[*layers, *batch, heads]`.
    """
    return _Evaluator(statistics).run(jaxpr, consts, args, ())


class _Evaluator:
    def __init__(self, statistics: Sequence[Statistic]):
        self.at: dict[Path, list[Statistic]] = {}
        for statistic in statistics:
            self.at.setdefault(statistic.path, []).append(statistic)
        self.prefixes = {s.path[:i] for s in statistics for i in range(1, len(s.path))}
        self.cuts = {path: i for s in statistics for path, i in s.cuts.items()}
        self.around_cuts = {path[:i] for path in self.cuts for i in range(1, len(path))}

    def run(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], path: Path
    ) -> tuple[list[Any], Stats]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        uncut: dict[Any, Any] = {}
        stats: Stats = {}
        for i, eqn in enumerate(jaxpr.eqns):
            here = (*path, i)
            values = [_read(env, atom) for atom in eqn.invars]
            with eqn.ctx.manager:
                if here in self.prefixes:
                    outs, more = self._inside(eqn, values, here)
                    stats |= more
                else:
                    outs = _bind(eqn, values)
                for statistic in self.at.get(here, ()):
                    stats[statistic.number] = _collect(statistic, eqn, values, outs, uncut)
                if here in self.around_cuts or here in self.cuts or _any_in(eqn.invars, uncut):
                    old = [_read(uncut if _is_in(a, uncut) else env, a) for a in eqn.invars]
                    uncut |= zip(eqn.outvars, self._uncut(eqn, old, here), strict=False)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [_read(env, atom) for atom in jaxpr.outvars], stats

    def _uncut(self, eqn: Any, values: Sequence[Any], here: Path) -> list[Any]:
        """Evaluates an equation once more, without soft caps and sinks; empty if it is no logit."""
        if here in self.cuts:
            return [_without(eqn, values, self.cuts[here])]
        inner = called(eqn)
        if inner is not None and eqn.primitive.name not in REMAT:
            jaxpr, consts = bare(inner)
            env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))
            for i, one in enumerate(jaxpr.eqns):
                args = [_read(env, atom) for atom in one.invars]
                outs = self._uncut(one, args, (*here, i)) or _bind(one, args)
                env.update(zip(one.outvars, outs, strict=True))
            return [_read(env, atom) for atom in jaxpr.outvars]
        return _bind(eqn, values) if eqn.primitive.name in LOGIT_CHAIN else []

    def _inside(self, eqn: Any, values: Sequence[Any], here: Path) -> tuple[list[Any], Stats]:
        """Evaluates a call, a loop or a branch that contains an attention."""
        name = eqn.primitive.name
        if name in CUSTOM:
            jaxpr, consts = bare(called(eqn))
            alone = [jax.lax.stop_gradient(value) for value in values]
            return _bind(eqn, values), self.run(jaxpr, consts, alone, here)[1]
        rule = _RULES.get(name)
        if rule is not None:
            return rule(self, eqn, values, here)
        return self._call(eqn, values, here)

    def _call(self, eqn: Any, values: Sequence[Any], here: Path) -> tuple[list[Any], Stats]:
        jaxpr, consts = bare(called(eqn))
        name, params = eqn.primitive.name, eqn.params

        def body(*args: Any) -> tuple[list[Any], Stats]:
            return self.run(jaxpr, consts, args, here)

        body.__name__ = str(params.get("name", name))
        if name in REMAT:
            prevent_cse, policy = params["prevent_cse"], params["policy"]
            return jax.checkpoint(body, prevent_cse=prevent_cse, policy=policy)(*values)
        if name in JIT:
            inner = tuple(map(_sharding, params["in_shardings"]))
            outer = [_sharding(s) for s in params["out_shardings"]]
            if all(s is None for s in outer):
                return jax.jit(body, in_shardings=inner)(*values)
            return jax.jit(body, in_shardings=inner, out_shardings=(outer, None))(*values)
        return body(*values)

    def _scan(self, eqn: Any, values: Sequence[Any], here: Path) -> tuple[list[Any], Stats]:
        params = eqn.params
        n, k = scan_counts(params)
        jaxpr, consts = bare(params["jaxpr"])

        def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], tuple[list[Any], Stats]]:
            outs, stats = self.run(jaxpr, consts, [*values[:n], *carry, *xs], here)
            return outs[:k], (outs[k:], stats)

        carry, (ys, stats) = jax.lax.scan(
            body,
            list(values[n : n + k]),
            list(values[n + k :]),
            params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        stacked = {s.number for found in self.at.values() for s in found if here in s.layers}
        # A scan of no steps has no logits.
        joined = {m: s if m in stacked else s.max(0, initial=-jnp.inf) for m, s in stats.items()}
        return [*carry, *ys], joined

    def _while(self, eqn: Any, values: Sequence[Any], here: Path) -> tuple[list[Any], Stats]:
        params = eqn.params
        n, m = params["cond_nconsts"], params["body_nconsts"]
        cond, cond_consts = bare(params["cond_jaxpr"])
        jaxpr, consts = bare(params["body_jaxpr"])

        def run(carried: Sequence[Any]) -> tuple[list[Any], Stats]:
            return self.run(jaxpr, consts, [*values[n : n + m], *carried], here)

        def body(state: tuple[list[Any], Stats]) -> tuple[list[Any], Stats]:
            outs, stats = run(state[0])
            return outs, {k: jnp.maximum(state[1][k], s) for k, s in stats.items()}

        def goes_on(state: tuple[list[Any], Stats]) -> Any:
            args = [*values[:n], *state[0]]
            return _Evaluator(()).run(cond, cond_consts, args, ())[0][0]

        start = list(values[n + m :])
        lowest = _lowest(jax.eval_shape(lambda carried: run(carried)[1], start))
        return jax.lax.while_loop(goes_on, body, (start, lowest))

    def _cond(self, eqn: Any, values: Sequence[Any], here: Path) -> tuple[list[Any], Stats]:
        branches = [bare(branch) for branch in eqn.params["branches"]]
        index, *args = values

        def run(i: int, *args: Any) -> tuple[list[Any], Stats]:
            return self.run(*branches[i], args, (*here, i))

        shapes: dict[int, Any] = {}
        for i in range(len(branches)):
            shapes |= jax.eval_shape(lambda *a, i=i: run(i, *a)[1], *args)

        def padded(i: int, *args: Any) -> tuple[list[Any], Stats]:
            outs, stats = run(i, *args)
            return outs, _lowest(shapes) | stats

        return jax.lax.switch(
            index, [functools.partial(padded, i) for i in range(len(branches))], *args
        )

    def _shard_map(self, eqn: Any, values: Sequence[Any], here: Path) -> tuple[list[Any], Stats]:
        """Stacks the max logits of all shards in front; none of them has a part of the heads."""
        params = eqn.params
        jaxpr, consts = bare(params["jaxpr"])
        manual = params.get("newly_manual_axes") or params["mesh"].axis_names
        axes = tuple(name for name in params["mesh"].axis_names if name in manual)
        inside = [s for path, found in self.at.items() for s in found if path[: len(here)] == here]

        def body(*args: Any) -> tuple[list[Any], Stats]:
            outs, stats = self.run(jaxpr, consts, args, here)
            return outs, {m: s[None] for m, s in stats.items()}

        specs = {s.number: jax.sharding.PartitionSpec(axes) for s in inside}
        outs, stats = jax.shard_map(
            body,
            mesh=params["mesh"],
            in_specs=tuple(params["in_specs"]),
            out_specs=(list(params["out_specs"]), specs),
            axis_names=set(axes),
            check_vma=params["check_vma"],
        )(*values)
        layers = {s.number: sum(p[: len(here)] == here for p in s.layers) for s in inside}
        return outs, {m: _behind_layers(s, layers[m]) for m, s in stats.items()}


_RULES = {
    "scan": _Evaluator._scan,
    "while": _Evaluator._while,
    "cond": _Evaluator._cond,
    "shard_map": _Evaluator._shard_map,
}


def _collect(
    statistic: Statistic,
    eqn: Any,
    values: Sequence[Any],
    outs: Sequence[Any],
    uncut: Mapping[Any, Any],
) -> jax.Array:
    """Computes the max logits at their equation."""
    if statistic.kernel is not None:
        return statistic.kernel(*map(jax.lax.stop_gradient, values))
    rows = outs[0]
    if statistic.cuts:
        (logits,) = eqn.invars
        if not _is_in(logits, uncut):
            raise ValueError(
                "with_max_logits: the logits before a soft cap or without a sink cannot be "
                "computed, because a loop or a checkpoint is between them and the softmax."
            )
        rows = _bind(eqn, [uncut[logits]])[0]
    return statistic.reduce(rows)


def _without(eqn: Any, values: Sequence[Any], kept: tuple[int, ...]) -> Any:
    """Returns what a soft cap is applied to, or a concatenation with the operands that count."""
    if eqn.primitive.name != "concatenate":
        (i,) = kept
        return jax.lax.stop_gradient(jnp.broadcast_to(values[i], eqn.outvars[0].aval.shape))
    parts = [
        jax.lax.stop_gradient(x) if i in kept else jnp.full_like(x, -jnp.inf)
        for i, x in enumerate(values)
    ]
    return jnp.concatenate(parts, axis=eqn.params["dimension"])


def _behind_layers(stacked: jax.Array, layers: int) -> jax.Array:
    """Moves the axis of shards behind the layers and joins it with the batch, if there is one."""
    x = jnp.moveaxis(stacked, 0, layers)
    if x.ndim < layers + 3:
        return x
    return x.reshape(*x.shape[:layers], -1, *x.shape[layers + 2 :])


def _lowest(shapes: Mapping[int, Any]) -> Stats:
    return {k: jnp.full(s.shape, -jnp.inf, s.dtype) for k, s in shapes.items()}


def _sharding(value: Any) -> Any:
    """Returns a sharding; None where there is none."""
    return None if "Unspecified" in type(value).__name__ else value


def _bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(outs) if eqn.primitive.multiple_results else [outs]


def _read(env: Mapping[Any, Any], atom: Any) -> Any:
    return atom.val if hasattr(atom, "val") else env[atom]


def _is_in(atom: Any, env: Mapping[Any, Any]) -> bool:
    return not hasattr(atom, "val") and atom in env


def _any_in(atoms: Sequence[Any], env: Mapping[Any, Any]) -> bool:
    return any(_is_in(atom, env) for atom in atoms)
