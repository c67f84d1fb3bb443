"""Colours that mean the same in every chart and on every page."""

from segtrust.regions import REGIONS

REGION_COLOURS = dict(zip(REGIONS, ("#3a7fd5", "#c98500", "#c23b5f"), strict=True))

# below this entropy (bits) an overlay is transparent, so that the scan stays visible; the colour bar begins here
ENTROPY_SHOWN_FROM = 0.05
