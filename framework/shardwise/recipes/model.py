"""What a recipe needs to know of the model that it starts from."""

from __future__ import annotations

import dataclasses

from shardwise.config.load import load_config
from shardwise.config.start import located
from shardwise.data.chat import CHATML
from shardwise.data.tokenizer import Tokenizer, load_tokenizer
from shardwise.models import text_part
from shardwise.models.common.config import DecoderConfig
from shardwise.stages.run import with_vocabulary


@dataclasses.dataclass(frozen=True)
class Start:
    """A model on disk or on the hub, as a recipe names it (``ref``)."""

    ref: str
    config: DecoderConfig
    tokenizer: Tokenizer
    own_template: bool
    part: str = ""  # of a multimodal model, what is read and what is not

    @property
    def words(self) -> str:
        """One line on it."""
        c = self.config
        template = "its own chat template" if self.own_template else "no chat template, so ChatML"
        part = f"{self.part}; " if self.part else ""
        return (
            f"{part}{c.family}, {c.num_parameters() / 1e6:,.1f} million parameters, {c.num_layers} "
            f"layers, width {c.hidden_size}; {self.tokenizer.vocab_size:,} tokens, up to "
            f"{c.max_seq_len:,} in a row; {template}"
        )


def open_start(ref: str) -> Start:
    """Raises ConfigError for what is no model, of an unknown family, or without a tokenizer."""
    run = load_config({"init_from": ref, "stages": [{"kind": "pretrain", "steps": 1}]}).config
    tokenizer = load_tokenizer(run.tokenizer)
    model = with_vocabulary(run, tokenizer).model
    assert isinstance(model, DecoderConfig)
    own = tokenizer.chat_template is not None
    tokenizer.chat_template = tokenizer.chat_template or CHATML
    return Start(ref, model, tokenizer, own, text_part.described(located(ref)))
