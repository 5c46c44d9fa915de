"""Rules that assign a parameter to AdamW: names, biases, routers, vectors of stacked layers."""

from muonclip_jax._muon.roles import look_alikes, names
from muonclip_jax._muon.roles.biases import has_fitting_bias, is_matrix_of_adaptive_norm
from muonclip_jax._muon.roles.decision import Decision
from muonclip_jax._muon.roles.evidence import Evidence
from muonclip_jax._muon.roles.modules import Leaf, Path, Shape

# How many times longer than wide tables of embeddings are, at least.
_MUCH_LONGER = 8
_SMALL_EXPERTS = "there would be at least one expert for each unit of their longest side"


def by_name(leaf: Leaf, evidence: Evidence) -> Decision | None:
    """A component of the path names a role, unless the shapes beside it contradict."""
    if leaf.role is None or _is_low_rank(leaf, evidence):
        return None
    role, name = leaf.role
    if look_alikes.is_matrix(leaf, evidence) or look_alikes.is_dense(leaf, evidence):
        return None
    doubt = look_alikes.doubt(leaf, evidence) or look_alikes.doubt_kernel(leaf, evidence)
    if role.name == "norm":
        if is_matrix_of_adaptive_norm(leaf, evidence, name):
            return None
        inside = leaf.core[leaf.core.index(name) + 1 :]
        is_vector = bool(inside) and names.matches("scale|gain|bias|offset", inside[0])
        if len(inside) > 1 and len(leaf.shape) > 1 and leaf.is_inside and not is_vector:
            doubt = "it may be the matrix of an adaptive norm"
    if role.name == "embedding" and leaf.is_inside and not leaf.has(names.PATCHES):
        if _is_dense(leaf, evidence):
            return None
        doubt = _doubt_table(leaf, evidence, name)
        if not doubt and _is_one_of_several(leaf, evidence):
            doubt = f"'{leaf.core[-2]}' has several matrices, as dense layers"
    if role.name == "output head":
        is_top = role.where == "top"
        if (is_top and _is_hidden_layer(leaf, evidence, name)) or _is_in_head(leaf, evidence, name):
            return None
        is_square = len(leaf.shape) == 2 and leaf.shape[0] == leaf.shape[1]
        if is_square and (is_top or name != leaf.name):
            doubt = "its inputs and outputs have equal sizes, as in hidden layers"
    return Decision(None, f"{role.name} '{name}'", doubt)


def _is_in_head(leaf: Leaf, evidence: Evidence, name: str) -> bool:
    """Returns whether a square dense layer is inside a head with a vocabulary, as in BERT."""
    is_dense = name != leaf.name and names.matches(names.DENSE, leaf.name)
    if not is_dense or len(leaf.shape) != 2 or leaf.shape[0] != leaf.shape[1]:
        return False
    return evidence.vocabulary not in (0, leaf.shape[0])


