# This study trains a small GPT with six heads that are matrix products, on the standard library's sources, with three
# seeds. The linear head's features have the scale that was tuned in a GPT of this size (RESULTS.md, "Which n").
#   python prepare_stdlib.py
#   python study.py config/study_gpt.py
script = "train.py"
base = "config/heads.py"
settings = "--max_iters=250 --eval_interval=25 --eval_iters=40 --log_interval=5 --compile=false"
heads = "baseline+feature_scale=4,euclidean,cosine,mahalanobis:diagonal,offset_l2,chebyshev:cosh"
out_dir = "out/study_gpt"
