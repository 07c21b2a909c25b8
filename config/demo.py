# `make demo`: the CPU preset with the cosine harmonic head, as many steps as fit into three minutes on 2 cores
#   python train.py config/demo.py
include('cpu.py') # noqa: F821
out_dir = 'out/demo'
overwrite = True # a demo may be run again
distance = 'cosine'
max_iters = 800
eval_interval = 100
log_interval = 20
