"""Tally: voxels of a patient, reduced to counts and sums that add up.

Every voxel metric of a patient, every pooled metric of a cohort, every bootstrap resample of patients and
every recalibration is a function of tallies (definitions, section 4). A tally holds, per region and mask,

- `scores`: voxels by uncertainty bin × outcome {TP, FP, FN, TN}, per measure;
- `score_sums`: Σu, Σu², Σℓ, Σℓ², Σuℓ by outcome, where ℓ is the negative log-likelihood of the voxel;
- `probabilities`: n, Σp, Σp², Σlog p, Σlog(1 - p) by probability bin × truth;
- `class_probabilities`: n, Σp by the same, for each class of `ALL`;
- `confidences`: n, Σc by confidence bin × {wrong, correct};
- `joint`: voxels by coarse uncertainty × loss, for rank correlation;
- `classes`: predicted class × reference class, for `ALL`.

Only occupied cells are kept. Counts are int64, sums float64. Adding tallies pools their voxels: counts
exactly, sums to rounding. Bins are closed on the left, and fine: the coarse bins of a metric are unions of them.
Smaller tallies of the same patient after fewer passes stand beside it (`Tally.convergence`).
"""

import base64
import json
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from segtrust.bins import (
    CLIP,
    CONFIDENCE_BINS,
    FP,
    JOINT_BINS,
    PROBABILITY_BINS,
    SCORE_BINS,
    TN,
    distance_bins,
    joint_groups,
    loss_index,
    sums_by,
)
from segtrust.errors import SegtrustError
from segtrust.files import canonical_json, read_parquet, write_parquet_groups
from segtrust.masks import BANDS, MASKS, band_index
from segtrust.measures import (
    BETWEEN_MEMBERS,
    ENTROPY_4CLASS,
    MEASURES,
    MEMBER_MEASURES,
    OWN_ERRORS,
    WITHIN_MEMBERS,
    binary_entropy_of,
    boundary_proximity,
    entropy_4class,
    logarithms,
)
from segtrust.regions import CLASSES, REGIONS, four_class

FORMAT = 3
TALLY_KEY = b"tally"
CASE_KEY = b"case"
REST_KEY = b"volume_rest"
CONVERGENCE_KEY = b"convergence"

ALL = "ALL"
TALLY_REGIONS = (*REGIONS, ALL)
# a voxel lies in any number of masks, and in at most one band of distance to the reference surface
TALLY_MASKS = (*MASKS, *BANDS)

PROBABILITY = "probability"
DETERMINISTIC = "probability_deterministic"
CLASS_KINDS = tuple(f"probability_{name}" for name in CLASSES)

SCORE_SUMS = ("u", "u2", "loss", "loss2", "u_loss")
PROBABILITY_SUMS = ("p", "p2", "log_p", "log_1mp")
JOINT_MASKS = ("brain", "predicted_5mm")

# --- tables -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How the cells of a table are numbered: a key is ((region, mask, series), outcome, bin), the bin fastest."""

    masks: tuple
    series: tuple
    n_outcomes: int
    n_bins: int
    sums: tuple = ()

    @property
    def size(self):
        """Return the number of cells of one region, mask and series."""
        return self.n_outcomes * self.n_bins

    @property
    def region_size(self):
        return len(self.masks) * len(self.series) * self.size

    def cell(self, key):
        """Return the number of a cell in a file, from its key in the region: the mask is fastest, as a bin often holds
        the same voxels in several masks, and equal neighbours compress well."""
        mask, place = np.divmod(key, len(self.series) * self.size)
        return place * len(self.masks) + mask

    def key(self, cell):
        """Return the key in the region of a cell in a file."""
        place, mask = np.divmod(cell, len(self.masks))
        return mask * (len(self.series) * self.size) + place

    def described(self):
        """Return what each cell of a file is: numbers of mask, series, outcome and bin, arrays (region_size,)."""
        place, mask = np.divmod(np.arange(self.region_size), len(self.masks))
        series, place = np.divmod(place, self.size)
        return mask, series, *np.divmod(place, self.n_bins)

    def start(self, region, mask, series):
        """Return the key of the first cell of a series."""
        row = TALLY_REGIONS.index(region) * len(self.masks) + self.masks.index(mask)
        return (row * len(self.series) + self.series.index(series)) * self.size


_SCORES = (*MEASURES, OWN_ERRORS, ENTROPY_4CLASS, *MEMBER_MEASURES)
_KINDS = (PROBABILITY, DETERMINISTIC)
LAYOUTS = {
    "scores": Layout(TALLY_MASKS, _SCORES, 4, len(SCORE_BINS)),
    "score_sums": Layout(TALLY_MASKS, _SCORES, 4, 1, SCORE_SUMS),
    "probabilities": Layout(MASKS, _KINDS, 2, len(PROBABILITY_BINS), PROBABILITY_SUMS),
    "class_probabilities": Layout(MASKS, CLASS_KINDS, 2, len(PROBABILITY_BINS), ("p",)),
    "confidences": Layout(MASKS, _KINDS, 2, len(CONFIDENCE_BINS), ("c",)),
    "joint": Layout(JOINT_MASKS, _SCORES, 1, JOINT_BINS * JOINT_BINS),
    "classes": Layout(MASKS, ("class",), 4, 5),
}
SETTINGS = {"format": FORMAT, **{name: layout.n_bins for name, layout in LAYOUTS.items()}}
# a file is read by region and part: what is resampled together lies together
PARTS = {
    "scores": ("scores",),
    "sums": ("score_sums", "joint", "classes"),
    "calibration": ("probabilities", "class_probabilities", "confidences"),
}


