"""The weights that an adapter leaves as they are, kept in few bits (QLoRA: Dettmers et al. 2023).

The linear layers of all blocks, as bitsandbytes chooses them: embeddings, norms, biases and the
head stay. A weight is quantised whole, before a rank takes its part of it, so that blocks and
scales are those of the whole tensor and no layout changes a number. Parts whose edges fall inside
of a block hold that block too. With ZeRO-3, the data ranks share a weight's bytes and gather them
for each product; otherwise each has them all, as it would have the gathered weights through a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from shardwise.errors import ConfigError
from shardwise.models import registry
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.decoder import Decoder
from shardwise.models.common.init import init_spec, init_tensor, plain_name
from shardwise.ops import comm, int8, nf4
from shardwise.ops.frozen_linear import frozen_linear
from shardwise.ops.linear import Accumulate
from shardwise.parallel import tensor
from shardwise.parallel.data import ZERO
from shardwise.parallel.full_tensor import chunk_size, join
from shardwise.parallel.mesh import Mesh

# Shape suffixes: O output features (rows), I input features; see `ops.nf4` and `ops.int8`.

Kind = Literal["nf4", "int8"]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Form(Protocol):
    """How a part of a weight is kept: as tensors by name."""

    @property
    def shared(self) -> tuple[str, ...]:
        """Those whose rows data ranks may share among them."""
        ...

    def shapes(self) -> Shapes:
        """Of the tensors of this part."""
        ...

    def quantise(self, whole_OI: Tensor) -> dict[str, Tensor]:
        """This part of a whole weight."""
        ...

    def dense(self, kept: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The part, in full."""
        ...


