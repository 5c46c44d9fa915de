"""The settings of the optimizers, built once from the arguments of the public functions."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import optax

from muonclip_jax._common.settings import PRECONDITIONINGS, Rule, choice
from muonclip_jax._common.types import ArrayTree, Scalar
from muonclip_jax._muon.adamw import adamw
from muonclip_jax._muon.chains import in_float32, with_sharding_of_mu
from muonclip_jax._muon.family.sinkhorn import RMS, scale_by_sinkhorn
from muonclip_jax._muon.per_head import PerHead
from muonclip_jax._muon.roles.decision import RoleSettings
from muonclip_jax._muon.routing import role_settings
from muonclip_jax._orthogonalize.coefficients import Coefficients, is_single_step
from muonclip_jax._orthogonalize.matrices import ConsistentRMS
from muonclip_jax._orthogonalize.newton_schulz import Orthogonalizer, orthogonalizer
from muonclip_jax._orthogonalize.settings import COEFFICIENT_RULES
from muonclip_jax._sharding.placement import shardings_by_path

# Values of `preconditioning` that are no preconditioning of `newton_schulz`.
EQUILIBRATIONS = ("inputs", "outputs")
# The rules of the settings of an update, in addition to the rules in `_common.settings`.
UPDATE_RULES: dict[str, Rule] = {
    **COEFFICIENT_RULES,
    "preconditioning": choice(*PRECONDITIONINGS, *EQUILIBRATIONS),
}

# w_M, w_G of the matrix that is orthogonalized, w_M M + w_G G; None leaves G out.
Weights: TypeAlias = tuple[jax.Array, jax.Array | None]
# (β, t) -> the weights.
Direction: TypeAlias = Callable[[jax.Array, jax.Array], Weights]


@dataclasses.dataclass(frozen=True)
class MuonSettings:
    """The checked settings of a Muon update, built once from the arguments of a public function.

    Attributes:
      caller: Name of the public function, for errors.
      direction: The weights of the momentum and the gradient in the matrix to orthogonalize.
      orthogonalize: Newton-Schulz with its settings.
      eps: See `newton_schulz`.
      beta: Decay of the momentum.
      mu_dtype: Dtype in which the momentum of real leaves is kept; None: as the parameters.
      adaptive: Whether to multiply each orthogonalized matrix O by ⟨d, O⟩, d the direction.
      equilibrate: `"inputs"` or `"outputs"`: what is normalized before, see `normalize_matrices`.
      shardings: How parameters are sharded on an Auto mesh, by path.
    """

    caller: str
    direction: Direction
    orthogonalize: Orthogonalizer
    eps: Scalar
    beta: Scalar
    mu_dtype: Any
    adaptive: bool
    equilibrate: str | None
    shardings: Mapping[str, Any]

    @classmethod
    def of(cls, caller: str, direction: Direction, arguments: Mapping[str, Any]) -> "MuonSettings":
        """Builds the settings.

        Args:
          caller: Name of the public function.
          direction: See `MuonSettings`.
          arguments: Its arguments by name, checked; arguments of other settings are ignored.
        """
        names = "ns_coeffs ns_steps preconditioning ns_method ns_dtype ns_products".split()
        by = arguments["preconditioning"]
        equilibrate = by if by in EQUILIBRATIONS else None
        if equilibrate:
            arguments = {**arguments, "preconditioning": "frobenius"}
        return cls(
            caller=caller,
            direction=direction,
            orthogonalize=newton_schulz_of(*(arguments[name] for name in names)),
            eps=arguments["eps"],
            beta=arguments["beta"],
            mu_dtype=arguments["mu_dtype"],
            adaptive=arguments["adaptive"],
            equilibrate=equilibrate,
            shardings=shardings_by_path(caller, arguments["shardings"]),
        )


@dataclasses.dataclass(frozen=True)
class MatrixScale:
    """The step along the orthogonalized matrices; each field is the argument of `muon`."""

    learning_rate: optax.ScalarOrSchedule
    weight_decay: optax.ScalarOrSchedule
    weight_decay_mask: ArrayTree | Callable[[ArrayTree], ArrayTree] | None
    consistent_rms: ConsistentRMS
    cautious_weight_decay: bool
    neuron_b2: Scalar | None


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The checked settings of an optimizer, built once from the arguments of a public function.

    Attributes:
      caller: Name of the public function, `muon` or `muonclip`.
      roles: Which parameters are matrices.
      update: The update of the matrices.
      scale: Its learning rate, decay and scale.
      rest: The optimizer of the other parameters.
      tables: Builds the optimizer of those whose override is `Sinkhorn`, from their token axes.
    """

    caller: str
    roles: RoleSettings
    update: MuonSettings
    scale: MatrixScale
    rest: optax.GradientTransformation
    tables: Callable[[ArrayTree], optax.GradientTransformation]

    @classmethod
    def of(
        cls,
        caller: str,
        direction: Direction,
        arguments: Mapping[str, Any],
        per_head: PerHead,
        layout: PerHead = None,
    ) -> "OptimizerSettings":
        """Builds the settings.

        Args:
          caller: Name of the public function.
          direction: See `MuonSettings`.
          arguments: Its arguments by name, checked.
          per_head: See `muon`.
          layout: The head layouts that are clipped.
        """
        roles = role_settings(arguments, per_head, layout)
        update = MuonSettings.of(caller, direction, arguments)
        scale = MatrixScale(*(arguments[field.name] for field in dataclasses.fields(MatrixScale)))
        tables = functools.partial(_sinkhorn_of, arguments)
        return cls(caller, roles, update, scale, _adamw_of(arguments), tables)


def _adamw_of(arguments: Mapping[str, Any]) -> optax.GradientTransformation:
    """Builds AdamW; each of its settings that is None is the setting of the matrices."""

    def own(name: str) -> Any:
        value = arguments[f"adam_{name}"]
        return arguments[name] if value is None else value

    return adamw(
        learning_rate=own("learning_rate"),
        b1=arguments["adam_b1"],
        b2=arguments["adam_b2"],
        eps=arguments["eps"],
        eps_root=arguments["adam_eps_root"],
        mu_dtype=arguments["mu_dtype"],
        weight_decay=own("weight_decay"),
        nesterov=own("nesterov"),
        cautious_weight_decay=arguments["cautious_weight_decay"],
    )


def _sinkhorn_of(
    arguments: Mapping[str, Any], token_axes: ArrayTree
) -> optax.GradientTransformation:
    """Builds the optimizer of token tables: AdamW's learning rate, the momentum of the matrices."""
    rate = arguments["adam_learning_rate"]
    chain = optax.chain(
        scale_by_sinkhorn(token_axes, arguments["beta"], mu_dtype=arguments["mu_dtype"]),
        optax.scale(RMS),
        optax.scale_by_learning_rate(arguments["learning_rate"] if rate is None else rate),
    )
    return with_sharding_of_mu(in_float32(chain))


def newton_schulz_of(
    coefficients: Coefficients,
    steps: Any,
    preconditioning: str,
    method: str,
    dtype: Any,
    products: str,
) -> Orthogonalizer:
    """Builds the Newton-Schulz iteration of an optimizer, whose `ns_steps` is never None."""
    steps = steps if is_single_step(coefficients) else None
    return orthogonalizer(coefficients, steps, method, dtype, preconditioning, products)