@dataclass(frozen=True)
class Cells:
    """Occupied cells of a table: ascending keys int64, counts int64, sums float64 (cells, sums)."""

    key: np.ndarray
    n: np.ndarray
    sums: np.ndarray

    def of_region(self, layout, region):
        """Return the cells of one region."""
        start = layout.start(region, layout.masks[0], layout.series[0])
        part = slice(*np.searchsorted(self.key, (start, start + layout.region_size)))
        return Cells(self.key[part], self.n[part], self.sums[part])

    def dense(self, start, size):
        """Return counts (size,) and sums (size, sums) of a range of keys."""
        part = slice(*np.searchsorted(self.key, (start, start + size)))
        place = self.key[part] - start
        n = np.zeros(size, np.int64)
        n[place] = self.n[part]
        sums = np.zeros((size, self.sums.shape[1]))
        sums[place] = self.sums[part]
        return n, sums


def _added(parts, n_sums):
    if not parts:
        return Cells(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, n_sums)))
    key = np.concatenate([part.key for part in parts])
    order = np.argsort(key, kind="stable")
    key = key[order]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    n = np.concatenate([part.n for part in parts])[order]
    sums = np.concatenate([part.sums for part in parts])[order]
    if not len(first):
        return Cells(key, n, sums)
    return Cells(key[first], np.add.reduceat(n, first), np.add.reduceat(sums, first, axis=0))


# --- the tally ----------------------------------------------------------------------------------------------


