# This study trains an MLP with every head on scikit-learn's digits, with three seeds and without a download.
#   python study.py config/study_digits.py
script = "train_vision.py"
base = "config/mlp.py"
settings = "--epochs=20 --plots=false"
out_dir = "out/study_digits"
