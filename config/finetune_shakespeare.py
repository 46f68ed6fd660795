"""OpenAI's GPT-2, fine-tuned on Shakespeare for a few steps: nanoGPT's settings, but for the size of the model."""

out_dir = "out-finetune-shakespeare"
dataset = "shakespeare"
init_from = "gpt2"  # nanoGPT takes gpt2-xl; also a folder or a name on the hub. The model's sizes come with it
always_save_checkpoint = False  # only the best: text this short is soon learned by heart

batch_size = 1
gradient_accumulation_steps = 32  # 1 x 32 x 1,024 = 32,768 tokens a step; Shakespeare has 301,966: 9.2 steps an epoch
max_iters = 20

learning_rate = 3e-5  # as low as pre-training ended with
decay_lr = False

eval_interval = 5
eval_iters = 40
