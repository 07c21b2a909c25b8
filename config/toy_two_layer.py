# Oursland's two-layer nets, "Neural Networks Learn Distance Metrics", Tables 1, 3 and 5: full batches, plain SGD.
#   python train_toy.py config/toy_two_layer.py
# The paper's table, minutes on a GPU, with --epochs=50000 for the nets that end in L2:
#   python train_toy.py config/toy_two_layer.py --dataset=mnist --models=all --epochs=5000
study = "two_layer"
out_dir = "out/toy_two_layer"
models = "relu,abs,relu2,relu2_neg,abs2,abs2_neg"
optimizer = "sgd"
learning_rate = 1e-3
weight_decay = 0.0
batch_size = 0
epochs = 1000
eval_interval = 50
