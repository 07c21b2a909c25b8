# `make demo` trains this: the CPU preset with the cosine harmonic head, on 0.8M tokens, in three minutes on 2 cores.
#   python train.py config/demo.py
include("cpu.py")
out_dir = "out/demo"
overwrite = True # a demo may be run again
distance = "cosine"
max_iters = 400
eval_interval = 100
log_interval = 20
