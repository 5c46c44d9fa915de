"""QK-clip in kauldron, the trainer of Gemma (PyPI `gemma` and `kauldron`): a train step.

Muon needs nothing from here: `optimizer=mc.muon(...)` is a field of `kd.train.Trainer`.
"""

import dataclasses
import math
from typing import Any

from kauldron import kd

import muonclip_jax as mc


@dataclasses.dataclass(kw_only=True, eq=False, frozen=True)
class QKClipTrainStep(kd.train.TrainStep):
    threshold: float = 100.0
    alpha: float = 0.5
    shared_key: str = "query"
    expect: int | None = None

    def _step(self, state: kd.train.TrainState, batch: Any) -> tuple[Any, Any]:
        inner = super()._step

        def step(params: Any) -> tuple[Any, Any]:
            return inner(state.replace(params=params), batch)

        function = mc.with_max_logits(step, expect=self.expect)
        (new_state, context), stats = function(state.params)
        analysis = mc.analyze(self._forward(state, batch), state.params)
        params, info = mc.qk_clip(
            new_state.params,
            stats,
            analysis,
            threshold=self.threshold,
            alpha=self.alpha,
            shared_key=self.shared_key,
        )
        scalars = {
            name.removeprefix("qk_clip/"): kd.metrics.AverageState.from_values(value)
            for name, value in mc.qk_clip_metrics(info).items()
        }
        metrics = {**context.metric_states, "qk_clip": scalars}
        return new_state.replace(params=params), context.replace(metric_states=metrics)

    def _forward(self, state: Any, batch: Any) -> Any:
        context = kd.train.Context.from_state_and_batch(state=state, batch=batch)

        def forward(params: Any) -> Any:
            return kd.train.forward(
                context.replace(params=params),
                model=self.model,
                rngs=self.rng_streams.train_rngs(state.step),
                is_training=True,
            ).preds

        return forward
