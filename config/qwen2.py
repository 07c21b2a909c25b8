# This trains Qwen2-0.5B (403.0M parameters with GPT-2 tokens) at the paper's settings (section C.2): 6 x 10 x 1024
# tokens per step. The paper's runs had vocab_size = 151936 (494.0M parameters) on GPT-2's tokens, so that 101,679
# never occurred.
#   python prepare_openwebtext.py
#   torchrun --standalone --nproc_per_node=2 train.py config/qwen2.py --distance=cosine --out_dir=out/qwen2_cosine
out_dir = "out/qwen2"
dataset = "openwebtext"
model = "qwen2"
scale = "0.5B" # 24 layers, 14 heads of queries, 2 of keys and values, width 896, an MLP of 4864

block_size = 1024
tie_weights = True

batch_size = 6
gradient_accumulation_steps = 10 # 60 sequences
learning_rate = 1e-4
min_lr = 1e-6
warmup_iters = 1000
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
