"""Draw dropout masks: which channels or elements of a layer a pass keeps.

Counter-based: the random numbers of a layer come from Philox with a key that is the SHA-256 of (seed, case, source,
pass, layer name), and from nothing else (definitions, section 10). No network and no PyTorch is needed here.
"""

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from segtrust.sources import block_of

DRAWS = 2**16


@dataclass(frozen=True)
class Layer:
    """An active dropout layer: its name in the network, what it drops (`channel` or `element`), its rate in (0, 1)."""

    name: str
    kind: str
    rate: float


def draw_masks(layers, shapes, seed, case, source, pass_index, *, balanced=False, window=None):
    """Return the masks of one pass, {layer name: list of bool arrays, one per call of the layer}, True where kept.

    An element is dropped with the layer's rate, rounded to 1/65,536.

    layers : list of Layer
    shapes : {layer name: list of shapes}, from `Stochastic.mask_shapes`
    seed : int; case : patient; source : name of the member and flip; pass_index : int from 0
    balanced : whether, within each block of passes (0–4, 5–9, 10–19, …), every element is dropped equally often, as
        near as the rate allows; a pass is still a function of its number
    window : number of a sliding window, to draw masks of its own for it; None for the whole volume
    """
    if balanced:
        return {
            layer.name: _balanced(shapes[layer.name], layer.rate, [seed, case, source, layer.name], pass_index)
            for layer in layers
        }
    key = [seed, case, source, pass_index]
    return {
        layer.name: [
            draw >= round(layer.rate * DRAWS)
            for draw in _draws(shapes[layer.name], [*key, layer.name] + ([] if window is None else [window]))
        ]
        for layer in layers
    }


def multipliers(layers, masks):
    """Return what the layers multiply by, {layer name: list of float32 arrays, first axis the batch}.

    layers : list of Layer
    masks : list over the batch of what `draw_masks` returns; a kept element becomes 1 / (1 - rate), a dropped one 0
    """
    return {
        layer.name: [
            np.concatenate(calls).astype(np.float32) * np.float32(1 / (1 - layer.rate))
            for calls in zip(*(mask[layer.name] for mask in masks), strict=True)
        ]
        for layer in layers
    }


def _draws(shapes, key):
    """Yield uniform uint16 arrays of the given shapes, from one stream."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    philox = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64))
    for shape in shapes:
        n_values = int(np.prod(shape))
        words = philox.random_raw(-(-n_values // 4)).astype("<u8", copy=False)
        yield words.view("<u2")[:n_values].reshape(shape)


def _balanced(shapes, rate, key, pass_index):
    """Return masks in which, over a block of n passes, every element is dropped ⌊n·rate⌋ or ⌈n·rate⌉ times.

    Selection sampling: how often an element is dropped in the block is drawn first (its expectation is n·rate), then
    pass by pass whether it is dropped now, with probability (times left) / (passes left). So every set of passes
    of that size is equally likely, and in each single pass an element is dropped with the layer's rate.
    """
    start, stop = block_of(pass_index)
    whole, part = divmod((stop - start) * rate, 1)
    left = [
        (int(whole) + (draw < round(part * DRAWS))).astype(np.int32) for draw in _draws(shapes, [*key, "block", start])
    ]
    for index in range(start, pass_index + 1):
        dropped = [
            draw.astype(np.int64) * (stop - index) < n.astype(np.int64) * DRAWS
            for draw, n in zip(_draws(shapes, [*key, "balanced", index]), left, strict=True)
        ]
        left = [n - gone for n, gone in zip(left, dropped, strict=True)]
    return [~gone for gone in dropped]
