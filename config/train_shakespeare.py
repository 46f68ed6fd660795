"""A small model on Shakespeare in GPT-2's tokens: 338 k tokens, so it overfits soon; best_model is the one to use."""

out_dir = "out-shakespeare"
dataset = "shakespeare"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2

batch_size = 64
gradient_accumulation_steps = 1  # 64 x 256 = 16,384 tokens a step, 18 steps an epoch
max_iters = 1000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
lr_decay_iters = max_iters
beta2 = 0.99

eval_interval = 100
eval_iters = 0  # the whole split: 36 k tokens
log_interval = 10
always_save_checkpoint = False
