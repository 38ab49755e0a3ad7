"""Outcome and process reward models as scorers of a search."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from shardwise.errors import CheckpointError, ConfigError
from shardwise.losses.scores import Score
from shardwise.models import registry
from shardwise.models.common.config import DecoderConfig
from shardwise.search.scorers import Path

# Shape suffixes: B rows (one), T tokens, V numbers of the head (one).


class ModelScorer:
    """A model with a scalar head that is this rank's own, and reads one path at a time.

    So the size of a batch, which changes how sums are rounded, changes no score. ``weights`` is a
    stream of full tensors. Raises ConfigError for a head, or a vocabulary, of another kind, and
    CheckpointError for weights that do not fit.
    """

    samples, reads = 0, True

    def __init__(
        self,
        name: str,
        config: DecoderConfig,
        weights: Iterable[tuple[str, Tensor]],
        score: Score,
        vocab_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        hf_names: bool = True,
    ) -> None:
        self.name, self.score, self.device = name, score, torch.device(device)
        if config.head != "scalar":
            raise ConfigError(f"{name}: its model writes text; a scorer's has a scalar head")
        if config.vocab_size != vocab_size:
            raise ConfigError(
                f"{name}: its model has a vocabulary of {config.vocab_size}, what it is to score "
                f"one of {vocab_size}; take a model that was trained with this tokenizer"
            )
        with torch.device("meta"):
            model = registry.build(config)
        self.model = model.to(dtype).to_empty(device=self.device).eval().requires_grad_(False)
        self._load(registry.from_hf_tensors(config, weights) if hf_names else weights)

    @torch.no_grad()
    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        left = dict(self.model.named_parameters())
        for name, tensor in weights:
            parameter = left.pop(name, None)
            if parameter is None or parameter.shape != tensor.shape:
                raise CheckpointError(f"{self.name}: no parameter {name} of {tuple(tensor.shape)}")
            parameter.copy_(tensor)
        if left:
            raise CheckpointError(f"{self.name}: {', '.join(sorted(left)[:5])} did not arrive")

    def __call__(self, paths: Sequence[Path]) -> list[float | None]:
        """See `search.scorers.Scorer`."""
        return [self._one(path) for path in paths]

    @torch.no_grad()
    def _one(self, path: Path) -> float:
        ids_BT = torch.tensor([[*path.prompt_tokens, *path.token_ids]], device=self.device)
        scores_BTV = self.model(ids_BT, torch.arange(ids_BT.shape[1], device=self.device)[None])
        behind = scores_BTV[0, len(path.prompt_tokens) :, 0].double().cpu().numpy()
        return self.score.total(behind[self.score.read_at(path.token_ids)])
