"""An attacker inside of a reward function: nothing gets out, the trainer survives (as root too)."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import ConfigError
from shardwise.rewards.user import UserReward, UserRewardConfig

SOURCE = Path(__file__).with_name("escapes.py")
NAMES = re.findall(
    r'^    "([^"]+)": ', SOURCE.read_text().split("ESCAPES = {")[1].split("\n}")[0], re.M
)

linux = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64", reason="numbers of x86_64"
)


def place(folder: Path) -> Path:
    """The reward's file with a neighbour, a canary and a secret around it."""
    inner = folder / "mine"
    inner.mkdir()
    shutil.copy(SOURCE, inner / "reward.py")
    (inner / "beside.txt").write_text("data")
    (folder / "canary").write_text("untouched")
    (folder / "secret.txt").write_text("hunter2")
    return inner / "reward.py"


def config(path: Path, **changes: object) -> UserRewardConfig:
    fields = {"function": f"{path}:reward", "timeout_s": 3.0, "memory_mb": 1024}
    return UserRewardConfig.model_validate(fields | changes)


def item(name: str, folder: Path) -> dict[str, Any]:
    meta = {"folder": str(folder), "trainer": os.getpid()}
    return {"question": "q", "completion": name, "answer": "4", "meta": meta}


def state(folder: Path) -> dict[str, Any]:
    return {
        str(p.relative_to(folder)): (
            p.read_bytes() if p.is_file() else b"",
            p.stat().st_mode,
            p.stat().st_mtime,
        )
        for p in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module", params=["this user", "nobody"])
def inside(request: pytest.FixtureRequest) -> Iterator[tuple[UserReward, Path]]:
    """A sandbox of this user (root, in many a container) or of nobody, and the folder around it."""
    with (
        tempfile.TemporaryDirectory() as name,
        pytest.MonkeyPatch.context() as patch,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(name)
        folder.chmod(0o755)
        patch.setenv("SHARDWISE_TEST_SECRET", "hunter2")
        settings = config(place(folder))
        if request.param == "nobody":
            if os.geteuid() != 0:
                pytest.skip("only root can become nobody")
            options = {"user": 65534, "group": 65534, "extra_groups": []}
            patch.setattr(subprocess, "Popen", functools.partial(subprocess.Popen, **options))
            patch.setattr(sys, "executable", "/usr/bin/python3")  # root's own may be out of reach
            try:
                yield stack.enter_context(UserReward(settings)), folder
            except (ConfigError, OSError) as e:
                pytest.skip(f"nobody can run no Python here: {e}")
        else:
            yield stack.enter_context(UserReward(settings)), folder


@linux
@pytest.mark.parametrize("name", NAMES)
def test_no_escape(inside: tuple[UserReward, Path], name: str) -> None:
    reward, folder = inside
    before, limits = state(folder), os.sched_getaffinity(0)
    found = reward.score([item(name, folder), item("alive", folder)])
    assert found[1].value == 0.25, "others are scored"
    if name == "forged answer":
        assert found[0].value is None and "not asked for" in found[0].reason
    else:
        assert found[0].value in (0.0, None), found[0]
    assert state(folder) == before
    assert os.sched_getaffinity(0) == limits


@linux
def test_there_is_nothing_to_gain_while_the_file_is_imported(
    inside: tuple[UserReward, Path],
) -> None:
    reward, folder = inside
    if reward.sandbox.lacking:
        pytest.skip(f"this kernel lacks {reward.sandbox.lacking}")
    found = reward.score([item("at import", folder), item("beside", folder)])
    assert found[0].reason == "ValueError: []"
    assert found[1].value == 1.0, "files beside it may be read then"
