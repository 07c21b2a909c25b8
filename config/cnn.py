# This trains the paper's CNN (Tables 4 to 7), at the MLP's settings except for its batch sizes:
#   python train_vision.py config/cnn.py --dataset=cifar10 --distance=cosine
include("mlp.py")
model = "cnn"
out_dir = f"out/{dataset}_{model}"
_column = ["mnist", "cifar10", "cifar100", "digits"].index(dataset)
batch_size = [8192, 4096, 512, 64][_column]
