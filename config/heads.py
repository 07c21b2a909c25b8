# This trains one head on 77,000 tokens, the same for every head: a table in RESULTS.md has each with three seeds.
#   python train.py config/heads.py --distance=chebyshev --variant=smooth --seed=1 \
#       --out_dir=out/heads/chebyshev_smooth_1
include("cpu.py")
out_dir = "out/heads/baseline"
batch_size = 4
block_size = 64 # 256 tokens per step
max_iters = 300
warmup_iters = 20
eval_interval = 100
eval_iters = 160 # 40,960 tokens
log_interval = 20
compile = True # pays for the tiles of the elementwise distances
