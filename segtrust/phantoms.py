"""Phantoms: synthetic brains with gliomas, in the exact layout of BraTS 2021.

They exist to try, test and demonstrate everything without anybody's scan. A phantom is drawn in steps: the
traits of a patient (how old the brain looks, how faint the tumour), the anatomy (soft maps of tissue from
implicit surfaces and smooth random fields), the tumour, and the appearance of both in four modalities.

Patient `index` of cohort `seed` depends on (seed, index, shape) alone: enlarging a cohort keeps its first
patients. The brain keeps its proportions and fills the grid as far as the tightest axis allows: on
240 × 240 × 155 voxels it has the size of a real one, on a smaller grid it is a small brain on 1 mm voxels.
The millimetres below are those of a full-size brain.
"""

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from segtrust.errors import SegtrustError
from segtrust.files import replacing
from segtrust.progress import progress

MODALITIES = ("t1", "t1ce", "t2", "flair")
CODING = "brats2021"
NECROSIS, OEDEMA, ENHANCING = 1, 2, 4
SMALLEST_AXIS = 24

# Extent of a full-size brain (left-right, front-back, bottom-top), and the share of the grid it may fill.
BRAIN_MM = (134.0, 177.0, 136.0)
FILL = 0.88

# Brightness of white matter in typical files, and of every tissue relative to it.
WHITE_MATTER = {"t1": 1030.0, "t1ce": 2200.0, "t2": 440.0, "flair": 1050.0}
PARTS = ("grey", "deep_grey", "csf", "necrosis", "solid", "oedema", "enhancing")
BRIGHTNESS = {
    "t1": dict(zip(PARTS, (0.77, 0.86, 0.34, 0.55, 0.66, 0.80, 0.82), strict=True)),
    "t1ce": dict(zip(PARTS, (0.80, 0.88, 0.38, 0.58, 0.70, 0.82, 2.10), strict=True)),
    "t2": dict(zip(PARTS, (1.38, 1.12, 3.40, 2.80, 2.40, 2.15, 1.90), strict=True)),
    "flair": dict(zip(PARTS, (1.24, 1.14, 0.28, 1.15, 1.85, 2.10, 1.70), strict=True)),
}


@dataclass(frozen=True)
class Phantom:
    """One synthetic patient.

    images : dict t1, t1ce, t2, flair → int16 (x, y, z), ≥ 1 in the brain and 0 outside
    labels : uint8 (x, y, z), codes of BraTS 2021: 0 background, 1 necrotic core, 2 oedema, 4 enhancing tumour
    """

    images: dict
    labels: np.ndarray


@dataclass(frozen=True)
class Lesion:
    """One focus of tumour: centre (3,) and radius in mm, and the stretch (3,) of its axes."""

    centre: np.ndarray
    radius_mm: float
    stretch: np.ndarray


@dataclass(frozen=True)
class Traits:
    """What distinguishes a patient, whatever the grid.

    size, ventricles, atrophy : relative to a typical brain;  white_matter_lesions : 0 (none) to 1
    rim_mm, oedema_mm : typical thickness of the enhancing rim and of the oedema
    difficulty : 0 (clear) to 1; drives the next five
    contrast_* : of a part of the tumour to white matter; 1 as in BRIGHTNESS, 0 invisible
    blur_mm : softness of the tumour's borders;  noise : per modality, relative to white matter
    bias : standard deviation of the logarithm of the bias field;  gain : per modality, of the scanner
    """

    size: float
    ventricles: float
    atrophy: float
    white_matter_lesions: float
    lesions: tuple
    enhances: bool
    rim_mm: float
    oedema_mm: float
    difficulty: float
    contrast_enhancing: float
    contrast_oedema: float
    contrast_core: float
    blur_mm: float
    noise: dict
    bias: float
    gain: dict