class Nf4Form:
    """See `ops.nf4`."""

    shared = ("codes_NC", "absmax_N")

    def __init__(self, shape: torch.Size, rows: range, columns: range) -> None:
        self.size = (len(rows), len(columns))
        self.num_blocks = -(-math.prod(shape) // nf4.BLOCK)
        self.runs = nf4.Runs.of(shape, rows, columns)

    def shapes(self) -> Shapes:
        """See `Form`."""
        num = self.runs.num * self.runs.num_blocks
        return {
            "codes_NC": ((num, nf4.BLOCK // 2), torch.uint8),
            "absmax_N": ((num,), torch.uint8),
            "nested_M": ((-(-self.num_blocks // nf4.NESTED_BLOCK),), torch.float32),
            "offset": ((), torch.float32),
        }

    def quantise(self, whole_OI: Tensor) -> dict[str, Tensor]:
        """See `Form`."""
        return vars(nf4.quantise(whole_OI).part(self.runs))

    def dense(self, kept: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """See `Form`."""
        return nf4.Nf4(**kept).dequantise(self.runs, dtype).reshape(self.size)


class Int8Form:
    """See `ops.int8`."""

    shared = ("codes_OI", "absmax_O")

    def __init__(self, shape: torch.Size, rows: range, columns: range) -> None:
        self.rows, self.columns = rows, columns

    def shapes(self) -> Shapes:
        """See `Form`."""
        return {
            "codes_OI": ((len(self.rows), len(self.columns)), torch.int8),
            "absmax_O": ((len(self.rows),), torch.float32),
        }

    def quantise(self, whole_OI: Tensor) -> dict[str, Tensor]:
        """See `Form`."""
        return vars(int8.quantise(whole_OI).part(self.rows, self.columns))

    def dense(self, kept: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """See `Form`."""
        return int8.Int8(**kept).dequantise(dtype)


FORMS: dict[Kind, Callable[[torch.Size, range, range], Form]] = {
    "nf4": Nf4Form,
    "int8": Int8Form,
}


class QuantisedWeight(nn.Module):
    """A weight's part on this rank, as buffers; `load` fills them.

    ``weight``: the parameter that it takes the place of, whole or cut over tp ranks (meta device).
    ``compute``: the dtype of products.
    """

    def __init__(self, weight: Tensor, kind: Kind, mesh: Mesh, compute: torch.dtype) -> None:
        super().__init__()
        self.shape, self.mesh = weight.shape, mesh
        self.master, self.compute = weight.dtype, compute
        self.placements = weight.placements if isinstance(weight, DTensor) else None
        self.form: Form = FORMS[kind](weight.shape, *self._held())
        self.group = mesh.groups["shard"] if ZERO[mesh.layout.zero].reshard_after_forward else None
        for name, (shape, dtype) in self.form.shapes().items():
            if self._shared(name):
                shape = (-(-shape[0] // self._size), *shape[1:])
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_buffer(name, empty, persistent=False)

    def _held(self) -> list[range]:
        """Rows and columns of this rank's part."""
        held = [range(n) for n in self.shape]
        for placement in self.placements or ():
            if isinstance(placement, Shard):
                dim, tp, rank = placement.dim, self.mesh.layout.tp, self.mesh.place["tp"]
                total = self.shape[dim]
                start = min(total, rank * -(-total // tp))
                held[dim] = range(start, start + chunk_size(total, tp, rank))
        return held

    @property
    def _size(self) -> int:
        """How many ranks share the bytes."""
        return 1 if self.group is None else self.group.size()

    def _shared(self, name: str) -> bool:
        return self._size > 1 and name in self.form.shared

    @torch.no_grad()
    def load(self, whole_OI: Tensor) -> None:
        """Take a whole weight. Raises ConfigError for one that the form cannot hold."""
        try:
            kept = self.form.quantise(whole_OI)
        except ValueError as error:
            raise ConfigError(f"adapter.quantise: {error}; choose nf4") from None
        for name, value in kept.items():
            if self._shared(name):
                assert self.group is not None
                each = len(self.get_buffer(name))
                value = _filled(value, each * self._size)[each * self.group.rank() :][:each]
            self.get_buffer(name).copy_(value)

    def _kept(self) -> dict[str, Tensor]:
        """The tensors of this rank's part, gathered where ranks share them."""
        found = {}
        for name, (shape, _) in self.form.shapes().items():
            value = self.get_buffer(name)
            if self._shared(name):
                assert self.group is not None
                out = value.new_empty((len(value) * self._size, *value.shape[1:]))
                comm.all_gather(out, value, self.group, "shard").wait()
                value = out[: shape[0]]
            found[name] = value
        return found

    def dense(self, dtype: torch.dtype) -> Tensor:
        """This rank's part, in full; a collective call where ranks share it."""
        return self.form.dense(self._kept(), dtype)

    @torch.no_grad()
    def part(self) -> Tensor:
        """This rank's part as it computes, in the master dtype, as a parameter would hold it.

        A collective call where ranks share it; a copy: writing into it changes nothing.
        """
        value = self.dense(self.master)
        if self.placements is None:
            return value
        shape, stride = self.shape, (self.shape[1], 1)
        return DTensor.from_local(
            value, self.mesh.tp, self.placements, run_check=False, shape=shape, stride=stride
        )

    @torch.no_grad()
    def whole(self) -> Tensor:
        """The whole weight as it computes, in the master dtype; a collective call."""
        value = self.dense(self.master)
        for placement in self.placements or ():
            if isinstance(placement, Shard):
                total = self.shape[placement.dim]
                value = join(value, total, placement.dim, self.mesh.groups["tp"])
        return value


def _filled(value: Tensor, rows: int) -> Tensor:
    """With rows of zeros behind, up to so many."""
    return F.pad(value, [0, 0] * (value.dim() - 1) + [0, rows - len(value)])


class Operand:
    """What stands where a linear layer's weight stood: made in full for each product."""

    def __init__(self, kept: QuantisedWeight, rows: slice = slice(None)) -> None:
        self.kept, self.rows = kept, rows

    def __getitem__(self, rows: slice) -> Operand:
        return Operand(self.kept, rows)

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        return self.kept.compute

    def to(self, dtype: torch.dtype) -> Tensor:
        """The weight (OI) in full, as it computes."""
        return self.kept.dense(self.dtype)[self.rows].to(dtype)


def _product(x: Tensor, weight: Operand, _: Accumulate | None) -> Tensor:
    """See `parallel.tensor.Matmul`; there is no gradient of the weight to be left for later."""
    found: Tensor = frozen_linear(x, weight.to)
    return found


def attach(model: Decoder, kind: Kind, mesh: Mesh, compute: torch.dtype) -> None:
    """Quantise the linear layers of a part of a model's blocks (on the meta device), in place."""
    present = dict(model.named_modules())
    for name in names(model.config):
        path = name.removesuffix(".weight")
        if path not in present:
            continue
        host = tensor.swapped_linear(model, path)
        kept = QuantisedWeight(host.weight, kind, mesh, compute)  # type: ignore[arg-type]
        del host.weight
        host.quantised = kept
        host.weight = Operand(kept)  # type: ignore[assignment]
        host.matmul = _product  # type: ignore[assignment]


def names(model: DecoderConfig) -> list[str]:
    """The weights that are quantised: of the linear layers of all blocks."""
    with torch.device("meta"):
        whole = registry.build(model.model_copy(update={"vocab_size": model.vocab_size or 1}))
    linear = (p for p, module in whole.named_modules() if isinstance(module, nn.Linear))
    return [f"{path}.weight" for path in linear if path.startswith("layers.")]


def read_back(
    named: Iterable[tuple[str, Tensor]], kind: Kind, model: DecoderConfig
) -> Iterator[tuple[str, Tensor]]:
    """A base model's weights as an adapter over the quantised base has them, those in fp32."""
    few = set(names(model))
    for name, value in named:
        if name in few:
            form = FORMS[kind](value.shape, *map(range, value.shape))
            value = form.dense(form.quantise(value), torch.float32)
        yield name, value


def quantised(model: nn.Module) -> Iterator[tuple[str, QuantisedWeight]]:
    """The quantised weights of a part of a model, by the names of their parameters."""
    for path, module in model.named_modules():
        if isinstance(module, QuantisedWeight):
            yield f"{plain_name(path).removesuffix('quantised')}weight", module


def init_weights(model: Decoder, seed: int) -> None:
    """Give them their initial values, as `models.common.init.init_weights` gives others theirs."""
    for name, kept in quantised(model):
        spec = init_spec(name, model.spec)
        kept.load(init_tensor(name, tuple(kept.shape), spec, seed))
