"""Pack what a reader of a study's numbers needs into one archive: settings, tables, report, and where they come from.

Scans never go in; voxels, passes, maps, and the pages of patients, which show their scans, only when asked for. The
same files give the same bytes, whoever packs them.
"""

import gzip
import hashlib
import io
import os
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import yaml

import segtrust
from segtrust.config import checked_config
from segtrust.errors import SegtrustError
from segtrust.files import canonical_json, provenance_of, replacing
from segtrust.progress import progress
from segtrust.provenance import file_digest

# patterns below results/: of each model, and of the study
OF_A_MODEL = (
    "{model}/cohort/*",
    "{model}/inject/rate.json",
    "{model}/train/curve.*",
    "{model}/train/checkpoint.sha256",
)
OF_ALL = ("comparison/*", "report/*", "report/assets/*", "report/figures/*", "report/tables/*", "report/triage/*")
# of each model, what may be asked for besides
EXTRAS = {
    "maps": "{model}/maps/*",
    "pages": "report/patients/{model}/*",
    "tally": "{model}/tally/*",
    "voxels": "{model}/voxels/*",
    "samples": "{model}/samples/*/*",
}
MANIFEST, PROVENANCE = "MANIFEST.sha256", "provenance.json"


def export(study, archive, extras=()):
    """Write the archive of a study, and return a summary of it as text.

    study : Path of the study's folder
    archive : path of the file to write, .tar.gz
    extras : names in `EXTRAS` of what to add

    Names in the archive begin with the name of the study's folder. `MANIFEST.sha256` holds the digest of every other
    file, for `sha256sum --check`; `provenance.json` the provenance of each model's tables. Raises SegtrustError where
    the archive exists, has another ending, or the study has no report yet.
    """
    study, archive = Path(study), Path(archive)
    if not archive.name.endswith((".tar.gz", ".tgz")):
        raise SegtrustError(f"{archive}: expected a name that ends with .tar.gz")
    if archive.exists():
        raise SegtrustError(f"{archive} exists already; remove it, or give another name")
    config = checked_config(yaml.safe_load((study / "config.yaml").read_text(encoding="utf-8")))
    files = files_of(study, config, extras)
    provenance = canonical_json(provenance_of_tables(study, config["models"])).encode()
    digests = {name: file_digest(path) for name, path in progress(files.items(), "files read")}
    digests[PROVENANCE] = hashlib.sha256(provenance).hexdigest()
    manifest = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()
    with (
        replacing(archive) as partial,
        open(partial, "wb") as raw,
        # neither a date nor the name of the file
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, content in ((MANIFEST, manifest), (PROVENANCE, provenance)):
            _add(tar, f"{study.name}/{name}", len(content), io.BytesIO(content))
        for name, path in progress(sorted(files.items()), "files packed"):
            with open(path, "rb") as file:
                _add(tar, f"{study.name}/{name}", path.stat().st_size, file)
    return _summary(study, archive, files, config["models"])


def files_of(study, config, extras=()):
    """Return {name in the archive: Path} of the files of a study that are packed; SegtrustError without a report.

    config : the study's checked configuration; extras : names in `EXTRAS`
    """
    if not (study / "results/report/index.html").is_file():
        raise SegtrustError(f"{study} has no results/report/index.html yet; `segtrust run` makes it")
    patterns = [*OF_A_MODEL, *(EXTRAS[name] for name in extras)]
    places = [*(pattern.format(model=model) for model in config["models"] for pattern in patterns), *OF_ALL]
    found = [path for place in places for path in (study / "results").glob(place) if path.is_file()]
    names = {path.relative_to(study): path for path in found}
    # half-written files and caches are hidden
    files = {name.as_posix(): path for name, path in names.items() if not any(part[0] == "." for part in name.parts)}
    sheet = study / config["patients"]
    # a sheet elsewhere has no name relative to the study
    name = os.path.normpath(config["patients"]) if sheet.resolve().is_relative_to(study.resolve()) else sheet.name
    return {**files, "config.yaml": study / "config.yaml", name: sheet}


def provenance_of_tables(study, models):
    """Return {"segtrust": version, "models": {name: provenance}, "comparison": provenance}, without tables not there.

    models : names
    """
    tables = {name: study / f"results/{name}/cohort/metrics.parquet" for name in models}
    found = {name: provenance_of(pq.read_schema(path)) for name, path in tables.items() if path.is_file()}
    comparison = study / "results/comparison/metrics.parquet"
    compared = {"comparison": provenance_of(pq.read_schema(comparison))} if comparison.is_file() else {}
    return {"segtrust": segtrust.__version__, "models": found, **compared}


def _add(tar, name, size, content):
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    tar.addfile(entry, content)


def _summary(study, archive, files, models):
    slices = sum(name.endswith(".png") and "_slice_" in name for name in files)
    lines = [f"{archive}: {len(files):,} files of {study.name}, {archive.stat().st_size / 1e6:.1f} MB"]
    without = [name for name in models if f"results/{name}/cohort/metrics.parquet" not in files]
    lines += [f"note: without tables, as there are none: {', '.join(without)}"] if without else []
    pages = [path for name in models for path in (study / f"results/report/patients/{name}").glob("*.html")]
    if pages and not any(name.startswith("results/report/patients/") for name in files):
        lines.append("note: without pages of patients, so links to them lead nowhere; `--with pages` packs them")
    lines += (
        [f"note: no scan is in it, but the report shows single slices of scans ({slices} figures)"] if slices else []
    )
    return "\n".join([*lines, f"check it, unpacked, with: sha256sum --check {MANIFEST}"])
