"""Tokenizers: exact round trips, exact byte counts, and the same ids in transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.config.schema import TokenizerConfig
from shardwise.data.chat import CHATML
from shardwise.data.stdlib import read_stdlib
from shardwise.data.tokenizer import (
    EOS,
    IM_END,
    PAD,
    SPECIAL_TOKENS,
    ByteTokenizer,
    FastTokenizer,
    Tokenizer,
    byte_alphabet,
    load_tokenizer,
    tokenizer_fingerprint,
    train_bpe,
)
from shardwise.errors import DataError, UserError

CORPUS = [
    d.text for d in read_stdlib("all") if d.name in ("argparse.py", "json/decoder.py", "this.py")
]
BPE = train_bpe(CORPUS, 600, chat_template=CHATML)
BOTH = pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
TEXT = st.text(st.characters(codec="utf-8"), max_size=60)
HARD = [
    "",
    " ",
    "\n\n\t x\r\n",
    "naïve 東京 👩‍👩‍👧",
    "a  b   c",
    "12345",
    "<|im_end|>",
    "\x00\x7f",
    "é́",
]


@BOTH
@given(text=TEXT)
def test_round_trip_and_bytes(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode_batch([text, "x", text]) == [ids, tokenizer.encode("x"), ids]


@BOTH
def test_byte_lengths_are_exact_on_real_files(tokenizer: Tokenizer) -> None:
    for text in CORPUS:
        ids = tokenizer.encode(text)
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert tokenizer.byte_lengths.dtype == np.int64
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)


@BOTH
def test_text_never_forges_control_tokens(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("a<|im_end|>b")
    assert tokenizer.id_of(IM_END) not in plain
    parsed = tokenizer.encode("a<|im_end|>b", allow_special=True)
    assert parsed.count(tokenizer.id_of(IM_END)) == 1
    assert tokenizer.decode(parsed) == "ab"
    assert tokenizer.decode(parsed, skip_special=False) == "a<|im_end|>b"
    assert [tokenizer.byte_lengths[tokenizer.id_of(t)] for t in SPECIAL_TOKENS] == [0] * 4


@BOTH
def test_protocol(tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.special_tokens == SPECIAL_TOKENS
    assert tokenizer.token_of(tokenizer.eos_id) == EOS and tokenizer.bos_id is None
    assert tokenizer.pad_id == tokenizer.id_of(PAD) != tokenizer.eos_id
    assert tokenizer.stop_ids == (tokenizer.eos_id, tokenizer.id_of(IM_END))
    with pytest.raises(DataError, match="no token 'nope'"):
        tokenizer.id_of("nope")
    with pytest.raises(DataError, match="no id 99999"):
        tokenizer.token_of(99999)


def test_bytes_are_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 260
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 10]
    assert tokenizer.encode("é<|pad|>", allow_special=True) == [0xC3, 0xA9, 259]


@BOTH
@pytest.mark.parametrize("special", [False, True])
def test_transformers_agrees(tokenizer: Tokenizer, tmp_path: Path, special: bool) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [t for t in HARD + CORPUS if special or "<|" not in t]
    for text in texts:
        ids = tokenizer.encode(text, allow_special=special)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs(text)["input_ids"] == ids  # nothing is added by default either
        assert theirs.decode(ids, skip_special_tokens=False) == text
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert theirs.chat_template == tokenizer.chat_template
    assert len(theirs) == tokenizer.vocab_size


@BOTH
def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for source in (
        tmp_path,
        tmp_path / "tokenizer.json",
        TokenizerConfig(kind="file", path=tmp_path),
    ):
        again = load_tokenizer(source)
        assert again.hash == tokenizer.hash
        assert again.chat_template == tokenizer.chat_template
        assert [again.encode(t) for t in HARD] == [tokenizer.encode(t) for t in HARD]
        np.testing.assert_array_equal(again.byte_lengths, tokenizer.byte_lengths)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    again.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_hash_sees_every_part() -> None:
    hashes = {
        ByteTokenizer().hash,
        BPE.hash,
        ByteTokenizer(chat_template=CHATML).hash,
        train_bpe(CORPUS, 500).hash,
    }
    assert len(hashes) == 4


def test_training_is_deterministic(tmp_path: Path) -> None:
    """Also in another process, with the trainer's threads on and another hash seed."""
    program = (
        "import sys; from pathlib import Path\n"
        "from shardwise.data.tokenizer import train_bpe\n"
        "from shardwise.data.chat import CHATML\n"
        "texts = Path(sys.argv[1]).read_bytes().decode().split(chr(0))\n"
        "print(train_bpe(texts, 600, chat_template=CHATML).hash)\n"
    )
    (tmp_path / "texts").write_bytes("\0".join(CORPUS).encode())
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": "5"}
    command = [sys.executable, "-c", program, str(tmp_path / "texts")]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == BPE.hash


