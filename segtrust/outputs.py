"""Region probabilities from what a network returns."""

import numpy as np
from scipy.special import expit, softmax

from segtrust.regions import REGIONS, class_regions


def region_probability(logits, outputs):
    """Return probabilities of WT, TC, ET, float32 (n, 3, …), from a network's logits (n, channels, …).

    logits : NumPy array or tensor; the probabilities are of the same kind
    outputs : list of the three regions in the network's order (a sigmoid each), or {"softmax": list of the four
        classes in the network's order}: P(WT) = P(NCR) + P(ED) + P(ET), P(TC) = P(NCR) + P(ET), P(ET)
        (definitions, section 1)
    """
    is_array = isinstance(logits, np.ndarray)
    logits = logits.astype(np.float32, copy=False) if is_array else logits.float()
    if not isinstance(outputs, dict):
        chosen = logits[:, [outputs.index(region) for region in REGIONS]]
        return expit(chosen) if is_array else chosen.sigmoid()
    order = outputs["softmax"]
    if is_array:
        return np.stack([class_regions(distribution, order) for distribution in softmax(logits, axis=1)])
    probability = logits.softmax(1)
    necrotic, oedema, enhancing = (probability[:, order.index(name)] for name in ("NCR", "ED", "ET"))
    core = necrotic + enhancing
    regions = probability[:, :3].clone()
    for place, region in enumerate((core + oedema, core, enhancing)):
        regions[:, place] = region
    return regions.clamp_(max=1)