def _is_dense(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a parameter is a dense layer that computes the embedding of a time step."""
    computed = [n for n in leaf.core if names.matches(names.COMPUTED, n)]
    if not computed:
        return False
    has_bias = len(leaf.shape) < 4 and has_fitting_bias(leaf, evidence)
    has_bias |= _is_one_of_several(leaf, evidence)
    return has_bias or leaf.name not in computed or names.matches(names.DENSE, leaf.name)


def _is_one_of_several(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether a module has the matrices `w1` and `w2` itself, as no table has."""
    found = (evidence.by_core.get((*leaf.core[:-1], c)) for c in evidence.children[leaf.core[:-1]])
    matrices = [x for x in found if x and len(x.shape) > 1 and x.is_inside]
    return leaf.is_inside and len(matrices) > 1


def _is_low_rank(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether `g1` and `g2` are a matrix to a low rank and one from it, as in RWKV-7."""
    *module, name = leaf.core
    if name.lower() not in ("g1", "g2") or len(leaf.shape) < 2:
        return False
    first, second = (evidence.by_core.get((*module, name[0] + end)) for end in "12")
    if first is None or second is None or min(len(first.shape), len(second.shape)) < 2:
        return False
    return first.shape[-1] == second.shape[-2] != first.shape[-2]


def _doubt_table(leaf: Leaf, evidence: Evidence, name: str) -> str:
    """Doubts that a parameter below the name of an embedding is a table."""
    if len(leaf.shape) < 4 and has_fitting_bias(leaf, evidence):
        return f"the bias beside it fits a dense layer, although '{name}' names an embedding"
    is_long = len(leaf.shape) > 1 and max(leaf.shape) >= _MUCH_LONGER * min(leaf.shape)
    if names.matches(names.DENSE, leaf.name) and len(leaf.shape) > 1 and not is_long:
        return f"'{leaf.name}' may be a dense layer, although '{name}' names an embedding"
    return ""


def _is_hidden_layer(leaf: Leaf, evidence: Evidence, name: str) -> bool:
    """Returns whether projections beside `output`, `out_layer` or `w_out` make it no head."""
    module = leaf.core[: len(leaf.core) - len(names.near(leaf.core))]
    if not evidence.is_root(module):
        first = name.lower().replace("out", "in")
        if name == "proj_out" or (first != name.lower() and evidence.has_child(module, first)):
            return True
    return evidence.has_child(module, names.INTO_HEADS)


def state_space(leaf: Leaf, evidence: Evidence) -> Decision | None:
    """`B`, `C`, `P` and `A_re` beside `log_step` or `Lambda_re` act on each channel alone."""
    name, module = leaf.core[-1], leaf.core[:-1]
    if not names.matches(names.STATE_SPACE_MATRICES, name):
        return None
    is_complex = names.matches(r"[abc]_(re|im|real|imag)", name)
    beside = evidence.children[module] - {name}
    if is_complex or any(names.matches(names.STATE_SPACE, n) for n in beside):
        return Decision(None, f"state-space parameter '{name}'")
    if name in "ABC" and {"A", "B", "C"} <= {name, *beside}:
        same = {x.shape for x in evidence.beside(leaf) if x.name in "ABC"} == {leaf.shape}
        doubt = "" if "D" in beside else "nothing beside it shows a state-space layer"
        return Decision(None, f"state-space parameter '{name}'", doubt) if same else None
    return None


def noise(leaf: Leaf, evidence: Evidence) -> Decision | None:
    """`sigma` beside `mu` of the same shape scales noise, element by element."""
    if not leaf.is_inside or not names.matches(names.NOISE, leaf.name):
        return None
    beside = [x for x in evidence.beside(leaf) if names.matches(names.MEAN, x.name)]
    if any(x.shape == leaf.shape for x in beside):
        return Decision(None, f"noise '{leaf.name}'")
    return None


def per_head(leaf: Leaf, evidence: Evidence) -> Decision | None:
    """`u` and `w` beside `receptance` are vectors of each head, as in RWKV."""
    name, module = leaf.core[-1], leaf.core[:-1]
    if name.lower() in ("u", "w") and evidence.has_child(module, "receptance"):
        return Decision(None, f"time-mixing vector '{name}'")
    return None


def short_bias(leaf: Leaf, evidence: Evidence) -> Decision | None:
    """`b` beside `w` or `kernel` is a bias, as in Haiku; LoRA has matrices `a` and `b`."""
    name, beside = leaf.core[-1], evidence.children[leaf.core[:-1]]
    if name.endswith("_b") and any(
        name[:-2] + end in beside for end in ("", *names.MATRIX_SUFFIXES)
    ):
        return Decision(None, f"bias '{name}'")
    is_low_rank = names.matches(names.FROM_LOW_RANK, name) or f"{name[:-1]}a" in beside
    is_bias = name.endswith("_b") and not is_low_rank and not leaf.is_lora
    if not (names.matches("b", name) and name[0] == "b") and not is_bias:
        return None
    if any(matrix in beside for matrix in ("w", "W", "kernel", "weight", f"w{name[1:]}")):
        return Decision(None, f"bias '{name}'", look_alikes.doubt_shape(leaf, evidence))
    if len(leaf.shape) < 2 or {"a", "A"} & beside or leaf.is_lora:
        return None
    return Decision(None, f"bias '{name}'", "nothing beside it shows that it is a bias")


def router(leaf: Leaf, evidence: Evidence) -> Decision | None:
    """A matrix of (inputs, experts) beside stacks or series of that number of experts."""
    for depth, name in enumerate(leaf.core):
        is_gate = names.matches(names.GATE, name)
        if is_gate and evidence.has_child(leaf.core[:depth], names.EXPERTS):
            return Decision(None, f"router '{name}' beside experts")
    _, shape = evidence.layer_of(leaf)
    name = leaf.core[len(leaf.module)]
    if len(shape) < 2 or names.matches(names.INTO_HEADS, name):
        return None
    is_gate = names.matches(names.GATE, name)
    stacks = evidence.experts(leaf.module)
    orders = [(shape[-1], shape[-2])]
    if is_gate or leaf.is_inside:
        orders.append((shape[-2], shape[-1]))  # outputs first
    for count, inputs in orders:
        sides = stacks.get((shape[:-2], count), [])
        fitting = [pair for pair in sides if inputs in pair]
        if count > 1 and ((is_gate and sides) or len(fitting) > 1):
            reason = f"router '{name}' beside {len(sides)} stacks of {count} experts"
            is_small = not is_gate and count >= max(map(max, fitting))
            return Decision(None, reason, _SMALL_EXPERTS if is_small else "")
        if count > 1 and _has_series(leaf.module, count, evidence, any_name=is_gate):
            return Decision(None, f"router '{name}' beside {count} numbered modules")
    if leaf.module and len(shape) == 2 and _is_beside_list(leaf, shape, evidence):
        doubt = f"nothing but their number shows that the {shape[-1]} modules beside it are experts"
        return Decision(None, f"router '{name}' beside {shape[-1]} numbered modules", doubt)
    if is_gate and leaf.module and not evidence.has_child(leaf.module, names.BESIDE_GATE):
        if names.matches(names.MIXTURES, leaf.module[-1]):
            return Decision(None, f"router '{name}' of '{leaf.module[-1]}'")
    return None


def _has_series(module: Path, count: int, evidence: Evidence, *, any_name: bool) -> bool:
    """Returns whether a module has `count` numbered experts, as a list or as children.

    With `any_name`, numbered modules of every name count as experts.
    """
    children = [c for c in evidence.children[module] if any_name or names.matches(names.EXPERTS, c)]
    series = [[c for c in children if names.is_numbered(c)]]
    series += [[*evidence.children.get((*module, child), ())] for child in children]
    return any(len(s) == count and all(map(names.is_numbered, s)) for s in series)


def _is_beside_list(leaf: Leaf, shape: Shape, evidence: Evidence) -> bool:
    """Returns whether beside (inputs, n) there is a list of n modules with these inputs."""
    inputs, count = shape
    if count < 2 or names.is_numbered(leaf.name) or leaf.is_lora:
        return False
    for child in evidence.children[leaf.module]:
        modules = evidence.children.get((*leaf.module, child), ())
        if len(modules) == count and all(map(str.isdigit, modules)):
            group = evidence.groups[(*leaf.module, child)]
            sides = [evidence.leaves[i].shape for i in group.leaves]
            return sum(inputs in side for side in sides if len(side) == 2) >= count
    return False


def few_axes(leaf: Leaf, evidence: Evidence) -> Decision | None:
    """Vectors and scalars, also where a stack of layers adds an axis."""
    if len(leaf.shape) < 2:
        return Decision(None, "fewer than two axes")
    stack, shape = evidence.layer_of(leaf)
    if len(shape) < 2:
        is_kernel = leaf.core[-1] == "kernel" and leaf.role is None
        doubt = "it is a kernel, and its first axis may be its inputs" if is_kernel else ""
        return Decision(None, "fewer than two axes in each layer of a stack", doubt)
    if not stack.known and len(leaf.shape) == 2 and (shared := evidence.shared_axis(leaf)):
        module, count = shared
        reason = f"stacked vector: {count} parameters of '{'/'.join(module)}' share the first axis"
        doubt = ""
        if names.matches(names.MATRIX_NAMES, leaf.core[-1]):
            doubt = f"it has a matrix's name, and all of them have a first axis of {leaf.shape[0]}"
        return Decision(None, reason, doubt)
    if not stack.known and len(leaf.shape) == 2 and _is_beside_stacks(leaf, evidence):
        return Decision(None, f"stacked vector: all stacks beside it have {leaf.shape[0]} layers")
    return None


def _is_beside_stacks(leaf: Leaf, evidence: Evidence) -> bool:
    """Returns whether three or more stacks of matrices beside a parameter have its first size."""
    shapes = [x.shape for x in evidence.beside(leaf) if len(x.shape) > 2 and x.role is None]
    if leaf.is_lora or len(shapes) < 3 or {shape[0] for shape in shapes} != {leaf.shape[0]}:
        return False
    return len({*shapes}) > 1 and not evidence.is_width(leaf.shape[0], shapes)
