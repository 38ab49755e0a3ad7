"""Chats against the real transformers: text, ids and masks, for tokenizers of every make."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from shardwise.data.chat import CHATML, encode_chat, render
from shardwise.data.sentencepiece_model import load_sentencepiece
from shardwise.data.tokenizer import ByteTokenizer, load_tokenizer, special, train_bpe

transformers = pytest.importorskip("transformers")

CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
WORDS = [
    "the",
    "answer",
    "is",
    "7",
    "and",
    "not",
    "more",
    ",",
    "said",
    "old",
    "man",
    "to",
    "a",
    "child",
    "of",
    "three",
    "x",
    "é",
    "你",
    ".",
]
TEXTS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 4

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] != 'assistant' %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What templates may use: names, filters, tags and tests of transformers' own environment.
FEATURES = (
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}"
    "{% set ns = namespace(n=0, self=1) %}{% set d = dict(a=1) %}{{ dict.fromkeys('ab', 1) }}"
    "{% for m in messages %}{% if loop.index0 > 3 %}{% break %}{% endif %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}"
    "{{ ns.n }}{{ m | tojson }}{{ m | tojson(ensure_ascii=True, sort_keys=True) }}"
    "{{ m | tojson(indent=2) }}{{ m | tojson(separators=(',', ':')) }}{{ m | tojson(True, 1) }}"
    "{{ m.reasoning_content }}{{ m.thinking }}{{ m.tool_calls is defined }}{% endfor %}"
    "{{ tools }}{{ documents }}{{ tools | tojson if tools }}{{ add_generation_prompt }}{{ extra }}"
)


def _fast(backend: Tokenizer, folder: Path, bos: bool) -> None:
    backend.add_special_tokens([special(t) for t in CONTROL])
    if bos:
        number = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", number)]
        )
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    config |= {"pad_token": "<|pad|>"} | ({"bos_token": "<s>"} if bos else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _bpe(normalizer: Any, pre_tokenizer: Any, decoder: Any) -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        backend.decoder = decoder
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def _byte_level(folder: Path) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    _fast(backend, folder, bos=False)


def _metaspace(scheme: str, folder: Path, bos: bool = False) -> None:
    space = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    _fast(_bpe(None, space, decoders.Metaspace(prepend_scheme=scheme)), folder, bos)


def _prepend(folder: Path) -> None:
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    _fast(_bpe(normalizers.Sequence(steps), None, None), folder, bos=True)


def _stripping(folder: Path) -> None:
    steps = [normalizers.NFKC(), normalizers.Strip(), normalizers.Lowercase()]
    steps.append(normalizers.Replace(Regex(r"\s+"), " "))
    _fast(_bpe(normalizers.Sequence(steps), pre_tokenizers.Whitespace(), None), folder, bos=True)


def _sentencepiece(kind: str, folder: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(t.replace("\n", " ") for t in TEXTS),
        model_writer=model,
        vocab_size=320,
        model_type=kind,
        byte_fallback=True,
        pad_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
        control_symbols=",".join(CONTROL[2:]),
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    load_sentencepiece(folder / "tokenizer.model").save(folder)


MAKES: dict[str, Any] = {
    "bytes": lambda f: ByteTokenizer().save(f),
    "bpe": lambda f: train_bpe(TEXTS, 320).save(f),
    "byte-level": _byte_level,
    "metaspace-first": functools.partial(_metaspace, "first"),
    "metaspace-always": functools.partial(_metaspace, "always", bos=True),
    "prepend": _prepend,
    "stripping": _stripping,
    "spm-bpe": functools.partial(_sentencepiece, "bpe"),
    "spm-unigram": functools.partial(_sentencepiece, "unigram"),
}


@functools.cache
def pair(make: str) -> tuple[Any, Any]:
    """One folder, read by us and by transformers."""
    with tempfile.TemporaryDirectory() as name:
        MAKES[make](Path(name))
        return load_tokenizer(name), transformers.AutoTokenizer.from_pretrained(name)


WORD = st.sampled_from([*WORDS, "", " ", "  ", "\n", "\u00a0", "ﬁ", "🙂", "\r\n", "zzz"])
CONTENT = st.lists(WORD, max_size=6).map(lambda words: " ".join(words))
CHATS = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3)


def chat_of(turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    roles = [("user", q) for q, _ in turns], [("assistant", a) for _, a in turns]
    return [{"role": r, "content": c} for both in zip(*roles) for r, c in both]


@pytest.mark.parametrize("make", MAKES)
@settings(max_examples=15, deadline=None)
@given(turns=CHATS)
def test_ids_equal_transformers(make: str, turns: list[tuple[str, str]]) -> None:
    ours, theirs = pair(make)
    chat = chat_of(turns)
    for template in (CHATML, LLAMA2, MARKED):
        ours.chat_template = theirs.chat_template = template
        ids, mask = encode_chat(ours, chat)
        found = theirs.apply_chat_template(
            chat, return_dict=True, return_assistant_tokens_mask=template == MARKED
        )
        assert ids == found["input_ids"]
        # transformers finds no token at a space that the normaliser or the offsets leave out.
        if template == MARKED and all(a and a == a.strip() for _, a in turns):
            assert mask == [bool(m) for m in found["assistant_masks"]]
        prompt = theirs.apply_chat_template(chat[:-1], add_generation_prompt=True)["input_ids"]
        assert encode_chat(ours, chat[:-1], add_generation_prompt=True)[0] == prompt
        said = [t for t, m in zip(ids, mask) if m]
        ends = [t for t in said if t in ours.stop_ids]
        assert len(ends) == len(turns)
        if make in ("bytes", "bpe", "byte-level"):  # others have no token for some of the text
            # Nothing but the answers; a space at the border may be of one token with either.
            text = ours.decode([t for t in said if t not in ours.stop_ids])
            assert "".join(text.split()) == "".join("".join(a.split()) for _, a in turns)


def test_the_tokenizers_differ() -> None:
    """Each would fail if its pieces were encoded alone; the test above would otherwise be empty."""
    chat = chat_of([("the man", "is old"), ("and", "not more")])
    alone = []
    for make in MAKES:
        ours, _ = pair(make)
        ours.chat_template = LLAMA2
        text = render(ours, chat)
        ids, _ = ours.encode_with_offsets(text)
        cut = text.index("is old")
        parts = [ours.encode_with_offsets(p)[0] for p in (text[:cut], text[cut:])]
        alone.append(ids != [*parts[0], *parts[1]])
    assert sum(alone) >= 4


def test_templates_find_what_transformers_gives_them() -> None:
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "né <b>", "name": None, "z": 1, "a": [1, {"b": None}]},
        {"role": "assistant", "content": None, "thinking": "hm", "tool_calls": [{"id": "1"}]},
        {"role": "assistant", "content": "x", "reasoning": "so"},
        {"role": "user", "content": "beyond the break"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"é": 1}}}]
    more = {"tools": tools, "documents": [{"title": "t", "text": "x"}], "extra": [1]}
    for make in MAKES:
        ours, theirs = pair(make)
        ours.chat_template = theirs.chat_template = FEATURES
        for variables in ({}, more):
            text = theirs.apply_chat_template(chat, tokenize=False, **variables)
            assert render(ours, chat, **variables) == text
