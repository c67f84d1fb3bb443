"""Rows of the cohort's tables: their columns, which are the public contract, and what every row has in common."""

import numpy as np
import pyarrow as pa

from segtrust.masks import BANDS, CONDITIONAL_ON_REFERENCE, DEPENDS_ON_MODEL

METRICS_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("reference_model", pa.string()),
        ("passes", pa.int64()),
        ("group", pa.string()),
        ("group_value", pa.string()),
        ("region", pa.string()),
        ("mask", pa.string()),
        ("measure", pa.string()),
        ("aggregation", pa.string()),
        ("metric", pa.string()),
        ("n_bins", pa.int64()),
        ("pooling", pa.string()),
        ("recalibration", pa.string()),
        ("value", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("interval", pa.string()),
        ("bias", pa.float64()),
        ("p_value", pa.float64()),
        ("p_value_holm", pa.float64()),
        ("n_cases", pa.int64()),
        ("n_voxels", pa.int64()),
        ("conditional_on_reference", pa.bool_()),
        ("mask_depends_on_model", pa.bool_()),
    ]
)
STRATA_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("region", pa.string()),
        ("measure", pa.string()),
        ("aggregation", pa.string()),
        ("scheme", pa.string()),
        ("stratum", pa.string()),
        ("cutoff_source", pa.string()),
        ("n_cases", pa.int64()),
        ("median_dice", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("score_low", pa.float64()),
        ("score_high", pa.float64()),
        ("group", pa.string()),
        ("group_value", pa.string()),
    ]
)
CURVES_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("curve", pa.string()),
        ("region", pa.string()),
        ("mask", pa.string()),
        ("measure", pa.string()),
        ("pooling", pa.string()),
        ("n_bins", pa.int64()),
        ("point", pa.int64()),
        ("x", pa.float64()),
        ("y", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("n", pa.int64()),
    ]
)

# measures that a scale fitted for injected dropout multiplies
SCALED_MEASURES = ("mutual_information", "variance")


class Rows:
    """Rows of the table `metrics`."""

    def __init__(self, evaluated):
        self._rows = []
        self._common = {"model": evaluated.model, "passes": evaluated.passes, "recalibration": "none"}

    def add(self, metric, value, interval, n_cases, *, region, pooling, mask=None, n_voxels=None, **more):
        """Append a row; interval : `intervals.Intervals` of one value; more : further columns, null where not given."""
        self._rows.append(
            self._common
            | {
                "region": region,
                "mask": mask,
                "metric": metric,
                "pooling": pooling,
                "value": float(value),
                "ci_low": float(interval.low),
                "ci_high": float(interval.high),
                "interval": str(interval.label),
                "bias": float(interval.bias),
                "n_cases": int(n_cases),
                "n_voxels": None if n_voxels is None else int(n_voxels),
                "conditional_on_reference": None if mask is None else mask in CONDITIONAL_ON_REFERENCE or mask in BANDS,
                "mask_depends_on_model": None if mask is None else mask in DEPENDS_ON_MODEL,
            }
            | more
        )

    def add_scaled(self, scales):
        """Append the rows on masks of the scaled measures; scales : as of `cohort`.

        A positive factor moves the mean alone: ranks and correlations stay as they are.
        """
        numbers = ("value", "ci_low", "ci_high", "bias")
        for row in [row for row in self._rows if row.get("measure") in SCALED_MEASURES and row["mask"] is not None]:
            scaled, factor = row | {"measure": f"{row['measure']}_scaled"}, scales[row["region"]]
            if not factor:
                scaled |= {**dict.fromkeys(numbers, np.nan), "n_cases": 0, "interval": "none: no scale could be fitted"}
            elif row["metric"] in ("mean_uncertainty", "ue_dice_threshold"):
                scaled |= {name: factor * row[name] for name in numbers}
            self._rows.append(scaled)

    def table(self):
        """Return the rows as a pyarrow Table."""
        return pa.Table.from_pylist(without_nan(self._rows), schema=METRICS_SCHEMA)


class Curves:
    """Rows of the table `curves`."""

    def __init__(self, model):
        self._model = model
        self._parts = []

    def add(
        self,
        curve,
        x,
        y,
        *,
        region,
        mask=None,
        measure=None,
        pooling,
        n_bins=None,
        low=None,
        high=None,
        n=None,
    ):
        """Append the points of a curve; x, y, and where given low, high, n : (n_points,)."""
        count = len(x)
        columns = {
            "model": self._model,
            "curve": curve,
            "region": region,
            "mask": mask,
            "measure": measure,
            "pooling": pooling,
            "n_bins": n_bins,
        }
        columns = {name: pa.array([value] * count, CURVES_SCHEMA.field(name).type) for name, value in columns.items()}
        columns["point"] = pa.array(np.arange(count))
        for name, values in {"x": x, "y": y, "low": low, "high": high}.items():
            values = np.full(count, np.nan) if values is None else np.asarray(values, np.float64)
            columns[name] = pa.array(values, from_pandas=True)
        columns["n"] = pa.nulls(count, pa.int64()) if n is None else pa.array(np.asarray(n, np.int64))
        self._parts.append(pa.table(columns, schema=CURVES_SCHEMA))

    def table(self):
        """Return the points of all curves as a pyarrow Table."""
        return pa.concat_tables(self._parts).combine_chunks()


def without_nan(rows):
    """Return rows (dicts) with None in the place of NaN."""
    return [
        {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in row.items()}
        for row in rows
    ]