class Tally:
    """Counts and sums over the voxels of one patient, or of several pooled.

    Make one with `Tally.of` or `Tally.read`; add tallies with `+` or `pooled`. Accessors return dense arrays;
    None where the quantity does not exist (no deterministic pass; variance of a single pass; parts of members where
    there is one), zeros where a mask is empty.

    available : frozenset of the series (measures and kinds of probability) that exist
    cases : list of dicts, one per patient, of numbers that do not add up (put into the table by `voxels`)
    overlap, overlap_deterministic : int64 (3, 3), |ŷ_a ∩ y_b| over the whole volume; the latter None without
        a deterministic pass
    counts : dict of int64 arrays that add up, over the whole volume: `n_voxels`, `n_nesting_breaks`,
        `n_argmax_differs` (scalars), `n_reference`, `n_predicted`, `n_deterministic` (3,), `classes` (4, 5), predicted
        class × reference class
    convergence : dict from a number of passes, fewer than all, to the brief Tally after them (`tally_columns`); empty
        for several patients pooled
    """

    def __init__(self, tables, counts, cases, available, settings=None, convergence=None):
        self._tables = tables
        self.counts = counts
        self.cases = cases
        self.available = frozenset(available)
        self.settings = settings or SETTINGS
        self.convergence = convergence or {}

    @classmethod
    def empty(cls, available):
        """Return the tally of no voxels; available : as of the class."""
        tables = {name: _added([], len(layout.sums)) for name, layout in LAYOUTS.items()}
        return cls(tables, {}, [], available)

    @classmethod
    def of(cls, table):
        """Return the tally of a voxels table (`segtrust.voxels.voxels`, or the same read from a file).

        The rest of the volume, counted in the table's metadata, is included, and so are the tallies after fewer
        passes.
        """
        columns = Columns.of_table(table)
        metadata = table.schema.metadata or {}
        case = json.loads(metadata[CASE_KEY]) if CASE_KEY in metadata else {}
        tally = tally_columns(columns, case)
        if REST_KEY in metadata:
            rest = cls.from_text(metadata[REST_KEY].decode())
            tally = cls._merged([tally, rest], tally.cases)
        if CONVERGENCE_KEY in metadata:
            texts = json.loads(metadata[CONVERGENCE_KEY])
            tally.convergence = {int(passes): cls.from_text(text) for passes, text in texts.items()}
        return tally

    @classmethod
    def of_arrays(
        cls, labels, passes, *, deterministic=None, brain=None, spacing_mm=(1.0, 1.0, 1.0), patient="patient"
    ):
        """Return the tally of one patient from arrays.

        labels : uint8 (x, y, z), the reference in canonical labels 0 background, 1 NCR, 2 ED, 3 ET
        passes : float arrays (3, x, y, z), one for each stochastic pass (or one mean probability): probability of WT,
            TC and ET in [0, 1]; any iterable, read once, so that passes need not be in memory together
        deterministic : float (3, x, y, z), probability with dropout off, or None
        brain : bool (x, y, z); None for the whole volume
        spacing_mm : (3,) voxel size
        patient : for messages

        Passes are summed as the workflow sums them, in steps of 2^-24. Raises SegtrustError for probabilities outside
        [0, 1] or NaN and for shapes that differ.
        """
        from segtrust.moments import Accumulator  # these need this module
        from segtrust.voxels import voxels

        labels = np.asarray(labels)
        brain = np.ones(labels.shape, bool) if brain is None else np.asarray(brain, bool)
        adding, n_passes = Accumulator(labels.shape, "member1"), 0
        for n_passes, probability in enumerate(passes, start=1):
            adding.add(n_passes - 1, np.asarray(probability, np.float32))
        if not n_passes:
            raise SegtrustError(f"{patient}: no pass was given, at least one is needed")
        if deterministic is not None:
            adding.set_deterministic(np.asarray(deterministic, np.float32))
        summary = adding.moments((0, 0, 0), None).summary(n_passes)
        table = voxels(summary, labels, brain, brain, spacing_mm=spacing_mm, patient=patient)
        return cls.of(table)

    def metrics(self):
        """Return every voxel metric as a DataFrame: region, mask, measure, metric, n_bins, value; NaN where undefined.

        Of one patient's tally these are the patient's metrics, of a sum of tallies the pooled ones.
        """
        from segtrust.values import frame_of, values_of  # these need this module

        return frame_of(values_of(self))

    def __add__(self, other):
        return pooled([self, other])

    @classmethod
    def _merged(cls, tallies, cases):
        first = tallies[0]
        for other in tallies[1:]:
            if other.settings != first.settings:
                raise SegtrustError(
                    f"tallies with different bins or formats cannot be pooled: {first.settings} and {other.settings}"
                )
            if other.available != first.available:
                only = sorted(other.available ^ first.available)
                raise SegtrustError(f"tallies of which only some have {', '.join(only)} cannot be pooled")
        tables = {
            name: _added([tally._tables[name] for tally in tallies], len(layout.sums))
            for name, layout in LAYOUTS.items()
        }
        counts = {name: sum(tally.counts[name] for tally in tallies) for name in first.counts}
        return cls(tables, counts, cases, first.available, first.settings)

    def repeated(self, times):
        """Return the tally of `times` copies of every voxel; cases are kept as they are."""
        tables = {name: Cells(cells.key, cells.n * times, cells.sums * times) for name, cells in self._tables.items()}
        counts = {name: value * times for name, value in self.counts.items()}
        return Tally(tables, counts, self.cases, self.available, self.settings)

    @classmethod
    def stitched(cls, tallies):
        """Return WT, TC, ET and ALL of four tallies of the same voxels; counts and cases of the first."""
        tables = {}
        for name, layout in LAYOUTS.items():
            parts = []
            for region, tally in zip(TALLY_REGIONS, tallies, strict=True):
                cells = tally._tables[name]
                parts.append(cells.of_region(layout, region))
            tables[name] = _added(parts, len(layout.sums))
        first = tallies[0]
        return cls(tables, first.counts, first.cases, first.available, first.settings)

    # accessors

    def cells(self, region, part):
        """Return the occupied cells of one region, a dict from the tables of a part (`PARTS`) to `Cells`.

        Their keys are those of a file, see `Layout.cell`, in its order.
        """
        found = {}
        for name in PARTS[part]:
            layout = LAYOUTS[name]
            held = self._tables[name].of_region(layout, region)
            cell = layout.cell(held.key - layout.start(region, layout.masks[0], layout.series[0]))
            order = np.argsort(cell)
            found[name] = Cells(cell[order], held.n[order], held.sums[order])
        return found

    @classmethod
    def of_cells(cls, region, tables, available):
        """Return the tally of one region from what `cells` returns; tables : dict of some or all tables."""
        held = {}
        for name, layout in LAYOUTS.items():
            if name in tables:
                key = layout.key(tables[name].key) + layout.start(region, layout.masks[0], layout.series[0])
                order = np.argsort(key)
                held[name] = Cells(key[order], tables[name].n[order], tables[name].sums[order])
            else:
                held[name] = _added([], len(layout.sums))
        return cls(held, {}, [], available)

    def _dense(self, table, region, mask, series):
        layout = LAYOUTS[table]
        n, sums = self._tables[table].dense(layout.start(region, mask, series), layout.size)
        shape = (layout.n_outcomes, layout.n_bins)
        return n.reshape(shape).T, np.moveaxis(sums.reshape(*shape, -1), (0, 1), (2, 1))

    def _exists(self, region, series):
        only_all = (ENTROPY_4CLASS, *CLASS_KINDS)
        in_both = (PROBABILITY, DETERMINISTIC)
        if region == ALL:
            fitting = series in only_all + in_both and ENTROPY_4CLASS in self.available
        else:
            fitting = series not in only_all
        return fitting and series in self.available

    def scores(self, region, mask, measure):
        """Return int64 (n_score_bins, 4): voxels by score bin, the most uncertain last, and outcome TP, FP, FN, TN.

        For `ALL`, errors stand in the FP column and correct voxels in the TN column. All zero for
        `boundary_proximity` where the prediction is empty or full.
        """
        return self._dense("scores", region, mask, measure)[0] if self._exists(region, measure) else None

    def score_sums(self, region, mask, measure):
        """Return float64 (5, 4): rows Σu, Σu², Σℓ, Σℓ², Σuℓ by outcome TP, FP, FN, TN."""
        if not self._exists(region, measure):
            return None
        return self._dense("score_sums", region, mask, measure)[1][:, 0]

    def probabilities(self, region, mask, kind):
        """Return counts and sums by probability bin × truth {0, 1}: a dict of arrays (n_probability_bins, 2).

        kind : `probability` or `probability_deterministic`; for `ALL`, one of `CLASS_KINDS`

        `n` is int64; `sum_p` and, but for `ALL`, `sum_p2`, `sum_log_p`, `sum_log_1mp` and `sum_logit` are
        float64. Logarithms are natural, of p clipped to [1e-7, 1 - 1e-7].
        """
        if not self._exists(region, kind) or (region == ALL) != (kind in CLASS_KINDS):
            return None
        if region == ALL:
            n, sums = self._dense("class_probabilities", region, mask, kind)
            return {"n": n, "sum_p": sums[0]}
        n, sums = self._dense("probabilities", region, mask, kind)
        held = {f"sum_{name}": values for name, values in zip(PROBABILITY_SUMS, sums, strict=True)}
        return {"n": n, **held, "sum_logit": held["sum_log_p"] - held["sum_log_1mp"]}

    def confidences(self, region, mask, kind):
        """Return by confidence bin × {wrong, correct}: `n` int64 and `sum_c` float64, (n_confidence_bins, 2).

        kind : `probability` or `probability_deterministic` (judged by its own labels)
        """
        if not self._exists(region, kind):
            return None
        n, sums = self._dense("confidences", region, mask, kind)
        return {"n": n, "sum_c": sums[0]}

    def joint(self, region, mask, measure):
        """Return int64 (256, 256): voxels by coarse bins of uncertainty and loss, both ascending.

        mask : one of `JOINT_MASKS`
        """
        if not self._exists(region, measure):
            return None
        if mask not in JOINT_MASKS:
            raise KeyError(f"joint histograms exist for {', '.join(JOINT_MASKS)}, not for {mask}")
        return self._dense("joint", region, mask, measure)[0].reshape(JOINT_BINS, JOINT_BINS)

    def classes(self, mask):
        """Return int64 (4, 5): predicted class (argmax) × reference class, the fifth a resection cavity."""
        return self._dense("classes", ALL, mask, "class")[0].T

    @property
    def overlap(self):
        return self.counts["overlap"]

    @property
    def overlap_deterministic(self):
        return self.counts.get("overlap_deterministic")

    @property
    def scalars(self):
        """Return the numbers of a single patient, a dict; arrays are in the order WT, TC, ET.

        The additive `counts`; the numbers of the case (`passes`, `spacing_mm`, `hd95`, `hd95_brats`, `nsd_1mm`,
        `dice_lesionwise`, `pairwise_dice`, `no_boundary`, …), NaN for null; `reference_ml`, `predicted_ml` and
        `deterministic_ml` (3,), `pass_ml` (T, 3). Of several pooled patients, only the counts.
        """
        if len(self.cases) != 1:
            return dict(self.counts)
        case = {
            name: np.array(value, np.float64) if isinstance(value, list) else value
            for name, value in self.cases[0].items()
        }
        values = {**self.counts, **case}
        if "voxel_ml" in case:
            for name in ("reference", "predicted", "deterministic"):
                voxels = self.counts.get(f"n_{name}")
                values[f"{name}_ml"] = None if voxels is None else voxels * case["voxel_ml"]
            if case.get("pass_voxels") is not None:
                values["pass_ml"] = case["pass_voxels"] * case["voxel_ml"]
        return values

    # files

    def to_table(self, values=None):
        """Return the tally as a pyarrow Table, one row per occupied cell.

        Columns: `passes` (null, but in the tallies after fewer passes, which come last), `region`, `table`, `cell` (its
        number in the region, see `Layout.described`), `n`, and sums `sum_0` to `sum_4`.

        values : text to keep beside it, see `write`
        """
        about, stretches = self._about(), self._stretches()
        about |= {"stretches": [place for place, _ in stretches], "values": values}
        table = pa.concat_tables([rows for _, rows in stretches])
        return table.replace_schema_metadata({TALLY_KEY: canonical_json(about).encode()})

    def _about(self):
        early = sorted(self.convergence.items())
        return {"settings": self.settings, "cases": self.cases, **self._counted()} | {
            "convergence": {str(passes): tally._counted() for passes, tally in early}
        }

    def _counted(self):
        counts = {name: np.asarray(value).tolist() for name, value in self.counts.items()}
        return {"available": sorted(self.available), "counts": counts}

    def _stretches(self):
        """Return what is read in one go: a list of ([passes or None, region, part, rows by table], pyarrow Table)."""
        found = []
        for passes, tally in [(None, self), *sorted(self.convergence.items())]:
            for region in TALLY_REGIONS:
                for part in PARTS:
                    cells = tally.cells(region, part)
                    lengths = [len(held.key) for held in cells.values()]
                    found.append(([passes, region, part, lengths], _rows_of(cells, passes, region)))
        return found

    @classmethod
    def from_table(cls, table):
        """Return the tally that `to_table` wrote. Raises SegtrustError for another format or other bins."""
        about = about_of(table.schema)
        rows_of = table["passes"].fill_null(0).to_numpy()
        convergence = {
            int(passes): cls._of_rows(table.filter(rows_of == int(passes)), [], held, {})
            for passes, held in about["convergence"].items()
        }
        return cls._of_rows(table.filter(rows_of == 0), about["cases"], about, convergence)

    @classmethod
    def _of_rows(cls, table, cases, about, convergence):
        region, number = (
            _indices(table[name], known) for name, known in (("region", TALLY_REGIONS), ("table", LAYOUTS))
        )
        cell, n = table["cell"].to_numpy().astype(np.int64), table["n"].to_numpy()
        tables = {}
        for position, (name, layout) in enumerate(LAYOUTS.items()):
            chosen = np.flatnonzero(number == position)
            key = region[chosen] * layout.region_size + layout.key(cell[chosen])
            order = np.argsort(key)
            chosen = chosen[order]
            sums = np.empty((len(chosen), len(layout.sums)))
            for column in range(len(layout.sums)):
                sums[:, column] = table[f"sum_{column}"].to_numpy()[chosen]
            tables[name] = Cells(key[order], n[chosen], sums)
        return cls(tables, counts_of(about), cases, about["available"], convergence=convergence)

    def write(self, path, provenance=None, values=None):
        """Write the tally as Parquet with its provenance (a dict), a row group for each region and part.

        values : text of the metrics of the patient, `values.Values.to_text`, for the cohort to read
        """
        table = self.to_table(values)
        sums = [f"sum_{position}" for position in range(len(SCORE_SUMS))]
        encodings = {"cell": "DELTA_BINARY_PACKED", **dict.fromkeys(["n", *sums], "BYTE_STREAM_SPLIT")}
        repeating = [name for name in table.column_names if name not in encodings]
        lengths = [sum(lengths) for *_, lengths in json.loads(table.schema.metadata[TALLY_KEY])["stretches"]]
        write_parquet_groups(
            path,
            table,
            lengths,
            provenance or {},
            compression_level=5,
            use_dictionary=repeating,
            column_encoding=encodings,
        )

    @classmethod
    def read(cls, path):
        """Return (tally, provenance) of a file; raises SegtrustError, naming it, for other bins or format."""
        table, provenance = read_parquet(path)
        try:
            return cls.from_table(table), provenance
        except SegtrustError as error:
            raise SegtrustError(f"{path}: {error}") from None

    def to_text(self):
        """Return the tally as text, for the metadata of another file."""
        sink = pa.BufferOutputStream()
        pq.write_table(self.to_table(), sink, compression="zstd")
        return base64.b64encode(sink.getvalue().to_pybytes()).decode()

    @classmethod
    def from_text(cls, text):
        """Return the tally that `to_text` described."""
        return cls.from_table(pq.read_table(pa.BufferReader(base64.b64decode(text))))


