# Is it the geometry or the exponent? This study trains nine distances with n = 1, the paper's, with n a factor of four
# smaller and larger, and with n learned, for both links.
#   python study.py config/study_n.py
script = "train_vision.py"
base = "config/mlp.py"
settings = "--dataset=mnist --batch_size=256 --epochs=6 --learning_rate=1e-3 --plots=false"
heads = ("baseline,euclidean,manhattan,chebyshev,minkowski:p=3,cosine,hamming,canberra:weighted,bray_curtis:abs,"
         "mahalanobis:diagonal")
links = "harmonic,softmin"
ns = "default,0.25,4,learn"
out_dir = "out/study_n"
