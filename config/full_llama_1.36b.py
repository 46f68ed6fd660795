"""LLaMA-style, 1,294,159,104 parameters: 18L-18H-2304D-RoPE-RMS-SwiGLU-PreNorm on SlimPajama-6B."""

out_dir = "out-llama-1.36b"
dataset = "slimpajama_6b_llama"
vocab_size = 32_000  # LLaMA-2's tokenizer

n_layer = 18
n_head = 18  # heads of 128
n_embd = 2304
d_ff = 6144  # 8/3 x 2,304
block_size = 2048
position_encoding = "rope"
normalization = "rmsnorm"
norm_position = "pre"
ffn_type = "swiglu"
bias = False
weight_tying = False

batch_size = 8
gradient_accumulation_steps = 16  # 8 x 16 x 2,048 = 262,144 tokens a step; 4 micro-steps a rank on 4 GPUs
max_iters = 22_888  # 6 B tokens / 262,144: one pass
learning_rate = 3e-4
min_lr = 3e-5
warmup_iters = 2000
lr_decay_iters = max_iters

eval_interval = 1000
eval_iters = 50
