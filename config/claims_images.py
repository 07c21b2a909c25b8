# This is the image settings of the study of claims (config/claims.toml): Adam with a cosine schedule to 0, so that
# validation is flat at the end, for as many steps with every head. The subsets are the first images of the files.
#   python claims.py mnist_cnn
_epochs = {"digits": 20, "mnist": 15, "cifar10": 30}
out_dir = f"out/claims_{dataset}_{model}"
val_fraction = 0.1
augment = "none"
normalize = "cifar10" if dataset == "cifar10" else "half"
optimizer = "adam"
batch_size = 64 if dataset == "digits" else 256
epochs = _epochs.get(dataset, 30)
lr_schedule = "cosine"
patience = 0
plots = False
