"""What computes a network: PyTorch on a GPU or CPU, or OpenVINO on a CPU.

A backend is a plain function of (images, multipliers of the dropout layers); which one computes changes no pass by
more than rounding. OpenVINO runs what PyTorch traced once for a model: the trace is kept beside the model's results, so
that only the first job needs PyTorch and MONAI.
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from segtrust.draws import Layer, draw_masks, multipliers
from segtrust.errors import SegtrustError
from segtrust.files import own_partial, read_json, remove_leftovers, write_json
from segtrust.provenance import code_digest, settings_digest, versions

# probabilities of both backends, on random masks
LARGEST_DIFFERENCE = 1e-3
_SMALL_VOLUME = 2_000_000


class TorchBackend:
    """A network computed by PyTorch.

    stochastic : `segtrust.dropout.Stochastic`
    device : "cuda" or "cpu"; precision : "float32" (no TF32) or "bfloat16" (autocast)
    threads : of the processor
    """

    name = "torch"

    def __init__(self, stochastic, device, precision, threads):
        import torch

        torch.set_num_threads(threads)
        self._torch = torch
        self._stochastic = stochastic
        self.device = device
        self.precision = precision
        self.layers = stochastic.layers
        self.out_of_memory = (torch.OutOfMemoryError,)
        self._place = torch.device(device)
        stochastic.to(self._place, memory_format=torch.channels_last_3d)

    def divisor(self, n_channels):
        """Return what the sides of images must be multiples of."""
        from segtrust.networks import divisor

        return divisor(self._stochastic, n_channels)

    def mask_shapes(self, shape):
        """Return {layer name: list of mask shapes, one per call} of one image (channels, x, y, z)."""
        return self._stochastic.mask_shapes(shape)

    def to_device(self, image):
        """Return a float32 array where this backend computes, an array or a tensor."""
        return image if self.device == "cpu" else self._torch.from_numpy(image).to(self._place)

    def predict(self, images, held):
        """Return logits (n, outputs, x, y, z), float32, an array on the CPU and a tensor on a GPU.

        images : (n, channels, x, y, z), as `to_device` gives them
        held : {layer name: list of float32 arrays, first axis n}, from `draws.multipliers`; None with dropout off
        """
        from segtrust.dropout import logits_of
        from segtrust.networks import arithmetic

        torch = self._torch
        with torch.inference_mode(), arithmetic(self._place, self.precision):
            tensors = torch.as_tensor(images, device=self._place)
            moved = None
            if held is not None:
                moved = {name: [torch.from_numpy(call).to(self._place) for call in held[name]] for name in held}
            logits = logits_of(self._stochastic(tensors.contiguous(memory_format=torch.channels_last_3d), moved))
            logits = logits.float()
            return logits.contiguous() if self.device != "cpu" else logits.contiguous().numpy()

    def batch(self, predict_one, voxels):
        """Return how many passes and windows are best computed at once.

        On a GPU, as many as four fifths of its free memory hold, found by predicting one; on a CPU two small volumes,
        because PyTorch computes single small ones without oneDNN.

        predict_one : function without arguments; voxels : of one image
        """
        if self.device == "cpu":
            return 2 if voxels < _SMALL_VOLUME else 1
        cuda = self._torch.cuda
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        predict_one()
        needed = max(cuda.max_memory_allocated() - before, 1)
        cuda.empty_cache()
        fitting = int(0.8 * cuda.mem_get_info()[0] / needed)
        return 1 << max(fitting.bit_length() - 1, 0)

    def after_out_of_memory(self):
        """Give memory back before a smaller batch is tried."""
        if self.device == "cuda":
            self._torch.cuda.empty_cache()


class OpenVINOBackend:
    """A traced network computed by OpenVINO on a CPU.

    path : of the trace, `….xml`, which `export` wrote; about : what is in the `….json` beside it
    precision : "float32", or "bfloat16" where the processor computes it; the attribute of this name says what is used
    threads : of the processor
    rate : of injected dropout; None for that of the trace
    """

    name = "openvino"
    device = "cpu"
    out_of_memory = ()

    def __init__(self, path, about, precision, threads, rate=None):
        import openvino

        self._openvino = openvino
        self._about = about
        self._core = openvino.Core()
        self._model = self._core.read_model(str(path))
        self._compiled = {}
        able = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.precision = precision if able else "float32"
        self._settings = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[self.precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
        }
        self.layers = [
            Layer(layer["name"], layer["kind"], rate if rate and layer["injected"] else layer["rate"])
            for layer in about["layers"]
        ]

    def divisor(self, n_channels):
        return self._about["divisor"]

    def mask_shapes(self, shape):
        if any(side % self._about["divisor"] for side in shape[1:]):
            sides, step = "×".join(map(str, shape[1:])), self._about["divisor"]
            raise SegtrustError(
                f"the network does not take images of {sides} voxels, sides must be multiples of {step}"
            )
        return {
            layer["name"]: [_shape_of(call, shape[1:]) for call in layer["calls"]] for layer in self._about["layers"]
        }

    def to_device(self, image):
        return image

    def predict(self, images, held):
        if held is None:
            shapes = self.mask_shapes(images.shape[1:])
            held = {name: [np.ones((len(images), *call[1:]), np.float32) for call in shapes[name]] for name in shapes}
        inputs = [np.ascontiguousarray(images), *(call for layer in self.layers for call in held[layer.name])]
        if images.shape not in self._compiled:
            model = self._model.clone()
            model.reshape(
                {
                    port: self._openvino.PartialShape(list(array.shape))
                    for port, array in zip(model.inputs, inputs, strict=True)
                }
            )
            self._compiled = {images.shape: self._core.compile_model(model, "CPU", self._settings)}
        return self._compiled[images.shape](inputs)[0]

    def batch(self, predict_one, voxels):
        return 1

    def after_out_of_memory(self):
        pass


def rate_of(inject, path):
    """Return the rate of injected dropout, in (0, 1), or None where none is injected.

    inject : None, or a dict whose `rate` is a number or "auto"
    path : of the file that rule `inject` wrote, which is read for "auto" alone
    """
    if inject is None:
        return None
    return read_json(path)["rate"] if inject["rate"] == "auto" else inject["rate"]


def open_backend(weights, *, digest, settings, rate, device, threads, cache, log):
    """Return the backend that computes a model's network.

    weights : path of the checkpoint; digest : of its content
    settings : as of `models.Model`; its `backend` is "torch", "openvino" or "auto", which takes OpenVINO on CPUs
        where it is installed
    rate : of injected dropout, or None
    device : "auto", "cuda" or "cpu"
    threads : of the processor
    cache : folder that keeps traces; one serves every rate of injected dropout
    log : function that takes a line of text

    Raises SegtrustError for a GPU or OpenVINO that is asked for and not there, and for weights that do not fit.
    """
    backend, precision, window = settings["backend"], settings["precision"], settings["sample"]["window"]
    on_gpu = _on_gpu(device)
    installed = find_spec("openvino") is not None
    if backend == "openvino" and (on_gpu or not installed):
        raise SegtrustError(
            "backend openvino computes on CPUs; set device: cpu"
            if installed
            else "backend openvino was asked for, but it is not installed: pip install 'segtrust[openvino]', or take "
            "backend: auto"
        )

    def with_torch():
        return TorchBackend(_read(weights, settings, rate), "cuda" if on_gpu else "cpu", precision, threads)

    if on_gpu or backend == "torch" or not installed:
        return with_torch()
    identity = {
        "network": settings["network"],
        "dropout": settings["stochastic"]["dropout"],
        "inject": {**(settings["stochastic"]["inject"] or {}), "rate": None},
        "channels": len(settings["sample"]["channels"]),
        "window": window,
        "weights": digest,
        "code": code_digest(__file__),
        "versions": versions(),
    }
    path = Path(cache) / f"{settings_digest(identity)[:16]}.xml"
    if not _about(path).exists():
        export(_read(weights, settings, rate), len(settings["sample"]["channels"]), window, path)
    about = read_json(_about(path))
    if "refusal" not in about:
        return OpenVINOBackend(path, about, precision, threads, rate)
    refusal = about["refusal"]
    if backend == "openvino":
        raise SegtrustError(f"OpenVINO does not compute this network: {refusal}; take backend: torch")
    log(f"PyTorch computes this network, because OpenVINO does not: {refusal}")
    return with_torch()


def export(stochastic, n_channels, window, path):
    """Trace a network and write it for OpenVINO: `….xml`, `….bin` and `….json`, which says what it needs.

    stochastic : `segtrust.dropout.Stochastic` on the CPU
    window : (x, y, z), the only size that will be predicted, of networks that are built for one; None for any size

    The trace is held against PyTorch under random masks, on another size than it was made with where the network takes
    several. A network that cannot be traced faithfully leaves a `refusal` in the `….json`. Several jobs may do this at
    once: each works in a folder of its own, and the `….json` is there last.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    folder = own_partial(path)
    folder.mkdir()
    try:
        about = _written(stochastic, n_channels, window, folder / path.name)
        for ending in (".bin", ".xml"):
            os.replace((folder / path.name).with_suffix(ending), path.with_suffix(ending))
    except _Refused as refusal:
        about = {"refusal": str(refusal)}
    finally:
        shutil.rmtree(folder)
    write_json(_about(path), about)


