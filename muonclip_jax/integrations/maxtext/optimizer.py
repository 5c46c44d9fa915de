"""`mc.muon` behind MaxText's `opt_type=muon`, with the shardings of the parameters."""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

import muonclip_jax as mc
from muonclip_jax.integrations.maxtext.attributes import replaced
from muonclip_jax.integrations.maxtext.settings import Replaced, Settings, check, head_layout


def with_our_muon(optimizers: Any, settings: Settings) -> Callable[..., Any]:
    """Wraps `get_optimizer`, which calls `optax_muon` for `opt_type=muon`.

    Args:
      optimizers: The module of MaxText.
      settings: The arguments of `install`.

    Returns:
      The function, which raises ValueError if the config selects another Muon.
    """
    get_optimizer = optimizers.get_optimizer

    @functools.wraps(get_optimizer)
    def wrapped(config: Any, learning_rate_schedule: Any, model: Any = None, **others: Any) -> Any:
        if settings.qk_clip:
            check(config, settings.alpha)
        built = []

        def muon(**arguments: Any) -> Any:
            arguments |= _more_arguments(config, model, settings)
            _log_routing_table(model, arguments)
            built.append(mc.muon(**arguments))
            return built[0]

        routers = Replaced(config, muon_include_routers=settings.include_routers)
        with replaced(optimizers, "optax_muon", muon):
            optimizer = get_optimizer(routers, learning_rate_schedule, model, **others)
        if config.opt_type == "muon" and not built:
            raise ValueError(
                f"muon_type={config.muon_type!r} is not the Muon of muonclip_jax: "
                "set muon_type=optax_muon, or do not call install()."
            )
        return optimizer

    return wrapped


def _more_arguments(config: Any, model: Any, settings: Settings) -> dict[str, Any]:
    """Returns the arguments of `mc.muon` that MaxText does not pass."""
    params = _parameters(model)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    if config.shard_optimizer_over_data:  # the momentum is sharded more than the parameters
        sharding = importlib.import_module("maxtext.utils.sharding")
        with_data = functools.partial(sharding.add_data_to_sharding, model.mesh)
        shardings = jax.tree_util.tree_map_with_path(with_data, params, shardings)
    more = {"shardings": shardings, **settings.muon}
    if more.get("per_head") is True:
        more["per_head"] = head_layout(config)
    return more


def _parameters(model: Any) -> Any:
    """Returns the parameters of a model, in the pytree that `nnx.Optimizer` passes to optax."""
    from flax import nnx

    return nnx.State(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def _log_routing_table(model: Any, arguments: Mapping[str, Any]) -> None:
    names = ("muon_weight_dimension_numbers", "consistent_rms", "per_head", "overrides")
    shown = {name: arguments[name] for name in names if name in arguments}
    table = mc.routing_table(_parameters(model), **shown)
    importlib.import_module("maxtext.utils.max_logging").log(f"muonclip_jax.muon\n{table}")
