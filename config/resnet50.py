# This trains the paper's ResNet-50 (Tables 4 to 7):
#   torchrun --standalone --nproc_per_node=2 train_vision.py config/resnet50.py --dataset=cifar100 --distance=cosine
model = "resnet50"
out_dir = f"out/{dataset}_{model}"
if dataset not in ("mnist", "cifar10", "cifar100"):
    raise ValueError(f"it has no column for {dataset}: use --dataset=mnist, cifar10 or cifar100")
_column = ["mnist", "cifar10", "cifar100"].index(dataset)
normalize = dataset
augment = ["none", "standard", "strong"][_column]

optimizer = "sgd"
momentum = 0.9
learning_rate = 0.1
weight_decay = 1e-4
batch_size = [512, 512, 256][_column]
epochs = [100, 100, 200][_column]
lr_schedule = ["step", "step", "multistep"][_column]
lr_step = 30
lr_milestones = "60,100,140"
lr_gamma = [0.1, 0.1, 0.2][_column]
patience = [15, 15, 25][_column]
compile = True