def pooled(tallies):
    """Return the tally of all voxels of several tallies: counts exact, sums to rounding.

    Raises SegtrustError when bins, format or the measures that exist differ.
    """
    tallies = list(tallies)
    return Tally._merged(tallies, [case for tally in tallies for case in tally.cases])


def about_of(schema):
    """Return what a tally's schema says of it: a dict. Raises SegtrustError for another format or other bins."""
    about = json.loads((schema.metadata or {}).get(TALLY_KEY, b"{}"))
    if about.get("settings") != SETTINGS:
        raise SegtrustError(
            f"this tally has bins and format {about.get('settings')}, expected {SETTINGS}; make it again from voxels"
        )
    return about


def counts_of(about):
    """Return the counts that `about_of` found, or a part of it for fewer passes: a dict of int64 arrays."""
    return {name: np.array(value, np.int64) for name, value in about["counts"].items()}


def _rows_of(tables, passes, region):
    """Return cells (a dict from table to `Cells`) of one region as a pyarrow Table."""
    parts = [(np.full(len(cells.key), tuple(LAYOUTS).index(name)), cells) for name, cells in tables.items()]
    number = np.concatenate([number for number, _ in parts])
    columns = {
        "passes": pa.array(np.full(len(number), passes or 0), pa.int32(), mask=np.full(len(number), passes is None)),
        "region": _dictionary(np.full(len(number), TALLY_REGIONS.index(region)), TALLY_REGIONS),
        "table": _dictionary(number, tuple(LAYOUTS)),
        "cell": pa.array(np.concatenate([cells.key for _, cells in parts]).astype(np.uint32)),
        "n": pa.array(np.concatenate([cells.n for _, cells in parts])),
    }
    for column in range(len(SCORE_SUMS)):
        sums = [
            cells.sums[:, column] if column < cells.sums.shape[1] else np.full(len(cells.key), np.nan)
            for _, cells in parts
        ]
        columns[f"sum_{column}"] = pa.array(np.concatenate(sums), from_pandas=True)
    return pa.table(columns)


