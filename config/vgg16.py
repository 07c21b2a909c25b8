# This trains the paper's VGG16 (Tables 5 to 7). Its rate and epochs are not in the paper: the rate is the published
# code's, the epochs are ResNet-50's.
#   python train_vision.py config/vgg16.py --dataset=cifar10 --distance=cosine
include("resnet50.py")
model = "vgg16"
out_dir = f"out/{dataset}_{model}"
_column = ["mnist", "cifar10", "cifar100"].index(dataset)
image_size = 32
learning_rate = 1e-3
batch_size = [4096, 2048, 512][_column]
lr_milestones = "75,125"
lr_gamma = 0.1