def draw_traits(generator):
    """Return the Traits of one patient, drawn from a numpy Generator."""
    difficulty = generator.beta(1.3, 1.7)
    lesions = [_draw_lesion(generator, generator.uniform(15, 30))]
    if generator.random() < 0.15:
        lesions.append(_draw_lesion(generator, generator.uniform(7, 13)))

    def contrast():
        return float(np.clip(1.1 - 0.65 * difficulty + generator.normal(0, 0.12), 0.25, 1.25))

    return Traits(
        size=generator.uniform(0.95, 1.03),
        ventricles=generator.uniform(0.75, 1.5),
        atrophy=generator.uniform(0.5, 1.5),
        white_matter_lesions=max(0.0, generator.uniform(-0.6, 1.0)),
        lesions=tuple(lesions),
        enhances=bool(generator.random() < 0.8),
        rim_mm=generator.uniform(3.0, 9.0),
        oedema_mm=generator.uniform(5.0, 28.0),
        difficulty=difficulty,
        contrast_enhancing=contrast(),
        contrast_oedema=contrast(),
        contrast_core=contrast(),
        blur_mm=generator.uniform(0.4, 1.0) + 1.5 * difficulty,
        noise={name: 0.015 + 0.055 * difficulty * generator.uniform(0.5, 1.3) for name in MODALITIES},
        bias=generator.uniform(0.03, 0.12),
        gain={name: float(np.exp(generator.normal(0, 0.18))) for name in MODALITIES},
    )


def _draw_lesion(generator, radius_mm):
    """Return a Lesion of this radius somewhere in the white matter of either hemisphere."""
    side = generator.choice((-1.0, 1.0))
    angle, out = generator.uniform(-np.pi / 2, np.pi / 2), generator.uniform(0.35, 0.62)
    across, along = side * (8 + 56 * out * np.cos(angle)), 84 * out * np.sin(angle)
    centre = np.array([across, along, generator.uniform(-8, 36)])
    return Lesion(centre, radius_mm, generator.uniform(0.8, 1.25, 3))


# -------------------------------------------------------------------------------------------- building blocks


def smooth_field(generator, shape, length):
    """Return a smooth Gaussian random field, mean 0 and standard deviation 1 at every voxel, float32.

    A sum of cubic B-splines with independent normal coefficients on knots `length` voxels apart. Matrix
    products are avoided on purpose: their rounding depends on the number of threads.
    """
    n_knots = [int((n - 1) / length) + 4 for n in shape]
    field = generator.standard_normal(n_knots, dtype=np.float32)
    for n in shape:
        field = _along_first_axis(field, n, length)
    return field


def _along_first_axis(coefficients, n, length):
    """Return cubic B-splines at n voxels along the first axis, which becomes the last; variance stays 1."""
    position = np.arange(n) / length
    knot = position.astype(int)
    t = position - knot
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3])
    weights = (weights / np.sqrt((weights**2).sum(axis=0))).astype(np.float32)[..., None, None]
    field = sum(weight * coefficients[knot + k] for k, weight in enumerate(weights))
    return np.ascontiguousarray(np.moveaxis(field, 0, -1))


def _step(distance, softness):
    """Return a soft step: 1 where distance ≪ 0, 0 where distance ≫ 0."""
    return (0.5 - 0.5 * np.tanh(distance / softness)).astype(np.float32)


def _ellipsoid(points, centre, semi_axes):
    """Return the approximate signed distance (mm, negative inside) to an ellipsoid."""
    scaled = [(p - c) / a for p, c, a in zip(points, centre, semi_axes, strict=True)]
    radius = np.sqrt(sum(x * x for x in scaled))
    slope = np.sqrt(sum((x / a) ** 2 for x, a in zip(scaled, semi_axes, strict=True)))
    return radius * (radius - 1) / np.maximum(slope, 1e-6)


def _capsule(points, start, end, radius_start, radius_end):
    """Return the signed distance (mm, negative inside) to a tapering tube."""
    start, end = np.array(start, np.float32), np.array(end, np.float32)
    along = end - start
    t = sum((p - s) * d for p, s, d in zip(points, start, along, strict=True)) / float(along @ along)
    t = np.clip(t, 0, 1)
    gap = np.sqrt(sum((p - s - t * d) ** 2 for p, s, d in zip(points, start, along, strict=True)))
    return gap - (radius_start + t * (radius_end - radius_start))


def _blend(a, b, width):
    """Return the smooth minimum of two distances: a union whose seam is rounded over `width` mm."""
    h = np.maximum(width - np.abs(a - b), 0) / width
    return np.minimum(a, b) - h * h * width / 4


