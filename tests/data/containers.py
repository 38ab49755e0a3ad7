"""The same rows in every kind of file and folder that holds rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONTAINERS = ("jsonl", "jsonl.gz", "json", "lines.json", "parquet", "arrow", "feather", "saved")


def write_rows(rows: Sequence[Any], folder: Path, container: str) -> Path:
    """Write ``rows`` into ``folder``; the path to read them of."""
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    file = folder / f"rows.{container}"
    if container in ("jsonl", "lines.json"):
        file.write_text(lines, encoding="utf-8", newline="\n")
    elif container == "jsonl.gz":
        file.write_bytes(gzip.compress(lines.encode()))
    elif container == "json":
        file.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        return _write_table(rows, folder, container)
    return file


def _write_table(rows: Sequence[Any], folder: Path, container: str) -> Path:
    import pyarrow as pa
    import pyarrow.parquet

    names = dict.fromkeys(name for row in rows for name in row)  # its columns are the first row's
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    if container == "parquet":
        pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=2)
        return folder / "rows.parquet"
    if container == "saved":
        return save_to_disk(table, folder / "saved")
    file = folder / "rows.arrow"
    new = pa.ipc.new_stream if container == "arrow" else pa.ipc.new_file
    with new(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return file


def save_to_disk(table: Any, folder: Path, num_files: int = 2) -> Path:
    """What ``datasets.Dataset.save_to_disk`` writes, as far as rows go."""
    import pyarrow as pa

    folder.mkdir(parents=True)
    step = -(-max(table.num_rows, 1) // num_files)
    names = []
    for i in range(0, max(table.num_rows, 1), step):
        names.append(f"data-{len(names):05}-of-{num_files:05}.arrow")
        with pa.ipc.new_stream(str(folder / names[-1]), table.schema) as writer:
            writer.write_table(table.slice(i, step))
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": n} for n in names]})
    )
    (folder / "dataset_info.json").write_text("{}")
    return folder
