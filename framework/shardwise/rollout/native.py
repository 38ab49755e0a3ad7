"""The compiled forward pass for CPUs: feeds `decode.cpp`.

Where it cannot be used, `unavailable` says why and the plain model generates instead.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.models.common.blocks import (
    Attention,
    Block,
    Dropout,
    GeluMLP,
    RMSNorm,
    SwiGLU,
    is_exactly,
)
from shardwise.models.common.decoder import Decoder
from shardwise.models.common.spec import ModelSpec, beyond
from shardwise.ops import compiled, rope
from shardwise.rollout import native_choice
from shardwise.rollout.backends import PlainBackend
from shardwise.rollout.config import Sampling
from shardwise.rollout.packing import bf16_holds, in_huge_pages, pack, unpack, unzip16, up32, zip16
from shardwise.rollout.pages import Cached, PagePool
from shardwise.rollout.sampling import Choice

# Shape suffixes: N rows, V vocabulary, D model width.

_CHUNK = 256  # rows of one call: large enough to be efficient, small enough for the L2 cache
_MAX_HEAD_DIM = 256  # as in decode.cpp


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled `decode.cpp`. Raises CannotBuildError."""
    found = compiled.load(Path(__file__).with_name("decode.cpp"))
    found.bf16_unit.restype = ctypes.c_int64
    return found


