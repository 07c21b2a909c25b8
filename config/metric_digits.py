# Embeddings of scikit-learn's digits: an MLP, five of the ten classes held out, batches of 16 images of each of the
# others. A run takes seconds. The rate is ten times that of Variance & Greediness, as there are 240 steps.
#   python train_metric.py config/metric_digits.py --loss=triplet
out_dir = "out/metric_digits"
dataset = "digits"
held_out = 5
batch_size = 80
learning_rate = 1e-3
epochs = 30
