"""What an optimizer keeps of each parameter, from whichever format it comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from shardwise.checkpoint import loading, summary
from shardwise.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerState:
    """Full tensors under our names, of one kind after the other."""

    kinds: tuple[str, ...]  # of a tensor like the parameter, such as exp_avg
    updates: int | None  # that the optimizer counts; None: it does not
    steps: int  # of training, those skipped included
    skipped: int
    of: Callable[[str], Iterator[tuple[str, Tensor]]]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As a native checkpoint has them: ``optim.<name>.<kind>``, and its step."""
        for number, kind in enumerate(self.kinds):
            for name, tensor in self.of(kind):
                yield f"optim.{name}.{kind}", tensor
                if number == 0 and self.updates is not None:
                    yield f"optim.{name}.step", torch.tensor(float(self.updates))


def of_native(path: Path) -> OptimizerState | None:
    """Of a native checkpoint; None: it has none. Raises UserError if it is not alike everywhere."""
    held = {t.name: t.shape for t in summary.inspect(path).tensors}
    names = [n.removeprefix("optim.").rpartition(".") for n in held if n.startswith("optim.")]
    if not names:
        return None
    kinds = tuple(sorted({kind for _, _, kind in names} - {"step"}))
    for name, _, kind in names:
        if kind != "step" and held[f"optim.{name}.{kind}"] != held.get(f"model.{name}"):
            raise UserError(f"{path}: optim.{name}.{kind} is no tensor like the parameter")
    steps = {
        float(tensor)
        for _, tensor in loading.read_tensors(
            path, lambda n: n.startswith("optim.") and n.endswith(".step")
        )
    }
    if len(steps) > 1:
        raise UserError(f"{path}: its parameters have had {sorted(steps)} updates, not as many")
    meta = loading.read_meta(path)
    engine = meta.get("engine", {})

    def of(kind: str) -> Iterator[tuple[str, Tensor]]:
        end = f".{kind}"
        found = loading.read_tensors(path, lambda n: n.startswith("optim.") and n.endswith(end))
        return ((n.removeprefix("optim.").removesuffix(end), tensor) for n, tensor in found)

    done = next(iter(steps), None)
    updates = int(engine.get("updates", done or 0))
    return OptimizerState(
        kinds, None if done is None else int(done), updates, int(engine.get("skipped", 0)), of
    )
