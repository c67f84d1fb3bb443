"""Layers: what `segtrust layers MODEL` prints, to see where dropout is and after which layers it can be injected."""

import torch
import yaml

from segtrust.bundle import read_bundle
from segtrust.config import checked_config
from segtrust.dropout import KINDS, matching, names_of_layers, silence, without_numbers
from segtrust.errors import SegtrustError
from segtrust.networks import build, divisor
from segtrust.preprocess import MODALITIES

LEAST_SIDE = 32  # voxels
LEGEND = (
    "output: channels × sides, – where a layer is a list of others, or gives no tensor",
    "dropout: what an active layer drops, and its rate; + is injected after the layer (stochastic.inject)",
)


def layers_of(model, study):
    """Return the table of the layers of a study's model, as text; its weights need not exist.

    model : name of a model in the study's config.yaml
    study : Path of the folder

    Raises SegtrustError for a model that is not there, or has no network.
    """
    path = study / "config.yaml"
    try:
        models = checked_config(yaml.safe_load(path.read_text(encoding="utf-8")))["models"]
    except yaml.YAMLError as error:
        raise SegtrustError(f"{path} is no YAML: {error}") from error
    if model not in models:
        raise SegtrustError(f"{path} has no model {model}; it has {', '.join(models)}")
    entry = models[model]
    if "predictions" in entry:
        raise SegtrustError(f"the model {model} has no network: its predictions were made elsewhere")
    if "bundle" in entry:
        entry = {**read_bundle(study / entry["bundle"]), **entry}
    return layer_table(build(entry["network"], seed=0), entry["window"], entry["stochastic"])


def layer_table(network, window, stochastic):
    """Return the layers of a network as aligned lines of text, in the order of its modules.

    network : changed in place where its own dropout is switched off
    window : (x, y, z) of an image that it takes; None for a cube of 32 voxels, or a little more
    stochastic : dict with `dropout`, whether its own dropout is active, and perhaps `inject`, a dict with `after`,
        `rate` and `kind`

    Of each layer: the shape of its output (channels first; of the first call, and of the first of several outputs),
    its class, dropout, and its name. Raises SegtrustError when the network does not take the image.
    """
    if not stochastic["dropout"]:
        silence(network)
    if window is None:
        step = divisor(network, len(MODALITIES))
        window = (step * max(3, -(-LEAST_SIDE // step)),) * 3
    image_shape = (len(MODALITIES), *window)
    shapes = _output_shapes(network, image_shape)
    inject = stochastic.get("inject", {"after": []})
    layers = {name: layer for name, layer in network.named_modules(remove_duplicate=False) if name}
    names = names_of_layers(network)
    followed = matching(names, inject["after"])
    rows = [("output", "class", "dropout", "layer")]
    for name, layer in layers.items():
        dropout = [f"{KINDS[type(layer)]} {layer.p:g}"] if type(layer) in KINDS and layer.p > 0 else []
        dropout += [f"+ {inject['kind']} {inject['rate']}"] if name in followed else []
        rows.append((_sides(shapes.get(name, ())), type(layer).__name__, " ".join(dropout), name))
    # names are the longest, and of any length: they come last
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{type(network).__name__}, given an image of {_sides(image_shape)}", ""]
    lines += [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]]) for row in rows
    ]
    lines += ["", *LEGEND]
    unmatched = [pattern for pattern in inject["after"] if not matching(names, [pattern])]
    lines += [f"stochastic.inject.after: no layer is named {pattern}" for pattern in unmatched]
    return "\n".join(lines)


def _output_shapes(network, image_shape):
    """Return {layer name: shape of its first output without the batch}, from a forward pass without numbers."""
    copy = without_numbers(network).eval()
    shapes = {}
    names = {}
    for name, layer in copy.named_modules(remove_duplicate=False):
        names.setdefault(layer, []).append(name)

    def note(layer, _, output):
        first = output[0] if isinstance(output, list | tuple) and output else output
        if isinstance(first, torch.Tensor):
            for name in names[layer]:
                shapes.setdefault(name, tuple(first.shape[1:]))

    for layer in names:
        layer.register_forward_hook(note)
    try:
        with torch.no_grad():
            copy(torch.empty((1, *image_shape), device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise SegtrustError(
            f"{type(network).__name__} does not take an image of {_sides(image_shape)}: {error}"
        ) from error
    return shapes


def _sides(shape):
    return "×".join(map(str, shape)) or "–"