# ---------------------------------------------------------------------------------------------------- anatomy


@dataclass(frozen=True)
class Frame:
    """The box of a grid that holds the brain.

    box : slices into the grid;  shape : its voxels
    points : (right-to-left, anterior, superior) of each voxel, float32, in mm of a full-size brain
    voxel_mm : size of a voxel in those mm
    """

    box: tuple
    shape: tuple
    points: list
    voxel_mm: float


def brain_frame(shape, size):
    """Return the Frame of a brain of relative `size` centred in a grid of this shape (LPS axes)."""
    scale = size * FILL * min(n / extent for n, extent in zip(shape, BRAIN_MM, strict=True))
    box, axes = [], []
    for n, extent, direction in zip(shape, BRAIN_MM, (1, -1, 1), strict=True):
        middle, reach = (n - 1) / 2, scale * (extent / 2 + 6) + 2
        first, last = max(0, int(middle - reach)), min(n, int(middle + reach) + 1)
        box.append(slice(first, last))
        axes.append((direction * (np.arange(first, last) - middle) / scale).astype(np.float32))
    points = np.meshgrid(*axes, indexing="ij")
    return Frame(tuple(box), points[0].shape, points, 1 / scale)


def _warped(frame, generator, amplitude_mm):
    """Return the points of a frame displaced by smooth random fields, so that no two brains are alike."""
    length = 45 / frame.voxel_mm
    return [p + amplitude_mm * smooth_field(generator, frame.shape, length) for p in frame.points]


def _pushed(points, lesions):
    """Return where the tissue at each point was before the lesions pushed it aside (mass effect)."""
    for lesion in lesions:
        offsets = [p - c for p, c in zip(points, lesion.centre.astype(np.float32), strict=True)]
        squared = sum(o * o for o in offsets) / (1.7 * lesion.radius_mm) ** 2
        shrink = 0.35 * np.exp(-squared)
        points = [p - o * shrink for p, o in zip(points, offsets, strict=True)]
    return points


def _vault(points):
    """Return the signed distance to the egg that both hemispheres fill from above, narrower in front."""
    x, a, s = points
    narrowed = x / (1.0 - 0.0010 * a)
    blunt = narrowed * np.sqrt(np.abs(narrowed / 66))  # flatter flanks than an ellipsoid's
    return _ellipsoid((blunt, a, s), (0, 0, 0), (66, 88, 67))


def _cerebrum(points):
    """Return the signed distance to the hemispheres: the vault, cut by the base, and temporal lobes."""
    x, a, s = points
    hull = -_blend(-_vault(points), 22 + 0.06 * a + s, 16.0)
    temporal = _ellipsoid((np.abs(x), a, s), (39, 4, -26), (24, 40, 21))
    return _blend(hull, temporal, 16.0)


def _ventricles(points, scale):
    """Return the signed distance to the lateral, third and fourth ventricles; `scale` widens them."""
    x, a, s = points
    mirrored = (np.abs(x), a, s)
    tubes = (
        ((8, 34, 6), (9, 12, 15), 4.5, 5.0),
        ((9, 12, 15), (11, -18, 19), 5.0, 4.5),
        ((11, -18, 19), (25, -36, 8), 4.5, 6.5),
        ((25, -36, 8), (23, -58, 2), 5.0, 1.5),
        ((25, -36, 8), (33, -8, -20), 4.0, 2.0),
    )
    distance = _ellipsoid(points, (0, -4, 2), (1.6, 14, 9))
    distance = np.minimum(distance, _ellipsoid(points, (0, -38, -34), (6, 5, 8)))
    for start, end, first, last in tubes:
        distance = np.minimum(distance, _capsule(mirrored, start, end, scale * first, scale * last))
    return distance


def _deep_grey(points):
    """Return the signed distance to thalamus, caudate head and lentiform nucleus on both sides."""
    x, a, s = points
    mirrored = (np.abs(x), a, s)
    thalamus = _ellipsoid(mirrored, (11, -13, 5), (8, 14, 9))
    caudate = _ellipsoid((np.abs(x) - 0.15 * (20 - a), a, s), (16, 19, 9), (5, 12, 10))
    lentiform = _ellipsoid((np.abs(x) + 0.25 * a, a, s), (26, 4, 0), (6.5, 18, 11))
    return np.minimum(np.minimum(thalamus, caudate), lentiform)