class _Refused(SegtrustError):
    """OpenVINO does not compute a network, for a reason that lies in the network."""


def _written(stochastic, n_channels, window, path):
    """Write the trace of a network, and return what is to be known about it; raise _Refused."""
    step, probes = _probes(stochastic, n_channels, window)
    shapes = [stochastic.mask_shapes((n_channels, *probe)) for probe in probes]
    layers = [_layer(layer, *(found[layer.name] for found in shapes), probes) for layer in stochastic.layers]
    about = {"divisor": step, "layers": layers}
    try:
        model = _traced(stochastic, n_channels, probes[0], shapes[0])
    except Exception as error:  # tracing and conversion raise many kinds
        raise _Refused(str(error).splitlines()[0]) from error
    _write_trace(model, path)
    difference = _difference(stochastic, n_channels, probes[1], path, about)
    if not difference <= LARGEST_DIFFERENCE:
        raise _Refused(f"probabilities differ by up to {difference:.2g}")
    return about


def _layer(layer, shapes, other_shapes, probes):
    """Return what is kept of a dropout layer: how its masks grow with the image; shapes : on each of the probes."""
    from segtrust.dropout import is_injected

    calls = [_call(shape, probes[0]) for shape in shapes]
    if [_shape_of(call, probes[1]) for call in calls] != [tuple(shape) for shape in other_shapes]:
        raise _Refused(f"the masks of {layer.name} do not grow with the image")
    return {
        "name": layer.name,
        "kind": layer.kind,
        "rate": layer.rate,
        "injected": is_injected(layer.name),
        "calls": calls,
    }


