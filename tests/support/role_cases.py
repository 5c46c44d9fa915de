"""Parameters of many kinds of models, a line for each: path, shape, what is right.

`A` is AdamW and `2x8x16` two matrices of 8 inputs and 16 outputs; a `W` behind it allows a warning
and any optimizer. Names and shapes are those of the public code in the comment.
"""

MODELS: dict[str, str] = {
    # moonshotai/Kimi-Linear-48B-A3B, modeling_kimi.py, in Flax's names
    "kimi_linear_nnx": """
embed_tokens/embedding 163840,2304 A
layers/0/self_attn/q_proj/kernel 2304,4096 1x2304x4096
layers/0/self_attn/k_proj/kernel 2304,4096 1x2304x4096
layers/0/self_attn/v_proj/kernel 2304,4096 1x2304x4096
layers/0/self_attn/q_conv1d/kernel 4,4096 A
layers/0/self_attn/k_conv1d/weight 4096,1,4 A
layers/0/self_attn/A_log 1,1,32,1 A
layers/0/self_attn/dt_bias 4096 A
layers/0/self_attn/f_a_proj/kernel 2304,128 1x2304x128
layers/0/self_attn/f_b_proj/kernel 128,4096 1x128x4096
layers/0/self_attn/b_proj/kernel 2304,32 1x2304x32
layers/0/self_attn/g_a_proj/kernel 2304,128 1x2304x128
layers/0/self_attn/g_b_proj/kernel 128,4096 1x128x4096
layers/0/self_attn/o_norm/scale 128 A
layers/0/self_attn/o_proj/kernel 4096,2304 1x4096x2304
layers/0/input_layernorm/scale 2304 A
layers/0/block_sparse_moe/gate/kernel 2304,256 A
layers/0/block_sparse_moe/gate/e_score_correction_bias 256 A
layers/0/block_sparse_moe/experts/w1 256,2304,1024 256x2304x1024
layers/0/block_sparse_moe/experts/w2 256,1024,2304 256x1024x2304
layers/0/block_sparse_moe/experts/w3 256,2304,1024 256x2304x1024
layers/0/block_sparse_moe/shared_experts/gate_proj/kernel 2304,1024 1x2304x1024
layers/0/block_sparse_moe/shared_experts/up_proj/kernel 2304,1024 1x2304x1024
layers/0/block_sparse_moe/shared_experts/down_proj/kernel 1024,2304 1x1024x2304
lm_head/kernel 2304,163840 A
norm/scale 2304 A
""",
    # the same, layers stacked by scan, experts as raw parameters
    "kimi_linear_scanned": """
embed/embedding 1024,64 A
layers/kda/q_proj/kernel 7,64,128 7x64x128
layers/kda/k_proj/kernel 7,64,128 7x64x128
layers/kda/v_proj/kernel 7,64,128 7x64x128
layers/kda/q_conv/kernel 7,4,1,128 A
layers/kda/A_log 7,4 A
layers/kda/dt_bias 7,128 A
layers/kda/b_proj/kernel 7,64,4 7x64x4W
layers/kda/o_proj/kernel 7,128,64 7x128x64
layers/kda/o_norm/scale 7,32 A
layers/ln/scale 7,64 A
layers/moe/gate/kernel 7,64,8 A
layers/moe/gate/bias 7,8 A
layers/moe/w_gate 7,8,64,32 56x64x32
layers/moe/w_up 7,8,64,32 56x64x32
layers/moe/w_down 7,8,32,64 56x32x64
""",
    # state-spaces/mamba, mamba_simple.py
    "mamba": """
backbone/embedding/weight 50277,768 A
backbone/layers/0/norm/weight 768 A
backbone/layers/0/mixer/in_proj/kernel 768,3072 1x768x3072
backbone/layers/0/mixer/conv1d/kernel 4,1,1536 A
backbone/layers/0/mixer/conv1d/bias 1536 A
backbone/layers/0/mixer/x_proj/kernel 1536,80 1x1536x80
backbone/layers/0/mixer/dt_proj/kernel 48,1536 1x48x1536
backbone/layers/0/mixer/dt_proj/bias 1536 A
backbone/layers/0/mixer/A_log 1536,16 A
backbone/layers/0/mixer/D 1536 A
backbone/layers/0/mixer/out_proj/kernel 1536,768 1x1536x768
backbone/norm_f/weight 768 A
""",
    # the same, outputs first and stacked
    "mamba_scanned_torchlike": """
backbone/layers/norm/weight 24,768 A
backbone/layers/mixer/in_proj/weight 24,3072,768 24x768x3072
backbone/layers/mixer/conv1d/weight 24,1536,1,4 A
backbone/layers/mixer/conv1d/bias 24,1536 A
backbone/layers/mixer/A_log 24,1536,16 A
backbone/layers/mixer/D 24,1536 A
backbone/layers/mixer/out_proj/weight 24,768,1536 24x1536x768
backbone/embedding/weight 50277,768 A
""",
    # BlinkDL/RWKV-LM, RWKV-v6
    "rwkv": """
emb/weight 65536,2048 A
blocks/0/ln0/weight 2048 A
blocks/0/att/time_mix_k 1,1,2048 A
blocks/0/att/time_decay 2048 A
blocks/0/att/time_faaaa 32,64 A
blocks/0/att/time_maa_w1 2048,160 1x2048x160
blocks/0/att/time_maa_w2 5,32,2048 5x32x2048W
blocks/0/att/receptance/kernel 2048,2048 1x2048x2048
blocks/0/att/key/kernel 2048,2048 1x2048x2048
blocks/0/att/value/kernel 2048,2048 1x2048x2048
blocks/0/att/output/kernel 2048,2048 1x2048x2048
blocks/0/att/r_k 32,64 A
blocks/0/ffn/key/kernel 2048,7168 1x2048x7168
blocks/0/ffn/value/kernel 7168,2048 1x7168x2048
head/weight 65536,2048 A
""",
    # huggingface/diffusers, models/unet_2d_condition_flax.py
    "diffusers_unet": """
conv_in/kernel 3,3,4,320 1x36x320W
conv_in/bias 320 A
time_embedding/linear_1/kernel 320,1280 1x320x1280
time_embedding/linear_1/bias 1280 A
down_blocks_0/resnets_0/norm1/scale 320 A
down_blocks_0/resnets_0/conv1/kernel 3,3,320,320 1x2880x320
down_blocks_0/resnets_0/time_emb_proj/kernel 1280,320 1x1280x320
down_blocks_0/resnets_0/time_emb_proj/bias 320 A
down_blocks_0/attentions_0/proj_in/kernel 1,1,320,320 1x320x320
down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_q/kernel 320,320 1x320x320
down_blocks_0/attentions_0/transformer_blocks_0/attn2/to_k/kernel 768,320 1x768x320
down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_out_0/kernel 320,320 1x320x320
down_blocks_0/attentions_0/transformer_blocks_0/ff/net_0/proj/kernel 320,2560 1x320x2560
down_blocks_0/attentions_0/transformer_blocks_0/ff/net_2/kernel 1280,320 1x1280x320
down_blocks_0/downsamplers_0/conv/kernel 3,3,320,320 1x2880x320
conv_norm_out/scale 320 A
conv_out/kernel 3,3,320,4 1x2880x4W
conv_out/bias 4 A
""",
    # facebookresearch/DiT, models.py
    "dit": """
x_embedder/proj/kernel 2,2,4,1152 A
x_embedder/proj/bias 1152 A
t_embedder/mlp_0/kernel 256,1152 1x256x1152
t_embedder/mlp_0/bias 1152 A
y_embedder/embedding_table 1001,1152 A
pos_embed 1,256,1152 A
blocks_0/adaLN_modulation/kernel 1152,6912 1x1152x6912
blocks_0/adaLN_modulation/bias 6912 A
blocks_0/attn/qkv/kernel 1152,3456 1x1152x3456
blocks_0/attn/proj/kernel 1152,1152 1x1152x1152
blocks_0/mlp/fc1/kernel 1152,4608 1x1152x4608
blocks_0/mlp/fc2/kernel 4608,1152 1x4608x1152
final_layer/adaLN_modulation/kernel 1152,2304 1x1152x2304
final_layer/adaLN_modulation/bias 2304 A
final_layer/linear/kernel 1152,32 AW
final_layer/linear/bias 32 A
""",
    # microsoft/Swin-Transformer
    "swin": """
patch_embed/proj/kernel 4,4,3,96 A
patch_embed/proj/bias 96 A
layers_0/blocks_0/norm1/scale 96 A
layers_0/blocks_0/attn/relative_position_bias_table 169,3 A
layers_0/blocks_0/attn/qkv/kernel 96,288 1x96x288
layers_0/blocks_0/attn/proj/kernel 96,96 1x96x96
layers_0/downsample/reduction/kernel 384,192 1x384x192
layers_0/downsample/norm/scale 384 A
head/kernel 768,1000 A
""",
    # facebookresearch/ConvNeXt, V2
    "convnext": """
downsample_layers_0/0/kernel 4,4,3,96 1x48x96W
stages_0/0/dwconv/kernel 7,7,1,96 A
stages_0/0/dwconv/bias 96 A
stages_0/0/norm/scale 96 A
stages_0/0/pwconv1/kernel 96,384 1x96x384
stages_0/0/pwconv2/kernel 384,96 1x384x96
stages_0/0/gamma 96 A
stages_1/0/grn/gamma 1,1,1,384 A
head/kernel 768,1000 A
""",
    # facebookresearch/dinov2
    "dinov2": """
cls_token 1,1,384 A
register_tokens 1,4,384 A
mask_token 1,384 A
pos_embed 1,1370,384 A
patch_embed/proj/kernel 14,14,3,384 A
blocks/0/norm1/scale 384 A
blocks/0/attn/qkv/kernel 384,1152 1x384x1152
blocks/0/ls1/gamma 384 A
blocks/0/mlp/w12/kernel 384,2048 1x384x2048
blocks/0/mlp/w3/kernel 1024,384 1x1024x384
""",
    # the same, stacked
    "dinov2_scanned": """
blocks/norm1/scale 12,384 A
blocks/attn/qkv/kernel 12,384,1152 12x384x1152
blocks/attn/qkv/bias 12,1152 A
blocks/attn/proj/kernel 12,384,384 12x384x384
blocks/ls1 12,384 A
blocks/ls2 12,384 A
blocks/mlp/fc1/kernel 12,384,1536 12x384x1536
blocks/mlp/fc2/kernel 12,1536,384 12x1536x384
""",
    # google-deepmind/recurrentgemma, jax
    "recurrentgemma": """
embedder/input_embedding 256000,2560 A
blocks/0/temporal_pre_norm/scale 2560 A
blocks/0/recurrent_block/linear_y/kernel 2560,2560 1x2560x2560
blocks/0/recurrent_block/conv_1d/w 4,2560 A
blocks/0/recurrent_block/conv_1d/b 2560 A
blocks/0/recurrent_block/rg_lru/a_param 2560 A
blocks/0/recurrent_block/rg_lru/input_gate/w 10,256,256 10x256x256
blocks/0/recurrent_block/rg_lru/input_gate/b 10,256 A
blocks/0/mlp_block/ffw_up/w 2,2560,7680 2x2560x7680
blocks/0/mlp_block/ffw_up/b 2,1,1,7680 A
blocks/0/mlp_block/ffw_down/kernel 7680,2560 1x7680x2560
""",
    # AI-Hypercomputer/maxtext, kernels only
    "maxtext_like_gqa_nonorm": """
attn/query/kernel 512,6,8,64 6x512x512
attn/out/kernel 8,6,64,512 6x512x512
attn/key/kernel 512,6,2,64 6x512x128
mlp/wi_0/kernel 512,6,2048 6x512x2048
mlp/wo/kernel 2048,6,512 6x2048x512
""",
    # a Llama of raw arrays, stacked
    "jax_llama_pure": """
tok_emb 32000,512 A
layers/attn_norm 8,512 A
layers/ffn_norm 8,512 A
layers/wq 8,512,8,64 8x512x512
layers/wk 8,512,2,64 8x512x128
layers/wv 8,512,2,64 8x512x128
layers/wo 8,8,64,512 8x512x512
layers/w1 8,512,2048 8x512x2048
layers/w2 8,2048,512 8x2048x512
layers/w3 8,512,2048 8x512x2048
final_norm 512 A
unembed 512,32000 A
""",
    # a GPT of raw arrays, stacked
    "jax_llama_flat_names_norm_g": """
wte 1000,64 A
h/g1 4,64 A
h/g2 4,64 A
h/wqkv 4,64,192 4x64x192
h/wo 4,64,64 4x64x64
h/w_in 4,64,256 4x64x256
h/w_out 4,256,64 4x256x64
h/b_in 4,256 A
h/lambda1 4,64 A
""",
    # KellerJordan/modded-nanogpt
    "modded_nanogpt": """
embed/weight 50304,768 A
value_embeds/0/weight 50304,768 A
blocks/0/attn/qkv_w 3,768,768 3x768x768
blocks/0/attn/lambdas 2 A
blocks/0/attn/c_proj/weight 768,768 1x768x768
blocks/0/mlp/c_fc/weight 3072,768 1x768x3072
blocks/0/mlp/c_proj/weight 768,3072 1x3072x768
skip_weights 6 A
lm_head/weight 50304,768 A
""",
    # google/brax, ppo networks
    "brax_ppo": """
params/hidden_0/kernel 87,256 1x87x256
params/hidden_0/bias 256 A
params/hidden_1/kernel 256,256 1x256x256
params/hidden_1/bias 256 A
params/hidden_2/kernel 256,16 AW
params/hidden_2/bias 16 A
""",
    # ikostrikov/jaxrl, ensemble of critics
    "critic_ensemble": """
VmapCritic_0/Dense_0/kernel 2,23,256 2x23x256
VmapCritic_0/Dense_0/bias 2,256 A
VmapCritic_0/Dense_1/kernel 2,256,256 2x256x256
VmapCritic_0/Dense_1/bias 2,256 A
VmapCritic_0/Dense_2/kernel 2,256,1 A
VmapCritic_0/Dense_2/bias 2,1 A
""",
    # patrick-kidger/equinox, examples/unet
    "eqx_unet": """
lin_in/weight 64,32 1x32x64
lin_in/bias 64 A
down/0/conv/weight 64,32,3,3 1x288x64
down/0/conv/bias 64,1,1 A
down/0/norm/weight 64 A
out/weight 3,64,3,3 1x576x3W
out/bias 3,1,1 A
""",
    # an Equinox transformer without biases
    "eqx_transformer_nobias": """
embed/weight 1000,64 A
layers/0/attn/query_proj/weight 64,64 1x64x64
layers/0/attn/key_proj/weight 32,64 1x64x32
layers/0/attn/value_proj/weight 32,64 1x64x32
layers/0/attn/output_proj/weight 64,64 1x64x64
layers/0/norm1/weight 64 A
layers/0/mlp/gate/weight 256,64 1x64x256
layers/0/mlp/up/weight 256,64 1x64x256
layers/0/mlp/down/weight 64,256 1x256x64
lm_head/weight 1000,64 A
""",
    # equinox.nn.MLP
    "eqx_mlp": """
layers/0/weight 8,4 1x4x8
layers/0/bias 8 A
layers/1/weight 8,8 1x8x8
layers/1/bias 8 A
layers/2/weight 3,8 AW
layers/2/bias 3 A
""",
    # google-deepmind/dm-haiku, examples/transformer
    "haiku_mha": """
transformer/h0_attn/query/w 512,512 1x512x512
transformer/h0_attn/query/b 512 A
transformer/h0_attn/linear/w 512,512 1x512x512
transformer/h0_mlp/linear/w 512,2048 1x512x2048
transformer/h0_mlp/linear/b 2048 A
transformer/h0_mlp/linear_1/w 2048,512 1x2048x512
transformer/h0_mlp/linear_1/b 512 A
transformer/h0_ln_1/scale 512 A
transformer/h0_ln_1/offset 512 A
embed/embeddings 1000,512 A
""",
    # google-research/t5x, scan_axis=1
    "t5x_scanned_axis1": """
token_embedder/embedding 32128,512 A
decoder/relpos_bias/rel_embedding 6,32 A
decoder/decoder_norm/scale 512 A
decoder/decoder/pre_mlp_layer_norm/scale 512,8 A
decoder/decoder/pre_self_attention_layer_norm/scale 512,8 A
decoder/decoder/self_attention/query/kernel 512,8,384 8x512x384
decoder/decoder/self_attention/key/kernel 512,8,384 8x512x384
decoder/decoder/self_attention/out/kernel 384,8,512 8x384x512
decoder/decoder/mlp/wi_0/kernel 512,8,1024 8x512x1024
decoder/decoder/mlp/wo/kernel 1024,8,512 8x1024x512
decoder/logits_dense/kernel 512,32128 A
""",
    # MLP-Mixer
    "mixer_custom": """
blocks_0/token_mixing/Dense_0/kernel 196,384 1x196x384
blocks_0/token_mixing/Dense_1/kernel 384,196 1x384x196
blocks_0/channel_mixing/Dense_0/kernel 768,3072 1x768x3072
blocks_0/channel_mixing/Dense_1/kernel 3072,768 1x3072x768
blocks_0/norm/scale 768 A
""",
    # karpathy/ng-video-lecture, one module per head
    "head_per_module": """
blocks_0/sa/heads_0/key/kernel 384,64 1x384x64
blocks_0/sa/heads_1/key/kernel 384,64 1x384x64
blocks_0/sa/proj/kernel 384,384 1x384x384
blocks_0/ffwd/net_0/kernel 384,1536 1x384x1536
""",
    # a list of experts
    "moe_list_experts": """
layers/0/moe/gate/kernel 64,4 A
layers/0/moe/experts/0/w1/kernel 64,128 1x64x128
layers/0/moe/experts/1/w1/kernel 64,128 1x64x128
layers/0/moe/experts/2/w1/kernel 64,128 1x64x128
layers/0/moe/experts/3/w1/kernel 64,128 1x64x128
layers/0/norm/scale 64 A
""",
    # a list of experts under another name
    "moe_named_mlps": """
layers/0/ffn/gate/kernel 64,4 A
layers/0/ffn/mlps/0/w1/kernel 64,128 1x64x128
layers/0/ffn/mlps/1/w1/kernel 64,128 1x64x128
layers/0/ffn/mlps/2/w1/kernel 64,128 1x64x128
layers/0/ffn/mlps/3/w1/kernel 64,128 1x64x128
""",
    # stacked experts beside a router of unknown name
    "moe_unnamed_router": """
layers/ln/scale 3,64 A
layers/ffn/assign/kernel 3,64,8 A
layers/ffn/up 3,8,64,128 24x64x128
layers/ffn/down 3,8,128,64 24x128x64
layers/mlp/gate/kernel 3,64,128 3x64x128
layers/mlp/up/kernel 3,64,128 3x64x128
layers/mlp/down/kernel 3,128,64 3x128x64
""",
    # Gated Attention, one gate per head
    "gated_attention_headgate": """
layers/0/attn/q_proj/kernel 64,4,16 1x64x64
layers/0/attn/k_proj/kernel 64,4,16 1x64x64
layers/0/attn/v_proj/kernel 64,4,16 1x64x64
layers/0/attn/o_proj/kernel 4,16,64 1x64x64
layers/0/attn/gate/kernel 64,4 1x64x4W
layers/0/norm/scale 64 A
""",
    # Perceiver, cross-attention from another width
    "perceiver": """
latents 256,512 A
pos/table 1000,512 A
cross/q/kernel 512,8,64 1x512x512
cross/k/kernel 768,8,64 1x768x512
cross/v/kernel 768,8,64 1x768x512
cross/o/kernel 8,64,512 1x512x512
cross/ln/scale 512 A
""",
    # Engram: hashed n-gram tables and their projections
    "engram": """
layers/0/engram/tables/0 100000,64 A
layers/0/engram/hash_embedding/weight 200000,64 A
layers/0/engram/key_proj/kernel 64,512 1x64x512
layers/0/engram/value_proj/kernel 64,512 1x64x512
layers/0/engram/short_conv/kernel 4,1,512 A
layers/0/norm/scale 512 A
""",
    # google-deepmind/alphafold, model/modules.py
    "alphafold_like": """
evoformer/msa_row_attention/query_w 256,8,32 1x256x256
evoformer/msa_row_attention/key_w 256,8,32 1x256x256
evoformer/msa_row_attention/value_w 256,8,32 1x256x256
evoformer/msa_row_attention/output_w 8,32,256 1x256x256
evoformer/msa_row_attention/gating_w 256,8,32 1x256x256W
evoformer/msa_row_attention/gating_b 8,32 A
evoformer/msa_row_attention/output_b 256 A
evoformer/msa_row_attention/query_norm/scale 256 A
evoformer/feat_2d_weights 128,8 1x128x8
""",
    # lindermanlab/S5
    "s5": """
encoder/layers_0/seq/Lambda_re 64 A
encoder/layers_0/seq/Lambda_im 64 A
encoder/layers_0/seq/B 64,256,2 AW
encoder/layers_0/seq/C 256,64,2 AW
encoder/layers_0/seq/D 256 A
encoder/layers_0/seq/log_step 64,1 A
encoder/layers_0/out2/kernel 256,256 1x256x256
""",
    # Haiku and Flax LSTMs
    "lstm": """
lstm/linear/w 512,1024 1x512x1024
lstm/linear/b 1024 A
OptimizedLSTMCell_0/hi/kernel 256,256 1x256x256
OptimizedLSTMCell_0/hi/bias 256 A
OptimizedLSTMCell_0/ii/kernel 128,256 1x128x256
""",
    # google/qwix, LoRA parameters alone
    "lora_qwix": """
layers/0/attn/q_proj/w_lora_a 2048,16 1x2048x16
layers/0/attn/q_proj/w_lora_b 16,16,128 1x16x2048
layers/0/attn/o_proj/w_lora_a 16,128,16 1x2048x16
layers/0/attn/o_proj/w_lora_b 16,2048 1x16x2048
layers/0/mlp/gate_proj/kernel_lora_a 2048,16 1x2048x16
""",
    # huggingface/peft, LoRA parameters alone
    "peft_lora": """
model/layers/0/self_attn/q_proj/lora_A/weight 8,2048 1x2048x8W
model/layers/0/self_attn/q_proj/lora_B/weight 2048,8 1x8x2048W
""",
    # latent attention with three-axis kernels, stacked
    "mla_native": """
layers/attn/q_a/kernel 3,512,96 3x512x96
layers/attn/q_a_norm/scale 3,96 A
layers/attn/q_b/kernel 3,96,8,48 3x96x384
layers/attn/kv_a/kernel 3,512,80 3x512x80
layers/attn/kv_a_norm/scale 3,64 A
layers/attn/kv_b/kernel 3,64,8,64 3x64x512
layers/attn/out/kernel 3,8,32,512 3x256x512
layers/ln/scale 3,512 A
""",
    # openai/CLIP
    "clip_like": """
visual/class_embedding 768 A
visual/positional_embedding 50,768 A
visual/proj 768,512 1x768x512W
visual/ln_post/scale 768 A
text_projection 512,512 1x512x512
logit_scale - A
token_embedding/embedding 49408,512 A
""",
    # HazyResearch/safari
    "hyena": """
layers/0/filter/pos_emb/z 1,1024,3 A
layers/0/filter/implicit_filter/0/weight 64,3 1x3x64W
layers/0/short_filter/weight 2304,1,3 AW
layers/0/in_proj/weight 2304,768 1x768x2304
layers/0/norm1/weight 768 A
""",
    # openai/gpt-oss, torch model
    "gpt_oss_flat": """
embedding/weight 1000,64 A
block/0/attn/norm/scale 64 A
block/0/attn/qkv/weight 192,64 1x64x192
block/0/attn/qkv/bias 192 A
block/0/attn/sinks 4 A
block/0/mlp/gate/weight 8,64 A
block/0/mlp/gate/bias 8 A
block/0/mlp/mlp1_weight 8,256,64 8x64x256
block/0/mlp/mlp1_bias 8,256 A
block/0/mlp/mlp2_weight 8,64,128 8x128x64
block/0/mlp/mlp2_bias 8,64 A
unembedding/weight 1000,64 A
""",
    # a scan of a scan
    "stacked_nested": """
stages/blocks/norm/scale 3,4,64 A
stages/blocks/mlp/up/kernel 3,4,64,256 12x64x256
stages/blocks/mlp/up/bias 3,4,256 A
stages/blocks/attn/query/kernel 3,4,64,4,16 12x64x64
stages/blocks/attn/out/kernel 3,4,4,16,64 12x64x64
stages/norm/scale 3,64 A
""",
    # stacked vectors of unknown names
    "unnamed_vectors_scanned": """
layers/alibi 6,8 A
layers/foo 6,64 A
layers/attn/wq 6,64,64 6x64x64
layers/attn/wo 6,64,64 6x64x64
layers/mlp/w1 6,64,256 6x64x256
layers/mlp/w2 6,256,64 6x256x64
""",
    # diffusers, AdaLayerNorm
    "ada_norm_linear": """
blocks/0/norm1/linear/kernel 512,3072 1x512x3072
blocks/0/norm1/linear/bias 3072 A
blocks/0/norm2/scale 512 A
blocks/0/attn/to_q/kernel 512,512 1x512x512
norm_out/linear/kernel 512,1024 1x512x1024
norm_out/linear/bias 1024 A
proj_out/kernel 512,16 A
proj_out/bias 16 A
""",
    # srush/annotated-s4, s4.py: S4 and S4D
    "annotated_s4": """
encoder/embedding 256,128 A
layers_0/norm/scale 128 A
layers_0/seq/Lambda_re 64,128 A
layers_0/seq/Lambda_im 64,128 A
layers_0/seq/P 64,128 A
layers_0/seq/B 64,128 A
layers_0/seq/C 64,128,2 A
layers_0/seq/D 1,128 A
layers_0/seq/log_step 1,128 A
layers_0/out/kernel 128,128 1x128x128
layers_1/seq/A_re 64,128 A
layers_1/seq/A_im 64,128 A
layers_1/seq/B_re 64,128 A
layers_1/seq/log_step 1,128 A
decoder/kernel 128,256 AW
decoder/bias 256 A
""",
    # ml-gde/jflux and Lightricks/LTX-Video: embedders of numbers, the last layer
    "jflux": """
img_in/kernel 64,512 1x64x512
time_in/in_layer/kernel 256,512 1x256x512
time_in/out_layer/kernel 512,512 1x512x512
double_blocks/0/img_mlp/0/kernel 512,2048 1x512x2048
double_blocks/0/norm/scale 512 A
final_layer/linear/kernel 512,64 A
final_layer/adaLN_modulation/1/kernel 512,1024 1x512x1024
""",
    # jax-ml/jax-llm-examples, nemotron3: Mamba-2 and grouped queries as einsums
    "nemotron3": """
embedding 32000,2688 A
layers/0/attn_pre_gamma 2688 A
layers/0/ffw/wx_in 2688,64,48 1x2688x3072
layers/0/ffw/wg_in 2688,64,48 1x2688x3072
layers/0/ffw/w_out 64,48,2688 1x3072x2688
layers/0/norm/scale 2688 A
layers/3/ffw/q 2688,2,16,128 1x2688x4096
layers/3/ffw/o 2,16,128,2688 1x4096x2688
layers/3/norm/scale 2688 A
""",
    # jax-ml/jax-llm-examples, deepseek_r1_jax: low ranks of queries, keys and values
    "deepseek_r1_jax": """
layers/0/attn/q_a 7168,1536 1x7168x1536
layers/0/attn/q_b 1536,128,192 1x1536x24576
layers/0/attn/kv_a 7168,512 1x7168x512
layers/0/attn/k_b 512,128,128 1x512x16384
layers/0/attn/v_b 512,128,128 1x512x16384
layers/0/attn/o 128,128,7168 1x16384x7168
layers/0/attn_pre_norm/scale 7168 A
""",
    # google-deepmind/penzai, llamalike_common.py: labels of parameters, split at dots
    "penzai_llama": """
transformer/embedder/embeddings/data_array 32000,1024 A
transformer/block_0/pre_attention_norm/scale/weights/data_array 1024 A
transformer/block_0/attention/query/weights/data_array 1024,2,4,128 1x1024x1024
transformer/block_0/attention/key/weights/data_array 1024,2,128 1x1024x256
transformer/block_0/attention/output/weights/data_array 2,4,128,1024 1x1024x1024
transformer/lm_head/weights/data_array 1024,32000 A
""",
    # google/dopamine, jax/networks.py: noisy networks
    "dopamine_noisy": """
Conv_0/kernel 8,8,4,32 1x256x32
NoisyNetwork_0/kernel_mu 7744,512 1x7744x512
NoisyNetwork_0/kernel_sigma 7744,512 A
NoisyNetwork_0/bias_mu 512 A
NoisyNetwork_0/bias_sigma 512 A
NoisyNetwork_1/kernel_mu 512,51 AW
NoisyNetwork_1/kernel_sigma 512,51 A
""",
    # Physical-Intelligence/openpi, lora.py: adapters of einsums with heads
    "openpi_lora": """
layers/attn/q_einsum/w 18,8,1024,256 18x1024x2048
layers/attn/q_einsum/lora_a 18,8,1024,16 144x1024x16
layers/attn/q_einsum/lora_b 18,8,16,256 144x16x256
layers/attn/attn_vec_einsum/w 18,8,256,1024 18x2048x1024
layers/pre_attention_norm/scale 18,1024 A
""",
    # apple/axlearn: output projections stored as queries are
    "axlearn_fuji": """
decoder/emb/token_emb/weight 32768,2048 A
decoder/layer/norm/scale 16,2048 A
decoder/layer/self_attention/attention/i_proj/i_proj/qkv_proj/weight 16,3,2048,32,64 48x2048x2048
decoder/layer/self_attention/attention/o_proj/weight 16,2048,32,64 16x2048x2048W
""",
    # deepmind/tapnet: depthwise convolutions without the name of one
    "tapnet_mixer": """
mixer/block/mlp1_up/w 3,1,2048 A
mixer/block/mlp1_up/b 2048 A
mixer/block/linear/w 512,512 1x512x512
mixer/block/layer_norm/scale 512 A
""",
    # an MLP of flax.linen.Dense
    "flax_mlp_named": """
Dense_0/kernel 784,512 1x784x512
Dense_0/bias 512 A
Dense_1/kernel 512,10 AW
Dense_1/bias 10 A
""",
    # the CNN of Flax's MNIST example
    "flax_cnn": """
Conv_0/kernel 3,3,1,32 AW
Conv_0/bias 32 A
Conv_1/kernel 3,3,32,64 1x288x64
Conv_1/bias 64 A
Dense_0/kernel 3136,256 1x3136x256
Dense_0/bias 256 A
Dense_1/kernel 256,10 AW
Dense_1/bias 10 A
""",
}
