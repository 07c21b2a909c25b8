"""
Nets that map images to embeddings, the losses that train them, and how well they retrieve: what train_metric.py trains.
Read model_vision.py first. The losses but CCL are those of pytorch-metric-learning, with its conventions and defaults:

    contrastive  Hadsell et al. 2006: [d_pos - pos_margin]+ and [neg_margin - d_neg]+ over all pairs
    triplet      Weinberger and Saul 2009: [d_ap - d_an + triplet_margin]+ over all triplets
    npair        Sohn 2016: one pair of each class, cross-entropy of its dot products with the other classes' positives
    infonce      van den Oord et al. 2018: for each positive pair, cross-entropy against the anchor's negatives
    arcface      Deng et al. 2019: cross-entropy of scaled cosines to class vectors, the own angle enlarged by a margin
    scl          Khosla et al. 2020: supervised contrastive
    ccl          Cai et al. 2023: center contrastive, see CenterContrastive
    head         an output layer of distances.py and cross-entropy on it: linear, NormFace, harmonic

    net = EmbeddingNet(MetricConfig("cnn", (1, 28, 28), num_classes=10, loss="triplet"))
    e = net.features(x)     # (B, embedding_size), of unit norm
    loss = net(x, y)        # one number
"""
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import safe
from distances import DistanceHead, head_arguments, pairwise, parse_head
from metrics import sums_by_class
from model_vision import BACKBONES, VisionConfig, VisionNet

try:
    from pytorch_metric_learning import losses
    from pytorch_metric_learning.distances import BaseDistance, LpDistance
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN
except ImportError as e:
    raise ImportError(f"metric learning needs its library: pip install pytorch-metric-learning ({e})") from None

LOSSES = ("contrastive", "triplet", "npair", "infonce", "arcface", "scl", "ccl")
HINGES = ("contrastive", "triplet")


class HeadDistance(BaseDistance):
    """A distance of distances.py as pytorch-metric-learning's `distance`; a learned one keeps its initial tensors."""

    def __init__(self, distance, variant=None, eps=1e-4, normalize_embeddings=True, **params):
        super().__init__(normalize_embeddings=normalize_embeddings, is_inverted=False)
        self.arguments = dict(distance=distance, variant=variant, eps=eps, **params)
        pairwise(torch.ones(1, 2), torch.ones(1, 2), **self.arguments) # raises ValueError for what is no distance

    def compute_mat(self, query_emb, ref_emb):
        return pairwise(query_emb, ref_emb, **self.arguments)

    def pairwise_distance(self, query_emb, ref_emb):
        return self.compute_mat(query_emb, ref_emb).diagonal()


class InfoNCE(losses.NTXentLoss):
    """
    The library's loss -log(e^(s_p / T) / (e^(s_p / T) + sum_n e^(s_n / T))) of every positive pair, from one row of
    negatives an anchor. The library's own way holds (positive pairs x negative pairs) numbers: 24 GB at a batch of 512
    images of 10 classes.
    """

    def _compute_loss(self, pos_pairs, neg_pairs, indices_tuple):
        anchors, positives, others, negatives = indices_tuple
        if len(anchors) == 0 or len(others) == 0:
            return self.zero_losses()
        sign = 1 if self.distance.is_inverted else -1
        size = 1 + max(anchors.max(), others.max(), negatives.max())
        z = pos_pairs.new_full((size, size), -torch.inf).index_put((others, negatives), sign * neg_pairs)
        against = (z / self.temperature).logsumexp(1) # (B,)
        found = F.softplus(against[anchors] - sign * pos_pairs / self.temperature)
        return {"loss": {"losses": found, "indices": (anchors, positives), "reduction_type": "pos_pair"}}


class CenterContrastive(nn.Module):
    """
    Center Contrastive Loss (Cai, Xiong and Tian 2023, arXiv 2308.00458), the mean over the batch of

        -log( e^(s (c_y.x - m)) / (e^(s (c_y.x - m)) + sum_{j != y} e^(s c_j.x)) )  +  weight |x - c_y|^2

    with x and the bank of centres c_k (num_classes, D) scaled to unit norm, and the bank learned with the net. The
    paper itself was not at hand. This is its Equation 5 as others quote it, where the second term is a factor
    e^(2 weight c_y.x) of the numerator: the same but for a constant. The values of s, m and weight are second-hand too.
    """

    def __init__(self, num_classes, embedding_size, scale=64.0, margin=0.2, weight=1.0):
        super().__init__()
        self.scale, self.margin, self.weight = scale, margin, weight
        self.centers = nn.Parameter(torch.empty(num_classes, embedding_size))
        nn.init.kaiming_uniform_(self.centers, a=5 ** 0.5) # as a head's prototypes begin

    def forward(self, embeddings, labels):
        x, centers = F.normalize(embeddings), F.normalize(self.centers)
        own = F.one_hot(labels, len(centers))
        z = self.scale * (x @ centers.T - self.margin * own) # (B, K)
        return F.cross_entropy(z, labels) + self.weight * (x - centers[labels]).square().sum(1).mean()


