# This suits one GPU of 8 to 12 GB: GPT-2's shape at half its depth and a shorter context, 0.26M tokens per step.
#   python train.py config/gpu12gb.py --distance=cosine
# If it runs out of memory, halve batch_size and double gradient_accumulation_steps and eval_iters: the steps and the
# validation range stay the same.
out_dir = "out/gpu12gb"
dataset = "openwebtext"

n_layer = 6
n_head = 12
n_embd = 768
block_size = 512

batch_size = 16
gradient_accumulation_steps = 32
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 500
max_iters = 20000
eval_interval = 500
eval_iters = 50
