"""
Image classifiers with any distance head as their output layer. Read distances.py first: this file needs no others.

The backbones are those of "Non-Euclidean Harmonic Losses" (C.1, Tables 5 and 6), here from small to large. Each of them
maps images (B, C, H, W) to features (B, num_features):

    pixels       nothing: the head lies on the pixels
    mlp          flatten, 512, 256
    cnn          two convolutions with max-pooling, 128
    resnet50     He et al. 2015, with a small stem for images below 64 pixels, after
                 https://github.com/pytorch/vision/blob/main/torchvision/models/resnet.py
    vgg16        Simonyan and Zisserman 2014, with a small classifier for images below 64 pixels, after
                 https://github.com/pytorch/vision/blob/main/torchvision/models/vgg.py
    vit_tiny     Dosovitskiy et al. 2020, after vit_tiny_patch16_224 of
                 https://github.com/huggingface/pytorch-image-models (timm)
    pvtv2_b0     Wang et al. 2021, after
                 https://github.com/whai362/PVT/blob/v2/classification/pvt_v2.py

The modules have the names of torchvision and timm, so that their weights can be loaded; only PVTv2's patch_embed and
downsample have other names there.

    net = VisionNet(VisionConfig("cnn", (1, 28, 28), num_classes=10, distance="cosine"))
    h = net.features(x)                     # (B, D), what the head sees
    z, _ = net(x)                           # (B, K), softmax(z) is p
    _, loss = net(x, targets)               # head.loss(h, targets)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from distances import DistanceHead, head_arguments


def at_least(pixels, name, image_shape):
    """Raise ValueError for images that the network called name would shrink to nothing."""
    C, H, W = image_shape
    if min(H, W) < pixels:
        raise ValueError(f"{name} takes images of at least {pixels}x{pixels} pixels, got {C}x{H}x{W}: "
                         "use image_size=32")


def small_or_imagenet(option, value, image_shape):
    """
    Return value, "small" or "imagenet"; None stands for what suits the images. Raises ValueError for another
    value.
    """
    if value not in (None, "small", "imagenet"):
        raise ValueError(f"{option} must be small or imagenet, got {value!r}")
    default = "small" if min(image_shape[1:]) < 64 else "imagenet"
    return value or default


def init_conv(module):
    """
    Initialise a convolution with kaiming_normal_'s mode fan_out. In a depth-wise convolution the fan_out of one group
    counts, which kaiming_normal_ does not see.
    """
    if isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# -----------------------------------------------------------------------------
# pixels, MLP, CNN

class Pixels(nn.Module):
    """No backbone at all: the features are the pixels."""

    def __init__(self, image_shape):
        super().__init__()
        self.num_features = math.prod(image_shape)

    def forward(self, x):
        return x.flatten(1)


class MLP(nn.Module):
    num_features = 256

    def __init__(self, image_shape):
        super().__init__()
        self.fc1 = nn.Linear(math.prod(image_shape), 512)
        self.fc2 = nn.Linear(512, 256)

    def forward(self, x):
        x = F.relu(self.fc1(x.flatten(1)))
        return F.relu(self.fc2(x))


class CNN(nn.Module):
    num_features = 128

    def __init__(self, image_shape):
        super().__init__()
        at_least(4, "CNN", image_shape)
        C, H, W = image_shape
        self.conv1 = nn.Conv2d(C, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc = nn.Linear(64 * (H // 4) * (W // 4), 128)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2) # (B, 32, H/2, W/2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2) # (B, 64, H/4, W/4)
        return F.relu(self.fc(x.flatten(1)))


# -----------------------------------------------------------------------------
# ResNet-50

class Bottleneck(nn.Module):
    """
    Convolutions of 1x1 to width, 3x3, and 1x1 to 4 width, with a shortcut. The 3x3 has the stride, as in torchvision
    and "v1.5"; in the paper the first 1x1 has it.
    """

    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = nn.Identity()
        if stride != 1 or channels != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False),
                nn.BatchNorm2d(4 * width),
            )

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x))


def bottlenecks(channels, width, depth, stride):
    """Make one stage of depth blocks; the first of them changes the number of channels and has the stride."""
    first = Bottleneck(channels, width, stride)
    others = [Bottleneck(4 * width, width, 1) for _ in range(depth - 1)]
    return nn.Sequential(first, *others)


class ResNet50(nn.Module):
    """
    ResNet-50. With stem "small" the first layer keeps the image's size, with "imagenet" it divides it by 4; None
    chooses small for images below 64 pixels.
    """
    num_features = 2048

    def __init__(self, image_shape, stem=None):
        super().__init__()
        C = image_shape[0]
        if small_or_imagenet("stem", stem, image_shape) == "small":
            self.conv1 = nn.Conv2d(C, 64, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(C, 64, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = bottlenecks(64, 64, depth=3, stride=1)
        self.layer2 = bottlenecks(256, 128, depth=4, stride=2)
        self.layer3 = bottlenecks(512, 256, depth=6, stride=2)
        self.layer4 = bottlenecks(1024, 512, depth=3, stride=2)
        self.apply(init_conv)

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)))) # (B, 64, H, W), or a quarter of H and W
        x = self.layer1(x) # (B, 256, H, W)
        x = self.layer2(x) # (B, 512, H/2, W/2)
        x = self.layer3(x) # (B, 1024, H/4, W/4)
        x = self.layer4(x) # (B, 2048, H/8, W/8)
        return x.mean((2, 3))


# -----------------------------------------------------------------------------
# VGG-16

class VGG16(nn.Module):
    """
    VGG-16. The classifier "imagenet" is the original one with layers of 7x7x512, 4096 and 4096 units; "small" has
    512, 512 and 256, or 512, 256 and 128 for images of one channel; None chooses small for images below 64 pixels.
    """
    layers = [64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool"]

    def __init__(self, image_shape, classifier=None, dropout=0.5):
        super().__init__()
        at_least(32, "VGG16", image_shape) # halved five times
        C = image_shape[0]
        features, channels = [], C
        for layer in self.layers:
            if layer == "pool":
                features.append(nn.MaxPool2d(2))
            else:
                features += [nn.Conv2d(channels, layer, 3, padding=1), nn.ReLU()]
                channels = layer
        self.features = nn.Sequential(*features)
        small = small_or_imagenet("classifier", classifier, image_shape) == "small"
        if not small:
            side, hidden, self.num_features = 7, 4096, 4096
        elif C == 1:
            side, hidden, self.num_features = 1, 256, 128
        else:
            side, hidden, self.num_features = 1, 512, 256
        self.avgpool = nn.AdaptiveAvgPool2d(side)
        self.classifier = nn.Sequential(
            nn.Linear(512 * side * side, hidden), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden, self.num_features), nn.ReLU(), nn.Dropout(dropout),
        )
        self.apply(init_conv)
        for layer in (self.classifier[0], self.classifier[3]):
            # with torchvision's 0.01 the features of the small classifier would start next to 0
            std = math.sqrt(2 / layer.out_features) if small else 0.01
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        x = self.avgpool(self.features(x)) # (B, 512, side, side)
        return self.classifier(x.flatten(1))


# -----------------------------------------------------------------------------
# ViT and PVTv2

def attend(q, k, v, heads):
    """Multi-head attention of queries q (B, N, D) to keys and values k, v (B, M, D): (B, N, D)."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v)) # (B, heads, N or M, D / heads)
    y = F.scaled_dot_product_attention(q, k, v) # (B, heads, N, D / heads)
    return y.transpose(1, 2).flatten(2)


