"""LLaMA's components at GPT-2's size: 12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm."""

dataset = "shakespeare"
batch_size = 12
gradient_accumulation_steps = 8  # 12 x 8 x 1,024 = 98,304 tokens a step

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
position_encoding = "rope"
normalization = "rmsnorm"
ffn_type = "swiglu"  # hidden width 8/3 x 768 = 2,048
weight_tying = False
