"""
model_vision.py against transformers, torchvision and timm where they can be imported, and plain modules written here.

$ pytest tests/test_model_vision.py
"""
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from small_models import EVERY_DISTANCE, EVERY_HEAD

from model_vision import BACKBONES, CNN, MLP, VGG16, Pixels, PVTv2_B0, ResNet50, VisionConfig, VisionNet, ViT

DTYPES = [(torch.float32, 1e-4), (torch.float64, 1e-8)]
IMAGENET = (3, 224, 224)


def images(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def vision_net(model="cnn", image_shape=(1, 12, 12), num_classes=7, seed=0, **config):
    torch.manual_seed(seed)
    return VisionNet(VisionConfig(model, image_shape, num_classes, **config))


def randomised(module, seed=0):
    """Draw all parameters and buffers: norms of 1, and biases of 0, would hide a term that was left out."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in module.state_dict().items():
            if name.endswith("running_var"):
                t.uniform_(0.5, 1.5, generator=g)
            elif t.ndim == 1 and name.endswith("weight"): # of a norm
                t.uniform_(0.3, 1.2, generator=g)
            elif t.is_floating_point() and name.endswith("weight"): # which keeps the size of what comes in
                t.normal_(0, t[0].numel() ** -0.5, generator=g)
            elif t.is_floating_point(): # a bias, or a token
                t.normal_(0, 0.2, generator=g)
    return module


def load(ours, theirs):
    """Give our module the tensors of a state_dict whose names are already ours: all of them, and none is left over."""
    ours.load_state_dict(theirs)
    return ours.eval()


def assert_same(ours, expected, tolerance):
    """They agree to tolerance in units of their spread, which a constant would not have."""
    scale = expected.std().item()
    assert scale > 1e-3 and ours.shape == expected.shape
    torch.testing.assert_close(ours / scale, expected / scale, rtol=0, atol=tolerance)


def assert_same_gradients(ours, theirs, rename, tolerance):
    """The parameters of two modules have the same gradients after a backward pass through both."""
    expected = rename({name: p.grad for name, p in theirs.named_parameters()})
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        size = expected[name].abs().max()
        assert size > 0, name
        torch.testing.assert_close(p.grad / size, expected[name] / size, rtol=0, atol=tolerance,
                                   msg=lambda m, name=name: f"{name}: {m}")

# -----------------------------------------------------------------------------
# sizes


def count(make, **kwargs):
    with torch.device("meta"): # no memory
        return sum(p.numel() for p in make(**kwargs).parameters())


@pytest.mark.parametrize("make, num_features, published", [
    (ResNet50, 2048, 25_557_032), (VGG16, 4096, 138_357_544), (ViT, 192, 5_717_416), (PVTv2_B0, 256, 3_666_760)])
def test_as_many_parameters_as_published(make, num_features, published):
    classifier = 1000 * num_features + 1000 # theirs is a Linear with a bias; our heads have none
    assert count(make, image_shape=IMAGENET) + classifier == published


def test_as_many_parameters_as_by_hand():
    assert count(Pixels, image_shape=(1, 28, 28)) == 0
    assert count(MLP, image_shape=(1, 28, 28)) == (784 * 512 + 512) + (512 * 256 + 256)
    assert count(CNN, image_shape=(1, 28, 28)) == (1 * 9 * 32 + 32) + (32 * 9 * 64 + 64) + (64 * 7 * 7 * 128 + 128)
    assert count(CNN, image_shape=(3, 32, 32)) == (3 * 9 * 32 + 32) + (32 * 9 * 64 + 64) + (64 * 8 * 8 * 128 + 128)
    # the small stem has 3x3 weights in place of 7x7
    assert count(ResNet50, image_shape=(3, 32, 32)) == count(ResNet50, image_shape=IMAGENET) - 64 * 3 * (49 - 9)
    # the small classifier in place of 25088, 4096, 4096
    convolutions = count(VGG16, image_shape=IMAGENET) - (25088 * 4096 + 4096) - (4096 * 4096 + 4096)
    assert convolutions == 14_714_688
    assert count(VGG16, image_shape=(3, 32, 32)) == convolutions + (512 * 512 + 512) + (512 * 256 + 256)
    assert count(VGG16, image_shape=(1, 32, 32)) == convolutions - 64 * 2 * 9 + (512 * 256 + 256) + (256 * 128 + 128)


def test_pvtv2_is_as_large_as_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PvtV2ForImageClassification(transformers.PvtV2Config(num_labels=1000)) # B0 is the default
    assert sum(p.numel() for p in theirs.parameters()) == 3_666_760

# -----------------------------------------------------------------------------
# shapes, and images that a backbone cannot take


@pytest.mark.parametrize("model, image_shape, num_features", [
    ("pixels", (1, 8, 8), 64), ("pixels", (1, 28, 28), 784), ("pixels", (3, 32, 32), 3072),
    ("mlp", (1, 8, 8), 256), ("mlp", (1, 28, 28), 256), ("mlp", (3, 32, 32), 256),
    ("cnn", (1, 4, 4), 128), ("cnn", (1, 8, 8), 128), ("cnn", (1, 28, 28), 128), ("cnn", (3, 30, 33), 128),
    ("resnet50", (1, 8, 8), 2048), ("resnet50", (1, 28, 28), 2048), ("resnet50", (3, 32, 32), 2048),
    ("resnet50", (3, 64, 64), 2048),
    ("pvtv2_b0", (1, 29, 29), 256), ("pvtv2_b0", (3, 32, 32), 256), ("pvtv2_b0", (3, 40, 71), 256),
    ("vgg16", (1, 32, 32), 128), ("vgg16", (3, 32, 32), 256),
    ("vit_tiny", (1, 16, 16), 192), ("vit_tiny", (3, 32, 32), 192), ("vit_tiny", (3, 32, 48), 192),
])
def test_features_have_the_promised_shape(model, image_shape, num_features):
    net = vision_net(model, image_shape).eval()
    with torch.no_grad():
        h, (z, loss) = net.features(images(2, *image_shape)), net(images(2, *image_shape))
    assert h.shape == (2, num_features)
    assert net.backbone.num_features == num_features == net.head.in_features
    assert z.shape == (2, 7) and loss is None and h.isfinite().all()
    assert (h[0] - h[1]).abs().max() > 1e-4 # of different images


@pytest.mark.parametrize("model, image_shape, message", [
    ("cnn", (1, 3, 8), "at least 4x4 pixels, got 1x3x8"),
    ("vgg16", (1, 8, 8), "image_size=32"),
    ("vgg16", (1, 28, 28), "at least 32x32 pixels, got 1x28x28: use image_size=32"),
    ("vgg16", (3, 32, 31), "image_size=32"),
    ("pvtv2_b0", (1, 8, 8), "image_size=32"),
    ("pvtv2_b0", (1, 28, 28), "image_size=32"),
    ("vit_tiny", (1, 8, 8), "patches of 16x16, which 1x8x8 is no multiple of: use image_size=16"),
    ("vit_tiny", (1, 28, 28), "image_size=32"),
    ("vit_tiny", (3, 32, 40), "image_size=48"),
    ("resnet", (3, 32, 32), "pixels, mlp, cnn, resnet50, vgg16, vit_tiny, pvtv2_b0, got 'resnet'"),
    ("mlp", (28, 28), r"\(C, H, W\)"),
    ("mlp", (0, 28, 28), r"\(C, H, W\)"),
])
def test_what_cannot_work_is_said(model, image_shape, message):
    with pytest.raises(ValueError, match=message):
        vision_net(model, image_shape)


def test_other_illegal_arguments():
    with pytest.raises(ValueError, match="stem must be small or imagenet, got 'tiny'"):
        ResNet50((3, 32, 32), stem="tiny")
    with pytest.raises(ValueError, match="classifier must be small or imagenet"):
        VGG16((3, 32, 32), classifier="tiny")
    with pytest.raises(ValueError, match="multiple of heads"):
        ViT((3, 32, 32), width=64, heads=3)
    with pytest.raises(ValueError, match="euclidean"):
        vision_net(distance="euclidian")
    with pytest.raises(ValueError, match="n must be > 0"):
        vision_net(distance="euclidean", n=0.0)
    with pytest.raises(ValueError, match="name=number"):
        vision_net(distance="minkowski", distance_params="p:3")
    for shape in [(1, 12, 12), (2, 1, 12, 13), (2, 3, 12, 12)]:
        with pytest.raises(ValueError, match=r"takes images \(B, 1, 12, 12\), got"):
            vision_net()(images(*shape))


def test_the_small_forms_are_for_images_below_64_pixels():
    with torch.device("meta"):
        for side, kernel, features in [(32, (3, 3), 256), (63, (3, 3), 256), (64, (7, 7), 4096), (224, (7, 7), 4096)]:
            assert ResNet50((3, side, side)).conv1.kernel_size == kernel
            assert VGG16((3, side, side)).num_features == features
        # unless the other form is asked for
        assert ResNet50(IMAGENET, stem="small").conv1.kernel_size == (3, 3)
        assert ResNet50((3, 32, 32), stem="imagenet").conv1.kernel_size == (7, 7)
        assert VGG16(IMAGENET, classifier="small").num_features == 256
        assert VGG16((1, 32, 32), classifier="imagenet").num_features == 4096

# -----------------------------------------------------------------------------
# initial weights


def test_initial_weights_are_those_published():
    def std(t):
        return pytest.approx(t.std().item(), rel=0.05)

    torch.manual_seed(0)
    resnet, vit, pvt, vgg = ResNet50((3, 32, 32)), ViT((3, 32, 32)), PVTv2_B0((3, 32, 32)), VGG16((3, 32, 32))
    assert (2 / (9 * 512)) ** 0.5 == std(resnet.layer4[1].conv2.weight) == std(vgg.features[28].weight) # fan_out
    assert (2 / (1 * 2048)) ** 0.5 == std(resnet.layer4[1].conv3.weight)
    assert (2 / 256) ** 0.5 == std(vgg.classifier[3].weight) and not vgg.classifier[3].bias.any()
    assert not vgg.features[28].bias.any() and (resnet.layer4[2].bn3.weight == 1).all()
    assert 0.02 == std(vit.blocks[3].attn.qkv.weight) == std(vit.blocks[0].mlp.fc2.weight)
    assert 0.02 == std(pvt.stages[3].blocks[1].attn.kv.weight)
    assert vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.1) and 0 < vit.cls_token.abs().max() < 1e-5
    assert not any(m.bias.any() for net in (vit, pvt) for m in net.modules() if isinstance(m, nn.Linear))
    assert (2 / (9 * 256)) ** 0.5 == std(pvt.stages[3].patch_embed.proj.weight)
    assert (2 / 9) ** 0.5 == std(pvt.stages[3].blocks[0].mlp.dwconv.weight) # fan_out of one group
    assert not any(m.bias.any() for m in pvt.modules() if isinstance(m, nn.Conv2d))

# -----------------------------------------------------------------------------
# MLP, CNN and VGG-16 against a chain of modules


def assert_same_as_chain(ours, chain, x, tolerance):
    """A chain of modules that takes our tensors, in the same order, gives what our module gives."""
    chain.load_state_dict(dict(zip(chain.state_dict(), ours.state_dict().values(), strict=True)), assign=True)
    with torch.no_grad():
        assert_same(ours.eval()(x), chain.eval()(x), tolerance)


def conv_relu(i, o):
    return [nn.Conv2d(i, o, kernel_size=3, stride=1, padding=1), nn.ReLU()]


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
def test_mlp_and_cnn_are_these_chains(dtype, tolerance):
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 10, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU())
    cnn = nn.Sequential(*conv_relu(3, 32), nn.MaxPool2d(2), *conv_relu(32, 64), nn.MaxPool2d(2),
                        nn.Flatten(), nn.Linear(64 * 2 * 2, 128), nn.ReLU())
    for ours, chain in [(MLP((3, 8, 10)), mlp), (CNN((3, 8, 10)), cnn)]:
        assert_same_as_chain(randomised(ours.to(dtype)), chain, images(3, 3, 8, 10, dtype=dtype), tolerance)
    x = images(3, 3, 8, 10)
    assert torch.equal(Pixels((3, 8, 10))(x), x.reshape(3, 240))


def vgg16_chain(channels, classifier):
    return nn.Sequential(
        *conv_relu(channels, 64), *conv_relu(64, 64), nn.MaxPool2d(2),
        *conv_relu(64, 128), *conv_relu(128, 128), nn.MaxPool2d(2),
        *conv_relu(128, 256), *conv_relu(256, 256), *conv_relu(256, 256), nn.MaxPool2d(2),
        *conv_relu(256, 512), *conv_relu(512, 512), *conv_relu(512, 512), nn.MaxPool2d(2),
        *conv_relu(512, 512), *conv_relu(512, 512), *conv_relu(512, 512), nn.MaxPool2d(2), *classifier)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("shape, sizes", [((3, 32, 32), (512, 512, 256)), ((1, 48, 41), (512, 256, 128))])
def test_small_vgg16_is_this_chain(shape, sizes, dtype, tolerance):
    a, b, c = sizes
    chain = vgg16_chain(shape[0], [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(a, b), nn.ReLU(), nn.Dropout(),
                                   nn.Linear(b, c), nn.ReLU(), nn.Dropout()])
    assert_same_as_chain(randomised(VGG16(shape).to(dtype)), chain, images(3, *shape, dtype=dtype), tolerance)


def test_original_vgg16_is_this_chain():
    with torch.device("meta"): # the chain takes our tensors
        chain = vgg16_chain(3, [nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(25088, 4096), nn.ReLU(), nn.Dropout(),
                                nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()])
        ours = VGG16((3, 64, 64))
    ours = randomised(ours.to_empty(device="cpu"))
    assert_same_as_chain(ours, chain, images(2, 3, 64, 64), 1e-4) # 2x2 is pooled up to 7x7
    assert_same_as_chain(ours, chain, images(1, 3, 224, 224), 1e-4)


def test_vgg16_drops_half_of_both_layers_in_training():
    torch.manual_seed(0)
    vgg = VGG16((3, 32, 32)).classifier
    with torch.no_grad():
        for layers in (vgg[:3], vgg[3:]):
            x = torch.randn(64, layers[0].in_features)
            kept, dropped = layers.eval()(x), layers.train()(x)
            on = (dropped != 0) & (kept != 0)
            assert on.sum() / (kept != 0).sum() == pytest.approx(0.5, abs=0.02)
            torch.testing.assert_close(dropped[on], 2 * kept[on])
    classifier = VGG16((3, 32, 32), dropout=0.1).classifier
    assert [m.p for m in classifier if isinstance(m, nn.Dropout)] == [0.1, 0.1]

# -----------------------------------------------------------------------------
# ResNet-50 against transformers


def hf_resnet(stem, dtype):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ResNetModel(transformers.ResNetConfig(
        depths=[3, 4, 6, 3], hidden_sizes=[256, 512, 1024, 2048], layer_type="bottleneck",
        downsample_in_bottleneck=False))
    if stem == "small": # they have no such stem
        theirs.embedder.embedder.convolution = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        theirs.embedder.pooler = nn.Identity()
    return randomised(theirs).to(dtype).eval()


def resnet_names(theirs):
    ours = {}
    for name, t in theirs.items():
        name = name.replace("embedder.embedder.convolution", "conv1")
        name = name.replace("embedder.embedder.normalization", "bn1")
        name = re.sub(r"encoder\.stages\.(\d)\.layers\.(\d)\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.", name)
        name = re.sub(r"layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}", name)
        name = re.sub(r"layer\.(\d)\.normalization", lambda m: f"bn{int(m[1]) + 1}", name)
        name = name.replace("shortcut.convolution", "downsample.0")
        name = name.replace("shortcut.normalization", "downsample.1")
        ours[name] = t
    return ours


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("stem, side", [("imagenet", 224), ("imagenet", 65), ("small", 19)])
def test_resnet50_is_that_of_transformers(stem, side, dtype, tolerance):
    batch_size = 2 if side < 224 else 1
    theirs, x = hf_resnet(stem, dtype), images(batch_size, 3, side, side, dtype=dtype)
    block = theirs.encoder.stages[1].layers[0].layer # the first that halves the image
    strides = [conv.convolution.stride for conv in block]
    assert strides == [(1, 1), (2, 2), (1, 1)] # torchvision's: the option's name speaks of the first 1x1
    ours = load(ResNet50((3, side, side), stem).to(dtype), resnet_names(theirs.state_dict()))
    with torch.no_grad():
        assert_same(ours(x), theirs(x).pooler_output.flatten(1), tolerance)


def test_resnet50_trains_as_that_of_transformers():
    theirs = hf_resnet("imagenet", torch.float64)
    x, g = images(2, 3, 48, 48, dtype=torch.float64), images(2, 2048, dtype=torch.float64)
    ours = load(ResNet50((3, 48, 48), "imagenet").double(), resnet_names(theirs.state_dict())).train()
    h, expected = ours(x), theirs.train()(x).pooler_output.flatten(1)
    assert_same(h, expected, 1e-8)
    (h * g).sum().backward()
    (expected * g).sum().backward()
    assert_same_gradients(ours, theirs, resnet_names, 1e-7)
    for name, t in resnet_names(theirs.state_dict()).items(): # running statistics
        torch.testing.assert_close(ours.state_dict()[name], t, rtol=1e-8, atol=1e-8)

# -----------------------------------------------------------------------------
# ViT against transformers


def hf_vit(side, dtype, patch_size=16):
    """
    The default layer_norm_eps of transformers is 1e-12, while the published ViT and timm have 1e-6. Its eager softmax
    would always be in fp32.
    """
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, image_size=side,
        patch_size=patch_size, layer_norm_eps=1e-6, attn_implementation="sdpa")
    return randomised(transformers.ViTModel(config, add_pooling_layer=False)).to(dtype).eval()


VIT_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layers.": "blocks.",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layernorm": "norm",
    "attention.o_proj": "attn.proj",
}


def renamed(theirs, names, joined, parts):
    """Their tensors under our names; those that are `parts` of one of ours are joined."""
    ours = {}
    for name, t in theirs.items():
        for old, new in names.items():
            name = name.replace(old, new)
        ours[name] = t
    for first in [name for name in ours if parts[0] in name]:
        ours[first.replace(parts[0], joined)] = torch.cat([ours.pop(first.replace(parts[0], part)) for part in parts])
    return ours


def vit_names(theirs):
    return renamed(theirs, VIT_NAMES, "attn.qkv", ["attention.q_proj", "attention.k_proj", "attention.v_proj"])


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("side, patch_size", [(224, 16), (64, 16), (32, 16), (28, 7)])
def test_vit_is_that_of_transformers(side, patch_size, dtype, tolerance):
    theirs, x = hf_vit(side, dtype, patch_size), images(2, 3, side, side, dtype=dtype)
    ours = load(ViT((3, side, side), patch_size=patch_size).to(dtype), vit_names(theirs.state_dict()))
    with torch.no_grad():
        assert_same(ours(x), theirs(x).last_hidden_state[:, 0], tolerance)


def test_gradients_of_vit_are_those_of_transformers():
    theirs = hf_vit(64, torch.float64)
    x, g = images(3, 3, 64, 64, dtype=torch.float64), images(3, 192, dtype=torch.float64)
    ours = load(ViT((3, 64, 64)).double(), vit_names(theirs.state_dict()))
    (ours(x) * g).sum().backward()
    (theirs(x).last_hidden_state[:, 0] * g).sum().backward()
    assert_same_gradients(ours, theirs, vit_names, 1e-7)

# -----------------------------------------------------------------------------
# PVTv2-B0 against transformers


def hf_pvt(dtype):
    """
    transformers takes eps 1e-6 for every LayerNorm. In the published code (and timm's) only those made with norm_layer
    have it: norm1, norm2 and the end of a stage. The norms of the patch embeddings and of the reduced keys are plain
    nn.LayerNorm, with an eps of 1e-5, as ours are.
    """
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PvtV2Model(transformers.PvtV2Config()) # B0 is the default
    assert theirs.config.hidden_sizes in [(32, 64, 160, 256), [32, 64, 160, 256]]
    plain = ("patch_embedding.layer_norm", "attention.layer_norm")
    changed = [m for name, m in theirs.named_modules() if name.endswith(plain)]
    assert len(changed) == 4 + 6 and all(m.eps == 1e-6 for m in changed)
    for m in changed:
        m.eps = 1e-5
    return randomised(theirs).to(dtype).eval()


PVT_NAMES = {
    "encoder.layers": "stages",
    "patch_embedding.layer_norm": "patch_embed.norm",
    "patch_embedding.": "patch_embed.",
    "attention.query": "attn.q",
    "attention.proj": "attn.proj",
    "attention.spatial_reduction": "attn.sr",
    "attention.layer_norm": "attn.norm",
    "layer_norm_1": "norm1",
    "layer_norm_2": "norm2",
    "layer_norm": "norm",
    "dense1": "fc1",
    "dense2": "fc2",
    "dwconv.dwconv": "dwconv",
}


def pvt_names(theirs):
    return renamed(theirs, PVT_NAMES, "attn.kv", ["attention.key", "attention.value"])


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("shape", [(3, 224, 224), (3, 64, 64), (3, 32, 32), (3, 70, 101)])
def test_pvtv2_is_that_of_transformers(shape, dtype, tolerance):
    theirs, x = hf_pvt(dtype), images(2, *shape, dtype=dtype)
    ours = load(PVTv2_B0(shape).to(dtype), pvt_names(theirs.state_dict()))
    with torch.no_grad():
        assert_same(ours(x), theirs(x).last_hidden_state.mean((2, 3)), tolerance)


def test_gradients_of_pvtv2_are_those_of_transformers():
    theirs = hf_pvt(torch.float64)
    x, g = images(2, 3, 96, 64, dtype=torch.float64), images(2, 256, dtype=torch.float64)
    ours = load(PVTv2_B0((3, 96, 64)).double(), pvt_names(theirs.state_dict()))
    (ours(x) * g).sum().backward()
    (theirs(x).last_hidden_state.mean((2, 3)) * g).sum().backward()
    assert_same_gradients(ours, theirs, pvt_names, 1e-7)

# -----------------------------------------------------------------------------
# torchvision and timm, where they can be imported beside this torch


def import_or_skip(name):
    try: # one built for another torch fails with more than an ImportError
        return __import__(name, fromlist=["models"])
    except Exception as e:
        pytest.skip(f"{name} cannot be imported: {e}")


def timm_pvt_names(theirs):
    ours = {}
    for name, t in theirs.items():
        if name.startswith("patch_embed."):
            name = "stages.0." + name
        ours[name.replace("downsample.", "patch_embed.")] = t
    return ours


@pytest.mark.parametrize("library, name, make, classifier, rename, side", [
    ("torchvision", "resnet50", ResNet50, "fc", dict, 64),
    ("torchvision", "vgg16", VGG16, "classifier.6", dict, 64),
    ("timm", "vit_tiny_patch16_224", ViT, "head", dict, 224),
    ("timm", "pvt_v2_b0", PVTv2_B0, "head", timm_pvt_names, 64),
])
def test_logits_are_those_of_torchvision_and_timm(library, name, make, classifier, rename, side):
    module, x = import_or_skip(library), images(2, 3, side, side)
    if library == "timm":
        theirs = module.create_model(name, pretrained=False)
    else:
        theirs = getattr(module.models, name)(weights=None)
    state = randomised(theirs).eval().state_dict()
    weight, bias = state.pop(classifier + ".weight"), state.pop(classifier + ".bias")
    ours = load(make((3, side, side)), rename(state))
    with torch.no_grad():
        assert_same(F.linear(ours(x), weight, bias), theirs(x), 1e-4)

# -----------------------------------------------------------------------------
# backbone and head


@pytest.mark.parametrize("model", BACKBONES)
def test_every_head_meets_the_same_backbone(model):
    shape = (3, 32, 32)
    expected = vision_net(model, shape).backbone.state_dict()
    if model == "cnn":
        heads = EVERY_HEAD
    elif model == "pixels":
        heads = [("cosine", "")] # Mahalanobis would have a matrix of 3072 x 3072
    else:
        heads = [("cosine", ""), ("mahalanobis", "standard")]
    for distance, variant in heads:
        theirs = vision_net(model, shape, distance=distance, variant=variant).backbone.state_dict()
        assert theirs.keys() == expected.keys()
        assert all(torch.equal(t, expected[name]) for name, t in theirs.items())
    if expected:
        other = vision_net(model, shape, seed=1).backbone.state_dict()
        assert any(not torch.equal(t, expected[name]) for name, t in other.items())


@pytest.mark.parametrize("distance, variant", EVERY_HEAD)
def test_loss_is_the_cross_entropy_of_the_scores(distance, variant):
    x, y = images(9, 1, 12, 12), torch.arange(9) % 7
    for config in [{}, dict(link="softmin", feature_scale=0.5), dict(learn_n=True, n=2.0)]:
        net = vision_net(distance=distance, variant=variant, **config).eval()
        z, loss = net(x)[0], net(x, y)[1]
        torch.testing.assert_close(loss, F.cross_entropy(z, y), rtol=1e-5, atol=1e-6)
        assert net(x, y)[0] is None and loss.ndim == 0


@pytest.mark.parametrize("distance, variant", EVERY_DISTANCE)
def test_the_nearest_prototype_wins(distance, variant):
    net, x = vision_net(distance=distance, variant=variant).eval(), images(40, 1, 12, 12)
    with torch.no_grad():
        d = net.head.distances(net.features(x))
        assert torch.equal(net(x)[0].argmax(1), d.argmin(1)) and d.std() > 0


@pytest.mark.parametrize("model", BACKBONES)
@pytest.mark.parametrize("distance", ["baseline", "euclidean", "cosine"])
def test_every_parameter_gets_a_gradient(model, distance):
    shapes = {"resnet50": (3, 16, 16), "vit_tiny": (3, 32, 32), "pvtv2_b0": (3, 64, 64), "vgg16": (3, 32, 32)}
    shape = shapes.get(model, (3, 8, 8))
    net = vision_net(model, shape, distance=distance, learn_n=distance == "cosine")
    assert net.training
    net(images(8, *shape), torch.arange(8) % 7)[1].backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_pvtv2_has_one_key_per_stage_at_32_pixels_and_more_above():
    for side, idle in [(32, True), (64, False)]:
        net = vision_net("pvtv2_b0", (3, side, side), distance="euclidean")
        net(images(4, 3, side, side), torch.arange(4))[1].backward()
        queries = [p for name, p in net.named_parameters() if name.endswith("attn.q.weight")]
        assert len(queries) == 8
        assert all((p.grad.abs().max() < 1e-9) == idle for p in queries)


def test_config_reaches_the_head():
    net = vision_net(distance="minkowski", distance_params="p=3", n=5.0, eps=1e-3, link="softmin", feature_scale=0.25)
    assert (net.head.distance, net.head.params, net.head.link) == ("minkowski", {"p": 3.0}, "softmin")
    assert (net.head.n, net.head.eps) == (5.0, 1e-3)
    assert vision_net(distance="chebyshev", variant="smooth").head.variant == "smooth"
    assert VisionConfig("mlp", (1, 8, 8), 10).n == 1.0 == vision_net(distance="cosine").head.n # Table 8
    x = images(2, 1, 12, 12)
    assert torch.equal(net.features(x), net.backbone(x) * 0.25)
    net.head.feature_scale = 1.0
    assert torch.equal(net.features(x), net.backbone(x))
    assert torch.equal(vision_net("pixels", (1, 2, 2)).features(images(3, 1, 2, 2)), images(3, 1, 2, 2).flatten(1))


def test_ignored_targets_do_not_count():
    net, x, y = vision_net(distance="euclidean").eval(), images(4, 1, 12, 12), torch.tensor([3, -1, 0, -1])
    torch.testing.assert_close(net(x, y)[1], net(x[::2], y[::2])[1])
