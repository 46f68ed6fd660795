"""A mixture: LayerNorm with biases, RoPE and a standard feed-forward, pre-norm: 12L-12H-768D-RoPE-LN-GELU-PreNorm."""

dataset = "shakespeare"
batch_size = 12
gradient_accumulation_steps = 8  # 12 x 8 x 1,024 = 98,304 tokens a step

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
position_encoding = "rope"
normalization = "layernorm"
norm_position = "pre"
ffn_type = "standard"
activation = "gelu"
bias = True
weight_tying = True
