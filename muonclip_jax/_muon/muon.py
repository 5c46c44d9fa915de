"""Muon for the matrices and AdamW for the rest, as one optimizer, by the role of each parameter."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._common.folding import fold_faults
from muonclip_jax._common.paths import leaf_paths
from muonclip_jax._common.settings import NUMBERS, check_settings
from muonclip_jax._common.types import ArrayTree, Scalar
from muonclip_jax._muon.chains import (
    add_decayed_weights,
    in_float32,
    same_model,
    with_sharding_of_mu,
)
from muonclip_jax._muon.family.cautious_decay import add_cautious_weight_decay
from muonclip_jax._muon.family.normuon import NEURON_EPS, neurons_normalized
from muonclip_jax._muon.family.sinkhorn import ScaleBySinkhornState
from muonclip_jax._muon.injection import injectable
from muonclip_jax._muon.overrides import ROLE_RULES
from muonclip_jax._muon.per_head import LAYOUT_RULES, PER_HEAD_RULES, PerHead
from muonclip_jax._muon.roles.decision import Overrides
from muonclip_jax._muon.routing import Routing, dtype_of, route
from muonclip_jax._muon.scale_by_muon import (
    ScaleByMuonState,
    bias_corrected,
    bias_corrected_nesterov,
    scale_by_direction,
    scale_by_shape,
)
from muonclip_jax._muon.settings import UPDATE_RULES, OptimizerSettings
from muonclip_jax._orthogonalize.coefficients import JORDAN, Coefficients
from muonclip_jax._orthogonalize.dimension_numbers import DimensionNumbersOrFn, is_function, spread
from muonclip_jax._orthogonalize.matrices import ConsistentRMS

_OPTIONAL = (
    "mu_dtype",
    "adam_learning_rate",
    "adam_nesterov",
    "consistent_rms",
    "outputs_first",
    "neuron_b2",
    "weight_decay_mask",
)


def _check(arguments: Mapping[str, Any]) -> None:
    """Raises for settings of `muon` that are not allowed."""
    rules = {**UPDATE_RULES, **ROLE_RULES, **PER_HEAD_RULES, **LAYOUT_RULES}
    check_settings("muon", arguments, optional=_OPTIONAL, rules=rules)


@injectable(NUMBERS, _check)
def muon(
    learning_rate: optax.ScalarOrSchedule,
    ns_coeffs: Coefficients = JORDAN,
    ns_steps: int | jax.Array = 5,
    beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: ArrayTree | Callable[[ArrayTree], ArrayTree] | None = None,
    mu_dtype: Any = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: str = "frobenius",
    adam_b1: Scalar = 0.9,
    adam_b2: Scalar = 0.999,
    adam_eps_root: Scalar = 0.0,
    adam_weight_decay: optax.ScalarOrSchedule = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: DimensionNumbersOrFn | None = None,
    consistent_rms: ConsistentRMS = None,
    ns_method: str = "auto",
    ns_dtype: Any = "auto",
    ns_products: str = "auto",
    shardings: ArrayTree = None,
    adam_nesterov: bool | None = None,
    per_head: PerHead = None,
    overrides: Overrides | None = None,
    outputs_first: bool | None = None,
    cautious_weight_decay: bool = False,
    neuron_b2: Scalar | None = None,
    layout: PerHead = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon for the matrices of a model, AdamW for everything else.

    A matrix W changes by `-learning_rate · (scale · O + weight_decay · W)`, with O its
    orthogonalized momentum and the scale of `scale_by_shape`. Embeddings, output heads, routers,
    norms, biases and everything with fewer than two axes are assigned to AdamW at any rank, and
    scan-stacked layers and experts are orthogonalized one matrix at a time. `routing_table` prints
    the assignment. The arguments up to `consistent_rms` have the names, defaults and meaning of
    `optax.contrib.muon`, which assigns by rank.

    Under `optax.MultiSteps` Newton-Schulz runs on every micro-step. It costs less to average the
    gradients first and update once.

    Args:
      learning_rate: Number or schedule.
      ns_coeffs: See `scale_by_muon`.
      ns_steps: See `scale_by_muon`.
      beta: Decay of the momentum of the matrices, in [0, 1).
      eps: For Newton-Schulz, see `scale_by_muon`, and for AdamW.
      weight_decay: Number or schedule; decay of the matrices, multiplied by the learning rate.
      weight_decay_mask: Pytree or prefix of booleans, or a function of the parameters that returns
        one: which matrices decay. None: all.
      mu_dtype: Dtype of the first moments of both optimizers. None: as the parameters. The second
        moments of AdamW are float32 for 16-bit parameters.
      nesterov: See `scale_by_muon`.
      adaptive: See `scale_by_muon`.
      preconditioning: See `scale_by_muon`.
      adam_b1: Decay of AdamW's first moment, in [0, 1).
      adam_b2: Decay of AdamW's second moment, in [0, 1).
      adam_eps_root: Added inside the root of AdamW.
      adam_weight_decay: Number or schedule; decay of AdamW's parameters, multiplied by its learning
        rate.
      adam_learning_rate: Number or schedule. None: `learning_rate`.
      muon_weight_dimension_numbers: Pytree, or a prefix of one, of `MuonDimensionNumbers`, with
        None for AdamW; a function of the parameters that returns one; or an `Analysis`, whose roles
        are used. None: by role.
      consistent_rms: See `scale_by_shape`. With 0.2 a learning rate tuned for AdamW fits.
      ns_method: See `newton_schulz`.
      ns_dtype: See `newton_schulz`.
      ns_products: See `newton_schulz`; on a mesh, pass `shardings` or use Explicit axes.
      shardings: See `scale_by_muon`.
      per_head: A head layout, or a tuple of head layouts: each head of the query, key and, where
        they are named, value kernels that it describes is a matrix of its own, with its own scale.
        An `Analysis` splits queries and keys. Biases and output projections are not split. None:
        each projection is one matrix.
      overrides: Mapping of path patterns (`fnmatch`, on paths joined by slashes) to
        `MuonDimensionNumbers`, None (AdamW) or `Sinkhorn`, which has AdamW's learning rate, `beta`
        and no weight decay. Other parameters keep their roles. If several patterns match a path,
        the last one counts. An override also silences its warning.
      outputs_first: Whether matrices are stored (outputs, inputs), as in Equinox and PyTorch, and
        convolutions (outputs, inputs, *window). None decides by biases, names and widths.
      adam_nesterov: Whether AdamW has Nesterov momentum, which makes it NAdamW. None: `nesterov`,
        as in optax.
      cautious_weight_decay: Whether the weights of both optimizers decay only where they agree in
        sign with the update, see `add_cautious_weight_decay`.
      neuron_b2: Decay of the second moment of each output neuron (NorMuon), see
        `normalize_neurons`; 0.95 in its paper. None: off.
      layout: The head layout of `qk_clip`, or a tuple of them: its patterns show which axes of
        queries and keys are inputs and outputs, under any names. It splits no heads. The roles
        of an `Analysis` are used if `muon_weight_dimension_numbers` is None.

    Returns:
      An optax transformation, which ignores extra arguments. `update` needs the parameters. Each
      update has the dtype of its gradient and is computed in float32 at least, then rounded once.
      `init` issues one `UserWarning` that lists the parameters to check: their names and shapes do
      not decide their role.

    Raises:
      TypeError: when built, for settings of a wrong type, such as a number given as a string.
      ValueError: when built, for settings out of range or unknown names; at `init` and while
        tracing, for parameters that fit no optimizer and gradients that do not match the state.

    Example:
      >>> import muonclip_jax as mc, jax.numpy as jnp, optax
      >>> tx = mc.muon(0.1, weight_decay=0.1, consistent_rms=0.2)
      >>> params = {"kernel": jnp.eye(4), "bias": jnp.ones(4)}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> print(f"{optax.apply_updates(params, updates)['kernel'][0, 0]:.3f}")
      0.959

    References:
      Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Liu et al. 2025, arXiv
      2502.16982, section 2.2 (decay, consistent_rms); optax/contrib/_muon.py (arguments).
    """
    arguments = locals()
    _check(arguments)
    direction = bias_corrected_nesterov if nesterov else bias_corrected
    return with_adamw(OptimizerSettings.of("muon", direction, arguments, per_head, layout))


