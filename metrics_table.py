"""
The report's numbers in words: METRICS has for each its title, its direction and its definition, TABLES says
where it is shown. metrics.py computes them.
"""
from collections import namedtuple

# spec: the format of a value times `scale`, which brings it to the unit of the title; lower: whether lower is better
Metric = namedtuple("Metric", "title spec scale lower definition")
METRICS = {
    "test_accuracy": Metric(
        "test accuracy (%)", ".2f", 100, False,
        "The share of the test set that is classified correctly, with the weights of the epoch of the best validation "
        "accuracy; of embeddings, with the last weights: the share whose nearest other image is of their class."),
    "f1_macro": Metric(
        "macro F1", ".4f", 1, False,
        "The mean over classes of 2 TP / (2 TP + FP + FN) on the test set, with the same weights. Standard; that the "
        "paper's F1 is the macro average is our reading."),
    "test_loss": Metric(
        "test loss (nats)", ".4f", 1, True,
        "The mean -log p_y on the test set, the exact loss, with the same weights; of language models on the test part "
        "of the validation split, with the last weights."),
    "val_accuracy": Metric(
        "validation accuracy (%)", ".2f", 100, False,
        "The share of the validation split that is classified correctly, at the best epoch."),
    "val_loss": Metric(
        "validation loss (nats)", ".4f", 1, True,
        "The mean -log p_y at the end over a fixed part of the validation split, the exact loss; for BERT over masked "
        "tokens."),
    "best_share": Metric(
        "best evaluation at", ".2f", 1, True,
        "The epoch of the best validation accuracy, or the step of the least validation loss, over their number: a run "
        "with 1 was at its best when it ended, and might have gone on to learn. The definition is ours."),
    "train_loss": Metric(
        "training loss (nats)", ".4f", 1, True,
        "The mean -log p_y of the first training samples, as many as are used for validation at the most, at the end "
        "and in evaluation mode, as the validation loss is taken; of images with the best epoch's weights."),
    "perplexity": Metric(
        "perplexity", ".4g", 1, True,
        "exp(validation loss)."),
    "gradient_stability": Metric(
        "gradient stability", ".3f", 1, False,
        "1 / (1 + std/mean) of the gradient norms before clipping (ddof 0), over the log lines after warm-up (vision: "
        "after the first epoch), in (0, 1]; 1 is constant. The paper names it, the definition is ours."),
    "grad_norm": Metric(
        "gradient norm", ".3g", 1, True,
        "The median over the same log lines of the gradient's norm before clipping. It has no better side: that lower "
        "is better is a convention here."),
    "clipping_quality": Metric(
        "clipping quality", ".3f", 1, False,
        "The mean over the same log lines of min(1, grad_clip / norm), the factor that clipping leaves of a gradient, "
        "in (0, 1]; 1 when nothing was clipped. The paper names it, the definition is ours."),
    "learning_quality": Metric(
        "learning quality", ".3f", 1, False,
        "The mean of (L_0 - L_best) / L_0, the share of its first loss that the run took off, and 1 - L_best / log V, "
        "how far it came from guessing among the V tokens; L are validation losses, and each of the two is clipped to "
        "[0, 1]. The paper names it, the definition is ours."),
    "model_health": Metric(
        "model health", "+.4f", 1, False,
        "-(collapse score - the baseline's of the same seed): positive collapses less. The paper names it, the "
        "definition is ours."),
    "pc2_ev": Metric(
        "PC2 EV", ".3f", 1, False,
        "The share of the variance in the top 2 principal components, (s_1^2 + s_2^2) / sum s_i^2, with s the singular "
        "values of the centred penultimate features, not standardised, Euclidean for every head; in [0, 1]. The paper "
        "names it, the definition is PCA's and the choice ours."),
    "pca90": Metric(
        "PCA@90% (to 50)", ".1f", 1, True,
        "The least number of principal components of the standardised features that together hold 90% of the variance, "
        "where no more than 50 are counted, as in the paper's tables. The paper names it, the definition is ours."),
    "pca90_uncapped": Metric(
        "PCA@90%", ".1f", 1, True,
        "As above, where all are counted."),
    "mean_accuracy": Metric(
        "nearest class mean (%)", ".2f", 100, False,
        "The share of the samples that are nearer to the mean of the other samples of their own class than to the mean "
        "of any other class, in the head's own distance (of the linear head, that has none, Euclid's); cosine's means "
        "are those of the unit vectors. Of test images with the best epoch's weights; of language models, of the "
        "validation samples of the last evaluation, in classes of two and more. The nearest class mean is standard, "
        "that it is taken in the head's own distance is ours."),
    "own_variance_ratio": Metric(
        "variance ratio, own geometry", ".3f", 1, True,
        "The variance ratio, below, of the features as the head's distance compares them: of unit length for cosine, "
        "whitened for Mahalanobis, as soft bits for Hamming, as shares for normalized Bray-Curtis, else as they are; "
        "of the same samples as the nearest class mean. The definition is ours."),
    "prototype_offset": Metric(
        "prototype off its class", ".3f", 1, True,
        "The mean over classes of the distance of the prototype to the mean of its class, over the mean distance of "
        "the class's samples to that mean (of the others), in the head's own distance; 0 is a prototype in the middle, "
        "1 one as far off as a sample. The linear head has none: its weights are directions. The definition is ours."),
    "prototype_alignment": Metric(
        "prototype alignment", ".3f", 1, False,
        "The share of the classes whose mean feature has its highest score, which is its least distance, at the "
        "class's own prototype; a tie is a miss. It is 1 for most heads that have learned, the linear one among them. "
        "The paper names it, the definition is ours."),
    "pca5": Metric(
        "PCA5", ".3f", 1, False,
        "The share of the variance in the top 5 principal components, sum_{i<=5} s_i^2 / sum s_i^2, with s the "
        "singular values of the centred final hidden states, not standardised; in [0, 1]. The paper names it, the "
        "definition is PCA's and the choice ours."),
    "effective_rank": Metric(
        "effective rank", ".1f", 1, False,
        "exp(H(p)) with p_i = s_i / sum s and H the entropy in nats, s the singular values of the centred hidden "
        "states: between 1 and their rank, and 0 where all are equal. The definition is Roy and Vetterli's (2007); "
        "that the paper means this one is our reading."),
    "collapse_score": Metric(
        "collapse score", ".3f", 1, True,
        "1 - effective rank / min(N, D) of N hidden states of D dimensions, in [0, 1]; 1 is complete collapse. The "
        "paper names it, the definition is ours."),
    "variance_ratio": Metric(
        "variance ratio", ".3f", 1, True,
        "The mean |h_i - mu_y|^2 within classes over the mean |mu_y - mu|^2 between them, Euclidean for every head, in "
        "classes of two samples and more: of test images with the best epoch's weights where a run has a "
        "predictions.npz, else of validation samples at the last evaluation. It stands for the variance of Variance & "
        "Greediness (arXiv 2601.21450), whose exact formulas are not available to us: the definition is ours."),
    "active_ratio": Metric(
        "active ratio", ".3f", 1, True,
        "The share of the samples, those of the variance ratio, whose gradient |d(-log p_y)/dh|, with h the features, "
        "exceeds half of the largest one; of contrastive and triplet losses the share of pairs or triplets whose loss "
        "is not 0. It stands for the greediness of Variance & Greediness (arXiv 2601.21450), whose exact formulas are "
        "not available to us: the definition is ours. That lower is better is a convention here."),
    "map_at_r": Metric(
        "MAP@R", ".3f", 1, False,
        "Mean average precision at R of retrieving each test image among the others, R as many as have its class."),
    "zero_shot_recall_at_1": Metric(
        "recall@1, classes held out (%)", ".2f", 100, False,
        "As the test accuracy of embeddings, of the test images of classes that were not trained on."),
    "probe_accuracy": Metric(
        "linear probe (%)", ".2f", 100, False,
        "The test accuracy of logistic regression on the embeddings of the classes held out."),
    "cpu_seconds": Metric(
        "CPU time (s)", ".4g", 1, True,
        "The CPU seconds of training on all threads of the process (of the first rank), evaluations not included, what "
        "is compiled on the way included. Another program takes none of them, as it does of seconds and kWh."),
    "energy_kwh": Metric(
        "energy (kWh)", ".3g", 1, True,
        "CPU, GPU and RAM of the machine from step 0 to the last evaluation, evaluations included (emissions.py)."),
    "emissions_g": Metric(
        "emissions (g CO2eq)", ".3g", 1, True,
        "kWh times the g CO2eq per kWh of the grid, one factor for a run."),
    "emissions_per_1000_steps": Metric(
        "g CO2eq per 1,000 steps", ".3g", 1, True,
        "The emissions over the steps in thousands, evaluations included."),
    "seconds_per_epoch": Metric(
        "s per epoch", ".3g", 1, True,
        "The median over epochs, evaluations not included."),
    "seconds_per_step": Metric(
        "s per step", ".3g", 1, True,
        "The median over log lines, evaluations not included."),
    "seconds_to_90": Metric(
        "time to 90% (s)", ".3g", 1, True,
        "Seconds to the first evaluation at which 90% of all progress was made: v <= v_0 - 0.9 (v_0 - v_best), with v "
        "the validation loss, or 1 - validation accuracy for vision. Each head has a 90% of its own. The paper names a "
        "time to 90%, the definition is ours."),
    "speed": Metric(
        "speed (s)", "+.3g", 1, False,
        "-(time to 90% - the baseline's of the same seed): positive is faster. The paper names it, the definition is "
        "ours."),
    "steps_to_90": Metric(
        "steps to 90%", ".4g", 1, True,
        "The step of the same evaluation. No other work on the machine changes it."),
    "speed_steps": Metric(
        "speed (steps)", "+.4g", 1, False,
        "-(steps to 90% - the baseline's of the same seed): positive is faster. The definition is ours."),
    "wh_to_90": Metric(
        "energy to 90% (Wh)", ".3g", 1, True,
        "The energy to the same evaluation as the time to 90%. The definition is ours."),
    "wh_to_target": Metric(
        "energy to target (Wh)", ".3g", 1, True,
        "The energy to the first evaluation as good as the target, which is the same for all heads: where the "
        "baseline's mean over seeds has made 90% of its progress. Runs that never get there have none. The definition "
        "is ours."),
    "steps_to_target": Metric(
        "steps to the tuned baseline", ".4g", 1, True,
        "Of a study of claims: the steps to the first evaluation as good as the linear head's runs at full length in "
        "tuning, their median. A run that never gets there has all of its own, which is too few. The definition is "
        "ours."),
    "cpu_to_target": Metric(
        "CPU time to the tuned baseline (s)", ".4g", 1, True,
        "The CPU time of the same steps."),
    "quality_per_wh": Metric(
        "quality per Wh", ".3g", 1, False,
        "Vision: points of test accuracy above chance (100/K) per Wh. Language: (log V - validation loss) per Wh. The "
        "definition is ours."),
}
# the tables of a family of runs
_TO_TARGET = ("seconds_to_90", "steps_to_90", "speed", "speed_steps", "wh_to_90", "wh_to_target", "quality_per_wh")
TABLES = {
    "vision": {
        "quality": ("test_accuracy", "f1_macro", "test_loss", "train_loss", "best_share", "grad_norm",
                    "gradient_stability"),
        "interpretability": ("test_accuracy", "mean_accuracy", "own_variance_ratio", "prototype_offset", "pc2_ev",
                             "pca90", "pca90_uncapped", "variance_ratio", "active_ratio"),
        "retrieval": ("map_at_r", "zero_shot_recall_at_1", "probe_accuracy"),
        "sustainability": ("energy_kwh", "cpu_seconds", "emissions_g", "emissions_per_1000_steps", "seconds_per_epoch",
                           *_TO_TARGET),
    },
    "language": {
        "quality": ("val_loss", "test_loss", "train_loss", "best_share", "perplexity", "grad_norm",
                    "gradient_stability", "clipping_quality", "learning_quality", "model_health"),
        "interpretability": ("val_loss", "mean_accuracy", "own_variance_ratio", "prototype_offset", "pca5",
                             "effective_rank", "collapse_score", "variance_ratio", "active_ratio"),
        "sustainability": ("energy_kwh", "cpu_seconds", "emissions_g", "emissions_per_1000_steps", "seconds_per_step",
                           *_TO_TARGET),
    },
}
PAIRED_TEST = (
    "The test is the paired t test, two-sided, of the differences over seeds: t = mean / (std / sqrt n) with n - 1 "
    "degrees of freedom, d_z = mean / std (Cohen), and the 95% interval of the mean difference. There is none for a "
    "single pair, nor where all differences are equal. The p values of a table are corrected for their number by "
    "Benjamini and Hochberg 1995 (false discovery rate). The definitions are standard, to apply them here is our "
    "choice.")
