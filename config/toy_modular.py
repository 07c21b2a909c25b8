# Modular addition with twenty seeds: does the head make the circle and the speed, or the scale of its scores?
# Baek et al. train for 7,000 epochs. Every head at every n: --epochs=7000 --heads=all --ns=1,2,4,16
#   python train_toy.py config/toy_modular.py
# The same with half of the pairs, where the linear head does not generalize:
#   python train_toy.py config/toy_modular.py --train_fraction=0.5 --out_dir=out/toy_modular_half
study = "modular"
out_dir = "out/toy_modular"
models = "mlp"
heads = "baseline,matched,stablemax,euclidean,cosine"
ns = "2,16"
learning_rate = 2e-3
weight_decay = 0.01 # of the transformer 0.005
epochs = 600
