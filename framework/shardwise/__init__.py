"""shardwise: distributed LLM training you can prove before you pay for the cluster.

The commands as functions, imported when first used:

train(config, overrides, nproc)    generate(checkpoint, prompts)    evaluate(checkpoint)
convert(source, out, to)           load_config(recipe, overrides)   doctor()
verify(recipe, layouts)            config_diff(a, b)                  init(model, data, stage=...)
sweep(sweep)                       report(run_dir)
serve(checkpoint, adapters=...)    learn(log, checkpoint, out)

and `shardwise.checkpoint` (inspect, verify, diff), `shardwise.data.prepare` (prepare, inspect),
`shardwise.report.api.compare`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardwise.checkpoint.convert import convert as convert
    from shardwise.config.load import load_config as load_config
    from shardwise.launch.config_diff import config_diff as config_diff
    from shardwise.launch.doctor import doctor as doctor
    from shardwise.launch.evaluate import evaluate as evaluate
    from shardwise.launch.generate import generate as generate
    from shardwise.launch.train import train as train
    from shardwise.recipes.api import init as init
    from shardwise.serve.learn import learn as learn

__version__ = "0.1.0"

# Where a room has the name, it is called itself (`lazy.callable_room`).
_PUBLIC = {
    "train": "shardwise.launch.train",
    "evaluate": "shardwise.launch.evaluate",
    "generate": "shardwise.launch.generate",
    "convert": "shardwise.checkpoint.convert",
    "load_config": "shardwise.config.load",
    "config_diff": "shardwise.launch.config_diff",
    "doctor": "shardwise.launch.doctor",
    "init": "shardwise.recipes.api",
    "learn": "shardwise.serve.learn",
}
_CALLABLE_ROOMS = ("verify", "sweep", "report", "serve")
__all__ = ["__version__", *_PUBLIC, *_CALLABLE_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _CALLABLE_ROOMS:
        return importlib.import_module(f"shardwise.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'shardwise' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