class LibraryLoss(nn.Module):
    """A loss with the library's conventions, criterion(embeddings, labels), in the place of a head."""
    n = 0.0 # it has no exponent

    def __init__(self, name, criterion, settings):
        super().__init__()
        self.name, self.criterion, self.settings = name, criterion, settings

    def loss(self, e, y):
        return self.criterion(e, y)

    def extra_repr(self):
        return ", ".join([self.name, *(f"{key} {value}" for key, value in self.settings.items())])


@dataclass
class MetricConfig:
    model: str # one of BACKBONES
    image_shape: tuple # (C, H, W)
    num_classes: int # those that it is trained on
    embedding_size: int = 128
    frozen: str = "" # the folder of a run of train_vision.py, or a ViT of transformers: its features, as they are
    loss: str = "contrastive"
    pos_margin: float = 0.0
    neg_margin: float = 1.0
    triplet_margin: float = 0.05
    infonce_temperature: float = 0.07
    arcface_margin: float = 28.6 # degrees
    arcface_scale: float = 64.0
    scl_temperature: float = 0.1
    ccl_margin: float = 0.2
    ccl_scale: float = 64.0
    ccl_weight: float = 1.0
    # the head of loss="head"; with the others distance is that of pairs, "baseline": the library's own
    distance: str = "baseline"
    variant: str = ""
    distance_params: str = ""
    link: str = "harmonic"
    n: float = 1.0
    learn_n: bool = False
    eps: float = 1e-4
    learn_eps: bool = False
    head_bias: bool = False
    learn_scale: bool = False
    softcap: float = 0.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    feature_scale: float = 1.0


def make_loss(c):
    """The DistanceHead or LibraryLoss of a MetricConfig. Raises ValueError for a loss or distance that there is not."""
    if c.loss == "head":
        return DistanceHead(c.embedding_size, c.num_classes, **head_arguments(vars(c)))
    arguments, own = parse_head(c.distance, c.variant, c.distance_params), {}
    if c.distance != "baseline":
        if c.loss in ("arcface", "ccl"):
            raise ValueError(f"{c.loss} is made of cosines and takes no other distance, got {c.distance}")
        own["distance"] = HeadDistance(**arguments, eps=c.eps)
    shape = dict(num_classes=c.num_classes, embedding_size=c.embedding_size)
    # the loss, its arguments by the names of their settings, and the others
    table = {
        "contrastive": (losses.ContrastiveLoss, dict(pos_margin="pos_margin", neg_margin="neg_margin"), own),
        "triplet": (losses.TripletMarginLoss, dict(margin="triplet_margin"), own),
        "npair": (losses.NPairsLoss, {}, own),
        "infonce": (InfoNCE, dict(temperature="infonce_temperature"), own),
        "arcface": (losses.ArcFaceLoss, dict(margin="arcface_margin", scale="arcface_scale"), shape),
        "scl": (losses.SupConLoss, dict(temperature="scl_temperature"), own),
        "ccl": (CenterContrastive, dict(margin="ccl_margin", scale="ccl_scale", weight="ccl_weight"), shape),
    }
    if c.loss not in table:
        raise ValueError(f"loss is {c.loss!r}: use {', '.join(LOSSES)} or head")
    make, names, others = table[c.loss]
    settings = {name: getattr(c, setting) for name, setting in names.items()}
    distance = dict(distance=c.distance) if own else {}
    return LibraryLoss(c.loss, make(**settings, **others), {**settings, **distance})


class Frozen(nn.Module):
    """A trained net whose weights stay, always in evaluation mode."""

    def __init__(self, net, num_features):
        super().__init__()
        self.net, self.num_features = net.requires_grad_(False).eval(), num_features

    def train(self, mode=True):
        return self

    @torch.no_grad()
    def forward(self, x):
        found = self.net(x)
        return found if isinstance(found, torch.Tensor) else found.last_hidden_state[:, 0] # the class token


def frozen_backbone(name, image_shape):
    """
    The backbone of a run of train_vision.py, or a ViT of transformers. Raises ValueError where there is none of that
    name, or one of other images.
    """
    path = os.path.join(name, "best.pt")
    if os.path.exists(path):
        best = safe.load(path)
        if tuple(best["model_args"]["image_shape"]) != tuple(image_shape):
            raise ValueError(f"frozen={name} takes images of shape {best['model_args']['image_shape']}, "
                             f"these are {image_shape}")
        net = VisionNet(VisionConfig(**best["model_args"]))
        net.load_state_dict(best["model"])
        return Frozen(net.backbone, net.backbone.num_features)
    try:
        from transformers import ViTModel
        net = ViTModel.from_pretrained(name, add_pooling_layer=False)
    except Exception as e: # the package, the name, the network
        first_line, *_ = str(e).splitlines() or [""]
        raise ValueError(f"frozen is {name!r}: no folder of a run with a best.pt, and no ViT that transformers can "
                         f"load ({type(e).__name__}: {first_line:.100})") from None
    expected = (net.config.num_channels, net.config.image_size, net.config.image_size)
    if tuple(image_shape) != expected:
        raise ValueError(f"frozen={name} takes images of shape {expected}, these are {tuple(image_shape)}: use "
                         f"--image_size={expected[1]} --channels={expected[0]}")
    return Frozen(net, net.config.hidden_size)