def _sulci(frame, generator, points, depth):
    """Return the distance (mm) to the nearest sulcus.

    Sulci are the zero level of a random field that changes little towards the centre of the brain, down to a
    `depth` (mm) that varies from place to place; distance to the level is |f| / |∇f| to first order.
    """
    x, a, s = points
    centred = (x, a, s - 2)
    radius = np.sqrt(sum((c / e) ** 2 for c, e in zip(centred, (66, 88, 66), strict=True)))
    outward = np.clip(radius, 0.2, None) ** -0.55 - 1
    index = np.indices(frame.shape, dtype=np.float32)
    steps = np.array([1, -1, 1], np.float32) / frame.voxel_mm
    coordinates = [i + c * outward * d for i, c, d in zip(index, centred, steps, strict=True)]
    length = max(5.0 / frame.voxel_mm, 2.1)
    source = smooth_field(generator, frame.shape, length)
    level = ndimage.map_coordinates(source, coordinates, order=1, mode="nearest")
    slope = np.sqrt(sum(g * g for g in np.gradient(level))) / frame.voxel_mm
    typical = 1 / (1.2 * length * frame.voxel_mm)
    across = np.abs(level) / np.maximum(slope, 0.5 * typical)
    bottom = 24 + 7 * smooth_field(generator, frame.shape, 14 / frame.voxel_mm)
    return np.hypot(across, np.maximum(depth - bottom, 0))


def _fissures(points):
    """Return the distance (mm) to the fissure between the hemispheres and to the Sylvian fissures."""
    x, a, s = points
    callosum = _ellipsoid((x, a, s), (0, -2, 0), (40, 46, 30))
    between = np.hypot(x, np.maximum(-callosum, 0))
    sylvian = np.hypot(s + 10 - 0.25 * a, np.maximum(38 - np.abs(x), 0))
    sylvian = np.hypot(sylvian, np.maximum(np.abs(a + 2) - 26, 0))
    return np.minimum(between, sylvian)


def anatomy(frame, generator, traits):
    """Return the healthy tissues of a brain, pushed aside by its lesions.

    Returns a dict of (x, y, z) arrays: brain (bool); cerebrum (bool, without stem and cerebellum); soft maps
    in [0, 1] of grey, deep_grey, csf, ventricle (part of csf), vessel (part of csf) and white (the rest);
    depth_mm below the surface of the brain; ventricle_mm, the distance to a ventricle; and points, the
    coordinates of the tissue before anything pushed it.
    """
    hull_points = _warped(frame, generator, 2.0)
    points = _pushed(hull_points, traits.lesions)
    soft = 0.7 * frame.voxel_mm

    cerebellum = _ellipsoid((np.abs(hull_points[0]), *hull_points[1:]), (20, -47, -36), (32, 30, 24))
    stem = _capsule(hull_points, (0, -18, -14), (0, -28, -66), 14.0, 10.5)
    cerebrum = np.maximum(_cerebrum(hull_points), 1.0 - cerebellum)
    hull = np.minimum(_blend(cerebrum, stem, 4.0), cerebellum)
    depth = np.where(cerebellum < 0, -cerebellum, -cerebrum)

    sulcus = np.minimum(_sulci(frame, generator, points, -_vault(hull_points)), _fissures(points))
    cortex = np.minimum(sulcus, np.maximum(depth, 0))
    uneven = 1 + 0.6 * smooth_field(generator, frame.shape, 14 / frame.voxel_mm)
    opening = traits.atrophy * (0.55 - 0.015 * np.clip(depth, 0, 20)) * uneven + 0.1 * frame.voxel_mm
    thickness = max(3.2, 1.1 * frame.voxel_mm)
    in_cerebellum, in_stem = cerebellum < 0, (stem < 0) & (cerebrum > -6)

    csf = _step(cortex - opening, soft)
    grey = _step(cortex - opening - thickness, soft)
    folia = np.sin(2 * np.pi * _folia_distance(hull_points) / max(7.0, 3.5 * frame.voxel_mm))
    grey = np.where(in_cerebellum, _step(-cerebellum - 13 - 7 * folia, 3.0), grey)
    csf = np.where(in_cerebellum, _step(-cerebellum - 1.2, soft), csf)
    grey, csf = np.where(in_stem, 0.25, grey), np.where(in_stem, _step(-stem - 1.0, soft), csf)

    ventricle_mm = _ventricles(points, traits.ventricles)
    ventricle = _step(ventricle_mm, soft)
    deep_grey = _step(_deep_grey(points), 1.5 * soft) * ~in_cerebellum
    csf = np.maximum(csf, ventricle)
    vessels = smooth_field(generator, frame.shape, max(4 / frame.voxel_mm, 1.5))
    vessel = csf * (1 - ventricle) * _step(1.2 - vessels, 0.3)
    return {
        "brain": ndimage.binary_opening(hull < 0),
        "grey": grey,
        "deep_grey": deep_grey,
        "csf": csf,
        "ventricle": ventricle,
        "vessel": vessel,
        "white": (1 - np.maximum(grey, deep_grey)) * (1 - csf),
        "depth_mm": -hull,
        "ventricle_mm": ventricle_mm,
        "points": points,
        "cerebrum": ~in_cerebellum & ~in_stem,
    }


