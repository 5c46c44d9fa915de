"""Shapes beside the kernels of MLA and of fused layouts confirm the widths, or raise."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import muonclip_jax as mc

pytestmark = pytest.mark.usefixtures("no_typecheck")
FLAT, OUTPUTS_FIRST = "inputs (heads head_dim)", "(heads head_dim) inputs"


def check(kernels, layout, heads, layers=2):
    """Traces the clip of a few equal layers; nothing is compiled."""

    def struct(shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    layer = {name: {"kernel": struct(shape)} for name, shape in kernels.items()}
    params = {f"layers_{i}": {"attn": layer} for i in range(layers)}
    stack = max(map(len, kernels.values())) - 3 if layout.stack_axis else 0
    entry = {"max_logits": struct((*(58,) * stack, heads))}
    stats = {name: {"attn": entry} for name in params}
    jax.eval_shape(lambda p, s: mc.qk_clip(p, s, layout)[0], params, stats)


def error_of(*arguments):
    with pytest.raises(ValueError, match="2 modules do not fit") as error:
        check(*arguments)
    return str(error.value)


# The files that define these models: config.json and modeling_*.py on Hugging Face; MaxText,
# src/MaxText/layers/attention_mla.py; Megatron-LM, multi_latent_attention.py.
WIDTHS: Any = {"nope_dim": 128, "rope_dim": 64, "value_dim": 128}
DEEPSEEK = mc.MLALayout(**WIDTHS, query="q_b_proj", key_value="kv_b_proj", kernel=FLAT)
V3 = {
    "q_a_proj": (7168, 1536),
    "q_b_proj": (1536, 128 * 192),
    "kv_a_proj_with_mqa": (7168, 576),
    "kv_b_proj": (512, 128 * 256),
    "o_proj": (128 * 128, 7168),
}
V2_LITE = {
    "q_proj": (2048, 16 * 192),
    "kv_a_proj_with_mqa": (2048, 576),
    "kv_b_proj": (512, 16 * 256),
    "o_proj": (2048, 2048),
}
MAXTEXT = {
    "wq_a": (7168, 58, 1536),
    "wq_b": (1536, 58, 128, 192),
    "wkv_a": (7168, 58, 576),
    "wkv_b": (512, 58, 128, 256),
    "out": (128, 58, 128, 7168),
}
MEGATRON = {
    "linear_q_down_proj": (7168, 1536),
    "linear_q_up_proj": (1536, 128 * 192),
    "linear_kv_down_proj": (7168, 576),
    "linear_kv_up_proj": (512, 128 * 256),
    "linear_proj": (128 * 128, 7168),
}
SHARED_KEY = {"q_b": (24, 4, 6), "kv_a": (32, 8), "k_rope": (32, 2), "kv_b": (8, 4, 9)}


def fused(qkv, columns, out, heads, head_dim, keys=None, **fields: Any):
    layout = mc.FusedQKVLayout(head_dim=head_dim, num_kv_heads=keys, qkv=qkv, **fields)
    return {qkv: columns, **out}, layout, heads


MODELS: dict[str, Any] = {
    "DeepSeek-V3": (V3, DEEPSEEK, 128),
    "DeepSeek-V3, outputs first": (
        {name: shape[::-1] for name, shape in V3.items()},
        dataclasses.replace(DEEPSEEK, kernel=OUTPUTS_FIRST),
        128,
    ),
    "DeepSeek-V2-Lite": (V2_LITE, dataclasses.replace(DEEPSEEK, query="q_proj"), 16),
    "MaxText": (
        MAXTEXT,
        mc.MLALayout(**WIDTHS, query="wq_b", key_value="wkv_b", stack_axis=1),
        128,
    ),
    "Megatron-LM": (
        MEGATRON,
        mc.MLALayout(
            **WIDTHS, query="linear_q_up_proj", key_value="linear_kv_up_proj", kernel=FLAT
        ),
        128,
    ),
    "a projection of the shared key": (
        SHARED_KEY,
        mc.MLALayout(nope_dim=4, rope_dim=2, value_dim=5),
        4,
    ),
    "GPT-2": fused("c_attn", (768, 2304), {"c_proj": (768, 768)}, 12, 64),
    "a table of values": fused(
        "c_attn", (768, 2304), {"c_proj": (768, 768), "value_embeds": (50257, 768)}, 12, 64
    ),
    "Pythia": fused(
        "query_key_value", (512, 1536), {"dense": (512, 512)}, 8, 64, order="interleaved"
    ),
    "Falcon-7B": fused("query_key_value", (4544, 4672), {"dense": (4544, 4544)}, 71, 64, 1),
    "Phi-3-medium": fused("qkv_proj", (5120, 7680), {"o_proj": (5120, 5120)}, 40, 128, 10),
    "ChatGLM2": fused("query_key_value", (4096, 4608), {"dense": (4096, 4096)}, 32, 128, 2),
    "Gemma-7B": fused(
        "qkv_einsum",
        (3, 16, 3072, 256),
        {"attn_vec_einsum": (16, 256, 3072)},
        16,
        256,
        kernel="3 heads inputs head_dim",
    ),
    "GPT-3 of MaxText": fused(
        "qkv_proj",
        (12288, 3, 96, 128),
        {"out": (96, 128, 12288)},
        96,
        128,
        kernel="inputs 3 heads head_dim",
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_right_layouts_of_public_models_are_accepted(model):
    check(*MODELS[model])


SWAPPED: Any = {"nope_dim": 64, "rope_dim": 128, "value_dim": 192}
# The kernels, the wrong layout, the heads of the max logits, the contradicting children, the fix.
WRONG: dict[str, Any] = {
    "nope and rope swapped": (
        V3,
        dataclasses.replace(DEEPSEEK, **SWAPPED),
        128,
        {"o_proj": "of 24576", "kv_a_proj_with_mqa": "of 512 or 640"},
        DEEPSEEK,
    ),
    "MaxText, swapped": (
        MAXTEXT,
        mc.MLALayout(**SWAPPED, query="wq_b", key_value="wkv_b", stack_axis=1),
        128,
        {"out": "of 24576", "wkv_a": "of 512 or 640"},
        None,
    ),
    "half the heads, twice as wide": (
        V3,
        dataclasses.replace(DEEPSEEK, nope_dim=256, rope_dim=128, value_dim=256),
        64,
        {"kv_a_proj_with_mqa": "of 512 or 640"},
        None,
    ),
    "a value width": (
        V2_LITE,
        mc.MLALayout(
            nope_dim=160,
            rope_dim=32,
            value_dim=96,
            query="q_proj",
            key_value="kv_b_proj",
            kernel=FLAT,
        ),
        16,
        {"o_proj": "of 1536", "kv_a_proj_with_mqa": "of 512 or 544"},
        dataclasses.replace(DEEPSEEK, query="q_proj"),
    ),
    "a shared key": (
        SHARED_KEY,
        mc.MLALayout(nope_dim=3, rope_dim=3, value_dim=6),
        4,
        {"k_rope": "of 3"},
        None,
    ),
    "a latent query": (
        {**V3, "q_a_proj": (7168, 768)},
        DEEPSEEK,
        128,
        {"q_a_proj": "of 1536"},
        None,
    ),
    "head_dim = d / heads, grouped": (  # 8 queries and 2 x 2 others of 64
        *fused("qkv", (256, 768), {"out": (512, 256)}, 8, 32),
        {"out": "of 256"},
        mc.FusedQKVLayout(head_dim=64, num_kv_heads=2),
    ),
    "values beside queries and keys": (
        *fused("qk", (512, 1024), {"v": (512, 512), "out": (512, 512)}, 8, 64, 4),
        {"v": "name of values"},
        None,
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_widths_that_divide_raise_until_confirmed(case):
    kernels, layout, heads, children, fix = WRONG[case]
    text = error_of(kernels, layout, heads)
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(lines) == len(children)
    for line, (child, expected) in zip(lines, children.items(), strict=True):
        assert line.startswith("  layers_0/attn and 1 more layer: ")
        assert f"'{child}'" in line
        assert expected in line
        assert f"confirm it with kept_leaves=('lora_a', '{child}')." in line
    assert fix is None or f"\nPass layout=mc.{fix}." in text
    check(kernels, dataclasses.replace(layout, kept_leaves=("lora_a", *children)), heads)