def _on_gpu(device):
    if device == "cpu" or (device == "auto" and not _may_have_gpu()):
        return False
    from segtrust.networks import torch_device

    return torch_device(device).type == "cuda"


def _may_have_gpu():
    """Say whether asking PyTorch for a GPU is worth the seconds of importing it."""
    return any(Path(place).exists() for place in ("/dev/dxg", "/dev/kfd")) or any(Path("/dev").glob("nvidia[0-9]*"))


def _read(weights, settings, rate):
    from segtrust.networks import read_network

    return read_network(weights, settings, rate)


def _about(path):
    return Path(path).with_suffix(".json")


def _probes(stochastic, n_channels, window):
    """Return (what sides must be multiples of, two sizes to try a network on: small, and different if it takes any)."""
    from segtrust.networks import divisor

    try:
        step = divisor(stochastic, n_channels)
    except SegtrustError:
        if window is None:
            raise
        return 1, [tuple(window)] * 2
    least = step * max(3, -(-32 // step))
    return step, [(least,) * 3, (least + step, least, least + 2 * step)]


def _call(shape, probe):
    """Return how the shape of a mask follows from the sides of the image."""
    if all(side == 1 for side in shape[2:]):
        return {"shape": list(shape)}
    if len(shape) != 5 or any(side % own for side, own in zip(probe, shape[2:], strict=True)):
        raise _Refused(f"a dropout layer has features of shape {tuple(shape)}, no fraction of the image")
    return {"channels": shape[1], "steps": [side // own for side, own in zip(probe, shape[2:], strict=True)]}


def _shape_of(call, sides):
    if "shape" in call:
        return tuple(call["shape"])
    return (1, call["channels"], *(side // step for side, step in zip(sides, call["steps"], strict=True)))


def _random_inputs(stochastic, n_channels, probe, shapes):
    """Return (image, [multipliers]) as arrays: noise, and one draw of the masks."""
    image = np.random.default_rng(0).normal(size=(1, n_channels, *probe)).astype(np.float32)
    held = multipliers(stochastic.layers, [draw_masks(stochastic.layers, shapes, 0, "probe", "probe", 0)])
    return image, held


def _traced(stochastic, n_channels, probe, shapes):
    """Return the OpenVINO model of a network whose inputs are an image and the multipliers of every call.

    Not by `openvino.convert_model`, which sends usage statistics.
    """
    import warnings

    import torch
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    from segtrust.dropout import logits_of

    image, held = _random_inputs(stochastic, n_channels, probe, shapes)
    counts = {name: len(calls) for name, calls in held.items()}

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stochastic = stochastic

        def forward(self, image, *flat):
            left = list(flat)
            return logits_of(
                self.stochastic(image, {name: [left.pop(0) for _ in range(n)] for name, n in counts.items()})
            )

    flat = [torch.from_numpy(call) for calls in held.values() for call in calls]
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Plain().eval(), (torch.from_numpy(image), *flat), check_trace=False)
    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced)  # must live until the conversion is done
    return frontend.convert(frontend.load(decoder))


def _write_trace(model, path):
    import openvino

    openvino.serialize(model, str(path), str(path.with_suffix(".bin")))


def _difference(stochastic, n_channels, probe, path, about):
    """Return the largest difference between probabilities of the two backends."""
    import torch

    shapes = stochastic.mask_shapes((n_channels, *probe))
    image, held = _random_inputs(stochastic, n_channels, probe, shapes)
    exact = TorchBackend(stochastic, "cpu", "float32", torch.get_num_threads()).predict(image, held)
    try:
        traced = OpenVINOBackend(path, about, "float32", torch.get_num_threads()).predict(image, held)
    except RuntimeError as error:  # a trace that does not fit the other size
        raise _Refused(str(error).splitlines()[0]) from error
    first, second = (1 / (1 + np.exp(-logits)) for logits in (exact, traced))
    return float(np.abs(first - second).max())