def _folia_distance(points):
    """Return a coordinate (mm) whose level surfaces fan out from the middle of the cerebellum."""
    x, a, s = points
    return np.sqrt(0.2 * x * x + (a + 27) ** 2 + 2.0 * (s + 36) ** 2)


# ----------------------------------------------------------------------------------------------------- tumour


def tumour(frame, generator, traits, tissue):
    """Return the labels (uint8, BraTS 2021) and the distance to the tumour core (mm, negative inside).

    The core is a ball whose surface is displaced by random fields; it stays out of the other hemisphere and
    of ventricles, but for those it has swallowed. Its outer layer, of varying thickness, enhances. Oedema
    spreads through white matter connected to it.
    """
    core_mm = _core_distance(frame, generator, traits)
    crossed_mm = _beyond_midline(tissue["points"], traits)
    room = tissue["brain"] & tissue["cerebrum"] & (tissue["depth_mm"] > 1.5) & (crossed_mm < 1)
    core = (core_mm < 0) & room & ((tissue["ventricle"] < 0.5) | (core_mm < -4))
    core = ndimage.binary_opening(core) | (core & (core_mm < -0.7 * frame.voxel_mm))

    reach = traits.oedema_mm * (1 + 0.5 * smooth_field(generator, frame.shape, 18 / frame.voxel_mm))
    spread = (core_mm + crossed_mm < reach) & (tissue["white"] > 0.5) & tissue["brain"] & tissue["cerebrum"]
    spread = _connected(ndimage.binary_opening(spread) | core, core)

    labels = np.zeros(frame.shape, np.uint8)
    labels[spread] = OEDEMA
    labels[core] = NECROSIS
    if traits.enhances:
        labels[core & (core_mm > -_rim_thickness(frame, generator, traits))] = ENHANCING
    return labels, core_mm


def _core_distance(frame, generator, traits):
    """Return the signed distance (mm) to the irregular surface of all lesions' cores."""
    coarse = smooth_field(generator, frame.shape, 14 / frame.voxel_mm)
    fine = smooth_field(generator, frame.shape, max(6 / frame.voxel_mm, 2.0))
    swelling = np.maximum(1 + 0.20 * coarse + 0.08 * fine, 0.7)
    nearest = np.full(frame.shape, np.inf, np.float32)
    for lesion in traits.lesions:
        offsets = zip(frame.points, lesion.centre, lesion.stretch, strict=True)
        distance = np.sqrt(sum(((p - np.float32(c)) / np.float32(k)) ** 2 for p, c, k in offsets))
        nearest = np.minimum(nearest, distance - lesion.radius_mm * swelling)
    return nearest


