"""Read a published MONAI bundle: its network, channels, outputs and crop. No code from it is executed."""

import json
import re
from pathlib import Path

from segtrust.errors import Problems, SegtrustError

MODALITY_NAMES = {
    "t1": ("t1", "t1n", "t1w"),
    "t1ce": ("t1ce", "t1c", "t1gd", "t1post", "t1contrast"),
    "t2": ("t2", "t2w"),
    "flair": ("flair", "t2f", "t2flair"),
}
REGION_NAMES = {"WT": ("wt", "wholetumor"), "TC": ("tc", "tumorcore"), "ET": ("et", "enhancingtumor")}
CLASS_NAMES = {
    "background": ("background",),
    "NCR": ("ncr", "ncrnet", "necrotic", "necroticcore", "necrotictumorcore", "necroticandnonenhancingtumor"),
    "ED": ("ed", "edema", "oedema", "peritumoraledema"),
    "ET": ("et", "enhancingtumor", "gdenhancingtumor"),
}
# what a bundle may do to its images without changing the numbers the network sees
READ = ("NormalizeIntensity", "Orientation", "CenterSpatialCrop", "Activations")
HARMLESS = ("LoadImage", "EnsureChannelFirst", "EnsureType", "Orientation", "CropForeground", "CenterSpatialCrop")


def read_bundle(folder):
    """Return what `configs/inference.json` and `configs/metadata.json` of a bundle say about its model.

    folder : the bundle, as published

    Returns a dict with the keys network (as `networks.build` takes it), channels, outputs (None where the bundle
    does not say), crop, orientation ("stored" unless the bundle reorients), window, overlap, and checkpoint
    (path of `models/model.pt`).

    Raises SegtrustError, naming the key, where a part that is needed is an expression (`$…`), which would have to be
    executed; and Problems for preprocessing that differs from ours: z-scores over the non-zero voxels of each
    modality (`NormalizeIntensityd` with nonzero and channel_wise), and no resampling.
    """
    folder = Path(folder)
    path = folder / "configs" / "inference.json"
    if not path.is_file():
        raise SegtrustError(f"{folder} is no MONAI bundle: there is no {path}")
    config = _Config(path)
    channels, outputs = _channels_and_outputs(folder / "configs" / "metadata.json")
    crop, orientation = _preprocessing(config)
    if outputs is not None:
        _check_activation(config, outputs)
    window, overlap = _inferer(config)
    return {
        "network": _network(config),
        "channels": channels,
        "outputs": outputs,
        "crop": crop,
        "orientation": orientation,
        "window": window,
        "overlap": overlap,
        "checkpoint": folder / "models" / "model.pt",
    }


class _Config:
    """A bundle's config, read without executing anything: references are followed, expressions refused."""

    def __init__(self, path):
        self.path = path
        try:
            self.content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SegtrustError(f"{path} is no JSON: {error}") from error

    def __contains__(self, key):
        return key in self.content

    def plain(self, key):
        """Return the value of a top-level key with all references resolved."""
        return self._resolve(self.content[key], key, ())

    def shallow(self, key):
        """Return the value of a key with references inside left as they are."""
        value = self.content[key]
        while isinstance(value, str) and value.startswith("@"):
            value = self._find(value, key)
        self._refuse(value, key)
        return value

    def resolved(self, value, key):
        """Return a value with all references resolved; key : its place, for messages."""
        return self._resolve(value, key, ())

    def target(self, value, key):
        """Return the name of the class that a part of the config describes, without its package."""
        if not isinstance(value, dict) or not isinstance(value.get("_target_"), str):
            raise SegtrustError(f"{self.path}: {key} has no _target_")
        return value["_target_"].rpartition(".")[2]

    def _resolve(self, value, key, seen):
        if isinstance(value, dict):
            return {name: self._resolve(part, f"{key}#{name}", seen) for name, part in value.items()}
        if isinstance(value, list):
            return [self._resolve(part, f"{key}#{index}", seen) for index, part in enumerate(value)]
        self._refuse(value, key)
        if isinstance(value, str) and value.startswith("@"):
            if value in seen:
                raise SegtrustError(f"{self.path}: {key} refers to itself by {value}")
            return self._resolve(self._find(value, key), f"{key} ({value})", (*seen, value))
        return value

    def _find(self, reference, key):
        value = self.content
        for part in re.split("#|::", reference.removeprefix("@")):
            try:
                value = value[int(part)] if isinstance(value, list) else value[part]
            except (KeyError, IndexError, ValueError, TypeError):
                raise SegtrustError(f"{self.path}: {key} refers to {reference}, which is not there") from None
        return value

    def _refuse(self, value, key):
        if isinstance(value, str) and value.startswith(("$", "%")):
            raise SegtrustError(
                f"{self.path}: {key} is the expression {value!r}; code from a bundle is not executed. Write the "
                "value out, or describe the model by `network` and `checkpoint` instead of `bundle`."
            )


