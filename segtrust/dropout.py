"""A dropout mask is an input of the network.

Every active dropout layer is replaced by a multiplication with a mask that the caller supplies. The network is
then a plain function of (image, masks): reproducible, batchable over passes and windows, and exportable.
"""

import re
from collections import defaultdict
from copy import deepcopy
from math import prod

import torch
from torch import nn

from segtrust.draws import Layer
from segtrust.errors import SegtrustError

KINDS = {nn.Dropout: "element", nn.Dropout1d: "channel", nn.Dropout2d: "channel", nn.Dropout3d: "channel"}
REFUSED = (nn.AlphaDropout, nn.FeatureAlphaDropout)
_SMALL = 64**3  # voxels


class Masked(nn.Module):
    """Stands where a dropout layer stood: multiplies by what is supplied for this call, or does nothing.

    A layer may be called several times in one forward pass (MONAI's Swin blocks share one); each call has a mask.
    """

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.multipliers = None
        self.shapes = None
        self.calls = 0

    def forward(self, features):
        call = self.calls
        self.calls += 1
        if self.shapes is not None:
            channel = tuple(features.shape[:2]) + (1,) * (features.dim() - 2)
            self.shapes.append(channel if self.layer.kind == "channel" else tuple(features.shape))
        if self.multipliers is None:
            return features
        return features * self.multipliers[call].to(features.dtype)


class Injected(nn.Module):
    """A layer followed by dropout."""

    def __init__(self, layer, dropout):
        super().__init__()
        self.layer = layer
        self.injected = dropout

    def forward(self, *inputs, **more):
        return self.injected(self.layer(*inputs, **more))


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

    def forward(self, image, multipliers=None):
        """Return the network's output under the given masks.

        image : tensor (n, channels, x, y, z)
        multipliers : {layer name: list of float tensors, one per call of the layer}, as `draws.multipliers` gives
            them for n masks; None for the deterministic pass (dropout off)
        """
        for masked in self.masked:
            masked.calls = 0
            masked.multipliers = None if multipliers is None else multipliers[masked.layer.name]
        try:
            return self.network(image)
        finally:
            for masked in self.masked:
                masked.multipliers = None

    def mask_shapes(self, image_shape):
        """Return {layer name: list of mask shapes, one per call} for one image of shape (channels, x, y, z).

        Found by a forward pass, of large images without numbers (on PyTorch's meta device), so that it costs neither
        time nor memory. Raises SegtrustError when the network does not take images of this shape, or returns another.
        """
        tried = on_trial(self, image_shape)
        for masked in tried.masked:
            masked.shapes = []
        try:
            found = output_sides(tried, image_shape)
            shapes = {masked.layer.name: masked.shapes for masked in tried.masked}
        except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError) as error:
            raise SegtrustError(f"{self._refusal(image_shape)}: {error}") from error
        finally:
            for masked in tried.masked:
                masked.shapes = None
        if found != image_shape[1:]:
            raise SegtrustError(f"{self._refusal(image_shape)}: it returns {_sides(found)}")
        return shapes

    def _refusal(self, image_shape):
        return f"{type(self.network).__name__} does not take images of {_sides(image_shape[1:])} voxels"


def inject(network, after, rate, kind):
    """Follow some layers of a network by dropout, in place (Ledda 2023); its weights are not touched.

    after : list of patterns of layer names: `*` matches within one part of a name, `**` across dots, such as
        ["down_layers.*", "up_layers.**.conv2"]
    rate : in (0, 1); kind : "channel" or "element"

    Returns the names of the layers followed. Raises SegtrustError for a pattern that matches no layer. Lists of layers
    are no layers.
    """
    names = names_of_layers(network)
    chosen = matching(names, after)
    unmatched = [pattern for pattern in after if not matching(names, [pattern])]
    if unmatched:
        raise SegtrustError(
            f"no layer of {type(network).__name__} is named {', '.join(unmatched)}; `segtrust layers MODEL` lists them"
        )
    followed = {}
    for name in reversed(chosen):  # layers inside a layer come before it
        parent, _, own = name.rpartition(".")
        holder = network.get_submodule(parent)
        layer = holder._modules[own]
        if layer not in followed and layer not in followed.values():
            followed[layer] = Injected(layer, nn.Dropout3d(rate) if kind == "channel" else nn.Dropout(rate))
        holder._modules[own] = followed.get(layer, layer)
    return chosen


def names_of_layers(network):
    """Return the names of the layers that dropout can follow; a list of layers is none."""
    named = network.named_modules(remove_duplicate=False)
    return [name for name, layer in named if name and not isinstance(layer, nn.ModuleList | nn.ModuleDict)]


def is_injected(name):
    """Say whether a dropout layer, given by name, was put there by `inject`."""
    return name.rpartition(".")[2] == "injected"


def matching(names, patterns):
    """Return the names that one of the patterns of `inject` matches, in their order."""
    wanted = [
        re.compile(
            "".join({"**": ".*", "*": "[^.]*"}.get(part, re.escape(part)) for part in re.split(r"(\*+)", pattern))
        )
        for pattern in patterns
    ]
    return [name for name in names if any(pattern.fullmatch(name) for pattern in wanted)]


def silence(network):
    """Switch off the dropout layers that a network has, in place."""
    for module in network.modules():
        if isinstance(module, (*KINDS, *REFUSED)):
            module.p = 0.0


def logits_of(output):
    """Return the logits in a network's output: itself, or the first of several (deep supervision)."""
    return output if isinstance(output, torch.Tensor) else output[0]


def on_trial(network, image_shape):
    """Return a network to try on images: itself for small ones, for large ones a copy on the meta device.

    On the meta device only shapes are computed, but getting there takes PyTorch seconds of imports.
    """
    return network if prod(image_shape[1:]) <= _SMALL else without_numbers(network)


def output_sides(network, image_shape):
    """Return the sides (x, y, z) of what a network returns for an image of shape (channels, x, y, z)."""
    device = next((parameter.device for parameter in network.parameters()), "cpu")
    with torch.no_grad():
        return logits_of(network(torch.zeros((1, *image_shape), device=device))).shape[2:]


def without_numbers(network):
    """Return a copy of a network on PyTorch's meta device, whose forward passes compute shapes only."""
    return deepcopy(network).to("meta")


def _sides(shape):
    return "×".join(str(side) for side in shape)


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
