"""sentencepiece models, trained here, against the sentencepiece library itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.config.schema import TokenizerConfig
from shardwise.data.chat import encode_chat
from shardwise.data.sentencepiece_model import load_sentencepiece
from shardwise.data.stdlib import read_stdlib
from shardwise.data.tokenizer import FastTokenizer, load_tokenizer
from shardwise.errors import DataError

sentencepiece = pytest.importorskip("sentencepiece")
TEXTS = [d.text for d in read_stdlib("all") if d.name in ("argparse.py", "json/decoder.py")]
KINDS = {
    "bpe": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False},
    "unigram": {"model_type": "unigram", "byte_fallback": True, "remove_extra_whitespaces": False,
                "normalization_rule_name": "identity", "user_defined_symbols": ["self."]},
    "nfkc": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "pad_id": 3},
    "bare": {"model_type": "bpe", "add_dummy_prefix": False},
}  # fmt: skip


@pytest.fixture(scope="module", params=sorted(KINDS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(ours, theirs, path, kind)."""
    folder = tmp_path_factory.mktemp("sp")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for t in TEXTS for line in t.splitlines()),
        model_prefix=str(folder / "m"),
        vocab_size=600,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
        **KINDS[request.param],
    )
    path = folder / "m.model"
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = load_tokenizer(TokenizerConfig(kind="sentencepiece", path=path))
    return ours, theirs, path, request.param


def test_real_text(pair: Any) -> None:
    ours, theirs, _, kind = pair
    assert isinstance(ours, FastTokenizer)
    ties = 0
    for text in [line for t in TEXTS for line in t.splitlines()] + [t[:20_000] for t in TEXTS]:
        ids, expected = ours.encode(text), theirs.encode(text)
        if kind in ("unigram", "nfkc"):  # ties: the same pieces in another order
            ties += ids != expected
            assert sorted(ids) == sorted(expected)
        else:
            assert ids == expected
        if kind in ("bpe", "unigram"):  # these lose nothing; the space in front is counted
            assert ours.decode(ids) == text
            assert ours.byte_lengths[ids].sum() == len(text.encode()) + bool(text)
    assert ties < 20  # of 2986 lines; 9 when this was written
    assert ours.vocab_size == theirs.get_piece_size()


ANY = st.one_of(
    st.sampled_from("self.x =()\n"),
    st.characters(codec="utf-8", exclude_characters="\x00\u2581", exclude_categories=["Cn", "Co"]),
)


@given(text=st.text(ANY, max_size=30))
@settings(max_examples=150)
def test_any_text(pair: Any, text: str) -> None:
    ours, theirs, _, kind = pair
    if kind in ("bpe", "unigram"):
        assert ours.encode(text) == theirs.encode(text)


def test_ids_of_special_tokens(pair: Any) -> None:
    ours, theirs, _, kind = pair
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id()) == (1, 2)
    assert ours.pad_id == (theirs.pad_id() if kind == "nfkc" else ours.eos_id)
    assert ours.stop_ids == (ours.id_of("<|im_end|>"), 2)[::-1]
    for text in ("a<|im_end|>b", "</s>", "<0x41>"):
        ids = ours.encode(text)
        assert kind in ("unigram", "nfkc") or ids == theirs.encode(text)
        assert not set(ids) & {ours.id_of(t) for t in ours.special_tokens}
    ids = ours.encode("<|im_start|>a<|im_end|></s>", allow_special=True)
    assert ids[0] == ours.id_of("<|im_start|>") and ids[-2:] == [ours.id_of("<|im_end|>"), 2]


def test_chat(pair: Any) -> None:
    ours = pair[0]
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    ids, mask = encode_chat(ours, chat)
    learned = ours.decode([i for i, m in zip(ids, mask) if m], skip_special=False)
    assert learned == "ho<|im_end|>"


def test_saved_for_transformers(pair: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs, _, _ = pair
    ours.save(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("def f(x):", "  self.parser\n  x", "hello 東京"):
        assert loaded(text, add_special_tokens=False)["input_ids"] == theirs.encode(text)
    assert load_tokenizer(tmp_path).hash == ours.hash


def test_folder_with_a_model(pair: Any) -> None:
    ours, _, path, _ = pair
    folder = path.parent / "folder"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(path.read_bytes())
    assert load_tokenizer(folder).hash == load_tokenizer(path).hash == ours.hash


def test_damage_is_named(pair: Any, tmp_path: Path) -> None:
    raw = pair[2].read_bytes()
    bad = tmp_path / "bad.model"
    for content in (b"", b"no model at all", raw[:-5], raw[:1000], b"\x0a\xff" + raw):
        bad.write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.model: .*not a sentencepiece model"):
            load_sentencepiece(bad)
    with pytest.raises(DataError, match=r"no\.model: cannot be read"):
        load_sentencepiece(tmp_path / "no.model")


def _field(number: int, value: bytes | int) -> bytes:
    """One field of a protocol buffer message (numbers and lengths below 128)."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    return bytes([number << 3 | 2, len(value)]) + value


_SCORE = b"\x15\0\0\0\0"
_END = _field(1, b"</s>") + _SCORE + _field(3, 3)
_A = _field(1, b"a") + _SCORE
_UNK = _field(1, b"<unk>") + _SCORE + _field(3, 2)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([_UNK, _A, _SCORE], "a piece has no text"),
        ([_END, _A], "no piece is marked as the unknown one"),
        ([_UNK, _END, _field(1, b"a") + _field(2, 7)], "no 32-bit float"),
        ([_UNK, _END, _field(1, 7)], "a number where a text belongs"),
        ([_UNK, _END], ""),  # no ordinary piece
    ],
)
def test_damaged_pieces_are_named(tmp_path: Path, pieces: list[bytes], message: str) -> None:
    path = tmp_path / "bad.model"
    for kind in (1, 2):
        trainer = _field(2, _field(3, kind))
        path.write_bytes(b"".join(_field(1, p) for p in pieces) + trainer)
        if message or kind == 1:
            with pytest.raises(DataError, match=rf"bad\.model: .*{message}"):
                load_sentencepiece(path)