def _beyond_midline(points, traits):
    """Return how far (mm) each point lies in a hemisphere without a lesion, 0 elsewhere."""
    sides = {float(np.sign(lesion.centre[0])) for lesion in traits.lesions}
    return np.minimum.reduce([np.maximum(-side * points[0], 0) for side in sides])


def _rim_thickness(frame, generator, traits):
    """Return the thickness (mm) of the enhancing layer at each voxel: none, or at least about a voxel."""
    varying = smooth_field(generator, frame.shape, max(9 / frame.voxel_mm, 2.5))
    thickness = traits.rim_mm * (1 + 0.45 * varying)
    return np.where(thickness < 0.15 * traits.rim_mm, 0, np.maximum(thickness, 1.2 * frame.voxel_mm))


def _connected(mask, seeds):
    """Return the connected components of a mask that hold a seed."""
    components, n_components = ndimage.label(mask)
    holds_seed = np.zeros(n_components + 1, bool)
    holds_seed[np.unique(components[seeds])] = True
    holds_seed[0] = False
    return holds_seed[components]


# ------------------------------------------------------------------------------------------------- appearance


def appearance(frame, generator, traits, tissue, labels, core_mm):
    """Return the four images (dict of int16 arrays): tissue and tumour as a scanner would see them."""
    sigma = traits.blur_mm / frame.voxel_mm
    weight = {
        name: ndimage.gaussian_filter((labels == code).astype(np.float32), sigma)
        for name, code in (("necrosis", NECROSIS), ("oedema", OEDEMA), ("enhancing", ENHANCING))
    }
    fields = {
        "texture": smooth_field(generator, frame.shape, max(5 / frame.voxel_mm, 2.0)),
        "uptake": smooth_field(generator, frame.shape, max(8 / frame.voxel_mm, 2.5)),
        "patches": smooth_field(generator, frame.shape, 12 / frame.voxel_mm),
    }
    fading = np.clip(1.15 - 0.5 * np.clip(core_mm, 0, None) / max(traits.oedema_mm, 1), 0.65, 1.1)
    caps = traits.white_matter_lesions * _step(tissue["ventricle_mm"] - 3 - 2.5 * fields["patches"], 1.5)
    images = {}
    for name in MODALITIES:
        healthy = _healthy(name, tissue, caps)
        seen = _with_tumour(name, healthy, weight, traits, fields, fading)
        seen = ndimage.gaussian_filter(seen, (0.35, 0.35, 0.35 if name.startswith("t1") else 0.6))
        images[name] = _acquired(frame, generator, seen, traits, name) * tissue["brain"]
    return images


def _healthy(name, tissue, caps):
    """Return the brightness of the healthy brain in one modality, white matter = 1."""
    level = BRIGHTNESS[name]
    image = 1 + tissue["grey"] * (level["grey"] - 1)
    image += tissue["deep_grey"] * (level["deep_grey"] - image)
    if name in ("t2", "flair"):
        image += caps * tissue["white"] * (0.4 if name == "flair" else 0.25)
    image += tissue["csf"] * (level["csf"] - image)
    if name == "t1ce":
        image += tissue["vessel"] * (2.0 - image)
    return image


def _with_tumour(name, healthy, weight, traits, fields, fading):
    """Return the brightness with tumour: each part differs from white matter by its contrast, unevenly."""
    level = BRIGHTNESS[name]
    core = level["necrosis"] if traits.enhances else level["solid"]
    patches, uptake = fields["patches"], fields["uptake"]
    bright = {
        "necrosis": 1 + traits.contrast_core * (core - 1) * (1 + 0.12 * patches),
        "oedema": 1 + traits.contrast_oedema * (level["oedema"] - 1) * (1 + 0.10 * patches) * fading,
        "enhancing": 1 + traits.contrast_enhancing * (level["enhancing"] - 1) * (1 + 0.25 * uptake),
    }
    image = healthy + sum(weight[part] * (bright[part] - healthy) for part in weight)
    return image * (1 + 0.025 * fields["texture"])


def _acquired(frame, generator, brightness, traits, name):
    """Return an int16 image: brightness under a bias field, with Rician noise and arbitrary gain."""
    bias = np.exp(traits.bias * smooth_field(generator, frame.shape, 70 / frame.voxel_mm))
    real, imaginary = (_receiver_noise(frame, generator, traits.noise[name]) for _ in range(2))
    magnitude = np.hypot(brightness * bias + real, imaginary)
    return np.clip(np.rint(magnitude * WHITE_MATTER[name] * traits.gain[name]), 1, 32767).astype(np.int16)


