"""GPT-2's size with post-norm: 12L-12H-768D-AbsPos-LN-NB-GELU-PostNorm. OpenAI's own GPT-2 is pre-norm: config/train_gpt2.py."""

dataset = "shakespeare"
batch_size = 12
gradient_accumulation_steps = 8  # 12 x 8 x 1,024 = 98,304 tokens a step

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
position_encoding = "learned_absolute"
normalization = "layernorm_nobias"
norm_position = "post"
ffn_type = "standard"
activation = "gelu"
bias = False
weight_tying = True
