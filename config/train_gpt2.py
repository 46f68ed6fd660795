"""GPT-2 124 M on openwebtext, as nanoGPT trains it: pre-norm, no biases."""

out_dir = "out-gpt2-124m"
dataset = "openwebtext"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
bias = False

batch_size = 12
gradient_accumulation_steps = 5 * 8  # 12 x 1,024 x 40 = 491,520 tokens a step
max_iters = 600_000  # 295 B tokens
lr_decay_iters = 600_000

eval_interval = 1000
eval_iters = 200
log_interval = 10
