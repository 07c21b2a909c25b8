# Variance and greediness: seven metric-learning losses and three heads on scikit-learn's digits, with ten seeds.
#   python study.py config/study_metric_digits.py
# NormFace, and Euclid with another exponent, are points of the grid beside these:
#   python study.py config/study_metric_digits.py --heads=cosine --links=softmin --ns=16
#   python study.py config/study_metric_digits.py --heads=euclidean --ns=4
#   python figures_metric.py out/study_metric_digits
script = "train_metric.py"
base = "config/metric_digits.py"
settings = "--track_emissions=false"
heads = "contrastive,triplet,npair,infonce,arcface,scl,ccl,baseline,euclidean,cosine"
seeds = "1,2,3,4,5,6,7,8,9,10"
out_dir = "out/study_metric_digits"
