"""Caches of torch.compile and Triton are used where only we can write, or where the user says."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from shardwise.ops import compile_caches

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of the test's own, as /tmp is; returns torch's default in it."""
    for variable in (VARIABLE, "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, "")  # so that it is put back
        monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    compile_caches.secure.cache_clear()
    return compile_caches.places()[VARIABLE].folder


def test_the_default_is_torch_s_and_made_ours(place: Path) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    assert str(place) == default_cache_dir()
    compile_caches.secure()
    assert place.is_dir() and not compile_caches.places()[VARIABLE].instead


@pytest.mark.parametrize("how", ["another's", "others write", "a link", "no sticky bit"])
def test_what_others_can_write_is_replaced(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "no sticky bit":
        place.parent.chmod(0o777)
    elif how == "a link":
        place.symlink_to(tmp_path)
    else:
        place.mkdir()
        if how == "others write":
            place.chmod(0o777)
        else:
            os.chown(place, 54321, -1) if os.geteuid() == 0 else pytest.skip("needs root")
    compile_caches.secure()
    assert os.environ[VARIABLE] == str(tmp_path / "cache" / "shardwise" / "torchinductor")
    assert "TRITON_CACHE_DIR" not in os.environ


def test_the_user_s_word_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = place.with_name("shared")
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv(VARIABLE, str(shared))
    compile_caches.secure()
    assert os.environ[VARIABLE] == str(shared)
    assert "beware" in compile_caches.places()[VARIABLE].detail