def with_adamw(settings: OptimizerSettings) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer of a model: Muon for its matrices, AdamW for everything else."""
    caller, roles = settings.caller, settings.roles

    @functools.lru_cache(maxsize=4)
    def route_shapes(structure, shapes):
        """Routes a pytree by its shapes, once for many updates outside of `jax.jit`."""
        leaves = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
        return route(caller, structure.unflatten(leaves), roles)

    def routed(tree):
        """Routes a pytree and builds its optimizer: each part of a partition gets its leaves only.

        Labels and masks are functions, as optax would call a pytree that is callable.
        """
        leaves, structure = jax.tree.flatten(tree)
        dtypes = [dtype_of(x) for x in leaves]
        if is_function(roles.numbers) or None in dtypes:
            routing = route(caller, tree, roles)  # raises for leaves that are no arrays
        else:
            shapes = zip(map(jnp.shape, leaves), dtypes, strict=True)
            routing = route_shapes(structure, tuple(shapes))
        labels = structure.unflatten(routing.labels)
        matrices = _for_matrices(tree, structure.unflatten(routing.numbers), settings)
        parts: dict[Any, optax.GradientTransformation] = {"muon": matrices, "adam": settings.rest}
        if roles.has_tables:
            parts["sinkhorn"] = settings.tables(structure.unflatten(routing.token_axes))
        return routing, optax.partition(parts, lambda _: labels)

    def init_fn(params):
        routing, optimizer = routed(params)
        _warn(caller, routing)
        return optimizer.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        routing, optimizer = routed(updates)
        _check_state(caller, routing, state)
        with same_model(caller, updates, state, params, optimizer.init):
            return optimizer.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _for_matrices(
    tree: ArrayTree, numbers: ArrayTree, settings: OptimizerSettings
) -> optax.GradientTransformation:
    """Builds the optimizer of the matrices of a pytree, in float32 and rounded once."""
    scale, mask = settings.scale, settings.scale.weight_decay_mask
    if mask is not None and jax.tree.leaves(tree):
        mask = jax.tree.structure(tree).unflatten(
            spread(f"{settings.caller}: weight_decay_mask", mask, tree)
        )
    steps = [scale_by_direction(settings.update, numbers)]
    if scale.neuron_b2 is not None:
        steps.append(neurons_normalized(scale.neuron_b2, NEURON_EPS, numbers))
    cautious = scale.cautious_weight_decay
    add_decay = add_cautious_weight_decay if cautious else add_decayed_weights
    steps += [
        scale_by_shape(numbers, scale.consistent_rms),
        add_decay(scale.weight_decay, None if mask is None else lambda _: mask),
        optax.scale_by_learning_rate(scale.learning_rate),
    ]
    return with_sharding_of_mu(in_float32(optax.chain(*steps)))


def _warn(caller: str, routing: Routing) -> None:
    """Issues one warning for all parameters whose names and shapes do not decide their role."""
    if texts := routing.warnings:
        warnings.warn(
            f"{caller}: check the optimizer of these parameters. Their names and shapes do not "
            "decide it. An override of a parameter silences its warning, and `routing_table` "
            "prints all parameters.\n" + "\n".join(f"  {text}" for text in texts),
            UserWarning,
            stacklevel=3,
        )


def _check_state(caller: str, routing: Routing, state: ArrayTree) -> None:
    """Raises if the state is of the same parameters, in another assignment to optimizers."""
    kinds = {ScaleByMuonState: "muon", ScaleBySinkhornState: "sinkhorn"}
    states = jax.tree.leaves(state, is_leaf=lambda x: type(x) in kinds)
    found = [(kinds[type(x)], x.mu) for x in states if type(x) in kinds]
    labels = [label for label, _ in found]
    moments = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu"))
    all_paths = {path for x in moments if hasattr(x, "mu") for path in leaf_paths(x.mu)}
    if "muon" not in labels or len(labels) > len({*labels}) or all_paths != {*routing.paths}:
        return
    in_state = {path: label for label, mu in found for path in leaf_paths(mu)}
    now = dict(zip(routing.paths, routing.labels, strict=True))
    faults = [
        ("/".join(path), f"now {_NAMES[label]}, {_NAMES[before]} in the state.")
        for path, label in now.items()
        if label != (before := in_state.get(path, "adam"))
    ]
    if faults:
        raise ValueError(
            f"{caller}: the state is from another assignment of parameters to optimizers.\n"
            + "\n".join(fold_faults(faults))
            + "\nPass the same overrides, muon_weight_dimension_numbers, outputs_first and masks "
            "as for `init`, or call `init` again."
        )


_NAMES = {"muon": "Muon", "adam": "AdamW", "sinkhorn": "Sinkhorn"}
