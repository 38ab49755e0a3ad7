"""What nvidia-smi says of a node's GPUs: the only place that reads its output.

tests/launch/preflight/nvidia_smi/ holds recorded output of several drivers, against which `read` is
tested: field names have changed between them (v11 to v13 of its schema).
"""

from __future__ import annotations

import shutil
import subprocess
from typing import Any
from xml.etree import ElementTree

from shardwise.errors import CheckFailed

_COMMAND = ("nvidia-smi", "-q", "-x")
# Path below <gpu>, the value that is sound or unknown, whether it ends the run, what to say.
_SIGNS = [
    ("gpu_reset_status/reset_required", "No", True, "asks for a reset; drain the node, reset it"),
    ("gpu_recovery_action", "None", True, "asks for recovery ({}); drain the node"),
    ("ecc_errors/unrepairable_memory", "No", True, "has memory beyond repair; replace it"),
    ("remapped_rows/remapped_row_failure", "No", True, "could not remap a bad row; replace it"),
    ("remapped_rows/remapped_row_pending", "No", True, "has rows to remap; reset it"),
    ("retired_pages/pending_retirement", "No", True, "has pages to retire; reboot the node"),
    ("fabric/state", "Completed", True, "is not in the NVLink fabric ({}); see fabricmanager"),
]
_SLOWED = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
_UNKNOWN = ("", "N/A", "Not Supported", "Requested functionality has been deprecated")


def query(seconds: float) -> dict[str, Any] | None:
    """The GPUs of this node (see `read`); None where there is no nvidia-smi.

    Raises CheckFailed when it fails, as it does without its driver, or does not end.
    """
    if shutil.which(_COMMAND[0]) is None:
        return None
    command = " ".join(_COMMAND)
    with subprocess.Popen(_COMMAND, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        try:
            out, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            raise CheckFailed(f"{command}: no answer within {seconds:.0f} s") from None
    if child.returncode:
        last = out.decode(errors="replace").strip().splitlines()[-1:]
        raise CheckFailed(f"{command}: exited with {child.returncode}: {' '.join(last)}")
    return read(out.decode(errors="replace"))


def read(text: str) -> dict[str, Any]:
    """``{"driver", "gpus": [{"name", "uuid", "ecc"}], "failures", "warnings"}`` of the XML.

    A failure is what does not go away by itself: uncorrectable ECC errors since the last reset,
    rows or pages that wait for one, a GPU that asks for one. Being slowed by heat or power is a
    warning. Raises CheckFailed for what is no output of nvidia-smi.
    """
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise CheckFailed(f"nvidia-smi: cannot be read: {error}") from None
    found: dict[str, Any] = {
        "driver": root.findtext("driver_version", ""),
        "gpus": [],
        "failures": [],
        "warnings": [],
    }
    for index, gpu in enumerate(root.findall("gpu")):
        name = gpu.findtext("product_name", "?")
        ecc = gpu.findtext("ecc_mode/current_ecc", "N/A")
        found["gpus"].append({"name": name, "uuid": gpu.findtext("uuid", "?"), "ecc": ecc})
        who = f"GPU {index} ({name}, {gpu.get('id', '?')})"
        if errors := _uncorrectable(gpu):
            found["failures"].append(f"{who} has {errors} uncorrectable ECC errors; reset it")
        for path, sound, fatal, says in _SIGNS:
            value = gpu.findtext(path, "").strip()
            if value not in (sound, *_UNKNOWN):
                found["failures" if fatal else "warnings"].append(f"{who} {says.format(value)}")
        if slowed := [name for name in _SLOWED if _active(gpu, name)]:
            found["warnings"].append(f"{who} is slowed ({', '.join(slowed)}); look at its cooling")
    return found


def _uncorrectable(gpu: ElementTree.Element) -> int:
    """Since the last reset; newer drivers tell parity from other errors."""
    counts = gpu.findall("ecc_errors/volatile/*")
    return sum(
        int(text) for c in counts if "uncorrectable" in c.tag and (text := c.text or "").isdigit()
    )


def _active(gpu: ElementTree.Element, reason: str) -> bool:
    return "Active" in (
        gpu.findtext("clocks_event_reasons/clocks_event_reason_" + reason),
        gpu.findtext("clocks_throttle_reasons/clocks_throttle_reason_" + reason),
    )
