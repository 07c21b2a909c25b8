# Modular addition, twenty seeds: does the head make the circle and the speed, or the scale of its scores?
# Baek et al. train 7,000 epochs with every head at n = 1, 2, 4 and 16: --epochs=7000 --heads=all --ns=1,2,4,16
#   python train_toy.py config/toy_modular.py
study = "modular"
out_dir = "out/toy_modular"
models = "mlp"
heads = "baseline,matched,stablemax,euclidean,cosine,manhattan"
ns = "2"
learning_rate = 2e-3
weight_decay = 0.01 # of the transformer 0.005
epochs = 2000
