# This suits a CPU: a GPT of 4 layers and 128 dimensions, on the standard library's sources. No network is needed.
#   python prepare_stdlib.py
#   python train.py config/cpu.py --distance=euclidean
out_dir = "out/cpu"
dataset = "stdlib"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128

batch_size = 16
gradient_accumulation_steps = 1 # 2,048 tokens per step
learning_rate = 3e-3
min_lr = 3e-4
warmup_iters = 50
max_iters = 2000
beta2 = 0.99
eval_interval = 250
eval_iters = 20
log_interval = 10
intermediate_size = 352 # for --model=qwen2
compile = False # of so small a model; the losses of elementwise distances compile themselves
