"""Backends compute the same passes; the naive masks do not."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_sample import a_network, a_scan, draw, equal, on_torch

from segtrust import backends
from segtrust.backends import OpenVINOBackend, TorchBackend, export, open_backend
from segtrust.dropout import Stochastic
from segtrust.errors import SegtrustError
from segtrust.files import read_json
from segtrust.networks import build

SHAPE = (24, 20, 16)


def traced(network, folder, window=None):
    path = folder / "trace.xml"
    export(Stochastic(network), 4, window, path)
    about = read_json(path.with_suffix(".json"))
    assert "refusal" not in about, about
    return OpenVINOBackend(path, about, "float32", 1)


@pytest.fixture
def openvino():
    return pytest.importorskip("openvino", reason="OpenVINO is not installed, so its backend is not tested")


def close(first, second):
    """Hold two moments to what float32 promises through a small network."""
    assert first.volumes.keys() == second.volumes.keys()
    n = len(first.volumes)
    a, b = first.summary(n), second.summary(n)
    for name in ("probability", "deterministic", "expected_entropy"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=2e-5)


@pytest.mark.parametrize("kind", ["unet", "segresnet"])
def test_openvino_computes_the_passes_of_pytorch(kind, tmp_path, openvino):
    close(draw(range(4), backend=traced(a_network(kind), tmp_path)), draw(range(4), kind))


@pytest.mark.parametrize("kind", ["unet", "segresnet"])
@pytest.mark.parametrize("masks", ["independent", "balanced", "per_window"])
def test_windows_are_computed_alike_too(kind, masks, tmp_path, openvino):
    settings = {"window": [8, 8, 8], "masks": masks}
    close(
        draw(range(3), backend=traced(a_network(kind), tmp_path, [8, 8, 8]), **settings),
        draw(range(3), kind, **settings),
    )


def test_a_split_on_openvino_gives_the_same_bits(tmp_path, openvino):
    from segtrust.moments import merge

    backend = traced(a_network(), tmp_path)
    parts = [draw(part, backend=backend) for part in (range(2, 5), range(2))]
    assert equal(merge(parts), draw(range(5), backend=backend))


def test_one_trace_serves_patients_of_any_size(tmp_path, openvino):
    backend = traced(a_network(), tmp_path)
    for shape in ((26, 22, 19), (21, 30, 24)):
        scan = a_scan(shape=shape)
        close(draw(range(2), backend=backend, scan=scan), draw(range(2), scan=scan))


@pytest.mark.parametrize(
    "network",
    [
        {"name": "AttentionUnet", "spatial_dims": 3, "in_channels": 4, "out_channels": 3, "channels": [4, 8],
         "strides": [2], "dropout": 0.2},
        {"name": "DynUNet", "spatial_dims": 3, "in_channels": 4, "out_channels": 3, "kernel_size": [3] * 3,
         "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 8, 8], "dropout": 0.2},
    ],
    ids=lambda network: network["name"],
)  # fmt: skip
def test_other_networks_of_monai_are_traced_faithfully(network, tmp_path, openvino):
    backend = traced(build(network, seed=0), tmp_path)
    close(draw(range(2), backend=backend), draw(range(2), backend=on_torch(build(network, seed=0))))


class DependsOnSize(torch.nn.Module):
    """A network that a trace made on one size does not tell on another."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout3d(0.2)
        self.convolution = torch.nn.Conv3d(4, 3, 1)

    def forward(self, image):
        return self.convolution(self.dropout(image)) * (10 if image.shape[-1] > 32 else 1)


def test_a_network_that_is_not_traced_faithfully_is_refused_with_the_reason(tmp_path, openvino):
    export(Stochastic(DependsOnSize()), 4, None, tmp_path / "trace.xml")
    assert "probabilities differ" in read_json(tmp_path / "trace.json")["refusal"]


def test_a_network_whose_trace_depends_on_the_size_is_refused(tmp_path, openvino):
    network = build({"name": "BasicUNet", "in_channels": 4, "out_channels": 3, "features": [4] * 6, "dropout": 0.2}, 0)
    export(Stochastic(network), 4, None, tmp_path / "trace.xml")
    assert "refusal" in read_json(tmp_path / "trace.json")


def opened(tmp_path, network=None, **changes):
    settings = {
        "network": network or {"name": "UNet-Res", "channels": [4, 8], "strides": [2], "out_channels": 3},
        "stochastic": {"dropout": True, "inject": None},
        "backend": "auto",
        "precision": "float32",
        "sample": {"channels": ["t1ce", "t1", "t2", "flair"], "window": None},
    } | changes
    path = tmp_path / "weights.pt"
    torch.save(build(settings["network"], seed=3).state_dict(), path)
    lines = []
    backend = open_backend(
        path, digest="d", settings=settings, rate=None, device="cpu", threads=1, cache=tmp_path / "cache",
        log=lines.append,
    )  # fmt: skip
    return backend, lines


def test_automatic_is_openvino_on_a_cpu_where_it_is_installed(tmp_path, openvino):
    assert opened(tmp_path)[0].name == "openvino"


