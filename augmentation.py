"""
How images are changed for training, a row of AUGMENTATIONS: draw() draws the parameters, augment() applies them.
"""
import numpy as np
import torch
import torch.nn.functional as F

# flip: the probability of a horizontal flip. padding: pixels of zeros around the image, before a random crop.
# degrees: the largest rotation, either way. The rest is colour jitter: a factor from [1 - b, 1 + b], and for hue a
# shift from [-h, h] of the colour circle.
NO_JITTER = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
AUGMENTATIONS = {
    "none": {"flip": 0.0, "padding": 0, "degrees": 0.0, **NO_JITTER},
    "crop": {"flip": 0.0, "padding": 4, "degrees": 10.0, **NO_JITTER}, # for digits, which must not be mirrored
    "standard": {"flip": 0.5, "padding": 4, "degrees": 10.0, **NO_JITTER},
    "strong": {"flip": 0.5, "padding": 4, "degrees": 15.0,
               "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1},
}


def draw(rng, count, spec):
    """
    Draw augment's parameters for count images: {name: (count,) tensor} of those that spec, a row of AUGMENTATIONS,
    uses. Every row takes the same numbers from rng, a RandomState, so that rows can be compared on the same draws.
    """
    u = rng.random_sample((8, count)) # in [0, 1)
    params = {}
    if spec["flip"]:
        params["flip"] = u[0] < spec["flip"]
    if spec["padding"]: # whole pixels
        params["dy"], params["dx"] = np.floor(u[1:3] * (2 * spec["padding"] + 1)) - spec["padding"]
    if spec["degrees"]:
        params["degrees"] = (2 * u[3] - 1) * spec["degrees"]
    for i, name in enumerate(("brightness", "contrast", "saturation"), 4):
        if spec[name]:
            low, high = max(0, 1 - spec[name]), 1 + spec[name]
            params[name] = low + (high - low) * u[i]
    if spec["hue"]:
        params["hue"] = (2 * u[7] - 1) * spec["hue"]
    for name, p in params.items():
        params[name] = torch.from_numpy(p if p.dtype == bool else p.astype(np.float32))
    return params


def augment(x, flip=None, dy=None, dx=None, degrees=None, brightness=None, contrast=None, saturation=None, hue=None):
    """
    Return images x (B, C, H, W), float in 0..255, changed by these parameters; x itself stays as it is. Each
    parameter is None or a (B,) tensor on x's device. They are applied in this order:

        flip                              mirror the image where it is True
        dy, dx                            crop from the zero-padded image, that many pixels down and right of its corner
        degrees                           rotate about the centre, counter-clockwise
        brightness, contrast, saturation  factors as those of torchvision's ColorJitter
        hue                               a shift in turns, -0.5..0.5

    Saturation and hue leave images alone that do not have 3 channels.
    """
    if any(p is not None for p in (flip, dy, dx, degrees)):
        x = warp(x, flip, dy, dx, degrees)

    def column(p):
        return p[:, None, None, None] # (B, 1, 1, 1)
    if brightness is not None:
        x = (x * column(brightness)).clamp_(0, 255)
    if contrast is not None:
        x = torch.lerp(grey(x).mean((1, 2, 3), keepdim=True), x, column(contrast)).clamp_(0, 255)
    if saturation is not None and x.size(1) == 3:
        x = torch.lerp(grey(x), x, column(saturation)).clamp_(0, 255)
    if hue is not None and x.size(1) == 3:
        x = shift_hue(x, hue)
    return x


def warp(x, flip, dy, dx, degrees):
    """Flip, crop and rotate by one affine map: each new pixel is interpolated from one place of x, or from zeros."""
    B, _, H, W = x.shape
    zeros = x.new_zeros(B)
    side = zeros + 1 if flip is None else 1 - 2 * flip.to(x.dtype) # -1: mirrored
    dy = zeros if dy is None else dy
    dx = zeros if dx is None else dx
    angle = zeros if degrees is None else torch.deg2rad(degrees)
    cos, sin = angle.cos(), angle.sin()
    # grid_sample counts in sides of the image; where these are powers of two, no shift by whole pixels is rounded
    h, w = 1 << (H - 1).bit_length(), 1 << (W - 1).bit_length()
    if (h, w) != (H, W):
        x = F.pad(x, (0, w - W, 0, h - H))
    v = torch.arange(H, dtype=x.dtype, device=x.device) - (H - 1) / 2 # pixels from the centre, down
    u = torch.arange(W, dtype=x.dtype, device=x.device) - (W - 1) / 2 # and to the right

    # the grid is made by hand, as affine_grid's matrix product would be rounded to TF32 where that is allowed
    def coordinate(a, b, c, n):
        """Return pixel a u + b v + c of a side of n, in grid_sample's units of -1..1: (B, H, W), for a, b, c (B,)."""
        along_u = 2 / n * torch.outer(a, u) # (B, W)
        along_v = 2 / n * (torch.outer(b, v) + c[:, None]) + 1 / n - 1 # (B, H)
        return along_u[:, None, :] + along_v[:, :, None]
    from_column = coordinate(side * cos, -side * sin, side * dx + (W - 1) / 2, w)
    from_row = coordinate(sin, cos, dy + (H - 1) / 2, h)
    grid = torch.stack((from_column, from_row), -1) # (B, H, W, 2)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def grey(x):
    """Return the luma (B, 1, H, W) of images (B, 3, H, W), and grey images as they are."""
    if x.size(1) != 3:
        return x
    r, g, b = x.split(1, 1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def shift_hue(x, hue):
    """Return x (B, 3, H, W) with its hue shifted by hue (B,) turns; saturation and value, in the sense of HSV, stay."""
    r, g, b = x.unbind(1) # (B, H, W)
    value = x.amax(1)
    span = value - x.amin(1)
    safe = torch.where(span > 0, span, 1)
    green_or_blue = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    h = torch.where(value == r, (g - b) / safe, green_or_blue) # the hue, in sixths of a turn
    h = h + 6 * hue[:, None, None]

    def channel(n):
        k = (n + h) % 6
        return value - span * torch.minimum(k, 4 - k).clamp_(0, 1)
    return torch.stack((channel(5), channel(3), channel(1)), 1)