def _dictionary(indices, names):
    return pa.DictionaryArray.from_arrays(pa.array(indices.astype(np.int8)), pa.array(names))


def _indices(column, names):
    """Return the position in `names` of each entry of a dictionary-encoded column."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    place = {name: position for position, name in enumerate(names)}
    position = np.array([place.get(name, -1) for name in column.dictionary.to_pylist()], np.int64)
    return position[column.indices.to_numpy()]


# --- from voxels to a tally ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Columns of a voxels table as arrays; region columns are lists of three in the order WT, TC, ET.

    labels : uint8, canonical; cavity : bool or None
    probability, deterministic : float32
    expected_entropy, member_entropy, variance, distance_predicted, distance_reference : float16
    masks : uint16
    weight : None, or float64: the number of voxels that each row stands for

    What no series needs that is counted may be None.
    """

    labels: np.ndarray
    prediction: np.ndarray | None
    cavity: np.ndarray | None
    probability: list
    deterministic: list | None
    expected_entropy: list
    member_entropy: list | None
    variance: list | None
    distance_predicted: list | None
    distance_reference: list
    masks: list
    weight: np.ndarray | None = None

    @classmethod
    def of_table(cls, table):
        """Return the columns of a table made by `segtrust.voxels.voxels`."""

        def column(name):
            return table[name].to_numpy()

        def per_region(name):
            present = f"{name}_{REGIONS[0]}" in table.column_names
            return [column(f"{name}_{region}") for region in REGIONS] if present else None

        return cls(
            labels=column("reference"),
            prediction=column("prediction"),
            cavity=column("reference_code") == 4 if "reference_code" in table.column_names else None,
            probability=per_region("probability"),
            deterministic=per_region("deterministic_probability"),
            expected_entropy=per_region("expected_entropy"),
            member_entropy=per_region("member_entropy"),
            variance=per_region("variance"),
            distance_predicted=per_region("distance_predicted"),
            distance_reference=per_region("distance_reference"),
            masks=per_region("masks"),
        )

    @property
    def series(self):
        """Return the names of all series that can be counted."""
        held = {"entropy", "expected_entropy", "boundary_proximity", ENTROPY_4CLASS, PROBABILITY, *CLASS_KINDS}
        if self.variance:
            held |= {"variance", "mutual_information"}
        if self.member_entropy:
            held |= {*MEMBER_MEASURES}
        if self.deterministic:
            held |= {"deterministic_entropy", OWN_ERRORS, DETERMINISTIC}
        return held


