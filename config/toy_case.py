# The case study of Figure 9: the linear head with and without weight decay, and the harmonic one without.
#   python train_toy.py config/toy_case.py
#   python train_toy.py config/toy_case.py --heads=baseline --weight_decay=0.5
#   python figures_toy.py out/toy_case
study = "modular"
heads = "baseline,euclidean"
ns = "2"
learning_rate = 1e-3
weight_decay = 0.0
out_dir = f"out/toy_case/decay{weight_decay:g}"
epochs = 2000
