"""What is read out of recorded output of nvidia-smi, and out of one that fails or hangs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shardwise.errors import CheckFailed
from shardwise.launch.preflight import gpus

RECORDED = Path(__file__).parent / "nvidia_smi"


@pytest.mark.parametrize(
    ("file", "driver", "name", "ecc"),
    [
        ("t4-v11", "515.105.01", "Tesla T4", "Enabled"),
        ("a100-v12", "535.54.03", "NVIDIA A100-SXM4-80GB", "Enabled"),
        ("ada-v13", "595.84", "NVIDIA RTX 4000 SFF Ada Generation", "Disabled"),
    ],
)
def test_sound_gpus_of_three_schemas(file: str, driver: str, name: str, ecc: str) -> None:
    found = gpus.read((RECORDED / f"{file}.xml").read_text())
    assert found["driver"] == driver
    assert [(g["name"], g["ecc"]) for g in found["gpus"]] == [(name, ecc)]
    assert found["failures"] == found["warnings"] == []


@pytest.mark.parametrize(
    ("file", "old", "new", "key", "says"),
    [
        ("t4-v11", "<dram_uncorrectable>0", "<dram_uncorrectable>3", "failures", "3 uncorrectable"),
        ("ada-v13", "parity>N/A", "parity>2", "failures", "2 uncorrectable"),
        ("t4-v11", "retirement>No", "retirement>Yes", "failures", "pages to retire"),
        ("ada-v13", "pending>No</remapped", "pending>Yes</remapped", "failures", "rows to remap"),
        ("ada-v13", "failure>No", "failure>Yes", "failures", "could not remap"),
        ("a100-v12", "required>No", "required>Yes", "failures", "asks for a reset"),
        ("ada-v13", "action>None", "action>Reset", "failures", r"recovery \(Reset\)"),
        ("ada-v13", "memory>N/A", "memory>Yes", "failures", "beyond repair"),
        ("a100-v12", "<state>N/A", "<state>In Progress", "failures", r"fabric \(In Progress\)"),
        ("t4-v11", "hw_slowdown>Not ", "hw_slowdown>", "warnings", r"slowed \(hw_slowdown\)"),
        ("a100-v12", "sw_thermal_slowdown>Not ", "sw_thermal_slowdown>", "warnings", "slowed"),
    ],
)
def test_a_sick_gpu_is_named(file: str, old: str, new: str, key: str, says: str) -> None:
    text = (RECORDED / f"{file}.xml").read_text()
    assert old in text
    found = gpus.read(text.replace(old, new, 1))
    assert len(found["failures"] + found["warnings"]) == 1
    assert re.match(f"GPU 0 .*{says}", found[key][0])


def fake(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `nvidia-smi` on PATH."""
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_the_command_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, f'[ "$*" = "-q -x" ] && cat {RECORDED}/a100-v12.xml', monkeypatch)
    found = gpus.query(10.0)
    assert found is not None and len(found["gpus"]) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo 'NVIDIA-SMI has failed'; exit 9", "exited with 9: NVIDIA-SMI has failed"),
        ("echo No devices were found", "cannot be read"),
        ("exec sleep 60", r"no answer within 0 s"),
    ],
)
def test_a_broken_driver_is_an_error(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, body, monkeypatch)
    with pytest.raises(CheckFailed, match=message):
        gpus.query(0.3 if "sleep" in body else 10.0)


def test_no_gpus_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.query(1.0) is None
