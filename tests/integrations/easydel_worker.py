"""Trains tiny models with EasyDeL's own trainer: python -m tests.integrations.easydel_worker FILE.

FILE has a JSON list of cases; the results are written beside it, as .out. EasyDeL is imported in
the functions, because pytest looks for examples in this module too.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import muonclip_jax as mc
from muonclip_jax.integrations import easydel

VOCABULARY, LENGTH, BATCH = 128, 32, 16
SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "sharding_axis_dims": (1, -1, 1, 1, 1),
}
MLA = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}


def build(kind, attn_dtype="float32"):
    """Builds a model with large queries and keys; without a dtype, attention has its default."""
    import easydel as ed

    shared = SHARED | ({"attn_dtype": jnp.dtype(attn_dtype)} if attn_dtype else {})
    if kind == "llama":
        config, cls = ed.LlamaConfig(**shared, num_key_value_heads=2), ed.LlamaForCausalLM
        names, factor = ("q_proj", "k_proj"), 8.0
    else:
        config, cls = ed.DeepseekV3Config(**shared, **MLA), ed.DeepseekV3ForCausalLM
        names, factor = ("q_b_proj", "kv_b_proj"), 20.0
    model = cls(config=config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    for layer in model.model.layers:
        for name in names:
            kernel = getattr(layer.self_attn, name).kernel
            kernel.value = kernel.value * factor
    return model.shard_model() if jax.device_count() > 1 else model


def token_ids():
    """One batch: each row counts up in steps of its own."""
    rng = np.random.default_rng(0)
    start, step = rng.integers(VOCABULARY, size=(BATCH, 1)), rng.integers(1, 4, size=(BATCH, 1))
    return ((start + step * np.arange(LENGTH)) % VOCABULARY).astype(np.int32)


def max_logits64(model):
    """Computes the max logits of each layer in float64 from queries and keys, [layers, heads]."""
    import easydel as ed

    found, module = [], ed.FlexibleAttentionModule
    forward = module.forward

    def recording(self, query_states, key_states, *args, softmax_scale=None, **kwargs):
        q, k = (np.asarray(x, np.float64) for x in (query_states, key_states))
        k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
        logits = np.einsum("bthk,bshk->bhts", q, k) * (softmax_scale or self.softmax_scale)
        visible = np.tri(q.shape[1], dtype=bool)
        found.append(np.where(visible, logits, -np.inf).max((0, 2, 3)).tolist())
        kwargs["softmax_scale"] = softmax_scale
        return forward(self, query_states, key_states, *args, **kwargs)

    module.forward = recording
    try:
        with jax.disable_jit(), model.mesh:
            model(input_ids=jnp.asarray(token_ids()))
    finally:
        module.forward = forward
    return found


def roles(model):
    """Returns the table of roles, and what the program shows otherwise."""
    state = model.to_state()

    def forward(params, ids):
        return state.merge(params)(input_ids=ids).logits

    with model.mesh:
        analysis = str(mc.analyze(forward, state.graphstate, token_ids()))
    _head, *differing = analysis.split("names that suggest another role")
    return str(mc.routing_table(state.graphstate, consistent_rms=0.2)), differing


def checksums(model):
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    return [float(np.asarray(leaf, np.float64).sum()) for leaf in leaves]


def train(case, folder):
    """Trains one model.

    Args:
      case: `model`, `steps`, `name`; `threshold`, None for EasyDeL's trainer as it is; `oracle`;
        everything else are arguments of `TrainingArguments`.
      folder: The folder of checkpoints.

    Returns:
      Loss and metrics of each step, and the requested extras.
    """
    import easydel as ed
    from datasets import Dataset

    case = dict(case)
    kind, threshold, oracle = case.pop("model"), case.pop("threshold"), case.pop("oracle", False)
    attn_dtype, steps, log = case.pop("attn_dtype", "float32"), case.pop("steps"), []

    class Trainer(ed.Trainer):
        def on_step_end(self, state, metrics, step):
            others = {k: float(v) for k, v in (metrics.other_metrics or {}).items()}
            log.append({"step": int(step), "loss": float(metrics.loss), **others})
            return state, metrics

    if threshold is not None:
        trainer = easydel.with_qk_clip(Trainer, threshold=threshold)
    else:
        easydel.register()
        trainer = Trainer
    arguments = ed.TrainingArguments(
        **{"model_name": case.pop("name"), "optimizer": "muonclip", "scheduler": "none"} | case,
        save_directory=str(folder),
        max_training_steps=steps,
        total_batch_size=BATCH,
        max_length=LENGTH,
        shuffle_train_dataset=False,
        use_wandb=False,
        track_memory=False,
        log_steps=1,
        report_steps=1,
    )
    rows = np.tile(token_ids(), (20, 1)).tolist()
    ones = np.ones_like(rows).tolist()
    columns = {"input_ids": rows, "attention_mask": ones, "labels": rows}
    dataset = Dataset.from_dict(columns).with_format("numpy")
    model = build(kind, attn_dtype)
    result = {"before": max_logits64(model)} if oracle else {}
    out = trainer(arguments=arguments, model=model, dataset_train=dataset).train()
    trained = out.state.model
    if oracle:
        result["after"] = max_logits64(trained)
    return result | {"log": log, "checksums": checksums(trained)}


def main(path):
    path = pathlib.Path(path)
    results = []
    for case in json.loads(path.read_text()):
        if case.get("roles"):
            results.append(roles(build(case["model"])))
        else:
            results.append(train(case, path.parent))
    path.with_suffix(".out").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
