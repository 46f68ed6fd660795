"""Characters of Shakespeare with nanoGPT's baby settings: 10.6 M parameters, a minute or two on one GPU."""

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2

batch_size = 64
gradient_accumulation_steps = 1  # 64 x 256 = 16,384 characters a step
max_iters = 5000
learning_rate = 1e-3  # small networks stand more
min_lr = 1e-4
warmup_iters = 100
lr_decay_iters = max_iters
beta2 = 0.99  # few tokens a step: a longer memory of the squared gradient

eval_interval = 250
eval_iters = 0  # the whole split
log_interval = 10
always_save_checkpoint = False  # it overfits in the end: the best validation loss is what counts
