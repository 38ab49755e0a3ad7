"""Checkpoints that are committed or do not exist: atomic, hashed, free of pickle, any layout.

save(root, step, tensors, meta)        one directory, durable when the call returns
AsyncSaver(root).save(step, ...)       the same behind the training loop
load(path, tensors), load_latest(...)  in place, into any layout; every byte verified
latest, best, list_steps, prune        the folder
inspect, verify, diff                  for people
"""

from shardwise.checkpoint.background import AsyncSaver
from shardwise.checkpoint.checks import Problem, Summary, inspect, verify
from shardwise.checkpoint.differences import Difference, diff
from shardwise.checkpoint.loading import (
    Loaded,
    load,
    load_latest,
    read_files,
    read_meta,
    read_tensors,
)
from shardwise.checkpoint.manifest import DamagedError, MismatchError
from shardwise.checkpoint.saving import mark_best, prune, save
from shardwise.checkpoint.steps import best, latest, list_steps, resolve
from shardwise.checkpoint.writer import Writer

__all__ = [
    "AsyncSaver",
    "DamagedError",
    "Difference",
    "Loaded",
    "MismatchError",
    "Problem",
    "Summary",
    "Writer",
    "best",
    "diff",
    "inspect",
    "latest",
    "list_steps",
    "load",
    "load_latest",
    "mark_best",
    "prune",
    "read_files",
    "read_meta",
    "read_tensors",
    "resolve",
    "save",
    "verify",
]
