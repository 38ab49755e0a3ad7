"""`shardwise doctor`: what this machine has, and which optional libraries are used and why."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import shardwise


@dataclasses.dataclass(frozen=True)
class Library:
    """An optional library. ``used``: whether something will call it on this machine."""

    name: str
    purpose: str
    version: str | None
    used: bool
    detail: str


# Distribution, module, extra, purpose. GPU kernels come from `shardwise.ops.capability`.
_OPTIONAL = [
    ("transformers", "transformers", "hf", "parity tests, loading what we export"),
    ("huggingface_hub", "huggingface_hub", "hf", "models and datasets by hf:org/name"),
    ("gguf", "gguf", "gguf", "convert from GGUF"),
    ("pyarrow", "pyarrow", "data", "parquet input"),
    ("sentencepiece", "sentencepiece", "data", "sentencepiece tokenizers"),
    ("zstandard", "zstandard", "data", "zst-compressed input"),
    ("tiktoken", "tiktoken", "data", "tiktoken tokenizers"),
    ("reasoning-gym", "reasoning_gym", "tasks", "problems for rewards"),
    ("math-verify", "math_verify", "math", "rewards for mathematics"),
    ("tensorboard", "tensorboard", "watch", "logging.tensorboard"),
    ("wandb", "wandb", "watch", "logging.wandb"),
    ("optuna", "optuna", "sweep", "samplers of sweeps"),
    ("peft", "peft", "peft", "parity tests, loading adapters that we export"),
]


def doctor() -> dict[str, Any]:
    """Facts as JSON values: python, torch, machine, compiler, devices, libraries, problems."""
    import torch

    from shardwise.metrics.meters import num_cores

    compiler = os.environ.get("CXX") or next(
        (found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None
    )
    libraries = _libraries()
    return {
        "shardwise": shardwise.__version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "torch": _torch(torch),
        "machine": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cores": num_cores(),
            "memory_gib": _memory_gib(),
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        },
        "compiler": {
            "path": compiler,
            "detail": "torch.compile can be used"
            if compiler
            else "no C++ compiler: engine.compile auto means off on CPU; install g++ or clang++",
        },
        "caches": _caches(),
        "devices": _devices(torch),
        "libraries": [dataclasses.asdict(library) for library in libraries],
    }


def as_text(found: dict[str, Any]) -> str:
    """The facts as a page."""
    torch, machine = found["torch"], found["machine"]
    lines = [
        f"shardwise  {found['shardwise']}, Python {found['python']['version']}",
        f"torch      {torch['version']}, CUDA {torch['cuda'] or 'none'}, "
        f"backends {', '.join(torch['distributed']) or 'none'}, CPU {torch['cpu_capability']}",
        f"machine    {machine['system']}, {machine['cores']} cores, "
        f"{machine['memory_gib'] or '?'} GiB",
        f"compiler   {found['compiler']['path'] or 'none'}: {found['compiler']['detail']}",
    ]
    lines += [f"cache      {c['name']} {c['path']}: {c['detail']}" for c in found["caches"]]
    lines += [f"device     {d['name']}, {d['memory_gib']} GiB" for d in found["devices"]] or [
        "device     no GPU: everything runs on the CPU, over gloo"
    ]
    width = max(len(library["name"]) for library in found["libraries"])
    for library in found["libraries"]:
        mark = "used" if library["used"] else "not used"
        lines.append(
            f"  {library['name']:<{width}}  {library['version'] or '-':<12} {mark:<8}  "
            f"{library['purpose']}: {library['detail']}"
        )
    return "\n".join(lines)


def _caches() -> list[dict[str, str]]:
    """Folders from which built code is loaded."""
    from shardwise.ops import compile_caches
    from shardwise.safe_files import cache_root, private_folder

    try:
        kernels, detail = private_folder("kernels"), "CPU kernels, by hash"
    except OSError as error:
        kernels, detail = cache_root() / "kernels", f"not used: {error}"
    found = [{"name": "kernels", "path": str(kernels), "detail": detail}]
    for name, place in compile_caches.places().items():
        found.append({"name": name, "path": str(place.folder), "detail": place.detail})
    return found


def _torch(torch: Any) -> dict[str, Any]:
    import torch.distributed as dist

    backends = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
    }
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "distributed": [name for name, there in backends.items() if there],
    }


def _devices(torch: Any) -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return found


def _libraries() -> list[Library]:
    from shardwise.ops.capability import capabilities

    found = [
        Library(row.library, row.purpose, version(row.library), row.used, row.detail)
        for row in capabilities()
    ]
    for name, module, extra, purpose in _OPTIONAL:
        there = importlib.util.find_spec(module) is not None
        detail = "installed" if there else f"not installed; pip install 'shardwise[{extra}]'"
        found.append(Library(name, purpose, version(name), there, detail))
    return found


def version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_gib() -> float | None:
    try:
        text = Path("/proc/meminfo").read_text()
        return round(int(text.split("MemTotal:")[1].split()[0]) / 2**20, 1)
    except (OSError, IndexError, ValueError):
        return None