def unavailable(model: Decoder, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the native step cannot serve this model here; None when it can."""
    if device.type != "cpu":
        return f"the device is {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the dtype is {dtype}"
    if why := _unknown(model) or _switch(model.spec):
        return why
    config = model.config
    if config.hidden_size % 32 or config.head_width % 32 or config.head_width > _MAX_HEAD_DIM:
        return "hidden and head widths must be multiples of 32, the latter at most 256"
    try:
        found = library()
        native_choice.library()
    except compiled.CannotBuildError as e:
        return str(e)
    tiles = dtype == torch.bfloat16 and found.bf16_unit() == 2
    if tiles and not torch.cpu._is_amx_tile_supported():
        return "this process may not use the CPU's AMX tiles"
    return None


_NORMS = (RMSNorm, nn.LayerNorm)
# The parts that decode.cpp computes; a model of others, subclasses of these too, it cannot serve.
_PARTS = (
    Block, Attention, RMSNorm, SwiGLU, GeluMLP, Dropout, nn.Linear, nn.Embedding, nn.LayerNorm,
    nn.ModuleList,
)  # fmt: skip


def _unknown(model: Decoder) -> str | None:
    """What of a model decode.cpp was not made for."""
    kind = type(model)
    if not vars(kind).get("compiled_decoding", False):  # its own word, no parent's
        return f"{kind.__name__} does not say that it can be decoded so (compiled_decoding)"
    for path, module in model.named_modules():
        if path and not is_exactly(module, *_PARTS):
            return f"{path} is a {type(module).__qualname__}, which it does not know"
    if any(n.eps != model.spec.norm.eps for n in model.modules() if isinstance(n, _NORMS)):
        return "a norm has an eps of its own"
    return None


# Of a spec, what decode.cpp computes beside sizes; of a layer, too, which may differ in its window.
_OF_MODEL = {"tied", "learned_positions", "embed_scale", "embed_dropout"}
_OF_MODEL |= {"logit_scale", "logit_soft_cap"}  # of what it returns
_OF_LAYER = {"window", "rope", "qkv_bias", "o_bias", "qk_norm", "attn_dropout", "dropout"}
_OF_LAYER |= {"gated", "activation", "mlp_bias"}


def _switch(spec: ModelSpec) -> str | None:
    """What a spec asks for that decode.cpp does not compute."""
    if field := beyond(spec, _OF_MODEL):
        return f"it does not compute {field}"
    layer = spec.layer
    if any(dataclasses.replace(x, window=layer.window) != layer for x in spec.layers):
        return "its layers differ in more than their windows"
    field = beyond(layer, _OF_LAYER) or beyond(layer.norm, {"kind", "eps"})
    if field is not None:
        return f"it does not compute {field}"
    if layer.norm != spec.norm:
        return "its norms are of two kinds"
    if layer.qk_norm == "projection":
        return "it does not compute a norm over all heads"
    if layer.rope is not None and layer.rope.width != layer.head_width:
        return "it rotates whole heads"
    if layer.rope is not None and (field := beyond(layer.rope, {"scaling"})):
        return f"its rotation is not {field}"
    if (layer.gated, layer.activation) not in ((True, "silu"), (False, "gelu_tanh")):
        gate = "with" if layer.gated else "without"
        return f"it does not compute {layer.activation} {gate} a gate"
    if layer.gated and layer.mlp_bias:
        return "it does not compute mlp_bias beside a gate"
    return None


def _ffn_width(spec: ModelSpec) -> int:
    """As packed: features of the feed-forward, padded."""
    return up32(spec.layer.ffn_size)


class NativeBackend(PlainBackend):
    """Computes with `decode.cpp`; the plain model only holds the weights to be packed."""

    keys_across = True  # the positions of a page, side by side in a vector

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        self.library = library()
        self.layers: list[dict[str, Tensor | None]] = []
        self.top: dict[str, Tensor | None] = {}
        self.buffers: dict[str, Tensor] = {}
        self.narrow = False  # whether weights are packed in bf16
        self.threads = torch.get_num_threads()
        torch.cpu._init_amx()

    def _page_size(self) -> int:
        return 16  # as in decode.cpp

    def refresh(self) -> None:
        """Pack the plain model's weights: in bf16 if that holds all of them exactly."""
        m: Any = self.model
        self.narrow = bf16_holds(p for p in m.parameters() if p.dim() == 2)
        self.layers = [in_huge_pages(self._pack_layer(block)) for block in m.layers]
        self.top = in_huge_pages(
            {
                "norm": m.norm.weight.float(),
                "norm_bias": _bias(m.norm),
                "head": self._pack(m.head.weight),
            }
        )
        self.buffers = {}

    def _pack(self, weight: Tensor) -> Tensor:
        return pack(weight.bfloat16() if self.narrow else weight)

    def _unpack(self, packed: Tensor | None, num_out: int, num_in: int) -> Tensor:
        assert packed is not None
        return unpack(packed, num_out, num_in).to(self.cache.v.dtype)

    def _pack_layer(self, block: Any) -> dict[str, Tensor | None]:
        a, f = block.attn, block.mlp
        qkv = torch.cat((a.q.weight, a.k.weight, a.v.weight))
        gated = isinstance(f, SwiGLU)
        up = zip16(f.gate.weight, f.up.weight) if gated else f.up.weight
        biases = [_bias(linear) for linear in (a.q, a.k, a.v)]
        qkv_bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
        return {
            "norm1": block.attn_norm.weight.float(),
            "norm1_bias": _bias(block.attn_norm),
            "qkv": self._pack(qkv),
            "qkv_bias": _padded(qkv_bias),
            "q_norm": None if a.q_norm is None else a.q_norm.weight.float(),
            "k_norm": None if a.k_norm is None else a.k_norm.weight.float(),
            "o": self._pack(a.o.weight),
            "o_bias": _bias(a.o),
            "norm2": block.mlp_norm.weight.float(),
            "norm2_bias": _bias(block.mlp_norm),
            "up": self._pack(up),
            "up_bias": None if gated else _padded(_bias(f.up)),
            "down": self._pack(f.down.weight),
            "down_bias": _bias(f.down),
        }

    def served(self) -> dict[str, Tensor]:
        """See `PlainBackend.served`; packed matrices are unpacked again."""
        found = super().served()
        c, blocks = self.config, cast(Any, self.model).layers
        for i, (packed, block) in enumerate(zip(self.layers, blocks)):
            width, ffn = c.hidden_size, block.mlp.down.in_features
            sizes = [c.num_heads * c.head_width, *[c.kv_heads * c.head_width] * 2]
            qkv = self._unpack(packed["qkv"], sum(sizes), width).split(sizes)
            names = dict(zip(("attn.q", "attn.k", "attn.v"), qkv))
            names["attn.o"] = self._unpack(packed["o"], width, sizes[0])
            names["mlp.down"] = self._unpack(packed["down"], width, ffn)
            if isinstance(block.mlp, SwiGLU):
                both = self._unpack(packed["up"], 2 * up32(ffn), width)
                names |= zip(("mlp.gate", "mlp.up"), unzip16(both, ffn))
            else:
                names["mlp.up"] = self._unpack(packed["up"], ffn, width)
            found |= {f"layers.{i}.{name}.weight": tensor for name, tensor in names.items()}
        head = "embed.weight" if c.tie_embeddings else "head.weight"
        return found | {head: self._unpack(self.top["head"], c.vocab_size, c.hidden_size)}

    def resize(self, num_pages: int) -> None:
        """See `PlainBackend.resize`."""
        super().resize(num_pages)
        self.buffers = {}

    def _prepare(self, width: int) -> None:
        """Buffers for tables of so many pages, and the tables of pointers."""
        if self.buffers and self.buffers["scores"].shape[1] >= 4 * width * self.page_size:
            return
        c, rows = self.config, _CHUNK
        dtype, threads = self.cache.v.dtype, torch.get_num_threads()
        qkv_width = (c.num_heads + 2 * c.kv_heads) * c.head_width
        self.threads = threads
        self.buffers = {
            "qkv": torch.zeros(rows, up32(qkv_width), dtype=dtype),
            "attended": torch.zeros(rows, c.num_heads * c.head_width, dtype=dtype),
            "hidden": torch.zeros(rows, _ffn_width(c.spec), dtype=dtype),
            "scratch": torch.zeros(threads, rows, c.hidden_size, dtype=dtype),
            # Twice what is asked for: sequences grow.
            "scores": torch.zeros(threads, 4 * 2 * width * self.page_size),
        }
        layers = []
        for i, packed in enumerate(self.layers):
            window = self.model.spec.layers[i].window
            pointers = [_pointer(t) for t in packed.values()]
            caches = [self.cache.k[i].data_ptr(), self.cache.v[i].data_ptr()]
            layers.append([*pointers, *caches, window or 0])
        self.layer_table = torch.tensor(layers, dtype=torch.int64)
        m: Any = self.model
        self.model_table = torch.tensor(
            [
                *(c.num_layers, c.hidden_size, c.num_heads, c.kv_heads, c.head_width),
                *(_ffn_width(c.spec), c.vocab_size),
                *(self.cache.num_pages * self.page_size, 2 * width * self.page_size),
                *(isinstance(m.norm, RMSNorm), isinstance(m.layers[0].mlp, SwiGLU)),
                self.layer_table.data_ptr(),
                *(_pointer(t) for t in self.top.values()),
                *(self.buffers[k].data_ptr() for k in ("qkv", "attended", "hidden")),
                *(self.buffers[k].data_ptr() for k in ("scratch", "scores")),
                *(rows, self.narrow),
            ],
            dtype=torch.int64,
        )

    def forward(self, rows: Sequence[Cached]) -> Tensor:
        """See `PlainBackend.forward`; the logits are fp32, and nothing is padded.

        Here a row is a token, with the table of its sequence.
        """
        c: Any = self.config
        pending = [row.pending for row in rows]
        lengths_B = self._long(list(map(len, pending)))
        tokens_N = self._long(list(itertools.chain(*pending)))
        ends_B = lengths_B.cumsum(0)
        row_N = torch.arange(len(rows)).repeat_interleave(lengths_B)
        starts_B = self._long([row.length for row in rows])
        positions_N = torch.arange(len(tokens_N)) + (starts_B + lengths_B - ends_B)[row_N]
        tables_BP = self.tables(rows)
        self._prepare(tables_BP.shape[1])
        logits_BV = torch.empty(len(rows), up32(c.vocab_size))
        wanted_B, done = ends_B - 1, 0
        for start in range(0, len(tokens_N), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            wanted = wanted_B[(wanted_B >= start) & (wanted_B < start + _CHUNK)] - start
            self._call(
                tokens_N[chunk], row_N[chunk], positions_N[chunk], tables_BP, wanted,
                logits_BV[done:],
            )  # fmt: skip
            done += len(wanted)
        return self.model.shape_logits(logits_BV[:, : c.vocab_size])

    def _call(
        self,
        tokens_N: Tensor,
        row_N: Tensor,
        positions_N: Tensor,
        tables_BP: Tensor,
        wanted: Tensor,
        logits: Tensor,
    ) -> None:
        spec = self.model.spec
        # As (tokens, 1): no tensor of rng keys, so no dropout.
        x_ND = self.model.embed_tokens(tokens_N[:, None], positions_N[:, None], None)[:, 0]
        cosine = sine = None
        if spec.layer.rope is not None:
            tables = rope.tables(positions_N[:, None], spec.layer.rope)
            cosine, sine = (t.contiguous() for t in tables)
        inputs = [t.contiguous() for t in (x_ND, row_N, positions_N)]
        self.library.forward(
            ctypes.c_void_p(self.model_table.data_ptr()),
            ctypes.c_int64(x_ND.dtype == torch.bfloat16),
            ctypes.c_int64(len(x_ND)),
            *(ctypes.c_void_p(_pointer(t)) for t in (*inputs, tables_BP)),
            ctypes.c_int64(tables_BP.shape[1]),
            *(ctypes.c_void_p(_pointer(t)) for t in (cosine, sine)),
            ctypes.c_float(spec.norm.eps),
            ctypes.c_int64(len(wanted)),
            ctypes.c_void_p(wanted.data_ptr()),
            ctypes.c_void_p(logits.data_ptr()),
            ctypes.c_int(self.threads),
        )

    def choose(self, logits_NV: Tensor, sampling: Sampling, uniform_N: Tensor) -> Choice:
        """See `PlainBackend.choose`."""
        return native_choice.choose(logits_NV, sampling, uniform_N, self.threads)


_PROBE = (9, 24, 2)  # lengths of the prompts that are compared; then a few steps of each
_PROBE_STEPS = 3
# How far rounding may take logits, over their size: in fp32, and times what it takes the model.
_FP32_BOUND, _ROUNDING_FACTOR = 1e-3, 3.0


def error_of(backend: PlainBackend) -> tuple[float, float]:
    """How far a backend's logits are from its model's in fp32, and how far they may be.

    Differences and logits by their root mean squares; the worst of a prefill and some steps.
    Computes prompts of several lengths, and steps of sequences that share their pages. NaN where
    the model's logits are. In bf16, takes the memory of an fp32 copy of the model for a moment.
    """
    model, config = backend.model, backend.config
    lengths = [min(n, max(2, config.max_seq_len - _PROBE_STEPS)) for n in _PROBE]
    steps = min(_PROBE_STEPS, config.max_seq_len - max(lengths))
    longest = max(lengths) + steps
    ids_BT = (torch.arange(len(lengths) * longest) * 7919 + 13).view(
        -1, longest
    ) % config.vocab_size
    positions_BT = torch.arange(longest).expand_as(ids_BT)
    with torch.inference_mode():
        truth_BTV = rounded_BTV = model(ids_BT, positions_BT).float()
        if next(model.parameters()).dtype != torch.float32:
            exact = copy.deepcopy(model)
            vars(exact.head).pop("forward", None)  # of `widen_logits`: it holds the other's weight
            truth_BTV = exact.float()(ids_BT, positions_BT)
        found = []
        for rows, source, logits_BV in _probed(backend, ids_BT.tolist(), lengths, steps):
            at = torch.tensor(source), torch.tensor([row.length - 1 for row in rows])
            found.append((logits_BV, rounded_BTV[at], truth_BTV[at]))
    backend.resize(0)
    errors = [_distance(logits, truth) for logits, _, truth in found]
    lost = max(_distance(rounded, truth) for _, rounded, truth in found)
    error = math.nan if any(map(math.isnan, errors)) else max(errors)
    return error, max(_FP32_BOUND, _ROUNDING_FACTOR * lost)


def _probed(
    backend: PlainBackend, ids: list[list[int]], lengths: list[int], steps: int
) -> Iterator[tuple[list[Cached], list[int], Tensor]]:
    """Rows that a backend has extended, whose ids each has, and its logits; see `error_of`."""
    pool = PagePool(
        backend.page_size, None, backend.resize, backend.cache.copy, backend.cache.clear
    )
    pool.grow(sum(pool.pages_of(len(row)) + 1 for row in (*ids, ids[1])))
    rows, source = [Cached(ids[i][:n]) for i, n in enumerate(lengths)], [0, 1, 2]
    for step in range(steps + 1):
        for row in rows:
            pool.extend(row)
        logits_BV = backend.forward(rows)
        for row in rows:
            row.length = len(row.tokens)
        yield rows, source, logits_BV
        if step == 0:
            twin = Cached(list(rows[1].tokens))
            pool.share(rows[1], twin, len(twin.tokens))
            rows, source = [*rows, twin], [*source, 1]
        for row, i in zip(rows, source):
            row.tokens = ids[i][: row.length + 1]


def _distance(a: Tensor, b: Tensor) -> float:
    return float(((a.float() - b).pow(2).mean() / b.pow(2).mean()).sqrt())


def _bias(module: Any) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach().float()


def _padded(bias: Tensor | None) -> Tensor | None:
    """A bias as long as its padded panels."""
    if bias is None:
        return None
    return F.pad(bias, (0, -len(bias) % 32))


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
