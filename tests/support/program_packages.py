"""Models of public packages, as functions of abstract parameters of their full size.

Each builder returns `(fn, params, args)`; nothing is computed. `MODELS` has them by the name of
their table in tests/golden.
"""

import dataclasses
import importlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

LENGTH = 32


def package(name: str, install: str) -> Any:
    """Imports a package; skips the test where it is not installed."""
    return pytest.importorskip(name, reason=f"needs `pip install {install}`")


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def tunix(module: str, name: str, config: str) -> Callable[[], Any]:
    """A decoder of google-tunix, two layers of it."""

    def build() -> Any:
        package("tunix", "google-tunix==0.1.7")
        models: Any = importlib.import_module(f"tunix.models.{module}.model")
        settings = dataclasses.replace(getattr(models.ModelConfig, config)(), num_layers=2)
        model = nnx.eval_shape(lambda: getattr(models, name)(settings, rngs=nnx.Rngs(0)))
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def fn(params: Any, tokens: Any, positions: Any, mask: Any) -> Any:
            return nnx.merge(graph, params, rest)(tokens, positions, None, mask)[0]

        tokens = ints(2, LENGTH)
        return fn, params, (tokens, tokens, jax.ShapeDtypeStruct((2, LENGTH, LENGTH), jnp.bool_))

    return build


def hugging_face(name: str, config: str, apply: Any, *args: Any, **settings: Any) -> Any:
    """A Flax model of transformers before version 5, two layers of it."""

    def build() -> Any:
        transformers = package("transformers", "'transformers<5'")
        if not hasattr(transformers, name):
            pytest.skip("needs `pip install 'transformers<5'`: version 5 has no models in Flax")
        options = getattr(transformers, config)(**settings)
        model = getattr(transformers, name)(options, _do_init=False)
        shape = model.input_shape
        params = jax.eval_shape(lambda key: model.init_weights(key, shape), jax.random.key(0))
        return lambda p, *a: apply(model.module, {"params": p}, *a), params, args

    return build


def _positions(tokens: Any) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


def _decoder(module: Any, params: Any, tokens: Any) -> Any:
    return module.apply(params, tokens, jnp.ones_like(tokens), _positions(tokens)).logits


def _bloom(module: Any, params: Any, tokens: Any) -> Any:
    return module.apply(params, tokens, jnp.ones_like(tokens)).logits


def _bert(module: Any, params: Any, tokens: Any) -> Any:
    ones, zeros = jnp.ones_like(tokens), jnp.zeros_like(tokens)
    masks = jnp.ones((2, 12))  # of heads, multiplied with the weights
    return module.apply(params, tokens, ones, zeros, _positions(tokens), masks).logits


def _clip(module: Any, params: Any, tokens: Any, images: Any) -> Any:
    ones = jnp.ones_like(tokens)
    return module.apply(params, tokens, images, ones, _positions(tokens)).logits_per_image


def _whisper(module: Any, params: Any, sound: Any, tokens: Any) -> Any:
    ones = jnp.ones_like(tokens)
    return module.apply(params, sound, tokens, ones, _positions(tokens)).logits


def max_text(name: str, layers: int, **settings: Any) -> Callable[[], Any]:
    """A decoder of MaxText, some layers of it, in a scan."""

    def build() -> Any:
        os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
        maxtext = package("maxtext", "maxtext==0.2.5")
        linen, partitioning = map(
            importlib.import_module, ("flax.linen", "flax.linen.partitioning")
        )
        config: Any = importlib.import_module("maxtext.configs.pyconfig")
        utils: Any = importlib.import_module("maxtext.utils.maxtext_utils")
        models: Any = importlib.import_module("maxtext.models.models")
        base = pathlib.Path(maxtext.__file__).parent / "configs" / "base.yml"
        options = dict(
            model_name=name, base_num_decoder_layers=layers, override_model_config=True,
            run_name="test", enable_checkpointing=False, skip_jax_distributed_system=True,
            max_target_length=LENGTH, per_device_batch_size=2, attention="dot_product",
            hardware="cpu", dataset_type="synthetic",
        )  # fmt: skip
        chosen = config.initialize(["test", str(base)], **options, **settings)
        mesh = jax.sharding.Mesh(utils.create_device_mesh(chosen), chosen.mesh_axes)
        model = models.transformer_as_linen(chosen, mesh, quant=None, model_mode="train")
        tokens = ints(2 * jax.device_count(), LENGTH)

        def inside(fn: Any) -> Any:
            def run(*args: Any) -> Any:
                with mesh, partitioning.axis_rules(chosen.logical_axis_rules):
                    return fn(*args)

            return run

        def init(key: Any) -> Any:
            ones, keys = jnp.ones(tokens.shape, jnp.int32), {"params": key, "dropout": key}
            return model.init(keys | {"aqt": key}, ones, ones, enable_dropout=False)

        def fn(params: Any, tokens: Any) -> Any:
            segments = jnp.ones_like(tokens)
            out = model.apply(
                {"params": params}, tokens, _positions(tokens), decoder_segment_ids=segments,
                enable_dropout=False,
            )  # fmt: skip
            return out[0] if isinstance(out, tuple) else out

        params = linen.meta.unbox(jax.eval_shape(inside(init), jax.random.key(0)))["params"]
        return inside(fn), params, (tokens,)

    return build


