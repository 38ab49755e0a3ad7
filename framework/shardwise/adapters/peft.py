"""An adapter as PEFT stores it: `adapter_config.json` and `adapter_model.safetensors`.

One module of theirs may hold several of ours (GPT-2's ``c_attn`` is q, k and v), which then share
its A and have each its rows of B. Names and layout: PEFT 0.21, `utils/save_and_load.py` and
`tuners/lora/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.hf import Rule
from shardwise.models.families import family_of

# Shape suffixes: R rank of the update, I input and O output features (an embedding's inputs are the
# tokens, its outputs the features).

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
EMBEDDINGS = ("embed.weight", "pos_embed.weight")  # ours


@dataclasses.dataclass(frozen=True)
class Update:
    """What is added to one weight: ``alpha / R`` (rsLoRA: over its root) times ``B A``.

    ``magnitude_O``: of DoRA. All in the dtype in which they are stored.
    """

    A_RI: Tensor
    B_OR: Tensor
    alpha: float
    magnitude_O: Tensor | None = None

    @property
    def rank(self) -> int:
        """R."""
        return len(self.A_RI)

    def scaling(self, rslora: bool) -> float:
        """The factor of ``B A``."""
        return self.alpha / (self.rank**0.5 if rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """Updates by our module paths, and what was saved whole beside them.

    ``saved``: our parameters that stand in place of the base's (``modules_to_save``, ``bias``).
    ``base``: copies of the base's own weights, which PEFT stores with a targeted embedding or head.
    ``raw``: the config file. ``base_hash``: of the base model's weights, if the writer knew it.
    """

    updates: dict[str, Update]
    rslora: bool
    saved: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    base: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    raw: dict[str, Any] = dataclasses.field(default_factory=dict)
    base_hash: str | None = None


@dataclasses.dataclass(frozen=True)
class Place:
    """A module of theirs that can be adapted, and ours that it holds, in order."""

    name: str  # theirs, without ".weight"
    ours: tuple[str, ...]  # module paths
    embeds: bool
    rule: Rule  # of its weight

    @property
    def turned(self) -> bool:
        """Whether it is stored as (in, out), as Conv1D does."""
        return self.rule.transpose


def places(config: DecoderConfig) -> Iterator[Place]:
    """Linear layers and embeddings of a model, in its checkpoint's order."""
    for rule in rules(config):
        owns = rule.hf.endswith(".weight") and not any("norm" in name for name in rule.ours)
        if owns:
            ours = tuple(name.removesuffix(".weight") for name in rule.ours)
            embeds = rule.ours[0] in EMBEDDINGS
            yield Place(rule.hf.removesuffix(".weight"), ours, embeds, rule)


def rules(config: DecoderConfig) -> list[Rule]:
    """Of the model's family."""
    return family_of(config).rules(config)


# --- ours to theirs -------------------------------------------------------------------------------


def join(place: Place, updates: Mapping[str, Update], rslora: bool) -> Update | None:
    """The update of one module of theirs; None if none of ours in it has one.

    Where ours share one A, as those do that were read from such a module, theirs has it too; else
    its A holds all of ours, one above the other, and its B their rows, zero elsewhere.
    """
    found = [updates[path] for path in place.ours if path in updates]
    if not found:
        return None
    if len(place.ours) == 1:
        return found[0]
    first = found[0]
    magnitudes = [u.magnitude_O for u in found if u.magnitude_O is not None]
    magnitude_O = torch.cat(magnitudes) if magnitudes else None
    if magnitude_O is not None and len(magnitudes) == len(place.ours):
        magnitude_O = place.rule.in_turn(magnitude_O)
    whole = len(found) == len(place.ours)
    if whole and all(u.alpha == first.alpha and torch.equal(u.A_RI, first.A_RI) for u in found):
        B_OR = place.rule.in_turn(torch.cat([u.B_OR for u in found]))
        return Update(first.A_RI, B_OR, first.alpha, magnitude_O)
    A_RI = torch.cat([u.A_RI for u in found])
    B_OR = first.B_OR.new_zeros(sum(place.rule.rows), len(A_RI))
    row = column = 0
    for path, rows in zip(place.ours, place.rule.rows, strict=True):
        if (own := updates.get(path)) is not None:
            B_OR[row : row + rows, column : column + own.rank] = own.B_OR
            column += own.rank
        row += rows
    B_OR = place.rule.in_turn(B_OR)
    scaling = first.scaling(rslora)
    return Update(A_RI, B_OR, scaling * (column**0.5 if rslora else column), magnitude_O)


# --- theirs to ours -------------------------------------------------------------------------------


def split(place: Place, update: Update) -> Iterator[tuple[str, Update]]:
    """The updates of ours that one module of theirs holds."""
    if len(place.ours) == 1:
        yield place.ours[0], update
        return
    rule, whole_O = place.rule, update.magnitude_O
    none = [None] * len(place.ours)
    magnitudes = none if whole_O is None else rule.apart(whole_O).split(rule.rows)
    for path, B_OR, own_O in zip(place.ours, rule.apart(update.B_OR).split(rule.rows), magnitudes):
        yield path, dataclasses.replace(update, B_OR=B_OR.contiguous(), magnitude_O=own_O)


# --- merged ---------------------------------------------------------------------------------------


@torch.no_grad()
def merge(
    named: Iterable[tuple[str, Tensor]], adapter: PeftAdapter
) -> Iterator[tuple[str, Tensor]]:
    """A base model's weights (ours) with an adapter in them, each in its own dtype.

    Updates are computed in fp32 at least. Whoever wants the base again keeps it: subtracting does
    not give it back bit by bit.
    """
    for name, base in named:
        value = adapter.saved.get(name, base)
        update = adapter.updates.get(name.removesuffix(".weight"))
        if update is not None and name.endswith(".weight"):
            value = _updated(value, update, adapter.rslora, embeds=name in EMBEDDINGS)
        yield name, value.to(base.dtype)


def _updated(weight: Tensor, update: Update, rslora: bool, *, embeds: bool) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta = update.scaling(rslora) * (update.B_OR.to(wide) @ update.A_RI.to(wide))
    result = weight.to(wide) + (delta.T if embeds else delta)
    if update.magnitude_O is not None:
        norm_O1 = torch.linalg.vector_norm(result, dim=1, keepdim=True)
        result = update.magnitude_O.to(wide)[:, None] / norm_O1 * result
    return result
