"""metrics.jsonl stays valid JSON, whole lines only, and can be rewound exactly."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwise.errors import DataError
from shardwise.metrics.jsonl import JsonLines, finite, plain, read_jsonl, write_jsonl
from shardwise.storage.durable import StorageError

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.floats(), st.text(max_size=20)
)
RECORDS = st.dictionaries(
    st.text(min_size=1, max_size=10),
    st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(), st.floats())),
    max_size=5,
)


def strict(line: str) -> Any:
    """JSON as the standard has it, without Python's NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(records=st.lists(RECORDS, max_size=5))
def test_every_line_is_strict_json(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    path = tmp_path / "m.jsonl"
    path.unlink(missing_ok=True)
    write_jsonl(path, records)
    lines = path.read_bytes().decode().split("\n")
    assert lines.pop() == ""
    assert len(lines) == len(records)
    for line, record in zip(lines, records):
        back = strict(line)
        for key, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                assert back[key] is None and back[f"{key}_nonfinite"] == str(value)
            elif isinstance(value, (bool, int, float)) or value is None:
                assert back[key] == value


def test_nonfinite_says_which() -> None:
    record = finite({"a": float("nan"), "b": -math.inf, "c": [math.inf, 1.0], "d": {"e": math.nan}})
    assert record == {
        "a": None,
        "a_nonfinite": "nan",
        "b": None,
        "b_nonfinite": "-inf",
        "c": [None, 1.0],
        "d": {"e": None, "e_nonfinite": "nan"},
    }


def test_plain_values() -> None:
    assert plain(torch.tensor(2.5, dtype=torch.bfloat16)) == 2.5
    assert plain(np.float32(0.5)) == 0.5
    assert plain(np.int64(7)) == 7 and type(plain(np.int64(7))) is int
    assert plain(torch.tensor([1, 2])) == [1, 2]
    assert plain({"p": Path("a/b"), 3: (np.float64(1.0),)}) == {"p": "a/b", "3": [1.0]}


def test_torn_tail_is_cut_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_jsonl(path, [{"i": 1}, {"i": 2, "t": "ü"}])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        kept = [r["i"] for r in read_jsonl(path)]
        assert kept == ([] if cut < first else [1])
        write_jsonl(path, [{"i": 3}])
        assert [r["i"] for r in read_jsonl(path)] == [*kept, 3]


def test_keep_leaves_the_other_bytes(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"i":1,   "odd":  true}\n{"i":2}\n{"i":3}\n')
    file = JsonLines(path)
    inode = path.stat().st_ino
    assert file.keep(lambda r: True) == 0
    assert path.stat().st_ino == inode  # nothing to do, nothing replaced
    assert file.keep(lambda r: r["i"] != 2) == 1
    file.append({"i": 4})
    file.close()
    assert path.read_bytes() == b'{"i":1,   "odd":  true}\n{"i":3}\n{"i": 4}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize("bad", [b"not json\n", b"[1]\n", b"\xff\xfe\n"])
def test_a_bad_line_is_named(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"i": 1}\n' + bad)
    with pytest.raises(DataError, match=r"line 2: .*m\.jsonl"):
        list(read_jsonl(path))


@given(st.lists(st.binary(max_size=12), max_size=4), st.integers(0, 200), st.integers(0, 3))
def test_a_damaged_file_is_kept_aside_and_the_sound_lines_go_on(
    tmp_path_factory: pytest.TempPathFactory, junk: list[bytes], at: int, nulls: int
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "m.jsonl"
    lines = [b'{"i": %d}\n' % i for i in range(9)]
    where = at % len(lines)
    bad = [j.replace(b"\n", b"") + b"\n" for j in junk] + [b"\0" * 40 + b"\n"] * nulls
    bad = [b"x" + b for b in bad]  # no JSON, whatever it is
    lines[where:where] = bad
    path.write_bytes(b"".join(lines) + b'{"torn')
    file = JsonLines(path)
    file.append({"i": 9})
    file.close()
    assert [r["i"] for r in read_jsonl(path)] == list(range(10))
    kept = path.with_name("m.jsonl.damaged-1")
    assert kept.exists() == bool(bad) == bool(file.damaged)
    if bad:
        assert kept.read_bytes() == b"".join(lines) + b'{"torn'
        assert f"the first is line {where + 1}; kept as m.jsonl.damaged-1" in file.damaged


def test_something_else_of_that_name_is_moved_aside(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").mkdir()
    write_jsonl(tmp_path / "m.jsonl", [{"i": 1}])
    assert (tmp_path / "m.jsonl.damaged-1").is_dir() and (tmp_path / "m.jsonl").is_file()


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(0, 7))
def test_lines_wait_for_a_disk_that_is_full(
    tmp_path_factory: pytest.TempPathFactory, full: list[bool], part: int
) -> None:
    """Whatever part of a line still fits; none is lost, doubled or torn, and `sync` insists."""
    path = tmp_path_factory.mktemp("full") / "m.jsonl"
    file = JsonLines(path)
    real, state = os.write, {"full": False, "room": 0}

    def write(fd: int, data: bytes) -> int:
        if not state["full"]:
            return real(fd, data)
        if not state["room"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = real(fd, data[: state["room"]])
        state["room"] = 0
        return done

    with mock.patch("os.write", write):
        for i, now in enumerate(full):
            state.update(full=now, room=part if now else 0)
            file.append({"i": i})
        if full[-1]:
            with pytest.raises(StorageError, match=r"m\.jsonl: disk full; free some space"):
                file.sync()
        state["full"] = False
        file.close()
    assert [r["i"] for r in read_jsonl(path)] == list(range(len(full)))


def test_no_file_is_no_records(tmp_path: Path) -> None:
    assert list(read_jsonl(tmp_path / "none.jsonl")) == []