def tally_columns(columns, case, series=None, brief=False):
    """Return the tally of columns.

    case : dict of the patient's numbers that do not add up; goes into `Tally.cases`
    series : names of what is counted, `entropy` and `probability` among them; all that can be where None
    brief : whether to leave out joint histograms, and to give Σp², Σlog p and Σlog(1 - p) by truth alone: their sums
        over bins are right, and no single bin
    """
    series = columns.series if series is None else series
    tables = {name: [] for name in LAYOUTS}
    truth, predicted, own = [], [], []
    for position, region in enumerate(REGIONS):
        labels = columns.labels
        truth.append(_IN_REGION[position].take(labels))
        predicted.append(columns.probability[position] >= np.float32(0.5))
        if DETERMINISTIC in series:
            own.append(columns.deterministic[position] >= np.float32(0.5))
        members = truth[-1], predicted[-1], own[-1] if own else None
        _tally_region(tables, region, columns, position, *members, series, brief)

    def count(membership):
        if columns.weight is None:
            return np.count_nonzero(membership)
        return round(float(columns.weight[membership].sum()))

    def overlaps(labels):
        return np.array([[count(a & b) for b in truth] for a in labels], np.int64)

    counts = {
        "n_voxels": np.int64(count(np.ones(len(columns.labels), bool))),
        "n_reference": np.array([count(member) for member in truth], np.int64),
        "n_predicted": np.array([count(member) for member in predicted], np.int64),
        "n_nesting_breaks": np.int64(count((predicted[2] & ~predicted[1]) | (predicted[1] & ~predicted[0]))),
        "overlap": overlaps(predicted),
    }
    if ENTROPY_4CLASS in series:
        argmax, counts["classes"] = _tally_all(tables, columns)
        counts["n_argmax_differs"] = np.int64(count(argmax != columns.prediction))
    if DETERMINISTIC in series:
        counts["n_deterministic"] = np.array([count(member) for member in own], np.int64)
        counts["overlap_deterministic"] = overlaps(own)
    cells = {name: _added(parts, len(LAYOUTS[name].sums)) for name, parts in tables.items()}
    return Tally(cells, counts, [case], series)


# membership of canonical labels in WT, TC, ET
_IN_REGION = np.array([[0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]], bool)


class _Counter:
    """Count the voxels of one region.

    Voxels are first put in the order of groups: those that share their masks, band and outcomes. What is counted
    by group is then added up to masks; sums over a group are sums over a stretch of the array.

    tables : dict of lists that receive `Cells`
    masks, distance_reference : of the region
    flags : int32, below 64: whatever the outcomes of the voxel follow from
    weight : as of `Columns`
    brief : as of `tally_columns`
    """

    def __init__(self, tables, region, masks, distance_reference, flags, weight, brief=False):
        self._tables = tables
        self._region = region
        self._brief = brief
        band = _bands_of_half().take(distance_reference.view(np.uint16))
        found, group = _ranked((masks.astype(np.int32) << 4 | band) << _FLAG_BITS | flags)
        self.order = np.argsort(group, kind="stable")
        self._group = group[self.order].astype(np.int64)
        self._first = np.searchsorted(self._group, np.arange(len(found)))
        self._start_of = {}
        self._weight = None if weight is None else weight[self.order]
        self._flags = found & len(_FLAGS) - 1
        group_masks, group_band = found >> _FLAG_BITS + 4, found >> _FLAG_BITS & 15
        member = np.zeros((len(found), len(TALLY_MASKS)), bool)
        member[:, : len(MASKS)] = group_masks[:, None] >> np.arange(len(MASKS)) & 1
        in_band = np.flatnonzero(group_band < len(BANDS))
        member[in_band, len(MASKS) + group_band[in_band]] = True
        self._member = member
        in_joint = [MASKS.index(mask) for mask in JOINT_MASKS]
        self._joint = (member[:, in_joint] @ [1, 2])[self._group] * JOINT_BINS**2

    def _starts(self, n_bins):
        """Return the key of the first bin of each voxel's group."""
        if n_bins not in self._start_of:
            self._start_of[n_bins] = self._group * n_bins
        return self._start_of[n_bins]

    def sorted(self, values):
        """Return an array over voxels in the order of groups."""
        return values.take(self.order)

    def scores(self, series, bins, score, outcome, loss):
        """Count a measure: its bins, its sums with the loss, and the joint histogram.

        bins, score : by voxel, in the order of groups
        outcome : of each value of the flags, array (64,)
        loss : from `_loss`
        """
        value, squared, coarse_loss = loss
        self._cells("scores", series, bins, outcome, (), True)
        columns = (score, score * score, value, squared, score * value)
        if self._weight is not None:
            columns = tuple(column * self._weight for column in columns)
        n = np.bincount(self._group, self._weight, len(self._first))
        sums = np.stack([np.add.reduceat(column, self._first) for column in columns], axis=1)
        self._spread("score_sums", series, np.arange(len(n)), np.zeros(len(n), np.int64), outcome, n, sums, True)
        if not self._brief:
            self._join(series, bins, coarse_loss)

    def _join(self, series, bins, coarse_loss):
        """Count the joint histogram of a measure and the loss."""
        if series == "boundary_proximity":
            coarse = bins.astype(np.int64) * JOINT_BINS // len(SCORE_BINS)
        else:
            coarse = joint_groups().take(bins)
        joint = np.bincount(self._joint + coarse * JOINT_BINS + coarse_loss, self._weight, 4 * JOINT_BINS**2)
        _, one, other, both = joint.reshape(4, -1)
        for mask, n in zip(JOINT_MASKS, (one + both, other + both), strict=True):
            self._keep("joint", series, TALLY_MASKS.index(mask), n, None)

    def binned(self, table, series, bins, outcome, sums=()):
        """Count one table of the masks, with sums (arrays over voxels); arguments as for `scores`."""
        self._cells(table, series, bins, outcome, sums, False)

    def classes(self):
        """Count predicted class × reference class."""
        n = np.bincount(self._group, self._weight, len(self._first))
        group, reference = np.arange(len(n)), _REFERENCE_CLASS[self._flags]
        self._spread("classes", "class", group, reference, _PREDICTED_CLASS, n, np.empty((len(n), 0)), False)

    def _cells(self, table, series, bins, outcome, sums, with_bands):
        """Count by group and bin, then by mask, outcome and bin."""
        layout = LAYOUTS[table]
        key = self._starts(layout.n_bins) + bins
        size = len(self._first) * layout.n_bins
        n = np.bincount(key, self._weight, size)
        cell = np.flatnonzero(n)
        held = np.empty((len(cell), len(sums)))
        for position, column in enumerate(sums):
            weighted = column if self._weight is None else column * self._weight
            if position and self._brief:
                held[:, position] = 0
                first = np.searchsorted(cell, np.arange(len(self._first)) * layout.n_bins)
                held[first, position] = np.add.reduceat(weighted, self._first)
            else:
                held[:, position] = sums_by(key, weighted, size)[cell]
        group, place = np.divmod(cell, layout.n_bins)
        self._spread(table, series, group, place, outcome, n[cell], held, with_bands)

    def _spread(self, table, series, group, place, outcome, n, sums, with_bands):
        """Add cells by group and bin to every mask and band that the group lies in."""
        layout = LAYOUTS[table]
        place = outcome[self._flags[group]] * layout.n_bins + place
        for mask in range(len(TALLY_MASKS) if with_bands else len(MASKS)):
            chosen = np.flatnonzero(self._member[group, mask])
            if len(chosen):
                at = place[chosen]
                totals = [np.bincount(at, column[chosen], layout.size) for column in sums.T]
                self._keep(table, series, mask, np.bincount(at, n[chosen], layout.size), totals)

    def _keep(self, table, series, mask, n, totals):
        start = LAYOUTS[table].start(self._region, TALLY_MASKS[mask], series)
        occupied = np.flatnonzero(n)
        sums = np.stack([total[occupied] for total in totals], axis=1) if totals else np.empty((len(occupied), 0))
        self._tables[table].append(Cells(start + occupied, np.rint(n[occupied]).astype(np.int64), sums))


