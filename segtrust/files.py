"""Reading and writing of result files: always under another name first, then renamed into place."""

import hashlib
import json
import os
import re
import shutil
import socket
import time
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PROVENANCE_KEY = b"segtrust"

_MACHINE = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
_PARTIAL = re.compile(r"\.partial-(?P<machine>[0-9a-f]{6})-(?P<process>\d+)-(?P<name>.+)")
# no writer pauses so long
_ABANDONED_S = 3600


@contextmanager
def replacing(path):
    """Yield a path to write to; rename it to `path` when the block ends well, remove it otherwise.

    The temporary file stands beside the final one, so that the renaming is atomic, and keeps its ending, which
    some writers need. A reader never sees half a file. Its name belongs to this process alone: a job that outlived
    its Snakemake and the one that does its work again are not in each other's way. What killed jobs have left of the
    same file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    partial = own_partial(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def own_partial(path):
    """Return the path beside `path` that this process writes to before it renames."""
    return path.with_name(f".partial-{_MACHINE}-{os.getpid()}-{path.name}")


def remove_leftovers(folder, name=None):
    """Remove what killed processes have left in a folder of what they were writing.

    name : of the file they were writing; None for every file, in the folders below as well

    A leftover is of a process of this machine that has ended, or was not touched for an hour.
    """
    found = os.walk(folder) if name is None else [next(os.walk(folder))]
    for place, folders, files in found:
        for entry in [*folders, *files]:
            match = _PARTIAL.fullmatch(entry)
            path = Path(place, entry)
            if match and name in (None, match["name"]) and _is_left(path, match["machine"], int(match["process"])):
                shutil.rmtree(path) if entry in folders else path.unlink(missing_ok=True)


def _is_left(path, machine, process):
    if machine == _MACHINE:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False
    try:
        return time.time() - path.stat().st_mtime > _ABANDONED_S
    except FileNotFoundError:
        return False


def canonical_json(value):
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_json(path, value):
    """Write a value as indented JSON with sorted keys."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path):
    """Return the value in a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_parquet(path, table, provenance, **options):
    """Write a pyarrow Table with its provenance (a JSON-able dict) in the schema's metadata.

    options : further arguments of `pyarrow.parquet.write_table`
    """
    metadata = {**(table.schema.metadata or {}), PROVENANCE_KEY: canonical_json(provenance).encode()}
    with replacing(path) as partial:
        pq.write_table(table.replace_schema_metadata(metadata), partial, compression="zstd", **options)


def write_parquet_groups(path, table, lengths, provenance, **options):
    """Write as `write_parquet` does, with a row group for each stretch of rows, which can then be read alone.

    lengths : numbers of rows, in order; a stretch without rows has no row group
    options : further arguments of `pyarrow.parquet.ParquetWriter`
    """
    metadata = {**(table.schema.metadata or {}), PROVENANCE_KEY: canonical_json(provenance).encode()}
    table = table.replace_schema_metadata(metadata)
    with (
        replacing(path) as partial,
        pq.ParquetWriter(partial, table.schema, compression="zstd", write_statistics=False, **options) as writer,
    ):
        first = 0
        for length in filter(None, lengths):
            writer.write_table(table.slice(first, length), row_group_size=length)
            first += length


def read_parquet(path, columns=None):
    """Return (pyarrow Table, provenance dict) of a file written by `write_parquet`."""
    table = pq.read_table(path, columns=columns, partitioning=None)
    return table, provenance_of(table.schema)


def provenance_of(schema):
    """Return the provenance dict that a pyarrow schema carries."""
    return json.loads((schema.metadata or {}).get(PROVENANCE_KEY, b"{}"))


def write_csv(path, table):
    """Write a pyarrow Table as CSV, null as an empty field."""
    from pyarrow import csv

    with replacing(path) as partial, pa.OSFile(str(partial), "wb") as sink:
        csv.write_csv(table, sink)