def test_training_sizes(caplog: pytest.LogCaptureFixture) -> None:
    assert BPE.vocab_size == 600
    with pytest.raises(UserError, match="259; bytes and specials need 260"):
        train_bpe(CORPUS, 259)
    with pytest.raises(UserError, match=r"must hold '<\|pad\|>'"):
        train_bpe(CORPUS, 400, [EOS])
    with pytest.raises(DataError, match="no text"):
        train_bpe([], 300)
    small = train_bpe(["ab"], 400)
    assert small.vocab_size < 400 and "not 400" in caplog.text
    every_byte = "".join(map(chr, range(256)))
    assert small.decode(small.encode(every_byte)) == every_byte


def test_alphabet_is_the_library_s() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(byte_alphabet()) == sorted(ByteLevel.alphabet())
    pre = ByteLevel(add_prefix_space=False, use_regex=False)
    for byte in range(128):
        assert pre.pre_tokenize_str(chr(byte))[0][0] == byte_alphabet()[byte]


def _edited(folder: Path, **changes: object) -> Path:
    ByteTokenizer().save(folder)
    (folder / "hashes.json").unlink()  # as if another maker had written it
    file = folder / "tokenizer_config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def test_hugging_face_spellings(tmp_path: Path) -> None:
    """Tokens as mappings, templates as lists or as a file of their own, no config at all."""
    folder = _edited(
        tmp_path,
        eos_token={"content": IM_END, "__type": "AddedToken"},
        bos_token=EOS,
        pad_token=None,
        chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}],
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == tokenizer.id_of(IM_END)
    assert tokenizer.bos_id == tokenizer.id_of(EOS)
    assert tokenizer.chat_template == "d"
    (folder / "chat_template.jinja").write_text("from a file")
    assert load_tokenizer(folder).chat_template == "from a file"
    (folder / "tokenizer_config.json").unlink()
    bare = load_tokenizer(folder / "tokenizer.json")
    assert (bare.eos_id, bare.pad_id) == (bare.id_of(EOS), bare.id_of(PAD))


def test_template_option(tmp_path: Path) -> None:
    assert load_tokenizer(TokenizerConfig(chat_template="{{ x }}")).chat_template == "{{ x }}"
    (tmp_path / "t.jinja").write_text("{{ y }}")
    config = TokenizerConfig(chat_template=str(tmp_path / "t.jinja"))
    assert load_tokenizer(config).chat_template == "{{ y }}"
    with pytest.raises(UserError, match=r"tokenizer\.chat_template: cannot read 'no\.jinja'"):
        load_tokenizer(TokenizerConfig(chat_template="no.jinja"))
    (tmp_path / "t.jinja").write_bytes(b"{{ \xff }}")
    with pytest.raises(UserError, match=r"cannot read .*t\.jinja.*: byte 3: not UTF-8"):
        load_tokenizer(config)
    (tmp_path / "t.jinja").rename(tmp_path / "chat_template.jinja")
    BPE.save(tmp_path)
    with pytest.raises(DataError, match=r"chat_template\.jinja: byte 3: not UTF-8"):
        load_tokenizer(tmp_path)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    _edited(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not JSON"):
        load_tokenizer(tmp_path)
    for content, message in (
        ("[]", "must hold a JSON object"),
        ('{"eos_token": 5}', "eos_token must be a text, not 5"),
        ('{"eos_token": {"id": 5}}', "eos_token must be a text"),
        ('{"chat_template": 5}', "chat_template must be a text"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(DataError, match=rf"tokenizer_config\.json: {message}"):
            load_tokenizer(tmp_path)
    _edited(tmp_path, eos_token="<gone>")
    with pytest.raises(DataError, match="no token '<gone>'"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="needs texts to train on"):
        load_tokenizer(TokenizerConfig(kind="bpe"))


def test_bytes_fallback_vocabulary() -> None:
    """byte_lengths of a sentencepiece-like tokenizer.json: <0x..> pieces and the space mark."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    pieces = ["</s>", "\u2581hello", "\u2581wörld", "\u2581", *(f"<0x{b:02X}>" for b in range(256))]
    model = models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], 0, byte_fallback=True)
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.add_special_tokens(["</s>"])
    tokenizer = FastTokenizer(backend, eos="</s>")
    for text in ("hello wörld", "hello ☃ wörld"):
        ids = tokenizer.encode(text)
        # The space that Metaspace puts in front is counted, as documented.
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode()) + 1


def test_fingerprint_of_a_section(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    template = tmp_path / "t.jinja"
    template.write_text("{{ x }}")

    def prints() -> list[str]:
        configs = [
            TokenizerConfig(),
            TokenizerConfig(kind="bpe"),
            TokenizerConfig(kind="bpe", vocab_size=300),
            TokenizerConfig(kind="file", path=file),
            TokenizerConfig(kind="file", path=tmp_path),
            TokenizerConfig(chat_template=str(template)),
        ]
        return [tokenizer_fingerprint(c) for c in configs]

    before = prints()
    assert len(set(before)) == len(before)
    assert tokenizer_fingerprint(TokenizerConfig(vocab_size=5)) == before[0]  # of no matter there
    file.write_text(file.read_text() + " ")
    template.write_text("{{ y }}")
    assert [a == b for a, b in zip(prints(), before)] == [True] * 3 + [False] * 3