def _ranked(code):
    """Return the distinct values of small non-negative integers, and the rank of each; the ranks as int16 or wider."""
    size = 1 << len(MASKS) + 4 + _FLAG_BITS
    present = np.zeros(size, bool)
    present[code] = True
    found = np.flatnonzero(present)
    rank = np.empty(size, np.min_scalar_type(max(len(found) - 1, 0)))
    rank[found] = np.arange(len(found))
    return found, rank.take(code)


@cache
def _bands_of_half():
    """Return the band of each float16 distance to the reference surface; one past the last where there is none."""
    band = band_index(np.arange(1 << 16, dtype=np.uint16).view(np.float16))
    return np.where(band < 0, len(BANDS), band).astype(np.int32)


def _loss(log_likelihood):
    """Return the loss of each voxel, its square, and its bin in the joint histogram."""
    loss = -log_likelihood
    return loss, loss * loss, loss_index(loss)


# flags of a voxel: in a region, 1 for reference, 2 for predicted, 4 for predicted by the deterministic pass; in
# ALL, the predicted class, 4 times the reference class (4 is a cavity), and 32 where the deterministic pass is right
_FLAG_BITS = 6
_FLAGS = np.arange(1 << _FLAG_BITS)
_TRUTH, _PREDICTED, _OWN = (_FLAGS >> bit & 1 for bit in range(3))
_PREDICTED_CLASS, _REFERENCE_CLASS, _OWN_CORRECT = _FLAGS & 3, _FLAGS >> 2 & 7, _FLAGS >> 5


def _outcome(truth, predicted):
    """Return 0 TP, 1 FP, 2 FN, 3 TN."""
    return 3 - 2 * predicted - truth


def _tally_region(tables, region, columns, position, truth, predicted, own, series, brief):
    flags = truth + 2 * predicted.astype(np.int32) + (0 if own is None else 4 * own.astype(np.int32))
    masks, distance_reference = columns.masks[position], columns.distance_reference[position]
    counter = _Counter(tables, region, masks, distance_reference, flags, columns.weight, brief)
    truth = counter.sorted(truth)
    p = counter.sorted(columns.probability[position]).astype(np.float64)
    expected = counter.sorted(columns.expected_entropy[position])
    entropy, loss = _tally_probability(counter, PROBABILITY, p, truth, _PREDICTED)
    outcome = _outcome(_TRUTH, _PREDICTED)

    def score(measure, bins, values):
        counter.scores(measure, bins, values, outcome, loss)

    def score_difference(measure, whole, part):
        values = np.maximum(whole - part, 0)
        score(measure, SCORE_BINS.index(values), values)

    score("entropy", SCORE_BINS.index(entropy), entropy)
    wide = expected.astype(np.float64)
    if "expected_entropy" in series:
        score("expected_entropy", SCORE_BINS.index_half(expected), wide)
    if "mutual_information" in series:
        score_difference("mutual_information", entropy, wide)
    if BETWEEN_MEMBERS in series:
        member = counter.sorted(columns.member_entropy[position]).astype(np.float64)
        score_difference(BETWEEN_MEMBERS, entropy, member)
        score_difference(WITHIN_MEMBERS, member, wide)
    if "variance" in series:
        variance = counter.sorted(columns.variance[position])
        score("variance", SCORE_BINS.index_half(variance), variance.astype(np.float64))
    if "boundary_proximity" in series:
        distance = counter.sorted(columns.distance_predicted[position])
        if len(distance) and not np.isnan(distance[0]):
            score("boundary_proximity", distance_bins().take(distance.view(np.uint16)), boundary_proximity(distance))
    if DETERMINISTIC in series:
        p0 = counter.sorted(columns.deterministic[position]).astype(np.float64)
        entropy, own_loss = _tally_probability(counter, DETERMINISTIC, p0, truth, _OWN)
        bins = SCORE_BINS.index(entropy)
        score("deterministic_entropy", bins, entropy)
        counter.scores(OWN_ERRORS, bins, entropy, _outcome(_TRUTH, _OWN), own_loss)


