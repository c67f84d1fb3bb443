"""Networks: building them by name, loading their weights, and reading region probabilities from their outputs."""

import inspect
import pickle
from contextlib import contextmanager
from pathlib import Path

import monai.networks.nets
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from segtrust.dropout import Stochastic, inject, on_trial, output_sides, silence
from segtrust.errors import SegtrustError

# what the stock networks fill in; every argument can be given otherwise
STOCK = {
    # the published MONAI bundle brats_mri_segmentation
    "SegResNet-BraTS": {
        "name": "SegResNet",
        "spatial_dims": 3,
        "init_filters": 16,
        "blocks_down": [1, 2, 2, 4],
        "blocks_up": [1, 1, 1],
        "in_channels": 4,
        "out_channels": 3,
        "dropout_prob": 0.2,
    },
    "UNet-Res": {
        "name": "UNet",
        "spatial_dims": 3,
        "in_channels": 4,
        "out_channels": 4,
        "channels": [16, 32, 64, 128, 256],
        "strides": [2, 2, 2, 2],
        "num_res_units": 2,
        "dropout": 0.2,
    },
}

WEIGHTS_KEYS = ("model", "state_dict", "network")
PREFIXES = ("module.", "network.", "model.")
N_LISTED = 5


def build(network, seed):
    """Return the network that a config describes, with weights drawn from a seed.

    network : {"name": a class of `monai.networks.nets` or a key of `STOCK`, further keys: its arguments}

    Raises SegtrustError for an unknown name or argument, listing what exists, and for arguments the class refuses.
    """
    arguments = {**STOCK.get(network["name"], {}), **{key: network[key] for key in network if key != "name"}}
    name = arguments.pop("name", network["name"])
    available = _network_classes()
    if name not in available:
        raise SegtrustError(
            f"there is no network {name}; known are {', '.join([*STOCK, *sorted(available)])} "
            f"(classes of monai.networks.nets, MONAI {monai.__version__})"
        )
    parameters = inspect.signature(available[name]).parameters
    unknown = [argument for argument in arguments if argument not in parameters]
    missing = [
        argument
        for argument, parameter in parameters.items()
        if argument not in arguments and parameter.default is parameter.empty and parameter.kind < 2
    ]
    if unknown or missing:
        found = f"unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(missing)}"
        raise SegtrustError(f"network {name}: arguments {found}; it takes {', '.join(parameters)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return available[name](**arguments)
        except Exception as error:
            reason = str(error).splitlines()[0]  # MONAI's of a missing library goes on with a traceback
            raise SegtrustError(f"network {name} refuses its arguments {arguments}: {reason}") from error


def read_network(checkpoint, settings, rate):
    """Return the Stochastic of a model's network with its weights.

    checkpoint : path of the weights
    settings : dict with `network`, see `build`, and `stochastic`: `dropout`, whether the network's own dropout layers
        are active, and `inject`, None or a dict with `after` and `kind`, see `dropout.inject`
    rate : of injected dropout; None without
    """
    network = build(settings["network"], seed=0)
    load_weights(network, load_checkpoint(checkpoint), checkpoint)
    return Stochastic(with_dropout(network, settings["stochastic"], rate))


def with_dropout(network, stochastic, rate):
    """Return a network with the dropout layers that are asked for, changed in place; arguments as `read_network`."""
    if not stochastic["dropout"]:
        silence(network)
    if stochastic["inject"] is not None:
        inject(network, stochastic["inject"]["after"], rate, stochastic["inject"]["kind"])
    return network


def check_sampling(models, trained):
    """Raise SegtrustError where passes cannot be drawn of a network that is to be trained: before hours of training.

    models : `config["models"]`; trained : name of the model that is trained; those that take its weights count too
    """
    for name, entry in models.items():
        if name == trained or entry.get("checkpoint") == {"model": trained}:
            _check_dropout(models[trained]["network"], **entry["stochastic"])


def _check_dropout(network, *, dropout, inject=None, **_):
    if dropout or inject:
        rate = inject and (inject["rate"] if inject["rate"] != "auto" else 0.5)
        built = with_dropout(build(network, seed=0), {"dropout": dropout, "inject": inject}, rate)
        if not Stochastic(built).layers:
            raise SegtrustError(
                f"no dropout layer with a rate above 0 is active in {type(built).__name__}, so all passes would be the "
                "same; give it dropout, inject some (stochastic: inject), or switch it off (stochastic: {dropout: "
                "false})"
            )


def load_checkpoint(path):
    """Return the weights in a file, a dict from layer name to tensor on the CPU.

    path : `.safetensors`, or what `torch.save` wrote: a plain state dict, or a dict that holds one under `model`,
        `state_dict` or `network`

    Nothing is unpickled but tensors and plain containers. Raises SegtrustError for a file that is missing, holds
    more than weights, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise SegtrustError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SegtrustError(
            f"{path} holds Python objects, which are not loaded because they could run code; save only the weights: "
            f"torch.save(network.state_dict(), path). ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, SafetensorError) as error:
        raise SegtrustError(f"{path} cannot be read as a checkpoint: {error}") from error
    if isinstance(content, dict):
        for key in WEIGHTS_KEYS:
            if isinstance(content.get(key), dict):
                content = content[key]
                break
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return dict(content)
        found = f"a dict with {', '.join(repr(key) for key in list(content)[:N_LISTED])}"
    else:
        found = type(content).__name__
    raise SegtrustError(
        f"{path} holds {found}; expected a state dict, or a dict with one under {', '.join(WEIGHTS_KEYS)}"
    )


def load_weights(network, state, path):
    """Copy the weights of a state dict into a network; every layer must be there with its shape.

    state : what `load_checkpoint` returned; a prefix such as `module.` that all names share is removed
    path : for the message only

    Raises SegtrustError that names the first layers that differ, with the shapes expected and found.
    """
    expected = network.state_dict()
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state) and not set(state) & set(expected):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    problems = [
        f"{name}: expected {tuple(tensor.shape)}, found "
        f"{tuple(state[name].shape) if name in state else 'no such layer'}"
        for name, tensor in expected.items()
        if name not in state or state[name].shape != tensor.shape
    ]
    problems += [
        f"{name}: found {tuple(tensor.shape)}, but the network has no such layer"
        for name, tensor in state.items()
        if name not in expected
    ]
    if problems:
        listed = problems[:N_LISTED]
        more = f"\n  and {len(problems) - N_LISTED} more" if len(problems) > N_LISTED else ""
        raise SegtrustError(
            f"{path} does not fit the network {type(network).__name__}:\n  " + "\n  ".join(listed) + more
        )
    network.load_state_dict(state)


def divisor(network, in_channels):
    """Return the smallest power of two that the sides of the network's input must be multiples of.

    Found by forward passes on cubes whose sides have no larger power of two as a factor. Raises SegtrustError when none
    up to 64 fits (as for networks with a fixed image size, which need a window).
    """
    training = network.training
    network.eval()
    try:
        for candidate in (1, 2, 4, 8, 16, 32, 64):
            side = candidate * max(3, 32 // candidate + 1 - 32 // candidate % 2)
            shape = (in_channels, side, side, side)
            try:
                found = output_sides(on_trial(network, shape), shape)
            except (RuntimeError, ValueError, AssertionError, IndexError, TypeError, AttributeError):
                continue
            if found == shape[1:]:
                return candidate
    finally:
        network.train(training)
    raise SegtrustError(
        f"{type(network).__name__} accepts no cube whose side is an odd multiple of 1, 2, 4, … or 64 voxels; "
        "if it was built for one image size, give that size as `window`"
    )


def torch_device(name):
    """Return the torch device for `auto`, `cuda` or `cpu`; `cuda` without a GPU is a SegtrustError."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SegtrustError(
            f"device {name} was asked for, but PyTorch {torch.__version__} finds no GPU here; "
            "use device: auto to fall back to the CPU"
        )
    return torch.device("cuda")


@contextmanager
def arithmetic(device, precision):
    """Compute in `float32` (no TF32) or `bfloat16` (autocast), with the deterministic convolutions of cuDNN."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32
    cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32 = False, False, True, False
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32 = before


def _network_classes():
    nets = monai.networks.nets
    return {
        name: value
        for name, value in vars(nets).items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and not name.startswith("_")
    }