class EmbeddingNet(nn.Module):
    """A backbone, a linear layer to embedding_size dimensions, unit norm, and the loss with what it learns itself."""

    def __init__(self, config):
        super().__init__()
        if config.model not in BACKBONES:
            raise ValueError(f"model must be one of {', '.join(BACKBONES)}, got {config.model!r}")
        self.config = config
        if config.frozen:
            self.backbone = frozen_backbone(config.frozen, config.image_shape)
        else:
            self.backbone = BACKBONES[config.model](config.image_shape)
        self.embed = nn.Linear(self.backbone.num_features, config.embedding_size)
        self.head = make_loss(config) # last, so that every loss meets the same net for the same seed

    def features(self, x):
        """Map images x (B, C, H, W) to embeddings (B, embedding_size) of unit norm, in float32."""
        return F.normalize(self.embed(self.backbone(x)).float())

    def loss(self, e, y):
        """The loss of embeddings e (B, D) with labels y (B,), in float32."""
        with torch.autocast(e.device.type, enabled=False):
            scale = self.config.feature_scale if self.config.loss == "head" else 1.0
            return self.head.loss(scale * e, y)

    def forward(self, x, y):
        return self.loss(self.features(x), y)


# -----------------------------------------------------------------------------
# spacing, greediness and retrieval

def class_spacing(h, y):
    """
    How the classes of features h (N, D) with classes y (N,), arrays, lie to each other: dict of
      mean      the mean distance |mu_a - mu_b| over all pairs of classes, with mu_c the mean of class c
      cv        their standard deviation (ddof 0) over that mean: 0 where they are even, as in a regular simplex
    Both are nan with one class, and cv where all means coincide. It stands for the "uneven spacing" of Variance &
    Greediness (arXiv 2601.21450), whose formulas are not available to us: the definition is ours.
    """
    _, _, counts, sums = sums_by_class(h, y)
    if len(counts) < 2:
        return dict(mean=math.nan, cv=math.nan)
    means = sums / counts[:, None]
    a, b = np.triu_indices(len(means), 1)
    d = np.linalg.norm(means[a] - means[b], axis=1)
    return dict(mean=float(d.mean()), cv=float(d.std() / d.mean()) if d.mean() > 0 else math.nan)


def gradient_norms(net, e, y):
    """|dL/de_i| times the number of samples, for each embedding e (N, D) with labels y (N,): (N,)."""
    training = net.head.training
    net.head.eval()
    with torch.enable_grad():
        e = e.detach().requires_grad_()
        gradient, = torch.autograd.grad(net.loss(e, y), e)
    net.head.train(training)
    return len(e) * gradient.norm(dim=1)


def active_terms(net, e, y):
    """The share of the pairs or triplets of embeddings e (N, D) whose hinge is not zero, for a loss in HINGES."""
    with torch.no_grad():
        parts = net.head.criterion.compute_loss(e, y, None, e, y)
    terms = [part["losses"] for part in parts.values() if torch.is_tensor(part["losses"])]
    return (torch.cat(terms) > 0).double().mean().item() if terms else 0.0


class Retrieval(AccuracyCalculator):
    """The library's calculator, with recall at 2 and 4 as well: whether one of the nearest k has the label."""

    def calculate_recall_at_2(self, knn_labels, query_labels, not_lone_query_mask, **kwargs):
        return recall(knn_labels, query_labels, not_lone_query_mask, 2)

    def calculate_recall_at_4(self, knn_labels, query_labels, not_lone_query_mask, **kwargs):
        return recall(knn_labels, query_labels, not_lone_query_mask, 4)

    def requires_knn(self):
        return [*super().requires_knn(), "recall_at_2", "recall_at_4"]


def recall(knn_labels, query_labels, counts, k):
    """The share of the queries that count, those that are not alone in their class, with their label among k."""
    hits = (knn_labels[:, :k] == query_labels[:, None]).any(1)
    return hits[counts].double().mean().item()


def retrieval(e, y):
    """
    Numbers by name of retrieving each of the embeddings e (N, D) with labels y (N,) among the others, by Euclid's
    distance of unit vectors, which ranks as cosine does: recall_at_1, 2, 4 and map_at_r, Musgrave et al. 2020. One that
    is alone in its class is no query; where all are, the numbers are nan.
    """
    names = {"precision_at_1": "recall_at_1", "recall_at_2": "recall_at_2", "recall_at_4": "recall_at_4",
             "mean_average_precision_at_r": "map_at_r"}
    enough = int(y.bincount().max()) > 4 # for recall at 4, the query being one of the largest class
    calculator = Retrieval(include=tuple(names), k="max_bin_count" if enough else None, device=torch.device("cpu"),
                           knn_func=CustomKNN(LpDistance(), batch_size=256),
                           kmeans_func=lambda *args: None) # the default needs faiss
    found = calculator.get_accuracy(e, y)
    return {names[name]: value for name, value in found.items()}