def _tally_probability(counter, kind, p, truth, predicted):
    """Count a probability and the confidence of its label; return its entropy and the loss.

    predicted : of each value of the flags
    """
    log_p, log_1mp = logarithms(p)
    entropy = binary_entropy_of(p, log_p, log_1mp)
    for logarithm in (log_p, log_1mp):
        np.clip(logarithm, np.log(CLIP), np.log1p(-CLIP), out=logarithm)
    counter.binned("probabilities", kind, PROBABILITY_BINS.index(p), _TRUTH, (p, p * p, log_p, log_1mp))
    confidence = np.maximum(p, 1 - p)
    correct = (predicted == _TRUTH).astype(np.int64)
    counter.binned("confidences", kind, CONFIDENCE_BINS.index(confidence), correct, (confidence,))
    return entropy, _loss(np.where(truth, log_p, log_1mp))


def _tally_all(tables, columns):
    """Count the four-class view; return the class of the greatest mean probability, and `classes` of the volume."""
    labels = columns.labels
    distribution = four_class(np.stack(columns.probability).astype(np.float64))
    argmax = distribution.argmax(axis=0)
    reference = labels if columns.cavity is None else np.where(columns.cavity, np.uint8(len(CLASSES)), labels)
    flags = argmax.astype(np.int32) | reference.astype(np.int32) << 2
    if columns.deterministic:
        own = four_class(np.stack(columns.deterministic).astype(np.float64))
        flags |= (own.argmax(axis=0) == labels).astype(np.int32) << 5
    # the masks and distances of ALL are those of WT
    counter = _Counter(tables, ALL, columns.masks[0], columns.distance_reference[0], flags, columns.weight)
    truth = _REFERENCE_CLASS % len(CLASSES)
    correct = (truth == _PREDICTED_CLASS).astype(np.int64)

    def confidences(kind, values, right):
        values = counter.sorted(values)
        counter.binned("confidences", kind, CONFIDENCE_BINS.index(values), right, (values,))

    confidences(PROBABILITY, distribution.max(axis=0), correct)
    if columns.deterministic:
        confidences(DETERMINISTIC, own.max(axis=0), _OWN_CORRECT)
    for label, kind in enumerate(CLASS_KINDS):
        p = counter.sorted(distribution[label])
        counter.binned("class_probabilities", kind, PROBABILITY_BINS.index(p), (truth == label).astype(int), (p,))
    entropy = counter.sorted(entropy_4class(distribution))
    of_truth = np.take_along_axis(distribution, labels[None].astype(np.intp), axis=0)[0]
    loss = _loss(np.log(np.clip(counter.sorted(of_truth), CLIP, 1 - CLIP)))
    counter.scores(ENTROPY_4CLASS, SCORE_BINS.index(entropy), entropy, np.where(correct, TN, FP), loss)
    counter.classes()
    by_flags = np.bincount(flags, columns.weight, len(_FLAGS))
    classes = np.zeros((len(CLASSES), len(CLASSES) + 1), np.int64)
    np.add.at(
        classes, (_PREDICTED_CLASS, np.minimum(_REFERENCE_CLASS, len(CLASSES))), np.rint(by_flags).astype(np.int64)
    )
    return argmax, classes


def tally_quiet(distances, with_deterministic, with_members, with_variance):
    """Return the tally of voxels of `volume` alone with zero probability everywhere and background as reference.

    distances : list of three float16 arrays, distance to the predicted WT, TC, ET of each voxel
    with_deterministic, with_members, with_variance : whether these exist for the patient

    Such voxels differ by distance alone, and few distances occur: they are counted first.
    """
    tallies = []
    for distance in distances:
        n = np.bincount(distance.view(np.uint16), minlength=1 << 16)
        found = np.flatnonzero(n)
        nothing, nowhere = np.zeros(len(found), np.float32), np.full(len(found), np.nan, np.float16)
        flat = [nothing.astype(np.float16)] * 3
        columns = Columns(
            labels=np.zeros(len(found), np.uint8),
            prediction=np.zeros(len(found), np.uint8),
            cavity=None,
            probability=[nothing] * 3,
            deterministic=[nothing] * 3 if with_deterministic else None,
            expected_entropy=flat,
            member_entropy=flat if with_members else None,
            variance=flat if with_variance else None,
            distance_predicted=[found.astype(np.uint16).view(np.float16)] * 3,
            distance_reference=[nowhere] * 3,
            masks=[np.ones(len(found), np.uint16)] * 3,
            weight=n[found].astype(np.float64),
        )
        tallies.append(tally_columns(columns, {}))
    # each region from the tally of its own distances; ALL knows no distance
    return Tally.stitched([*tallies, tallies[0]])
