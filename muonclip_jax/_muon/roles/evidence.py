"""Evidence from the shapes of a pytree: stacked layers, widths, biases.

Layers that `scan` or `vmap` stacks have one more axis in every parameter, of one size. A gain of a
norm is a vector, so that its rank counts the axes of the stack. The sizes of the gains are the
widths of the activations, which enter a projection on its input side.
"""

import collections
from collections.abc import Iterable, Sequence

from muonclip_jax._common.paths import without_boxes
from muonclip_jax._muon.roles import names
from muonclip_jax._muon.roles.modules import (
    Experts,
    Group,
    Leaf,
    Path,
    Shape,
    Stack,
    common,
    is_tiny,
)
from muonclip_jax._muon.roles.vectors import vector_kind, without_window


class Evidence:
    """Everything that the shapes of a pytree show; built once, read for each parameter.

    Args:
      paths: Components of the path of each parameter.
      shapes: Its shape.

    Attributes:
      leaves: The parameters.
      groups: The parameters of each module.
      children: The names of the children of each module.
      by_core: The parameters by path.
      sizes: How often each size occurs in the shapes.
      matrix_sizes: The same in the shapes of matrices, without windows of convolutions.
      vocabulary: The rows of the largest table of embeddings; 0 without one.
      embedded: Its width.
      usual_width: The most frequent size of the gains of norms; 0 without one.
      convention: Whether matrices are outputs first, by the name of the parameter, where shapes
        show it.
      has_kernels: Whether most matrices are the kernels of modules, as in Flax.
    """

    def __init__(self, paths: Sequence[Path], shapes: Sequence[Shape]):
        cores = [names.core(path) or ("",) for path in without_boxes(paths)]  # () of one array
        self.leaves = [
            Leaf(path, inner, shape, names.adamw_role(inner))
            for path, inner, shape in zip(paths, cores, shapes, strict=True)
        ]
        self.groups: dict[Path, Group] = {}
        self.children: dict[Path, set[str]] = {}
        for index, leaf in enumerate(self.leaves):
            self._add(index, leaf)
        self.by_core = {leaf.core: leaf for leaf in self.leaves}
        self.sizes = collections.Counter(n for shape in shapes for n in shape)
        vectors = ("bias", "norm", "scale")
        matrices = (
            without_window(leaf)
            for leaf in self.leaves
            if len(leaf.shape) > 1 and not (leaf.role and leaf.role[0].name in vectors)
            if not names.matches(names.NOISE, leaf.name)
        )
        self.matrix_sizes = collections.Counter(n for shape in matrices for n in shape)
        self.vocabulary, self.embedded = self._embedding_sizes()
        self.convention: dict[str, bool] = {}
        self._stacks: dict[Path, Stack] = {}
        self._widths: dict[Path, set[int]] = {}
        self._shared: dict[Path, bool] = {}
        self._experts: dict[Path, Experts] = {}
        self.usual_width = self._find_usual_width()
        self.has_kernels = False

    def _find_usual_width(self) -> int:
        """Finds the most frequent size of the gains of norms; 0 if there is none."""
        gains = (leaf for leaf in self.leaves if vector_kind(leaf) == "gain")
        sizes = collections.Counter(
            n for leaf in gains for n in self.stack_of(leaf).without(leaf.shape)[-1:]
        )
        return max(sizes, key=sizes.__getitem__, default=0)

    def _add(self, index: int, leaf: Leaf) -> None:
        shape, kind = leaf.shape, vector_kind(leaf)
        for depth in range(len(leaf.core)):
            prefix = leaf.core[:depth]
            group = self.groups.get(prefix)
            if group is None:
                group = self.groups[prefix] = Group(shape, shape[1:])
            else:
                group.lead = common(group.lead, shape)
                group.second = common(group.second, shape[1:])
            group.leaves.append(index)
            group.rank = max(group.rank, len(shape))
            self.children.setdefault(prefix, set()).add(leaf.core[depth])
            if kind == "gain":
                group.gains.add(shape)
                if not leaf.has(names.LOW_RANK_NORM):
                    group.widths.add(shape)
            elif kind == "bias":
                group.biases.add(shape)

    def _embedding_sizes(self) -> tuple[int, int]:
        """Finds the rows and the width of the largest table of embeddings; 0 without one.

        Positions are no vocabulary, and a matrix beside a bias is no table.
        """
        shapes = [
            leaf.shape[-2:]
            for leaf in self.leaves
            if leaf.role and leaf.role[0].name == "embedding" and 1 < len(leaf.shape) < 4
            if not any("pos" in name.lower() for name in leaf.core)
            if self.bias_of(leaf) is None and not leaf.has(names.COMPUTED)
        ]
        rows, width = max(shapes, key=lambda shape: (max(shape), shape), default=(0, 0))
        return rows, width

    def stack_of(self, leaf: Leaf) -> Stack:
        """Finds the stack axes of a parameter.

        The innermost module that has a norm decides; without a norm, the innermost that has a
        bias. A norm outside of the block shows nothing about what is inside.
        """
        prefix = leaf.core[:-1]
        if prefix not in self._stacks:
            self._stacks[prefix] = self._find_stack(prefix)
        stack = self._stacks[prefix]
        fits = all(axis < len(leaf.shape) for axis in stack.axes)
        fits &= stack.layers in (0, *leaf.shape[:1])
        return stack if fits else Stack((), False)

    def layer_of(self, leaf: Leaf) -> tuple[Stack, Shape]:
        """Returns the stack axes of a parameter and the shape of one layer."""
        stack = self.stack_of(leaf)
        return stack, stack.without(leaf.shape)

    def is_root(self, module: Path) -> bool:
        """Returns whether a module has all parameters of the pytree."""
        return len(self.groups[module].leaves) == len(self.leaves)

    def beside(self, leaf: Leaf) -> list[Leaf]:
        """Lists the other parameters of a module: directly in it or in modules of their own.

        `mlp/w` may be alone in the module `mlp`, or beside `mlp/v`.
        """
        group = (self.leaves[i] for i in self.groups[leaf.module].leaves)
        near = (leaf.module, leaf.core[:-1])
        return [
            x
            for x in group
            if x is not leaf
            if x.module == leaf.module or (x.role is None and x.core[:-1] in near)
        ]

    def leaves_in(self, module: Path) -> list[Leaf]:
        """Lists the parameters directly in a module."""
        found = (self.by_core.get((*module, child)) for child in self.children[module])
        return [leaf for leaf in found if leaf]

    def has_child(self, module: Path, pattern: str) -> bool:
        """Returns whether a module has a child of a name."""
        return any(names.matches(pattern, child) for child in self.children[module])

    def _find_stack(self, prefix: Path) -> Stack:
        for vectors in ("gains", "biases"):
            for depth in range(len(prefix), -1, -1):
                group = self.groups[prefix[:depth]]
                shapes = getattr(group, vectors)
                stack = (self._mixed(group) or group.stack(shapes)) if shapes else None
                if vectors == "biases" and shapes and self._are_columns(group):
                    stack = Stack((), True)
                if stack is not None and (stack.axes or self._is_local(prefix, depth)):
                    return stack
                if stack is not None:
                    break
        return self._second_axis(prefix)

    def _are_columns(self, group: Group) -> bool:
        """Returns whether biases are (outputs, 1), as of convolutions with outputs first.

        The bias of stacked layers with one output is beside a kernel that ends in 1 as well.
        """
        kernels = (self.leaves[i].shape for i in group.leaves)
        ends_in_one = any(len(shape) > 2 and shape[-1] == 1 for shape in kernels)
        return not ends_in_one and all(b[1:] == (1,) for b in group.biases)

    def _mixed(self, group: Group) -> Stack | None:
        """Finds stacked layers whose module holds an unstacked gain too, such as a last norm."""
        layers = {shape[0] for shape in group.gains if len(shape) == 2}
        if len(layers) != 1 or not any(len(shape) == 1 for shape in group.gains):
            return None
        (count,) = layers
        leaves = (self.leaves[i] for i in group.leaves)
        large = [x.shape for x in leaves if x.role is None and len(x.shape) > 2]
        stacked = [shape for shape in large if shape[0] == count]
        return Stack((0,), True, count) if len(stacked) > max(2, len(large) // 2) else None

    def _second_axis(self, prefix: Path) -> Stack:
        """Finds layers on axis 1, which all parameters of a module share, but not their first."""
        for depth in range(len(prefix), -1, -1):
            group = self.groups[prefix[:depth]]
            if group.lead or not group.second:
                continue
            shapes = {self.leaves[i].shape for i in group.leaves}
            large = [i for i in group.leaves if len(self.leaves[i].shape) > 2]
            if len(shapes) > 2 and any(not self._is_attention(self.leaves[i]) for i in large):
                return Stack(tuple(range(1, len(group.second) + 1)), True)
        return Stack((), False)

    def _is_local(self, prefix: Path, depth: int) -> bool:
        """Returns whether vectors of the module at `depth` are in the block of `prefix`."""
        if len(prefix) - depth > 2:
            return False
        inner = prefix[: depth + 1]
        if inner == prefix[:depth]:
            return True
        group = self.groups[inner]
        ranks = {len(self.leaves[i].shape) for i in group.leaves}
        return not (group.lead and len(group.leaves) > 2 and max(ranks) > 2)

    def shared_axis(self, leaf: Leaf) -> tuple[Path, int] | None:
        """Finds a module in which all parameters have the same first size, the number of layers.

        Returns:
          The path of the outermost such module and the number of its parameters; None if the size
          may be the width of the activations.
        """
        shared = self.same_first_axis(leaf)
        return None if shared is None or self._may_be_width(shared[0]) else shared

    def _may_be_width(self, prefix: Path) -> bool:
        """Returns whether the shared first size is a known width, or no side of a matrix is longer.

        Layers are fewer than the width of their activations.
        """
        group = self.groups[prefix]
        return self.is_width(group.lead[0], (self.leaves[i].shape for i in group.leaves))

    def is_width(self, size: int, shapes: Iterable[Shape]) -> bool:
        """Returns whether the first size of stacked parameters may be the width, not a number."""
        others = (n for shape in shapes if len(shape) > 2 for n in shape[1:])
        return size in (self.embedded, self.usual_width) or size >= max(others, default=0)

    def same_first_axis(self, leaf: Leaf) -> tuple[Path, int] | None:
        """Finds a module in which all of three or more parameters have the same first size.

        Returns:
          The path of the outermost such module and the number of its parameters.
        """
        for depth in range(len(leaf.core)):
            prefix = leaf.core[:depth]
            if self.groups[prefix].lead:
                shared = self._is_shared(prefix)
                return (prefix, len(self.groups[prefix].leaves)) if shared else None
        return None

    def _is_shared(self, prefix: Path) -> bool:
        if prefix not in self._shared:
            shapes = [self.leaves[i].shape for i in self.groups[prefix].leaves]
            several = len(shapes) > 2 and len(set(shapes)) > 1
            self._shared[prefix] = several and max(map(len, shapes)) > 2
        return self._shared[prefix]

    def experts(self, prefix: Path) -> "Experts":
        """Lists stacks of matrices below a module by the sizes of their batch axes.

        Returns:
          For (sizes of all batch axes but the last, size of the last): the sides of the matrices
          of each such parameter.
        """
        if prefix not in self._experts:
            found: Experts = {}
            for leaf in (self.leaves[i] for i in self.groups[prefix].leaves):
                shape = self.stack_of(leaf).without(leaf.shape)
                if len(shape) < 3 or is_tiny(*shape[-2:]):
                    continue
                if leaf.role is None and not self._is_attention(leaf):
                    found.setdefault((shape[:-3], shape[-3]), []).append({*shape[-2:]})
            self._experts[prefix] = found
        return self._experts[prefix]

    def widths(self, leaf: Leaf) -> set[int]:
        """Lists the widths of the activations around a parameter.

        These are the sizes of the gains in its block; the width of the embedding alone if that is
        among them, or if there is no gain.
        """
        prefix = leaf.core[:-1]
        if prefix not in self._widths:
            second = self.stack_of(leaf).axes[:1] == (1,)
            found = {shape[0] if second else shape[-1] for shape in self._block_gains(prefix)}
            embedded = {self.embedded} - {0}
            self._widths[prefix] = embedded if not found or found & embedded else found
        return self._widths[prefix]

    def _block_gains(self, prefix: Path) -> set[Shape]:
        """Lists the gains of the innermost module that has some, and of its block."""
        inner = next((d for d in range(len(prefix), -1, -1) if self.groups[prefix[:d]].widths), 0)
        outer = inner
        while outer > max(inner - 2, 0) and not (outer and names.is_numbered(prefix[outer - 1])):
            outer -= 1
        return self.groups[prefix[:outer]].widths

    def _is_attention(self, leaf: Leaf) -> bool:
        """Returns whether a parameter has the name of a projection into or out of heads."""
        own = names.near(leaf.core)
        if self.is_lone_letter(leaf):
            return False
        if any(names.matches(names.INTO_HEADS, names.stem(name)) for name in own):
            return True
        if not any(names.matches(names.OUT_OF_HEADS, names.stem(name)) for name in own):
            return False
        module = leaf.core[: len(leaf.core) - len(own)]
        found = [c for c in self.children[module] if names.matches(names.INTO_HEADS, names.stem(c))]
        return bool(found) and found not in (["k"], ["v"])

    def is_lone_letter(self, leaf: Leaf) -> bool:
        """Returns whether `k` or `v` has matrices beside it, but no queries, keys or values."""
        if leaf.name.lower() not in ("k", "v"):
            return False
        beside = [x for x in self.beside(leaf) if len(x.shape) > 1 and x.role is None]
        return bool(beside) and not any(names.matches(names.INTO_HEADS, x.name) for x in beside)

    def bias_of(self, leaf: Leaf) -> Leaf | None:
        """Finds the bias that is added to the outputs of a kernel."""
        *module, name = leaf.core
        candidates = [f"{names.stem(name)}{end}" for end in names.BIAS_SUFFIXES]
        if name[:2].lower() == "w_":
            candidates.append(f"b_{name[2:]}")
        if names.matches(names.OF_CELL, name):
            candidates.insert(0, name.replace("weight", "bias"))
        is_one_of_several = name[:1] in ("w", "W") and name[1:].isdigit()
        if names.matches(f"{names.MATRIX_NAMES}|{names.OF_CELL}", name) and not is_one_of_several:
            candidates += ["b", "bias"]
        if is_one_of_several:
            candidates.insert(0, f"b{name[1:]}")
        for candidate in candidates:
            if (bias := self.by_core.get((*module, candidate))) and bias is not leaf:
                return bias
        return None

    def has_output(self, leaf: Leaf, width: int) -> bool:
        """Returns whether another parameter of two axes or more has a last axis of this size."""
        others = (x for x in self.leaves if x is not leaf and len(x.shape) > 1)
        return any(x.shape[-1] == width for x in others)
