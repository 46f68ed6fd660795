"""The built-in corpus (Python's own standard library): text that looks like Python within two minutes on two CPU cores."""

out_dir = "out-quickstart"
dataset = "python_stdlib"

# LLaMA's components, small: 1.4 M parameters, 0.5 M of them the embedding
n_layer = 4
n_head = 4
n_embd = 128
block_size = 256
position_encoding = "rope"
normalization = "rmsnorm"
ffn_type = "swiglu"
weight_tying = True  # a head of its own would be another 0.5 M
dropout = 0.0

batch_size = 8
gradient_accumulation_steps = 1  # 8 x 256 = 2,048 tokens a step
max_iters = 450  # 0.9 M tokens
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 50
lr_decay_iters = max_iters
beta2 = 0.99  # few tokens a step: a longer memory of the squared gradient

eval_interval = 100
eval_iters = 10
sample_interval = 250
sample_prompt = "def "
log_interval = 10
rolling_interval = 0  # two minutes need no history
use_tensorboard = True
compile = False  # compiling takes longer than it saves here