def _network(config):
    key = next((key for key in ("network_def", "network") if key in config), None)
    if key is None:
        raise SegtrustError(f"{config.path}: there is no network_def")
    arguments = config.plain(key)
    target = arguments.pop("_target_", None) if isinstance(arguments, dict) else None
    if target is None:
        raise SegtrustError(f"{config.path}: {key} has no _target_")
    arguments.pop("_desc_", None)
    place, _, name = target.rpartition(".")
    if place and not f"{place}.".startswith("monai.networks.nets."):
        raise SegtrustError(
            f"{config.path}: {key}#_target_ is {target}; only classes of monai.networks.nets are built, "
            "code from a bundle is not executed"
        )
    return {"name": name, **arguments}


def _transforms(config, key):
    """Return [(class name without the dictionary ending, its arguments, its key)] of a Compose."""
    compose = config.shallow(key)
    steps = compose.get("transforms", []) if isinstance(compose, dict) else compose
    found = []
    for index, step in enumerate(steps):
        place = f"{key}#transforms#{index}"
        name = config.target(step, place)
        kind = re.sub(r"(Dict|d|D)$", "", name)
        # other transforms may hold expressions: what they would do does not matter
        found.append((kind, name, config.resolved(step, place) if kind in READ else step, place))
    return found


def _preprocessing(config):
    """Return (crop, orientation) that the bundle's preprocessing amounts to."""
    if "preprocessing" not in config:
        raise SegtrustError(f"{config.path}: there is no preprocessing, so how it normalises cannot be checked")
    crop, orientation, problems, normalised = "none", "stored", [], False
    for kind, name, step, key in _transforms(config, "preprocessing"):
        if kind == "NormalizeIntensity":
            normalised = True
            if not (step.get("nonzero") is True and step.get("channel_wise") is True):
                problems.append(
                    f"{key} is {name} with nonzero {step.get('nonzero', False)} and channel_wise "
                    f"{step.get('channel_wise', False)}; both must be true"
                )
            problems += [
                f"{key} is {name} with a fixed {argument}, expected that of each modality of each scan"
                for argument in ("subtrahend", "divisor")
                if step.get(argument) is not None
            ]
        elif kind not in HARMLESS:
            problems.append(f"{key} is {name}, which changes what the network sees in a way not done here")
        elif kind == "Orientation":
            orientation = step["axcodes"]
        elif kind == "CropForeground":
            crop = "foreground"
        elif kind == "CenterSpatialCrop":
            crop = {"center": step["roi_size"]}
    if not normalised:
        problems.append("it has no NormalizeIntensityd; scans are z-scored here")
    if problems:
        raise Problems([f"{config.path}: {problem}" for problem in problems])
    return crop, orientation


def _inferer(config):
    """Return (window, overlap) of the bundle's inferer; (None, 0) when it predicts the image as one."""
    if "inferer" not in config:
        return None, 0
    inferer = config.shallow("inferer")
    name = config.target(inferer, "inferer")
    if name == "SimpleInferer":
        return None, 0
    if name != "SlidingWindowInferer" or inferer.get("mode", "constant") != "constant":
        raise SegtrustError(
            f"{config.path}: inferer is {name} with mode {inferer.get('mode', 'constant')}; only SimpleInferer and "
            "SlidingWindowInferer with mode constant are done here"
        )
    inferer = {
        key: config.resolved(inferer[key], f"inferer#{key}") for key in ("roi_size", "overlap") if key in inferer
    }
    return inferer["roi_size"], inferer.get("overlap", 0.25)


def _channels_and_outputs(path):
    if not path.is_file():
        return None, None
    data_format = json.loads(path.read_text(encoding="utf-8")).get("network_data_format", {})
    channels = _names(data_format.get("inputs", {}), MODALITY_NAMES)
    outputs = _names(data_format.get("outputs", {}), REGION_NAMES)
    if outputs is None:
        classes = _names(data_format.get("outputs", {}), CLASS_NAMES)
        outputs = None if classes is None else {"softmax": classes}
    return channels, outputs


def _names(entries, known):
    """Return our names of the channels that the first entry of the metadata defines, or None."""
    definition = next(iter(entries.values()), {}).get("channel_def", {}) if entries else {}
    ours = []
    for index in range(len(definition)):
        name = re.sub("[^a-z0-9]", "", str(definition.get(str(index), "")).lower()).replace("tumour", "tumor")
        match = [key for key, names in known.items() if name in names]
        if not match:
            return None
        ours += match
    return ours if sorted(ours) == sorted(known) else None


def _check_activation(config, outputs):
    """Raise SegtrustError when the postprocessing's activation is not the one that the outputs imply."""
    if "postprocessing" not in config:
        return
    for kind, name, step, key in _transforms(config, "postprocessing"):
        if kind == "Activations":
            expected = "softmax" if isinstance(outputs, dict) else "sigmoid"
            if step.get(expected) is not True:
                raise SegtrustError(
                    f"{config.path}: {key} is {name} without {expected}, but the metadata names the outputs {outputs}"
                )