def init_linear(module):
    """Give a linear layer the initial weights of ViT and PVT."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class ViTBlock(nn.Module):

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width)))
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(width, 4 * width), fc2=nn.Linear(4 * width, width)))

    def forward(self, x):
        q, k, v = self.attn.qkv(self.norm1(x)).chunk(3, dim=2)
        x = x + self.attn.proj(attend(q, k, v, self.heads))
        x = x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))
        return x


class ViT(nn.Module):
    """A vision transformer, by default ViT-tiny. The features are the class token after the last norm."""

    def __init__(self, image_shape, patch_size=16, width=192, depth=12, heads=3):
        super().__init__()
        (C, H, W), P = image_shape, patch_size
        if H % P or W % P:
            raise ValueError(f"ViT cuts the image into patches of {P}x{P}, which {C}x{H}x{W} is no multiple of: "
                             f"use image_size={-(-max(H, W) // P) * P} or another patch_size")
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of heads {heads}")
        self.num_features = width
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(C, width, P, stride=P)))
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (H // P) * (W // P), width))
        self.blocks = nn.ModuleList([ViTBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_linear)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2) # (B, N, width)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed # (B, 1 + N, width)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


def conv_last(conv, x):
    """Apply a convolution to x (B, H, W, C), which is the layout that Linear and LayerNorm want."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PVTAttention(nn.Module):
    """Spatial-reduction attention: every pixel attends to one key per patch of sr x sr pixels."""

    def __init__(self, width, heads, sr):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.sr = nn.Conv2d(width, width, sr, stride=sr) if sr > 1 else None
        # as published, eps is 1e-5 here and in the patch embedding, and 1e-6 elsewhere
        self.norm = nn.LayerNorm(width) if sr > 1 else None

    def forward(self, x):
        y = self.norm(conv_last(self.sr, x)) if self.sr else x # (B, H/sr, W/sr, width)
        k, v = self.kv(y).flatten(1, 2).chunk(2, dim=2) # (B, HW/sr^2, width) each
        q = self.q(x).flatten(1, 2) # (B, HW, width)
        y = attend(q, k, v, self.heads) # (B, HW, width)
        return self.proj(y).view_as(x)


