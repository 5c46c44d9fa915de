"""Parameters with the name of a vector or a table, but with the shape of a matrix beside them."""

from muonclip_jax._muon.roles import names
from muonclip_jax._muon.roles.biases import bias_fit
from muonclip_jax._muon.roles.evidence import Evidence
from muonclip_jax._muon.roles.kernels import has_transposed
from muonclip_jax._muon.roles.modules import Leaf

# An axis longer than this hardly numbers the layers or heads of vectors.
_LONGEST_STACK = 16
# Roles that single parameters have by name, and whose vectors may be stacked.
_VECTORS_OF_MODULES = (
    *("norm", "layer scale", "scale", "gate vector", "attention sink", "learned token"),
    *("positional table", "relative positional table", "random frequency"),
)
_VECTORS = ("scale", "time-mixing vector", "gate vector", "learned token")


def is_matrix(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether `g`, `D` or `queries` has the shape of a matrix beside it."""
    if not _is_large(leaf, evidence):
        return False
    if leaf.role is not None and len(leaf.role[1]) == 1:
        return has_transposed(leaf, evidence) or _has_same(leaf, evidence)
    is_query = names.matches(names.INTO_HEADS, leaf.core[-1])
    return is_query and _has_same(leaf, evidence)


def is_dense(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a kernel below the name of a vector or a table is the one of a dense layer.

    A bias that fits shows this, and so does a gain of its inputs or the name of a dense layer:
    `gamma/kernel` beside `gamma/bias`, `layernorm_linear/kernel` and `linear_pos/kernel`.
    """
    shape = evidence.layer_of(leaf)[1]
    if _may_be_stacked(leaf, evidence):
        shape = shape[1:]
    if leaf.role is None or not _is_below_vectors(leaf) or len(shape) < 2 or min(shape) == 1:
        return False
    if leaf.is_inside and bias_fit(leaf, evidence)[0] is not None:
        return True
    if not leaf.core[-1].endswith("kernel"):
        return False
    beside = (evidence.layer_of(x)[1] for x in evidence.leaves_in(leaf.core[:-1]))
    inner = leaf.core[leaf.core.index(leaf.role[1]) : -1]
    is_named = any(names.matches(names.DENSE, n) and not names.matches("layers?", n) for n in inner)
    return is_named or shape[:1] in beside


def _is_below_vectors(leaf: Leaf) -> bool:
    return leaf.role is not None and leaf.role[0].name in _VECTORS_OF_MODULES


def _may_be_stacked(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether the first axis may number layers: no vector shows it, but a matrix has it."""
    if evidence.stack_of(leaf).known:
        return False
    return any(x.shape[:1] == leaf.shape[:1] and len(x.shape) > 2 for x in evidence.leaves)


def doubt_kernel(leaf: Leaf, evidence: Evidence) -> str:
    """Doubts that a kernel of two axes is a vector or a table."""
    shape = evidence.layer_of(leaf)[1]
    if not _is_below_vectors(leaf) or len(shape) != 2 or not _is_large(leaf, evidence):
        return ""
    is_kernel = leaf.core[-1] == "kernel" or any(
        names.matches(pattern, leaf.core[-1]) for pattern in names.PROJECTIONS
    )
    if not is_kernel or any(map(names.is_qk_norm, leaf.core)):
        return ""
    if _may_be_stacked(leaf, evidence):
        return ""
    return "it has the name and the two axes of a kernel"


def doubt(leaf: Leaf, evidence: Evidence) -> str:
    """Doubts a vector or a token that has the shape of a matrix."""
    if leaf.role is None or leaf.role[0].where != "leaf":
        return ""
    if len(leaf.role[1]) == 1 and _is_large(leaf, evidence):
        return "its two axes are as long as a matrix's"
    shape = evidence.layer_of(leaf)[1]
    if names.matches(names.MATRIX_ENDS, leaf.core[-1]) and len(shape) > 1 < min(shape[-2:]):
        return "its name ends as the name of a matrix"
    is_vector = leaf.role[0].name in _VECTORS and "sigma" not in leaf.core[-1]
    return doubt_shape(leaf, evidence) if is_vector else ""


def doubt_shape(leaf: Leaf, evidence: Evidence) -> str:
    """Doubts a parameter that has the shape of a matrix beside it."""
    if not _is_large(leaf, evidence):
        return ""
    if _has_same(leaf, evidence) or has_transposed(leaf, evidence):
        return "it has the sides of a matrix beside it"
    return ""


def _is_large(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether the last two axes of one layer are as long as in a matrix."""
    if len(leaf.shape) == 2 and evidence.shared_axis(leaf):
        return False
    shape = evidence.layer_of(leaf)[1]
    if len(shape) == 3 and names.matches(names.INTO_HEADS, leaf.name):
        return True
    return len(shape) > 1 and min(shape[-2:]) > _LONGEST_STACK


def _has_same(leaf: Leaf, evidence: Evidence) -> bool:
    return any(x.shape == leaf.shape and x.role is None for x in evidence.beside(leaf))
