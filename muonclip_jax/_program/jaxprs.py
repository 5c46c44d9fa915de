"""The parts of a jaxpr that differ between versions of JAX, and calls that only wrap a program."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

LOOPS = frozenset({"scan", "while", "cond", "shard_map"})
CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})
REMAT = frozenset({"remat2", "remat", "checkpoint"})
JIT = frozenset({"jit", "pjit"})
# Programs that cannot be read, or whose inner program is no jaxpr of their operands.
OPAQUE = frozenset(
    {
        "pallas_call",
        "tpu_custom_call",
        "ffi_call",
        "custom_call",
        "triton_kernel_call",
        "mosaic_gpu_call",
        "xla_call_custom",
        "dot_product_attention_fwd",
        "dot_product_attention_fwd_wrapper",
        "custom_partitioning",
    }
)


def is_opaque(name: str) -> bool:
    """Returns whether a primitive runs a program that cannot be read."""
    return name in OPAQUE or name.endswith("callback")


def bare(jaxpr: Any) -> tuple[Any, list[Any]]:
    """Returns a jaxpr and its constants: equations hold closed jaxprs before jax 0.12."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()) or ())


def called(eqn: Any) -> Any | None:
    """Returns the one program that a call runs on its operands; None for other primitives."""
    name = eqn.primitive.name
    if name in LOOPS or is_opaque(name):
        return None
    for key in ("call_jaxpr", "jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(key)
        if hasattr(bare(inner)[0], "eqns") and len(bare(inner)[0].invars) == len(eqn.invars):
            return inner
    return None


def inner_jaxprs(eqn: Any) -> Iterator[Any]:
    """Yields every jaxpr among the parameters of an equation."""
    for value in eqn.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            if hasattr(bare(inner)[0], "eqns"):
                yield inner


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the numbers of constants and of carried values of a scan."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # jax 0.12
    return len(list(consts)), len(list(carry))


def call_name(eqn: Any) -> str:
    """Returns the name of a kernel, a jitted function, or a function with a gradient rule."""
    info = eqn.params.get("name_and_src_info") or eqn.params.get("name")
    if info is None and eqn.primitive.name in CUSTOM:
        debug = getattr(bare(called(eqn))[0], "debug_info", None)
        info = getattr(debug, "func_name", None)
    return str(getattr(info, "name", info) or eqn.primitive.name)


def mesh_axes(spec: Any, ndim: int) -> list[tuple[str, ...]]:
    """Returns the mesh axes over which each axis of an operand of `shard_map` is sharded."""
    if isinstance(spec, Mapping):
        return [tuple(spec.get(d, ())) for d in range(ndim)]
    entries = [*spec, *[None] * (ndim - len(spec))]
    return [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries]


def is_tracer(value: Any) -> bool:
    """Returns whether a constant is an array that is not known yet."""
    return isinstance(value, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]
