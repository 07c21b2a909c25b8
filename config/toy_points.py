# What the theorems of "Non-Euclidean Harmonic Losses" (appendix A) say, on three classes of points in the plane.
#   python train_toy.py config/toy_points.py
# Prototypes against means and medians, which differ in skewed classes; n decides between them:
#   python train_toy.py config/toy_points.py --point_set=skewed --heads=euclidean,manhattan --ns=1,2,4
#   python train_toy.py config/toy_points.py --point_set=skewed --heads=euclidean,manhattan --ns=1,4 --link=softmin
study = "points"
out_dir = f"out/toy_{point_set}"
heads = "baseline,euclidean,manhattan,chebyshev"
ns = "2"
optimizer = "adamw"
learning_rate = 1e-2
weight_decay = 0.0
batch_size = 0
epochs = 10000
eval_interval = 50
