# This trains GPT-2 124M with the cosine harmonic head, the paper's choice for language models:
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_cosine.py
include("gpt2.py")
out_dir = "out/gpt2_cosine"
distance = "cosine"
