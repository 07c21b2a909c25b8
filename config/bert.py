# This trains BERT-base (124.7M parameters with GPT-2 tokens) by masked tokens, at the paper's settings (section C.2):
# 38 x 2 x 512 tokens per step, of which 15% are predicted.
#   python prepare_openwebtext.py
#   torchrun --standalone --nproc_per_node=2 train.py config/bert.py --distance=cosine --out_dir=out/bert_cosine
out_dir = "out/bert"
dataset = "openwebtext"
model = "bert"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 512
dropout = 0.1
tie_weights = True

batch_size = 38
gradient_accumulation_steps = 2 # 76 sequences, 77 masked tokens in each
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
