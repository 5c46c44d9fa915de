"""Vectors of norms and biases, and the shapes of kernels without their windows."""

from muonclip_jax._muon.roles import names
from muonclip_jax._muon.roles.modules import Leaf, Path, Shape


def vector_kind(leaf: Leaf) -> str:
    """Returns `gain` for a vector of a norm, `bias` for a bias, an empty string for others."""
    if not leaf.shape or leaf.role is None:
        return ""
    role, name = leaf.role
    if role.name == "norm" and not any(map(names.is_qk_norm, leaf.core)):
        inside = leaf.core[leaf.core.index(name) + 1 :]
        return "gain" if len(inside) <= 1 and not _is_dense(inside) else ""
    if role.name == "bias" or (role.name == "scale" and names.matches("scale|gain", leaf.core[-1])):
        may_have_heads = len(leaf.shape) > 1 and names.matches(
            names.INTO_HEADS, names.stem(names.near(leaf.core)[0])
        )
        return "" if may_have_heads or any(map(names.is_qk_norm, leaf.core)) else "bias"
    return ""


def _is_dense(inside: Path) -> bool:
    return bool(inside) and names.matches(r"(\w+_)?kernel|\w+_bias", inside[0])


def without_window(leaf: Leaf) -> Shape:
    """Returns the shape of a parameter without the window of a convolution."""
    shape = leaf.shape
    if len(shape) < 3 or not leaf.has(names.CONVOLUTION):
        return shape
    return shape[-2:] if max(shape[:-2]) <= max(shape[2:]) else shape[:2]
