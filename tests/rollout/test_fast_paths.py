"""Fast paths refuse what they were not made for: models that differ from ours in one place."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.models import families, registry
from shardwise.models.common.blocks import RMSNorm, SwiGLU
from shardwise.models.dense.model import Dense as Llama
from shardwise.parallel.tensor import widen_logits
from shardwise.rollout import native
from shardwise.rollout.cache import PagedCache
from shardwise.rollout.config import Sampling
from shardwise.rollout.generator import Generator
from tests.rollout import support


class Scaled(Llama):
    """Gemma's way: the embedding is multiplied by a constant."""

    def embed_tokens(self, *args: Any) -> Tensor:
        return super().embed_tokens(*args) * 8.0


class Claims(Llama):
    """Halves what is in front of the head, and says that it can be decoded all the same."""

    compiled_decoding = True

    def hidden(self, *args: Any, **options: Any) -> Tensor:
        return super().hidden(*args, **options).cumsum(-1)


class Capped(Llama):
    def forward(self, *args: Any, **options: Any) -> Tensor:
        return torch.tanh(super().forward(*args, **options) / 3.0) * 3.0


class OffsetNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.0


class OtherNorms(Llama):
    compiled_decoding = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for block in self.layers:
            block.attn_norm = OffsetNorm(config.hidden_size, config.norm_eps)


class OtherMLP(Llama):
    compiled_decoding = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        kind = type("Squared", (SwiGLU,), {"forward": lambda self, x: self.down(self.up(x) ** 2)})
        for block in self.layers:
            block.mlp = kind(config.hidden_size, config.ffn_size)


class OtherEps(Llama):
    compiled_decoding = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.norm = RMSNorm(config.hidden_size, 0.3)


class BiasedHead(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + torch.arange(self.out_features, device=input.device) / 9.0


class OtherHead(Llama):
    compiled_decoding = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.head = BiasedHead(config.hidden_size, config.head_size, bias=False)
        self.retie()


MODELS: dict[type[Llama], str] = {
    Scaled: "Scaled does not say that it can be decoded so",
    Capped: "Capped does not say",
    OtherNorms: r"layers.0.attn_norm is a OffsetNorm",
    OtherMLP: r"layers.0.mlp is a Squared",
    OtherEps: "eps of its own",
    OtherHead: "head is a BiasedHead",
    Claims: "logits differ from the model's by",
}


def loaded(monkeypatch: pytest.MonkeyPatch, kind: type[Llama]) -> tuple[Generator, Llama]:
    """A generator whose family has this model, and a model with the weights that it serves."""
    row = dataclasses.replace(families.FAMILIES["llama"], model=kind)
    monkeypatch.setitem(families.FAMILIES, "llama", row)
    generator = Generator(support.CONFIGS["llama"])
    generator.update_weights(support.hf_weights("llama"))
    model = registry.build(support.CONFIGS["llama"]).eval()
    model.load_state_dict(generator.backend.model.state_dict())
    return generator, model  # type: ignore[return-value]


def needs_native() -> None:
    if support.generator("llama").backend_note != "native CPU step":
        pytest.skip("no native step here")


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_the_model_generates_where_the_native_step_would_guess(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: type[Llama]
) -> None:
    needs_native()
    with caplog.at_level(logging.WARNING):
        generator, model = loaded(monkeypatch, kind)
    assert generator.backend_note.startswith("plain PyTorch: ")
    with pytest.raises(AssertionError, match=MODELS[kind]):
        raise AssertionError(generator.backend_note)
    assert bool(generator.mismatch) == (kind is Claims) == bool(caplog.records)
    found = generator.generate(support.requests(4), Sampling(greedy=True, max_new_tokens=5))
    for completion in found:
        ids = torch.tensor([[*completion.prompt_tokens, *completion.token_ids]])
        with torch.no_grad():
            logits = model(ids, torch.arange(ids.shape[1])[None])[0]
        logp = logits[len(completion.prompt_tokens) - 1 : -1].log_softmax(-1)
        assert logp.argmax(-1).tolist() == completion.token_ids
        expected = logp.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", support.CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_it_was_made_for_it_serves(name: str, dtype: torch.dtype) -> None:
    generator = support.generator(name, dtype)
    if "native" not in generator.backend_note:
        pytest.skip(generator.backend_note)
    assert not generator.mismatch
    error, bound = native.error_of(generator.backend)
    assert error < bound < 0.3


def shifted(real: Any) -> Any:
    def call(self: Any, tokens: Tensor, rows: Tensor, positions: Tensor, *rest: Tensor) -> None:
        real(self, tokens, rows, positions - (positions > 24).long(), *rest)

    return call


def another_page(real: Any) -> Any:
    """A table of two pages, one for the other; those of the last row are another's copies."""

    def tables(self: Any, rows: Any) -> Tensor:
        tables_BP = real(self, rows)
        return tables_BP.flip(1) if len(rows) == 4 else tables_BP  # type: ignore[no-any-return]

    return tables


def not_copied(real: Any) -> Any:
    return lambda self, source, target: None


@pytest.mark.parametrize(
    ("kind", "name", "plant"),
    [
        (native.NativeBackend, "_call", shifted),
        (native.NativeBackend, "tables", another_page),
        (PagedCache, "copy", not_copied),
    ],
)
def test_a_wrong_native_step_is_found_at_load(
    monkeypatch: pytest.MonkeyPatch, kind: type, name: str, plant: Any
) -> None:
    needs_native()
    monkeypatch.setattr(kind, name, plant(getattr(kind, name)))
    generator = support.generator("everything")
    assert generator.mismatch and generator.backend_note.startswith("plain PyTorch")


def test_weights_that_are_no_numbers_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_native()
    generator = Generator(support.CONFIGS["llama"])
    good = list(support.hf_weights("llama"))
    generator.update_weights((n, torch.full_like(t, torch.nan)) for n, t in good)
    assert generator.backend_note == "native CPU step" and not generator._compared
    generator.update_weights(iter(good))
    assert generator.backend_note == "native CPU step" and generator._compared


def test_a_head_of_another_kind_keeps_its_forward() -> None:
    model = registry.build(support.CONFIGS["llama"]).to(torch.bfloat16)
    model.head = BiasedHead(64, 101, bias=False).to(torch.bfloat16)
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    before = model.head(x)
    widen_logits(model)
    assert torch.equal(model.head(x), before)
