# This trains the paper's ViT (Tables 5 to 7) on images of 224 pixels. Its rate and epochs are not in the paper: the
# rate is the published code's, the epochs are PVT's.
#   torchrun --standalone --nproc_per_node=2 train_vision.py config/vit_tiny.py --dataset=cifar100 --distance=cosine
include("pvtv2_b0.py")
model = "vit_tiny"
out_dir = f"out/{dataset}_{model}"
_column = ["mnist", "cifar10", "cifar100"].index(dataset)
image_size = 224
learning_rate = [1e-3, 1e-3, 5e-4][_column]
batch_size = [256, 128, 128][_column]
