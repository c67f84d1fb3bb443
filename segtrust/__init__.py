"""segtrust: can the confidence of a brain-tumour segmentation model be trusted, region by region?

In a notebook: `segtrust.Tally.of_arrays(…).metrics()` gives every metric of a patient, `segtrust.metrics.compute(…)`
those of arrays of one region and mask.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("segtrust")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"


def __getattr__(name):
    # imported when asked for: jobs that need neither start faster
    if name == "Tally":
        from segtrust.tally import Tally

        return Tally
    if name == "metrics":
        from importlib import import_module

        return import_module("segtrust.metrics")
    raise AttributeError(f"module 'segtrust' has no attribute {name!r}")
