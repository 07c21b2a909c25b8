# This trains GPT-2 124M on OpenWebText at the settings of "Non-Euclidean Harmonic Losses", Tables 1-3, with any head
# (`python distances.py` lists them):
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py --distance=minkowski --distance_params=p=3 \
#       --out_dir=out/gpt2_minkowski3
# Two things differ from the paper's code. The loss is exact, without label smoothing and clamps. And the exponent n,
# which that code left different for each distance, is a multiple of sqrt(n_embd) by default; --n=... sets it.
out_dir = "out/gpt2"
dataset = "openwebtext"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
dropout = 0.1
bias = True
tie_weights = True

batch_size = 16
gradient_accumulation_steps = 8 # 16 x 8 = 128 sequences = 131,072 tokens per step
learning_rate = 2e-4
min_lr = 2e-6
warmup_iters = 500
max_iters = 10000
lr_decay_iters = 10000
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.999
grad_clip = 1.0

eval_interval = 1000
eval_iters = 100
log_interval = 50
dtype = "auto" # bfloat16 where the GPU has it
