"""Checkpoints that are committed or do not exist: atomic, hashed, free of pickle, any layout.

Nothing that is not finite is committed, so an older, sound checkpoint is never pruned for it.

save(root, step, tensors, meta)        one directory, durable when the call returns
AsyncSaver(root).save(step, ...)       the same behind the training loop
load(path, tensors), load_latest(...)  in place, into any layout; every byte verified
latest, best, list_steps, prune        the folder
inspect, verify, diff                  for people
"""

from typing import TYPE_CHECKING

from shardwise import lazy

if TYPE_CHECKING:
    from shardwise.checkpoint.background import AsyncSaver as AsyncSaver
    from shardwise.checkpoint.checks import Problem as Problem
    from shardwise.checkpoint.checks import verify as verify
    from shardwise.checkpoint.differences import Difference as Difference
    from shardwise.checkpoint.differences import diff as diff
    from shardwise.checkpoint.loading import Loaded as Loaded
    from shardwise.checkpoint.loading import load as load
    from shardwise.checkpoint.loading import load_latest as load_latest
    from shardwise.checkpoint.loading import read_files as read_files
    from shardwise.checkpoint.loading import read_meta as read_meta
    from shardwise.checkpoint.loading import read_tensors as read_tensors
    from shardwise.checkpoint.manifest import DamagedError as DamagedError
    from shardwise.checkpoint.manifest import MismatchError as MismatchError
    from shardwise.checkpoint.manifest import NonFiniteError as NonFiniteError
    from shardwise.checkpoint.manifest import PeerLostError as PeerLostError
    from shardwise.checkpoint.saving import mark_best as mark_best
    from shardwise.checkpoint.saving import prune as prune
    from shardwise.checkpoint.saving import save as save
    from shardwise.checkpoint.steps import best as best
    from shardwise.checkpoint.steps import latest as latest
    from shardwise.checkpoint.steps import list_steps as list_steps
    from shardwise.checkpoint.steps import resolve as resolve
    from shardwise.checkpoint.summary import Summary as Summary
    from shardwise.checkpoint.summary import inspect as inspect
    from shardwise.checkpoint.writer import Writer as Writer

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "background": ["AsyncSaver"],
        "checks": ["Problem", "verify"],
        "differences": ["Difference", "diff"],
        "loading": ["Loaded", "load", "load_latest", "read_files", "read_meta", "read_tensors"],
        "manifest": ["DamagedError", "MismatchError", "NonFiniteError", "PeerLostError"],
        "saving": ["mark_best", "prune", "save"],
        "steps": ["best", "latest", "list_steps", "resolve"],
        "summary": ["Summary", "inspect"],
        "writer": ["Writer"],
    },
)
