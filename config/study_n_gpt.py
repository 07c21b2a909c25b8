# This study asks the question of study_n.py for language: it trains three geometries with n = sqrt(n_embd), with n a
# factor of four smaller and larger, and with the default n learned, for both links.
#   python study.py config/study_n_gpt.py
include("study_gpt.py")
settings = "--max_iters=200 --eval_interval=50 --eval_iters=40 --log_interval=5 --compile=false"
heads = "baseline,euclidean,cosine,mahalanobis:diagonal"
links = "harmonic,softmin"
ns = "2.83,11.3,45.3,learn"
out_dir = "out/study_n_gpt"
