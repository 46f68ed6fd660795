"""The LLaMA preset with every choice spelled out: copy this file, change a line, compare the runs."""

dataset = "shakespeare"
batch_size = 12
gradient_accumulation_steps = 8  # 12 x 8 x 1,024 = 98,304 tokens a step

n_layer = 12
n_head = 12
n_kv_head = 12  # fewer share keys and values between heads (grouped-query attention)
n_embd = 768
d_ff = 2048  # 8/3 x 768
block_size = 1024
position_encoding = "rope"  # learned_absolute, rope, none
rope_theta = 10_000.0
normalization = "rmsnorm"  # layernorm, layernorm_nobias, rmsnorm
norm_position = "pre"  # pre, post
ffn_type = "swiglu"  # standard (with activation = ...), swiglu
bias = False
weight_tying = False
qk_norm = False
dropout = 0.0
