# Do prototypes stay finite (Theorem 1 of "Non-Euclidean Harmonic Losses")? An MLP on the digits, whose classes it
# separates, without weight decay, at a constant learning rate, for 64 times the 20 epochs of study_digits.py. The
# report's table of prototype norms decides by the slope over log t at the end.
#   python study.py config/study_norms.py
#   python report.py out/study_norms
script = "train_vision.py"
base = "config/mlp.py"
settings = "--epochs=1280 --eval_interval=10 --patience=0 --weight_decay=0 --plots=false"
heads = "baseline,euclidean,manhattan,cosine,mahalanobis"
seeds = "1,2,3,4,5,6"
out_dir = "out/study_norms"
