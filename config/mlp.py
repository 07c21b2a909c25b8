# This trains the paper's MLP (Tables 4 to 7); the column of the digits is not the paper's but ours.
#   python train_vision.py config/mlp.py --dataset=mnist --distance=cosine
model = "mlp"
out_dir = f"out/{dataset}_{model}"
_column = ["mnist", "cifar10", "cifar100", "digits"].index(dataset)
normalize = ["half", "cifar10", "cifar100", "half"][_column]

optimizer = "adam"
learning_rate = 3e-4
batch_size = [2048, 1024, 1024, 64][_column]
epochs = [40, 40, 150, 40][_column]
lr_schedule = ["none", "none", "step", "none"][_column]
lr_step = 50
lr_gamma = 0.5
patience = [15, 15, 25, 15][_column]