def haiku(name: str) -> Callable[[], Any]:
    """A network for images of Haiku."""

    def build() -> Any:
        hk = package("haiku", "dm-haiku==0.0.17")

        def forward(images: Any) -> Any:
            return getattr(hk.nets, name)(num_classes=1000)(images, is_training=True)

        model, images = hk.transform_with_state(forward), floats(2, 224, 224, 3)
        params, state = jax.eval_shape(model.init, jax.random.key(0), images)

        def fn(params: Any, state: Any, images: Any) -> Any:
            return model.apply(params, state, None, images)[0]

        return fn, params, (state, images)

    return build


_TOKENS = ints(2, LENGTH)
MODELS: dict[str, Callable[[], Any]] = {
    "tunix_llama3": tunix("llama3", "Llama3", "llama3p1_8b"),
    "tunix_qwen3": tunix("qwen3", "Qwen3", "qwen3_8b"),
    "tunix_qwen3_moe": tunix("qwen3", "Qwen3", "qwen3_30b_a3b"),
    "tunix_gemma3": tunix("gemma3", "Gemma3", "gemma3_4b_it"),
    "hf_flax_gpt2": hugging_face(
        "FlaxGPT2LMHeadModel", "GPT2Config", _decoder, _TOKENS, n_layer=2
    ),
    "hf_flax_llama": hugging_face(
        "FlaxLlamaForCausalLM", "LlamaConfig", _decoder, _TOKENS, num_hidden_layers=2
    ),
    "hf_flax_gptj": hugging_face(
        "FlaxGPTJForCausalLM", "GPTJConfig", _decoder, _TOKENS, n_layer=2
    ),
    "hf_flax_bloom": hugging_face(
        "FlaxBloomForCausalLM", "BloomConfig", _bloom, _TOKENS, n_layer=2, hidden_size=1024,
        n_head=16,
    ),
    "hf_flax_bert": hugging_face(
        "FlaxBertForMaskedLM", "BertConfig", _bert, _TOKENS, num_hidden_layers=2
    ),
    "hf_flax_clip": hugging_face(
        "FlaxCLIPModel", "CLIPConfig", _clip, ints(2, 77), floats(2, 224, 224, 3),
        text_config={"num_hidden_layers": 2}, vision_config={"num_hidden_layers": 2},
    ),
    "hf_flax_whisper": hugging_face(
        "FlaxWhisperForConditionalGeneration", "WhisperConfig", _whisper, floats(2, 80, 3000),
        _TOKENS, d_model=384, encoder_layers=2, decoder_layers=2, encoder_attention_heads=6,
        decoder_attention_heads=6, encoder_ffn_dim=1536, decoder_ffn_dim=1536,
    ),
    "maxtext_llama3": max_text("llama3.1-8b", 3),
    "maxtext_mixtral": max_text("mixtral-8x7b", 3),
    "maxtext_gpt_oss": max_text("gpt-oss-20b", 6),
    "maxtext_deepseek3": max_text("deepseek3-671b", 5, first_num_dense_layers=2),
    "maxtext_gpt3": max_text("gpt3-6b", 5),
    "maxtext_olmo3": max_text("olmo3-7b", 8),
    "haiku_resnet50": haiku("ResNet50"),
    "haiku_mobilenet": haiku("MobileNetV1"),
}  # fmt: skip
# Parameters that only Pallas kernels multiply (megablox): reported as unknown.
UNKNOWN = {"maxtext_mixtral": 3, "maxtext_gpt_oss": 6, "maxtext_deepseek3": 3}
