"""Import of GGUF files (llama.cpp's format): weights, tokenizer and chat template.

Quantised weights are expanded to fp32 by the `gguf` package. llama.cpp stores Q and K of the
"llama" architecture with rotary pairs side by side; here the two halves of a head are the pairs,
so their rows are put back.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardwise.errors import CheckpointError, UserError
from shardwise.models import travel
from shardwise.models.dense.llama import LlamaConfig
from shardwise.models.dense.rope import RopeScalingConfig
from shardwise.models.gguf_header import check_header
from shardwise.models.gguf_tokenizer import tokenizer_config, tokenizer_json
from shardwise.ops import rope

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
_TOP = {"token_embd": "embed", "output_norm": "norm", "output": "head"}
_LAYER = {
    "attn_norm": "attn_norm",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_output": "attn.o",
    "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
}
_SPECIAL = {"eos": "eos", "bos": "bos", "pad": "padding", "unk": "unknown"}
_ENDS = tuple(f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))
_ROPE_FACTORS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """What a GGUF file holds. ``tensors`` (our names, fp32, CPU) can be iterated once."""

    config: LlamaConfig
    tensors: Iterator[tuple[str, Tensor]]
    tokenizer_json: dict[str, Any]
    chat_templates: dict[str, str]  # by name; "default" is the one to use
    tokens: list[str]
    special_ids: dict[str, int]  # "eos", "bos", "pad", "unk", as far as the file names them
    end_ids: list[int]  # all that end a turn or a text

    def files(self) -> dict[str, bytes]:
        """The tokenizer and the end tokens as a Hugging Face folder holds them (`travel`)."""
        names = {kind: self.tokens[i] for kind, i in self.special_ids.items()}
        settings = tokenizer_config(names, self.chat_templates, self.config)
        found = {
            travel.TOKENIZER: json.dumps(self.tokenizer_json, ensure_ascii=False).encode(),
            travel.TOKENIZER_CONFIG: travel.dump(settings),
        }
        if self.end_ids:
            found[travel.GENERATION] = travel.dump({"eos_token_id": self.end_ids})
        return found


def from_gguf(path: Path | str) -> GgufModel:
    """Open a GGUF file of the Llama family (F32, F16, BF16, Q8_0, Q4_0 or Q4_1).

    Raises CheckpointError naming the file when it is damaged or of a kind that is not supported,
    and UserError when the `gguf` package is missing.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("reading GGUF needs: pip install 'shardwise[gguf]'") from None
    path = Path(path)
    try:
        check_header(path)
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except CheckpointError:
        raise
    except (ValueError, OSError, LookupError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{path} is not a readable GGUF file: {error}") from None
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = _config(fields, tensors)
        special = {
            kind: int(fields[f"tokenizer.ggml.{key}_token_id"])
            for kind, key in _SPECIAL.items()
            if f"tokenizer.ggml.{key}_token_id" in fields
        }
        return GgufModel(
            config=config,
            tensors=_stream(path, config, fields["general.architecture"], tensors),
            tokenizer_json=tokenizer_json(fields, special.get("bos")),
            chat_templates=_templates(fields),
            tokens=fields["tokenizer.ggml.tokens"],
            special_ids=special,
            end_ids=list(dict.fromkeys(int(fields[k]) for k in _ENDS if k in fields)),
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: the metadata has no {error}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path}: the metadata holds a value that cannot be: {error}"
        ) from None


def _templates(fields: Mapping[str, Any]) -> dict[str, str]:
    stem = "tokenizer.chat_template"
    named = {k.removeprefix(f"{stem}."): v for k, v in fields.items() if k.startswith(f"{stem}.")}
    return ({"default": fields[stem]} if stem in fields else {}) | named


def _config(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> LlamaConfig:
    arch = fields["general.architecture"]
    if arch not in _ARCHITECTURES:
        raise CheckpointError(
            f"architecture {arch!r} is not supported; supported: {', '.join(_ARCHITECTURES)}"
        )

    def get(key: str, default: Any = None) -> Any:
        return fields.get(f"{arch}.{key}", default)

    hidden, heads = fields[f"{arch}.embedding_length"], fields[f"{arch}.attention.head_count"]
    head_dim = get("attention.key_length", get("rope.dimension_count", hidden // heads))
    base = _shortest(get("rope.freq_base", 10_000.0))
    return LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        max_seq_len=fields[f"{arch}.context_length"],
        hidden_size=hidden,
        num_layers=fields[f"{arch}.block_count"],
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=None if head_dim * heads == hidden else head_dim,
        ffn_size=fields[f"{arch}.feed_forward_length"],
        rope_base=base,
        rope_scaling=_rope_scaling(get, tensors, head_dim, base),
        norm_eps=_shortest(fields[f"{arch}.attention.layer_norm_rms_epsilon"]),
        tie_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        sliding_window=get("attention.sliding_window"),
    )


def _shortest(value: float) -> float:
    """The shortest decimal of a number that was stored in fp32: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(
    get: Any, tensors: Mapping[str, Any], head_dim: int, base: float
) -> RopeScalingConfig | None:
    """Scaling from the metadata, or recognised from Llama 3's table of frequency divisors."""
    if _ROPE_FACTORS in tensors:
        divisors = np.asarray(tensors[_ROPE_FACTORS].data, dtype=np.float32).ravel()
        found = RopeScalingConfig(kind="llama3", factor=float(divisors.max()))
        plain, _ = rope.frequencies(head_dim, base, None)
        scaled, _ = rope.frequencies(head_dim, base, found.scaling(found.original_max_seq_len))
        if not np.allclose((plain / scaled).numpy(), divisors, rtol=1e-3):
            raise CheckpointError(
                f"{_ROPE_FACTORS} is not Llama 3's scaling with its published constants"
            )
        return found
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"rope scaling {kind!r} is not supported; supported: linear, yarn")
    original = get("rope.scaling.original_context_length", get("context_length"))
    factor = float(get("rope.scaling.factor", 1.0))
    return RopeScalingConfig(kind=kind, factor=factor, original_max_seq_len=original)


def _stream(
    path: Path, config: LlamaConfig, arch: str, tensors: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    from gguf.quants import dequantize

    for name, tensor in tensors.items():
        if name == _ROPE_FACTORS:
            continue
        ours = _our_name(name)
        kind = tensor.tensor_type.name
        if ours is None or kind not in _TYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} of type {kind} is not supported; types: "
                f"{', '.join(_TYPES)} of the Llama family's tensors"
            )
        try:
            value = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            value = value.reshape(tuple(int(n) for n in reversed(tensor.shape)))
            if arch == "llama" and ".attn.q." in ours:
                value = _unpermute(value, config.num_heads)
            if arch == "llama" and ".attn.k." in ours:
                value = _unpermute(value, config.num_kv_heads)
        except ValueError as error:
            raise CheckpointError(f"{path}: tensor {name!r} is damaged: {error}") from None
        yield ours, torch.from_numpy(value)


def _our_name(name: str) -> str | None:
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    if not stem.startswith("blk."):
        return None
    _, layer, part = stem.split(".", 2)
    return f"layers.{layer}.{_LAYER[part]}.{kind}" if part in _LAYER else None


def _unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a head from pair order (0, 0', 1, 1', ...) to halves (0, 1, ..., 0', 1', ...)."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
