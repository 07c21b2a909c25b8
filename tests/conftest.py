"""One thread per process: the tensors are small, and threads that wait for each other make a busy machine crawl."""
import os

import torch

os.environ["OMP_NUM_THREADS"] = "1" # of the scripts that the tests run
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1" # before anything imports triton: its kernels then run on the CPU
torch.set_num_threads(1)
