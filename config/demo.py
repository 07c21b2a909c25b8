# `make demo`: the CPU preset with the cosine harmonic head, 0.8M tokens, three minutes on 2 cores
#   python train.py config/demo.py
include("cpu.py")
out_dir = "out/demo"
overwrite = True # a demo may be run again
distance = "cosine"
max_iters = 400
eval_interval = 100
log_interval = 20
