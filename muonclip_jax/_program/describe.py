"""An attention layer in words and numbers that can be stored: no jaxpr in it."""

import dataclasses
import math
from collections.abc import Hashable, Sequence

from muonclip_jax._program.axes import Axis, Digit, Part, View
from muonclip_jax._program.closed import Closed
from muonclip_jax._program.head_map import HeadMap, SiteSource, head_maps
from muonclip_jax._program.sites import Source, Traced

# Components that name an array inside a projection.
_ARRAYS = frozenset("kernel weight w bias b lora_a lora_b w_lora_a w_lora_b value".split())


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One attention of a program, or a stack of attentions that a scan runs over.

    Attributes:
      path: The part of the paths of its parameters that they share.
      query: Paths of the parameters of its queries.
      key: Paths of the parameters of its keys.
      num_heads: Number of query heads.
      num_kv_heads: Number of key heads; for latent attention, heads of the keys that are not
        shared.
      head_dim: Number of columns of queries times keys.
      num_layers: Number of layers of the stack; 1 if it is none.
      qk_norm: Whether queries or keys are normalized after their projection.
      soft_cap: Whether logits pass a tanh.
      sink: Whether the softmax has columns that are no logits.
      opaque: Name of a kernel that cannot be read; empty for others.
      faults: Why its heads cannot be read, or not be clipped.
      layers: Sizes of the stacks of layers, outermost first.
      heads: Sizes of the axes of heads, outermost first.
      dims: For each product of queries and keys, the sizes of the axes it sums over.
      sources: The positions of queries and keys in their parameters.
    """

    path: str
    query: tuple[str, ...]
    key: tuple[str, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int = 1
    qk_norm: bool = False
    soft_cap: bool = False
    sink: bool = False
    opaque: str = ""
    faults: tuple[str, ...] = ()
    layers: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    heads: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    dims: tuple[tuple[int, ...], ...] = dataclasses.field(default=(), repr=False)
    sources: tuple[SiteSource, ...] = dataclasses.field(default=(), repr=False)

    def head_maps(self) -> list[HeadMap]:
        """Computes which head each element of its parameters belongs to.

        Raises:
          ValueError: if the program does not show it.
        """
        if self.faults:
            raise ValueError(f"{self.path}: {'; '.join(self.faults)}.")
        return head_maps(self.sources, self.layers, self.heads, self.dims)

    def __str__(self) -> str:
        """Describes it in one line."""
        heads = f"{self.num_heads or '?'} heads"
        if self.num_kv_heads not in (0, self.num_heads):
            heads += f", {self.num_kv_heads} key heads"
        stack = f"{self.num_layers} x " if self.layers else ""
        notes = [
            name
            for name, there in [
                ("QK-norm", self.qk_norm),
                ("soft cap", self.soft_cap),
                ("sink", self.sink),
                (f"kernel {self.opaque}", self.opaque),
            ]
            if there
        ]
        line = f"{stack}{heads} of {self.head_dim or '?'} columns"
        line += f"; queries {', '.join(self.query) or '?'}; keys {', '.join(self.key) or '?'}"
        line += f"; {', '.join(notes)}" if notes else ""
        return line + "".join(f"; WARNING: {fault}" for fault in self.faults)


def describe(
    traced: Traced, paths: Sequence[Sequence[str]], shapes: Sequence[tuple[int, ...]]
) -> AttentionSite:
    """Describes an attention.

    Args:
      traced: What is known of it.
      paths: Components of the path of each parameter.
      shapes: Its shape.

    Returns:
      The site.
    """
    softmax = traced.softmax
    names, dims = _names_of_indices(traced)
    found = tuple(
        SiteSource(
            side, "/".join(paths[s.number]), shapes[s.number], _renamed(s.view, names), s.is_inner
        )
        for side, some in (("query", traced.queries), ("key", traced.keys))
        for s in some
    )
    both = (*traced.queries, *traced.keys)
    kernels = [s for s in both if not s.is_inner] or both
    rows = softmax.shape
    layers = tuple(traced.sizes[("layer", path)] for path in traced.layers)
    marks = frozenset().union(*(s.marks for s in both))
    faults = [*traced.faults, *traced.notes]
    faults += [
        f"{m} is applied to queries, keys or their kernels" for m in sorted(marks - {"norm"})
    ]
    site = AttentionSite(
        path=_common(kernels, paths),
        query=_unique(paths, traced.queries),
        key=_unique(paths, traced.keys),
        num_heads=math.prod(rows[d] for d in traced.heads),
        num_kv_heads=math.prod(rows[d] for d in traced.heads),
        head_dim=sum(map(math.prod, dims)),
        num_layers=math.prod(layers),
        qk_norm="norm" in marks,
        soft_cap=bool(softmax.caps),
        sink=bool(softmax.sinks),
        faults=tuple(faults),
        layers=layers,
        heads=tuple(rows[d] for d in traced.heads),
        dims=dims,
        sources=found,
    )
    return _with_key_heads(site)


def _names_of_indices(
    traced: Traced,
) -> tuple[dict[Hashable, Hashable], tuple[tuple[int, ...], ...]]:
    """Returns lasting names of named indices, and for each product the sizes of its sum."""
    names: dict[Hashable, Hashable] = {("row", d): ("head", i) for i, d in enumerate(traced.heads)}
    names |= {("layer", path): ("layer", i) for i, path in enumerate(traced.layers)}
    dims: list[tuple[int, ...]] = []
    for product in traced.softmax.products:
        contract = product.node.params["dimension_numbers"][0][0]
        sizes = tuple(product.node.inputs[0].shape[d] for d in contract)
        start = sum(map(len, dims))
        names |= {("sum", product.node.path, k): ("dim", start + k) for k in range(len(sizes))}
        dims.append(sizes)
    return names, tuple(dims)


def distinct(sites: Sequence[AttentionSite]) -> list[AttentionSite]:
    """Gives layers that share a path, but no query parameters, the paths of their queries.

    Args:
      sites: Attention layers in the order of the program.

    Returns:
      The same sites.
    """
    queries: dict[str, set[tuple[str, ...]]] = {}
    for site in sites:
        queries.setdefault(site.path, set()).add(site.query)
    return [
        dataclasses.replace(site, path=site.query[-1].removeprefix("params/"))
        if len(queries[site.path]) > 1 and site.query
        else site
        for site in sites
    ]


def _with_key_heads(site: AttentionSite) -> AttentionSite:
    """Counts the key heads; a map that cannot be computed is one more fault."""
    if site.faults:
        return site
    try:
        maps = site.head_maps()
    except ValueError as error:
        return dataclasses.replace(site, faults=(str(error).rstrip("."),))
    groups = [
        {tuple(sorted({*map(int, group)})) for group in m.heads.reshape(-1, m.heads.shape[-1])}
        for m in maps
        if m.side == "key"
    ]
    count = max((len({g for g in found if g[0] >= 0}) for found in groups), default=0)
    return dataclasses.replace(site, num_kv_heads=count // site.num_layers)


def _unique(paths: Sequence[Sequence[str]], sources: Sequence[Source]) -> tuple[str, ...]:
    return tuple(dict.fromkeys("/".join(paths[s.number]) for s in sources))


def _common(sources: Sequence[Source], paths: Sequence[Sequence[str]]) -> str:
    """Returns the components that all paths begin with, without `params`."""
    found = [tuple(paths[s.number]) for s in sources]
    modules = [path[:-1] if path[-1] in _ARRAYS else path for path in found]
    common: list[str] = []
    for parts in zip(*modules, strict=False):
        if len({*parts}) > 1:
            break
        common.append(parts[0])
    if modules and len({*modules}) == 1:
        common = common[:-1]  # one projection for both, inside the attention
    return "/".join(common[1:] if common[:1] == ["params"] else common)


def _renamed(view: View, names: dict[Hashable, Hashable]) -> View:
    """Gives a view names that do not depend on the program."""
    others: dict[Hashable, Hashable] = {}

    def name(old: Hashable) -> Hashable:
        if isinstance(old, Part):
            return part(old)
        if old in names:
            return names[old]
        return others.setdefault(old, ("other", len(others)))

    def part(old: Part) -> Part:
        return old._replace(digit=digit(old.digit))

    def digit(old: Digit) -> Digit:
        return old._replace(name=name(old.name))

    axes = tuple(
        Axis(
            axis.offset,
            tuple((stride, digit(d)) for stride, d in axis.terms),
            None if axis.lost is None else frozenset(map(name, axis.lost)),
        )
        for axis in view.axes
    )
    return View(axes, tuple(map(part, view.parts)), view.is_partial)


def closed_site(closed: Closed, paths: Sequence[Sequence[str]]) -> AttentionSite:
    """Describes a kernel that cannot be read.

    Args:
      closed: What is known of it.
      paths: Components of the path of each parameter.

    Returns:
      The site; its number of heads is 0 if it is not clear.
    """
    name = closed.node.params["name"]
    return AttentionSite(
        path=_common((*closed.queries, *closed.keys), paths),
        query=_unique(paths, closed.queries),
        key=_unique(paths, closed.keys),
        num_heads=math.prod(closed.heads),
        num_kv_heads=0,
        head_dim=0,
        num_layers=math.prod(closed.layers.values()),
        opaque=name,
        faults=(f"the kernel {name} cannot be read",),
        layers=tuple(closed.layers.values()),
    )
