"""segtrust: can the confidence of a brain-tumour segmentation model be trusted, region by region?"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("segtrust")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"
