"""A dropout mask is an input of the network.

Every active dropout layer is replaced by a multiplication with a mask that the caller supplies. The network is
then a plain function of (image, masks): reproducible, batchable over passes and windows, and exportable.
"""

import hashlib
import json
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from segtrust.errors import SegtrustError

KINDS = {nn.Dropout: "element", nn.Dropout1d: "channel", nn.Dropout2d: "channel", nn.Dropout3d: "channel"}
REFUSED = (nn.AlphaDropout, nn.FeatureAlphaDropout)
DRAWS = 2**16


@dataclass(frozen=True)
class Layer:
    """An active dropout layer: its name in the network, what it drops (`channel` or `element`), its rate in (0, 1)."""

    name: str
    kind: str
    rate: float


class Masked(nn.Module):
    """Stands where a dropout layer stood: multiplies by the mask supplied for this call, or does nothing.

    A layer may be called several times in one forward pass (MONAI's Swin blocks share one); each call has a mask.
    """

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.scale = 1 / (1 - layer.rate)
        self.masks = None
        self.shapes = None
        self.calls = 0

    def forward(self, features):
        call = self.calls
        self.calls += 1
        if self.shapes is not None:
            channel = tuple(features.shape[:2]) + (1,) * (features.dim() - 2)
            self.shapes.append(channel if self.layer.kind == "channel" else tuple(features.shape))
        if self.masks is None:
            return features
        return features * (self.masks[call].to(features.dtype) * self.scale)


class Stochastic(nn.Module):
    """A network whose dropout masks are inputs; everything else stays as for inference.

    The given network is changed in place: it is put into evaluation mode and its active dropout layers
    (`nn.Dropout`, `Dropout1d`, `Dropout2d`, `Dropout3d` with a rate above 0) are replaced; doing so
    twice does no harm. Weights, their names and the statistics of normalisation layers are not touched.

    Raises SegtrustError for AlphaDropout, whose masks do more than multiply, and for a rate of 1.
    """

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.masked = _replace(network)
        self.eval()

    @property
    def layers(self):
        """The active dropout layers, a list of Layer in the order of the network's modules."""
        return [masked.layer for masked in self.masked]

    def train(self, mode=True):
        """Stay in evaluation mode: only the supplied masks are stochastic."""
        return super().train(False)

    def forward(self, image, masks=None):
        """Return the network's output under the given masks.

        image : tensor (n, channels, x, y, z)
        masks : {layer name: list of bool tensors, one per call of the layer}, True where kept, first axis n times
            that of `mask_shapes`; None for the deterministic pass (dropout off)
        """
        for masked in self.masked:
            masked.calls = 0
            masked.masks = None if masks is None else masks[masked.layer.name]
        try:
            return self.network(image)
        finally:
            for masked in self.masked:
                masked.masks = None

    def mask_shapes(self, image_shape):
        """Return {layer name: list of mask shapes, one per call} for one image of shape (channels, x, y, z).

        Found by a forward pass without numbers (on PyTorch's meta device), so it costs neither time nor memory.
        Raises SegtrustError when the network does not take images of this shape, or returns another.
        """
        copy = without_numbers(self)
        for masked in copy.masked:
            masked.shapes = []
        try:
            with torch.no_grad():
                found = logits_of(copy(torch.empty((1, *image_shape), device="meta"))).shape[2:]
        except (RuntimeError, ValueError, AssertionError) as error:
            raise SegtrustError(f"{self._refusal(image_shape)}: {error}") from error
        if found != image_shape[1:]:
            raise SegtrustError(f"{self._refusal(image_shape)}: it returns {_sides(found)}")
        return {masked.layer.name: masked.shapes for masked in copy.masked}

    def _refusal(self, image_shape):
        return f"{type(self.network).__name__} does not take images of {_sides(image_shape[1:])} voxels"


def check_stochastic(network, passes):
    """Raise SegtrustError when several passes are asked for and nothing in a network is stochastic."""
    active = (
        isinstance(module, Masked) or (isinstance(module, tuple(KINDS)) and module.p > 0)
        for module in network.modules()
    )
    if passes > 1 and not any(active):
        raise SegtrustError(
            f"{passes} passes were asked for, but no dropout layer with a rate above 0 is active in "
            f"{type(network).__name__}, so all passes would be the same; give the network dropout, or ask for one pass"
        )


def logits_of(output):
    """Return the logits in a network's output: itself, or the first of several (deep supervision)."""
    return output if isinstance(output, torch.Tensor) else output[0]


def without_numbers(network):
    """Return a copy of a network on PyTorch's meta device, whose forward passes compute shapes only."""
    return deepcopy(network).to("meta")


def draw_masks(layers, shapes, seed, case, source, pass_index):
    """Return the masks of one pass, {layer name: list of bool tensors on the CPU}, True where kept.

    Counter-based: the random numbers of a layer come from Philox with a key that is the SHA-256 of (seed, case,
    source, pass, layer name). They depend on nothing else, and are the same on every device. An element is
    dropped with the layer's rate, rounded to 1/65,536.

    layers : list of Layer
    shapes : {layer name: list of shapes}, from `Stochastic.mask_shapes`
    seed : int; case : patient; source : name of the member and flip; pass_index : int from 0
    """
    return {
        layer.name: [
            torch.from_numpy(draw >= round(layer.rate * DRAWS))
            for draw in _draws(shapes[layer.name], [seed, case, source, pass_index, layer.name])
        ]
        for layer in layers
    }


def stack_masks(masks, device):
    """Return the masks of several passes as one batch on a device.

    masks : list over passes of what `draw_masks` returns
    """
    return {
        name: [
            torch.cat([one_pass[name][call] for one_pass in masks]).to(device) for call in range(len(masks[0][name]))
        ]
        for name in masks[0]
    }


def _sides(shape):
    return "×".join(str(side) for side in shape)


def _draws(shapes, key):
    """Yield uniform uint16 arrays of the given shapes, from one stream."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    philox = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64))
    for shape in shapes:
        n_values = int(np.prod(shape))
        words = philox.random_raw(-(-n_values // 4)).astype("<u8", copy=False)
        yield words.view("<u2")[:n_values].reshape(shape)


def _replace(network):
    """Put a Masked in the place of every active dropout layer, under each of its names; return them."""
    places = defaultdict(list)
    for prefix, parent in network.named_modules():
        for name, child in parent._modules.items():
            places[child].append((f"{prefix}.{name}".lstrip("."), parent, name))
    replaced = []
    for module, found in places.items():
        if isinstance(module, REFUSED) and module.p > 0:
            raise SegtrustError(
                f"layer {found[0][0]} is {type(module).__name__}, which cannot be written as a multiplication with "
                "a mask; use Dropout, Dropout1d, Dropout2d or Dropout3d"
            )
        if isinstance(module, Masked):
            replaced.append(module)
            continue
        if type(module) not in KINDS or module.p == 0:
            continue
        if module.p == 1:
            raise SegtrustError(f"layer {found[0][0]} drops everything (rate 1); the rate must be below 1")
        masked = Masked(Layer(name=found[0][0], kind=KINDS[type(module)], rate=float(module.p)))
        for _, parent, name in found:
            setattr(parent, name, masked)
        replaced.append(masked)
    return replaced
