# The case study of Figure 9: the linear head with and without weight decay, and the harmonic one without.
#   python train_toy.py config/toy_case.py --heads=baseline,euclidean
#   python train_toy.py config/toy_case.py --heads=baseline --weight_decay=0.5 --out_dir=out/toy_case_decay
study = "modular"
out_dir = "out/toy_case"
heads = "baseline,euclidean"
ns = "2"
learning_rate = 1e-3
weight_decay = 0.0
epochs = 2000