def test_automatic_is_pytorch_where_openvino_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert opened(tmp_path)[0].name == "torch"
    with pytest.raises(SegtrustError, match=r"not installed: pip install 'segtrust\[openvino\]'"):
        opened(tmp_path, backend="openvino")


def test_a_second_job_needs_no_pytorch_for_a_traced_network(tmp_path, monkeypatch, openvino):
    opened(tmp_path)
    monkeypatch.setattr(backends, "_read", lambda *arguments: pytest.fail("the network was read again"))
    monkeypatch.setattr(torch, "save", lambda *arguments: None)
    assert opened(tmp_path)[0].name == "openvino"


def test_what_openvino_refuses_pytorch_computes_and_the_log_says_so(tmp_path, monkeypatch, openvino):
    monkeypatch.setattr(backends, "LARGEST_DIFFERENCE", -1)
    backend, lines = opened(tmp_path)
    assert backend.name == "torch"
    assert "because OpenVINO does not" in lines[0]
    with pytest.raises(SegtrustError, match="take backend: torch"):
        opened(tmp_path, backend="openvino")


def test_native_dropout_can_be_left_off(tmp_path):
    off = {"dropout": False, "inject": None}
    assert opened(tmp_path, stochastic=off, backend="torch")[0].layers == []


def test_a_batch_that_does_not_fit_is_halved_and_changes_nothing(monkeypatch):
    network = Stochastic(a_network())
    limited = TorchBackend(network, "cpu", "float32", 1)
    monkeypatch.setattr(limited, "out_of_memory", (MemoryError,))
    plain, sizes = limited.predict, []

    def predict(images, held):
        if len(images) > 2:
            raise MemoryError
        sizes.append(len(images))
        return plain(images, held)

    monkeypatch.setattr(limited, "predict", predict)
    lines = []
    found = draw(range(6), backend=limited, batch=8, log=lines.append)
    assert max(sizes) == 2
    assert [line for line in lines if "out of memory" in line] == [
        "a: out of memory; going on with batches of 4",
        "a: out of memory; going on with batches of 2",
    ]
    assert equal(found, draw(range(6), batch=2))


def test_a_single_pass_that_does_not_fit_is_an_error(monkeypatch):
    backend = on_torch(a_network())
    monkeypatch.setattr(backend, "out_of_memory", (MemoryError,))
    monkeypatch.setattr(backend, "predict", lambda images, held: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(SegtrustError, match=r"a: one pass of 20×16×20 voxels does not fit the memory"):
        draw(range(1, 3), backend=backend, batch=2)


def test_windows_fill_a_batch_that_passes_leave_open():
    backend = on_torch(a_network())
    backend.device = "cpu"
    whole = draw(range(2), backend=backend, window=[8, 8, 8], batch=1)
    sizes, plain = [], backend.predict
    spied = SimpleNamespace(
        device="gpu", layers=backend.layers, precision="float32", name="torch", out_of_memory=(),
        mask_shapes=backend.mask_shapes, to_device=torch.from_numpy,
        predict=lambda images, held: sizes.append(len(images)) or torch.from_numpy(plain(images, held)),
    )  # fmt: skip
    found = draw(range(2), backend=spied, window=[8, 8, 8], batch=8)
    assert max(sizes) == 8
    close(found, whole)


@pytest.mark.parametrize("n_outputs", [3, 4])
def test_tensors_of_a_gpu_are_summed_as_arrays_are(n_outputs):
    network = {"name": "UNet-Res", "channels": [4, 8], "strides": [2], "out_channels": n_outputs}
    outputs = ["TC", "WT", "ET"] if n_outputs == 3 else {"softmax": ["background", "NCR", "ED", "ET"]}
    backend = on_torch(build(network, seed=2))
    whole = draw(range(6), backend=backend, outputs=outputs)
    backend.device = "gpu"  # what it returns then are tensors, made in inference mode; they lie on the CPU
    found = draw(range(6), backend=backend, outputs=outputs, batch=4)
    close(found, whole)
    for key, sums in found.sums.items():
        assert {name: array.dtype for name, array in sums.items()} == {n: a.dtype for n, a in whole.sums[key].items()}


def test_a_mask_for_every_window_makes_the_variance_too_small_where_windows_overlap():
    # one voxel in many windows: the mean of several networks varies less than one network does
    settings = {"window": [8, 8, 8], "overlap": 0.5, "crop": "none"}
    held, naive = (draw(range(20), "segresnet", masks=masks, **settings) for masks in ("independent", "per_window"))
    ratio = naive.summary(20).variance.mean() / held.summary(20).variance.mean()
    assert ratio < 0.6


def test_without_overlap_a_mask_for_every_window_leaves_the_variance_as_it_is():
    settings = {"window": [8, 8, 8], "overlap": 0.0, "crop": {"center": [16, 16, 16]}}
    held, naive = (draw(range(20), "segresnet", masks=masks, **settings) for masks in ("independent", "per_window"))
    ratio = naive.summary(20).variance.mean() / held.summary(20).variance.mean()
    assert 0.7 < ratio < 1.4
