"""Torch's archives without pickle: what torch writes is read, what torch reads is written."""

from __future__ import annotations

import collections
import io
import os
import pickle
import socket
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwise.checkpoint.pickles import archive, program, write
from shardwise.errors import UserError
from tests.checkpoint.test_hostile import Bomb

WIDE = torch.arange(24.0).view(4, 6)
CONTENT: dict[Any, Any] = {
    "numbers": [1, -1, 255, 256, -(2**31), 2**40, -(2**200), 0.5, True, False, None],
    "text": "ä\n\"'",
    7: (1,),
    "deep": {"a": [{}, [], (), {"b": (1, (2, 3))}]},
    "size": torch.Size([3, 4]),
    "wide": WIDE,
    "view": WIDE[1:, ::2],
    "turned": WIDE.T,
    "scalar": torch.tensor(3.0),
    "none": torch.empty(0, 5),
    "brain": WIDE.bfloat16(),
    "counts": torch.tensor([1, -2]),
    "mask": torch.tensor([True, False]),
}


def seen(value: Any) -> Any:
    """With tensors in place of what stands for them."""
    if isinstance(value, archive.Stored):
        return value.tensor()
    if isinstance(value, dict):
        return {key: seen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(seen(item) for item in value)
    return value


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, Tensor):
        assert isinstance(found, Tensor) and found.dtype == wanted.dtype
        assert found.shape == wanted.shape and torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key, item in wanted.items():
            assert_same(found[key], item)
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted):
            assert_same(a, b)
    else:
        assert type(found) is type(wanted) and found == wanted


def read(path: Path) -> Any:
    return seen(archive.read([path])[0].value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_writes_is_read(tmp_path: Path, protocol: int) -> None:
    content = CONTENT | {"ordered": collections.OrderedDict(a=WIDE)}
    content["parameter"] = torch.nn.Parameter(WIDE)
    torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol)
    content["parameter"] = WIDE
    assert_same(read(tmp_path / "a.pt"), content)


def test_torch_reads_what_is_written(tmp_path: Path) -> None:
    write.write(tmp_path / "a.pt", CONTENT)
    assert_same(torch.load(tmp_path / "a.pt", weights_only=True), CONTENT)
    assert_same(read(tmp_path / "a.pt"), CONTENT)


def test_objects_are_notes_of_what_they_would_be(tmp_path: Path) -> None:
    torch.save({"a": Bomb(tmp_path / "canary")}, tmp_path / "a.pt")
    found = archive.read([tmp_path / "a.pt"])[0].value["a"]
    assert found.of == f"{os.mkdir.__module__}.mkdir"
    assert found.args == (str(tmp_path / "canary"),) and not (tmp_path / "canary").exists()


class Caller:
    """Calls something when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_a_hostile_pickle_writes_no_file_and_opens_no_socket(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.0)
        where = server.getsockname()
        for number, bomb in enumerate(
            [
                Caller(open, str(tmp_path / "canary"), "w"),
                Caller(subprocess.run, ["touch", str(tmp_path / "canary")]),
                Caller(eval, f"open({str(tmp_path / 'canary')!r}, 'w')"),
                Caller(socket.create_connection, where),
            ]
        ):
            path = tmp_path / f"{number}.pt"
            torch.save({"bomb": bomb}, path)
            pickle.loads(pickle.dumps(bomb))  # noqa: S301 (the payload does work)
            if number < 3:
                (tmp_path / "canary").unlink()
            else:
                server.accept()[0].close()
            assert isinstance(archive.read([path])[0].value["bomb"], archive.Thing)
            assert not (tmp_path / "canary").exists()
            with pytest.raises(BlockingIOError):
                server.accept()


def with_pickle(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", data)
    return path


LAUGHS = b"\x80\x02]q\x00" + b"".join(
    b"](" + b"h%c" % n * 10 + b"eq%c" % (n + 1) for n in range(30)
)
DEEP = b"\x80\x02" + b"](" * 100_000 + b"e" * 100_000 + b"."


@pytest.mark.parametrize(
    "data,why",
    [
        (b"", "STOP"),
        (b"garbage", "ValueError"),
        (b"\x80\x02", "STOP"),
        (b"\x80\x02.", "IndexError"),
        (b"\x80\x02h\x05.", "KeyError"),
        (b"\x80\x02K\x01K\x02b.", "fills"),
        (b"\x80\x02K\x01u.", "IndexError"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (LAUGHS + b".", "values"),
        (DEEP, "nested"),
    ],
)
def test_what_is_no_data_is_refused_by_name(tmp_path: Path, data: bytes, why: str) -> None:
    path = with_pickle(tmp_path / "a.pt", data)
    with pytest.raises(UserError, match=rf"a\.pt: .*{why}"):
        archive.read([path])


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    old, empty, none = io.BytesIO(), tmp_path / "empty.pt", tmp_path / "none.pt"
    torch.save([1], old, _use_new_zipfile_serialization=False)
    (tmp_path / "old.pt").write_bytes(old.getvalue())
    empty.write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", b"\x80\x02N.")
    os.mkfifo(tmp_path / "fifo.pt")
    for path in (tmp_path / "old.pt", empty, none, tmp_path / "packed.pt", tmp_path / "fifo.pt"):
        with pytest.raises(UserError, match=path.name):
            archive.read([path])


def test_a_tensor_does_not_reach_behind_its_storage(tmp_path: Path) -> None:
    torch.save(torch.arange(4.0), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        entries = {name: file.read(name) for name in file.namelist()}
    entries["a/data.pkl"] = entries["a/data.pkl"].replace(b"K\x04\x85", b"K\x05\x85")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as file:
        for name, data in entries.items():
            file.writestr(name, data)
    found = archive.read([tmp_path / "b.pt"])[0].value
    assert found.shape == (5,)
    with pytest.raises(UserError, match=r"b\.pt: a tensor ends behind"):
        found.tensor()


def test_the_process_can_neither_open_nor_connect(tmp_path: Path) -> None:
    """The second wall, should the first one ever fail: what was called would be refused."""
    tries = (
        ("os.open", f"os.open({str(tmp_path / 'canary')!r}, os.O_WRONLY | os.O_CREAT)"),
        ("a file", "os.open('/etc/hostname', os.O_RDONLY)"),
        ("a socket", "__import__('socket').socket()"),
        ("a process", "os.fork()"),
    )
    source = (
        Path(program.__file__)
        .read_text()
        .replace("parents[2]", f"parents[0] / {str(Path(program.__file__).parents[2])!r}")
    )
    for what, attempt in tries:
        body = source.replace(
            '        send(answer(receive(int.from_bytes(length, "little"))))\n',
            '        receive(int.from_bytes(length, "little"))\n'
            f"        try:\n            {attempt}\n            said = 'done'\n"
            "        except OSError as error:\n            said = str(error.errno)\n"
            "        send(json.dumps({'value': said}).encode())\n",
        )
        body = body.replace("import json\n", "import json\nimport socket\n", 1)
        (tmp_path / "program.py").write_text(body)
        write.write(path := tmp_path / f"{what[-4:]}.pt", [])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(archive, "PROGRAM", tmp_path / "program.py")
            assert archive.read([path])[0].value == "1", what  # EPERM
    assert not (tmp_path / "canary").exists()