class PVTBlock(nn.Module):

    def __init__(self, width, heads, sr, mlp_ratio):
        super().__init__()
        hidden = mlp_ratio * width
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = PVTAttention(width, heads, sr)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict(dict(
            fc1=nn.Linear(width, hidden),
            dwconv=nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), # its zero padding tells positions apart
            fc2=nn.Linear(hidden, width),
        ))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        y = conv_last(self.mlp.dwconv, self.mlp.fc1(self.norm2(x))) # (B, H, W, hidden)
        return x + self.mlp.fc2(F.gelu(y))


class PVTStage(nn.Module):
    """One of four stages, from (B, H, W, channels) to (B, H/stride, W/stride, width), rounded up."""

    def __init__(self, channels, width, patch, stride, heads, sr, mlp_ratio):
        super().__init__()
        self.patch_embed = nn.ModuleDict(dict(
            proj=nn.Conv2d(channels, width, patch, stride, padding=patch // 2),
            norm=nn.LayerNorm(width),
        ))
        self.blocks = nn.ModuleList([PVTBlock(width, heads, sr, mlp_ratio) for _ in range(2)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        x = self.patch_embed.norm(conv_last(self.patch_embed.proj, x))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PVTv2_B0(nn.Module):
    """
    PVTv2-B0. At 32x32 pixels each stage has only one key, to which every pixel attends whatever its query is: q and
    the k half of kv then have no gradient. Larger images have more keys.
    """
    num_features = 256

    def __init__(self, image_shape):
        super().__init__()
        at_least(29, "PVTv2_B0", image_shape) # the first patch embedding leaves 8x8, room for one key
        self.stages = nn.Sequential(
            PVTStage(image_shape[0], 32, patch=7, stride=4, heads=1, sr=8, mlp_ratio=8),
            PVTStage(32, 64, patch=3, stride=2, heads=2, sr=4, mlp_ratio=8),
            PVTStage(64, 160, patch=3, stride=2, heads=5, sr=2, mlp_ratio=4),
            PVTStage(160, 256, patch=3, stride=2, heads=8, sr=1, mlp_ratio=4),
        )
        self.apply(init_conv)
        self.apply(init_linear)

    def forward(self, x):
        x = self.stages(x.permute(0, 2, 3, 1)) # (B, H/32, W/32, 256)
        return x.mean((1, 2))


BACKBONES = {
    "pixels": Pixels,
    "mlp": MLP,
    "cnn": CNN,
    "resnet50": ResNet50,
    "vgg16": VGG16,
    "vit_tiny": ViT,
    "pvtv2_b0": PVTv2_B0,
}


# -----------------------------------------------------------------------------
# backbone and head

@dataclass
class VisionConfig:
    model: str # one of BACKBONES
    image_shape: tuple # (C, H, W)
    num_classes: int
    # the head, see distances.py
    distance: str = "baseline"
    variant: str = "" # "": the distance's default
    distance_params: str = "" # such as "p=3"
    link: str = "harmonic"
    n: float = 1.0 # exponent, the paper's (Table 8)
    learn_n: bool = False
    eps: float = 1e-4
    learn_eps: bool = False
    head_bias: bool = False
    learn_scale: bool = False
    softcap: float = 0.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    margin: float = 0.0
    angular_margin: float = 0.0
    feature_scale: float = 1.0 # features are multiplied by it


class VisionNet(nn.Module):
    """
    A backbone and a head: features(x) are the (B, D) that the head sees, forward is no more than features, head and
    loss. Raises ValueError for a config that does not fit together.
    """

    def __init__(self, config):
        super().__init__()
        if config.model not in BACKBONES:
            raise ValueError(f"model must be one of {', '.join(BACKBONES)}, got {config.model!r}")
        if len(config.image_shape) != 3 or min(config.image_shape) < 1:
            raise ValueError(f"image_shape must be (C, H, W), got {config.image_shape}")
        self.config = config
        self.backbone = BACKBONES[config.model](config.image_shape)
        # the head is made last, so that every head meets the same backbone for the same seed
        arguments = head_arguments(vars(config))
        self.head = DistanceHead(self.backbone.num_features, config.num_classes, **arguments)
        self.head.feature_scale = config.feature_scale

    def features(self, x):
        """Map images x (B, C, H, W) to features (B, D), the head's feature scale applied."""
        if x.shape[1:] != tuple(self.config.image_shape):
            expected = ", ".join(map(str, self.config.image_shape))
            raise ValueError(f"the model takes images (B, {expected}), got {tuple(x.shape)}")
        h = self.backbone(x)
        return h if self.head.feature_scale == 1 else h * self.head.feature_scale

    def forward(self, x, targets=None):
        """
        With targets (B,), where -1 does not count, return (None, the mean loss in nats).
        Without, return (z (B, K), None).
        """
        h = self.features(x)
        if targets is None:
            return self.head(h), None
        return None, self.head.loss(h, targets, ignore_index=-1)
