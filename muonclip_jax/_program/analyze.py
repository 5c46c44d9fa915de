"""`analyze`: reads the program of a model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from muonclip_jax._common.types import ArrayTree
from muonclip_jax._program.analysis import Analysis, paths_like
from muonclip_jax._program.describe import AttentionSite
from muonclip_jax._program.read import Program, call, read
from muonclip_jax._program.roles import Role, roles
from muonclip_jax._program.uses import Uses

# Roles by name: from the paths and shapes of all parameters, one for each.
NamesFn = Callable[[Sequence[tuple[str, ...]], Sequence[tuple[int, ...]]], Sequence[Role]]


def analyze_program(
    fn: Callable[..., Any],
    params: ArrayTree,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    names: NamesFn,
) -> Analysis:
    """Reads the program of a function.

    Args:
      fn: A forward pass or a loss; its first argument are the parameters.
      params: The parameters or their shapes.
      args: Its other arguments.
      kwargs: Its keyword arguments.
      names: Gives the roles that names suggest.

    Returns:
      The analysis.

    Raises:
      ValueError: if the function computes gradients, or `params` has no arrays.
    """
    traced = call(fn, params, args, kwargs)
    program = read(traced)
    if program.graph.differentiates:
        raise ValueError(
            "analyze: fn computes gradients, so it has products that the model has not. Pass the "
            "forward pass or the loss itself, not jax.grad of it and not a train step."
        )
    found = roles(program.graph, Uses(program.graph))
    paths = ["/".join(path) for path in traced.paths]
    shapes = [node.shape for node in program.graph.parameters]
    heads = _heads(program.sites)
    by_path = {
        path: role._replace(heads=heads.get(path, 0))
        for path, role in zip(paths, found, strict=True)
    }
    by_name = dict(zip(paths, names(traced.paths, shapes), strict=True))
    sizes = dict(zip(paths, shapes, strict=True))
    return Analysis(
        by_path,
        sizes,
        by_name,
        tuple(program.sites),
        tuple(_warnings(program, by_path, sizes, by_name)),
        paths_like(params, sizes),
    )


def _heads(sites: Sequence[AttentionSite]) -> dict[str, int]:
    """Returns the number of heads of each query and key parameter."""
    heads = {path: site.num_kv_heads for site in sites for path in site.key}
    return heads | {path: site.num_heads for site in sites for path in site.query}


def _warnings(
    program: Program,
    found: Mapping[str, Role],
    shapes: Mapping[str, tuple[int, ...]],
    by_name: Mapping[str, Role],
) -> list[str]:
    unknown = [
        f"{path} {shapes[path]} ({role.reason}): {by_name[path].optimizer}"
        for path, role in found.items()
        if role.optimizer == "unknown"
    ]
    lines = []
    if unknown:
        text = "; ".join(unknown)
        lines.append(f"the program does not decide these, so their names do: {text}")
    lines += [
        f"a softmax over a product of activations that is not understood: {place}"
        for place in program.suspects
    ]
    if program.without_rule:
        counts = ", ".join(f"{op} x {n}" for op, n in sorted(program.without_rule.items()))
        lines.append(f"primitives without a rule, through which no axis is followed: {counts}")
    faults = [(site.path, fault) for site in program.sites for fault in site.faults]
    lines += [f"attention {path or '(root)'}: {fault}" for path, fault in dict.fromkeys(faults)]
    return lines
