"""GPT-2-style, about 1.405 B parameters: 18L-19H-2432D-AbsPos-LN-NB-GELU-PreNorm on SlimPajama-6B."""

out_dir = "out-gpt2-1.36b"
dataset = "slimpajama_6b_gpt2"
vocab_size = 50_304  # GPT-2's 50,257, padded to a multiple of 64

n_layer = 18
n_head = 19  # heads of 128: 18 do not divide 2,432
n_embd = 2432
block_size = 2048
position_encoding = "learned_absolute"
normalization = "layernorm_nobias"
norm_position = "pre"
ffn_type = "standard"
activation = "gelu"
bias = False
weight_tying = True

batch_size = 8
gradient_accumulation_steps = 16  # 8 x 16 x 2,048 = 262,144 tokens a step; 4 micro-steps a rank on 4 GPUs
max_iters = 22_888  # 6 B tokens / 262,144: one pass
learning_rate = 3e-4
min_lr = 3e-5
warmup_iters = 2000
lr_decay_iters = max_iters

eval_interval = 1000
eval_iters = 50
