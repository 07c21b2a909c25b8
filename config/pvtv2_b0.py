# This trains the paper's PVTv2-B0 (Tables 4 to 7):
#   torchrun --standalone --nproc_per_node=2 train_vision.py config/pvtv2_b0.py --dataset=cifar10 --distance=cosine
model = "pvtv2_b0"
out_dir = f"out/{dataset}_{model}"
if dataset not in ("mnist", "cifar10", "cifar100"):
    raise ValueError(f"it has no column for {dataset}: use --dataset=mnist, cifar10 or cifar100")
_column = ["mnist", "cifar10", "cifar100"].index(dataset)
normalize = ["half", "cifar10", "cifar100"][_column]
image_size = 32
channels = 3

optimizer = "adamw"
learning_rate = [1e-4, 1e-4, 5e-5][_column]
weight_decay = 0.05
batch_size = 256
epochs = [80, 80, 150][_column]
lr_schedule = ["none", "none", "cosine"][_column]
min_lr = 1e-6
patience = [15, 15, 25][_column]
compile = True
