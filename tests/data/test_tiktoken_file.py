"""tiktoken files, against the tiktoken library itself."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.config.schema import TokenizerConfig
from shardwise.data import tiktoken_file
from shardwise.data.stdlib import read_stdlib
from shardwise.data.tiktoken_file import load_tiktoken, read_ranks
from shardwise.data.tokenizer import (
    EOS,
    SPECIAL_TOKENS,
    byte_alphabet,
    load_tokenizer,
    tokenizer_fingerprint,
    train_bpe,
)
from shardwise.errors import DataError, UserError

CORPUS = [d.text for d in read_stdlib("all") if d.name in ("argparse.py", "json/encoder.py")]


def _ranks(pattern: str) -> dict[bytes, int]:
    """A small real vocabulary: ours, trained with the pattern, renumbered by order of merging."""
    value = {c: b for b, c in enumerate(byte_alphabet())}
    bpe = train_bpe(CORPUS, 900, pattern=pattern)
    tokens = [bpe.token_of(i) for i in range(len(SPECIAL_TOKENS), bpe.vocab_size)]
    return {bytes(value[c] for c in t): i for i, t in enumerate(tokens)}


def _write(path: Path, ranks: dict[bytes, int]) -> Path:
    lines = [f"{base64.b64encode(t).decode()} {r}\n" for t, r in ranks.items()]
    path.write_text("".join(lines))
    return path


PATTERNS = {"r50k": tiktoken_file._GPT2, "x": tiktoken_file._CL100K, "o200k": tiktoken_file._O200K}


@pytest.fixture(scope="module", params=sorted(PATTERNS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """(ours, tiktoken's own) for one vocabulary."""
    tiktoken = pytest.importorskip("tiktoken")
    pattern = PATTERNS[request.param]
    ranks = _ranks(pattern)
    path = _write(tmp_path_factory.mktemp("tt") / f"{request.param}.tiktoken", ranks)
    theirs = tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return (
        load_tokenizer(
            TokenizerConfig(
                kind="tiktoken", path=path, split="cl100k" if request.param == "x" else None
            )
        ),
        theirs,
        path,
    )


def test_real_files(pair) -> None:  # type: ignore[no-untyped-def]
    ours, theirs, _ = pair
    for text in CORPUS:
        ids = ours.encode(text)
        assert ids == theirs.encode_ordinary(text)
        assert ours.byte_lengths[ids].sum() == len(text.encode())
        assert ours.decode(ids) == text


@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
@settings(max_examples=60)
def test_any_text(pair, text: str) -> None:  # type: ignore[no-untyped-def]
    ours, theirs, _ = pair
    assert ours.encode(text) == theirs.encode_ordinary(text)


def test_saved_for_transformers(pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    transformers = pytest.importorskip("transformers")
    ours, theirs, _ = pair
    ours.save(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in CORPUS:
        assert loaded(text)["input_ids"] == theirs.encode_ordinary(text)


def test_control_tokens(pair) -> None:  # type: ignore[no-untyped-def]
    ours, theirs, path = pair
    if path.name.startswith("r50k"):
        assert ours.eos_id == 50256  # its published number, beyond this small vocabulary
    else:
        assert ours.eos_id >= theirs.n_vocab
    assert len({ours.id_of(t) for t in SPECIAL_TOKENS}) == 4
    assert ours.encode(f"a{EOS}", allow_special=True)[-1] == ours.eos_id
    assert ours.vocab_size == max(ours.id_of(t) for t in ours.special_tokens) + 1


BYTES = {bytes([b]): b for b in range(256)}


def test_damage_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "d.tiktoken", BYTES)
    assert read_ranks(path) == BYTES
    good = path.read_text()
    for text, message in (
        ("", "line 0: not a whole tiktoken file: byte 0 has no token"),
        (good[: good.rindex("/w==")], "line 255: .* byte 255 has no token"),
        (good + "oops\n", "line 257: not 'base64 rank'"),
        (good + "!!!! 256\n", "line 257: not 'base64 rank'"),
        (good + "YWI= x\n", "line 257: not 'base64 rank'"),
        (good + "YWI= 5\n", "a rank occurs twice"),
        (good + "YWJj 256\n", "token of rank 256 is no merge"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=rf"d\.tiktoken: .*{message}"):
            load_tiktoken(path, "gpt2")
    with pytest.raises(DataError, match="cannot be read"):
        load_tiktoken(tmp_path / "none.tiktoken")


def test_a_rank_out_of_range_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.tiktoken", {b"a": -3})
    with pytest.raises(DataError, match=r"line 1: .*rank -3 is out of range"):
        load_tiktoken(path)


def test_splitting_is_never_guessed(tmp_path: Path) -> None:
    path = _write(tmp_path / "tokenizer.model", BYTES)
    with pytest.raises(UserError, match=r"tokenizer\.split: .*does not say how text is split"):
        load_tiktoken(path)
    config = TokenizerConfig(kind="tiktoken", path=path, split="o200k")
    assert load_tokenizer(config).encode("ab") == [97, 98]
    assert tokenizer_fingerprint(config) != tokenizer_fingerprint(
        config.model_copy(update={"split": None})
    )
    with pytest.raises(ValueError, match="split is of kind tiktoken alone"):
        TokenizerConfig(kind="file", path=path, split="gpt2")