def _receiver_noise(frame, generator, amplitude):
    """Return Gaussian noise whose neighbouring voxels are a little correlated, as in resampled images."""
    white = generator.standard_normal(frame.shape, dtype=np.float32)
    return amplitude * 1.57 * ndimage.gaussian_filter(white, 0.45)  # the filter leaves 1 / 1.57 of the amplitude


# --------------------------------------------------------------------------------------- patients and cohorts


def phantom(seed, index, shape):
    """Return the Phantom of patient `index` of cohort `seed` on a grid of this shape.

    seed, index : integers ≥ 0;  shape : three integers ≥ 24, axes LPS
    Raises SegtrustError for a grid too small to hold a brain.
    """
    shape = tuple(int(n) for n in shape)
    if len(shape) != 3 or min(shape) < SMALLEST_AXIS:
        raise SegtrustError(f"phantom of shape {shape}: needs three axes of at least {SMALLEST_AXIS} voxels")
    generator = np.random.default_rng([seed, index])
    traits = draw_traits(generator)
    frame = brain_frame(shape, traits.size)
    tissue = anatomy(frame, generator, traits)
    labels, core_mm = tumour(frame, generator, traits, tissue)
    images = appearance(frame, generator, traits, tissue, labels, core_mm)
    placed = {name: _placed(image, frame, shape) for name, image in images.items()}
    return Phantom(images=placed, labels=_placed(labels, frame, shape))


def _placed(array, frame, shape):
    """Return a whole grid, zero outside the frame's box."""
    whole = np.zeros(shape, array.dtype)
    whole[frame.box] = array
    return whole


def affine_of(shape):
    """Return the affine of BraTS 2021 files for a grid of this shape: LPS, 1 mm."""
    return np.array([[-1, 0, 0, 0], [0, -1, 0, shape[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]], np.float64)


def write_patient(folder, patient, content):
    """Write a Phantom as FOLDER/PATIENT/PATIENT_{t1,t1ce,t2,flair,seg}.nii.gz, the same bytes every time."""
    for name, array in {**content.images, "seg": content.labels}.items():
        image = nib.Nifti1Image(array, affine_of(array.shape))
        image.set_qform(image.affine, code="scanner")
        image.set_sform(image.affine, code="scanner")
        image.header.set_xyzt_units("mm")
        with replacing(_path(folder, patient, name)) as partial:
            partial.write_bytes(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))


def write_cohort(folder, n_patients, shape, seed, splits=None):
    """Write patients phantom_0001, phantom_0002, … and the sheet patients.tsv into a folder.

    n_patients : how many, at least 1
    shape, seed : as in `phantom`; patient `phantom_0001` has index 1
    splits : dict split → number of patients, given out in order; whoever is left over is `test`

    Returns the path of the sheet, whose paths are relative to it.
    Raises SegtrustError if the splits ask for more patients than there are, or the grid is too small.
    """
    assigned = [split for split, count in (splits or {}).items() for _ in range(count)]
    if n_patients < 1 or len(assigned) > n_patients:
        least = max(1, len(assigned))
        raise SegtrustError(f"{n_patients} phantoms cannot be split into {splits}; ask for at least {least}")
    assigned += ["test"] * (n_patients - len(assigned))
    folder = Path(folder)
    rows = []
    for index, split in enumerate(progress(assigned, "patients drawn"), start=1):
        patient = f"phantom_{index:04d}"
        write_patient(folder, patient, phantom(seed, index, shape))
        files = {name: _path("", patient, name).as_posix() for name in (*MODALITIES, "seg")}
        rows.append({"patient": patient, **files, "coding": CODING, "split": split})
    sheet = folder / "patients.tsv"
    with replacing(sheet) as partial, partial.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return sheet


def _path(folder, patient, name):
    """Return where a patient's file lies in the layout of BraTS 2021."""
    return Path(folder) / patient / f"{patient}_{name}.nii.gz"
