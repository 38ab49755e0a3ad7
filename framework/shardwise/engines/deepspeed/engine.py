"""The DeepSpeed engine: the library's ZeRO under our contract of sums and counts.

What the library does by itself and what is done around it:

- It averages gradients over all ranks: to it, context ranks are data ranks that bring other tokens.
  A micro-batch's objective is divided by the global count and multiplied by the number of ranks,
  so that the average is the sum.
- It divides by its accumulation steps. There is one, and the engine says which backward pass is
  the last of an update.
- Its initial masters are what the parameters were rounded to, and in bf16 without ZeRO an update
  has been made already. Masters and moments are set when all is built, then sent to what computes.
- Clipping, overflow checks, updates, partitions, gathering and offload are the library's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.adapters.served import to_hf_tensors
from shardwise.adapters.targets import is_adapter
from shardwise.adapters.trained import EVERYTHING, TrainedPart
from shardwise.assemble import cut_attention
from shardwise.config.optimizers import AdamWConfig, OptimizerConfig, SgdConfig
from shardwise.data.batch import MicroBatch
from shardwise.engines import native
from shardwise.engines.base import Engine, Scaled, Setup, Share, State
from shardwise.engines.deepspeed import fragments, library, user_config
from shardwise.engines.deepspeed.config import DeepSpeedConfig
from shardwise.engines.deepspeed.swapped import Swapped
from shardwise.engines.inputs import Cut
from shardwise.engines.reduction import LossSums, sum_over
from shardwise.engines.registry import as_kind
from shardwise.errors import CheckpointError, ConfigError
from shardwise.losses.contract import Loss
from shardwise.models import registry
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.init import init_spec, init_tensor, place, plain_name
from shardwise.ops.flat_shard import FlatShard
from shardwise.optim.build import parameter_groups, set_lr
from shardwise.optim.torch_kinds import without_state
from shardwise.parallel import blocks, tensor
from shardwise.parallel.context import ContextAttention
from shardwise.parallel.full_tensor import local_tensor
from shardwise.parallel.mesh import Mesh, place_mesh
from shardwise.precision.policy import Found, narrowest, of_terms, precision_of, resolve


def build(setup: Setup) -> Engine | None:
    """See `engines.registry.register_engine`.

    What is not trained has no optimizer to shard: the native engine evaluates it, on the same
    layout and from fp32 weights.
    """
    assert isinstance(setup.config, DeepSpeedConfig)
    if setup.optimizer is None:
        own = as_kind(setup.config, "native", recompute=setup.config.recompute, compile=False)
        return native.build(dataclasses.replace(setup, config=own))
    if setup.ranks is not None and list(setup.ranks) != list(range(dist.get_world_size())):
        raise ConfigError(
            "engine.kind: deepspeed takes all ranks of the world; leave out the role's ranks, or "
            "write kind: native for it"
        )
    mesh = place_mesh(setup.layout, setup.device, range(setup.layout.world))
    return None if mesh is None else DeepSpeedEngine(setup, mesh)


class DeepSpeedEngine:
    """See `engines.base.Engine`, and the module."""

    def __init__(self, setup: Setup, mesh: Mesh) -> None:
        assert isinstance(setup.model, DecoderConfig)
        assert isinstance(setup.config, DeepSpeedConfig) and setup.optimizer is not None
        self.setup, self.config, self.mesh, self.model_config = (
            setup,
            setup.config,
            mesh,
            setup.model,
        )
        self.data_rank, self.data_size = mesh.data_rank, mesh.data_size
        self.precision = precision_of(setup.config.precision, setup.device)
        own = resolve(setup.config.precision, setup.device)
        resolved = setup.config.model_copy(update={"precision": own})
        if why := resolved.refusal(mesh.layout):
            raise ConfigError(why)
        self.adapter_config = setup.trained.adapter
        self.zero = mesh.layout.zero
        deepspeed = library.load(setup.device.type)
        # The process group is there; this tells the library so.
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        part = TrainedPart(setup.trained, setup.model)
        self.adapter = part.adapter
        self._check_trained()
        self.folder = library.nvme_folder(self.config)
        self.model = self._build_model(deepspeed, part)
        self.parameters: dict[str, Any] = {
            plain_name(n): p for n, p in self.model.named_parameters()
        }
        self.has_dropout = setup.model != setup.model.without_dropout() or (
            part.adapter is not None and part.adapter.has_dropout
        )
        self._initialize(deepspeed, setup.optimizer)
        self.updates = self.skipped = 0
        self._logits_dtype = self.precision.compute
        self._terms = 0
        self._written: list[int] = []
        self._untold = user_config.passed_on(setup.config)
        self._start_weights()

    # --- building -------------------------------------------------------------------------------

    def _check_trained(self) -> None:
        trained, narrow = self.setup.trained, self.precision.compute.itemsize == 2
        if trained.adapter is not None and trained.adapter.quantise is not None:
            raise ConfigError(
                "adapter.quantise: engine.kind: deepspeed keeps the base as it is; leave it out, "
                "or write engine.kind: native"
            )
        if narrow and trained != EVERYTHING:
            key = "adapter" if trained.adapter is not None else "freeze"
            raise ConfigError(
                f"{key}: under engine.kind: deepspeed in bf16 what stands still would be rounded "
                "to bf16 for good; write engine.precision: fp32, or engine.kind: native"
            )

    def _build_model(self, deepspeed: Any, part: TrainedPart) -> Any:
        setup, config = self.setup, self.config
        computes = self.precision.compute
        scope: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.zero == 3:
            # A module's parameters are cut as soon as it is made: no rank ever holds the model.
            # Their dtype is the config's: one that is given is ignored on a CPU, for bf16 (0.19.8).
            scope = deepspeed.zero.Init(config_dict_or_path=self._json())
        with scope, setup.device:
            model = registry.build(setup.model)
            part.apply(model)
        if (layout := self.mesh.layout).cp > 1:
            cut_attention(model, ContextAttention(self.mesh.groups["cp"], layout.cp_kind))
        model.to(dtype=computes)
        if self.precision.logits(setup.wide_logits) != computes:
            tensor.widen_logits(model)
        blocks.wrap_blocks(model, config.recompute, False)
        return model

    def _json(self) -> dict[str, Any]:
        """What the library is told."""
        config, narrow = self.config, self.precision.compute == torch.bfloat16
        zero: dict[str, Any] = {"stage": self.zero}
        for key in ("offload_optimizer", "offload_param"):
            if (device := user_config.device_of(config, key)) != "none":
                zero[key] = {"device": device}
            if device == "nvme":
                assert self.folder is not None
                zero[key]["nvme_path"] = self.folder.name
        own: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # it counts samples for its log alone
            "train_batch_size": self.mesh.layout.world,
            "gradient_accumulation_steps": 1,
            "zero_optimization": zero,
            "bf16": {"enabled": narrow},
            "gradient_clipping": config.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if narrow:
            own["bf16"]["check_grad_overflow"] = True
        if narrow and self.zero:
            own |= {
                "data_types": {"grad_accum_dtype": "fp32"},
                "communication_data_type": "fp32",
            }
        return {"steps_per_print": None} | user_config.merged(config, own)

    def _initialize(self, deepspeed: Any, config: OptimizerConfig) -> None:
        if not isinstance(config, (AdamWConfig, SgdConfig)) or config.kind not in (
            "adamw",
            "adam",
            "sgd",
        ):
            raise ConfigError(
                f"optimizer.kind: {config.kind} looks at whole tensors, or at more than one part "
                "of an update, and DeepSpeed's ZeRO gives it stretches of many; write adamw, adam "
                "or sgd, or engine.kind: native"
            )
        trainable = [(n, p) for n, p in self.parameters.items() if p.requires_grad]
        inner = without_state(parameter_groups(trainable, config), config)
        set_lr(inner, 0.0)  # it may make an update while it is built
        self.engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=inner, config=self._json()
        )
        self.inner = inner
        if not self.precision.loss_scaling and hasattr(self.engine.optimizer, "overflow"):
            self.engine.optimizer.check_grad_overflow = True
        self.fragments = fragments.find(self.engine, self.parameters.items())
        inner.state.clear()
        flats = fragments.masters(self.engine.optimizer)
        self.swapped = Swapped(self.engine.optimizer, inner, flats)
        for flat, group in self._flats():
            self.swapped.start(flat, group)

    def _flats(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """What the optimizer updates on this rank, each with its group."""
        groups, outer = self.inner.param_groups, self.engine.optimizer
        flats = fragments.masters(outer)
        if not flats:
            yield from ((p, g) for g in groups for p in g["params"])
            return
        numbers = getattr(outer, "sub_group_to_group_id", {})
        for i, flat in enumerate(flats):
            yield flat, groups[numbers.get(i, i)]

    @torch.no_grad()
    def _start_weights(self) -> None:
        """A pure function of (seed, name); of each, what is here alone is made."""
        model, seed = self.model_config.spec, self.setup.seed
        for name, weight in self.held("weights"):
            shape, spec = tuple(weight.shape), init_spec(name, model)
            place(weight, lambda rows, n=name, s=shape, i=spec: init_tensor(n, s, i, seed, rows))  # type: ignore[misc]
        self._refresh()

    # --- training -------------------------------------------------------------------------------

    def forward_backward(
        self, microbatches: Sequence[MicroBatch], loss: Loss, lr: float | None = None
    ) -> dict[str, float]:
        """See `engines.base.Engine`; every rank brings as many micro-batches."""
        self._follow()
        self.model.train()
        cuts = [self._cut(batch, loss) for batch in microbatches]
        sums = LossSums(loss, self.mesh, [c.batch for c in cuts])
        for i, cut in enumerate(cuts):
            self.engine.set_gradient_accumulation_boundary(i == len(cuts) - 1)
            objective = sums.add(cut.logits(self._call(self.engine, cut)), cut.batch)
            if hasattr(self.engine.optimizer, "clear_lp_grads"):  # else it adds to zeros, in bf16
                self.engine.optimizer.clear_lp_grads(set_to_none=True)
            self.engine.backward(objective * self.mesh.layout.world, scale_wrt_gas=False)
        self._terms = sums.parts
        return sums.reduced()

    def _cut(self, batch: MicroBatch, reader: Callable[..., Any] | None = None) -> Cut:
        return Cut(batch, self.mesh, self.model_config, reader=reader)

    def _call(self, model: Any, cut: Cut) -> Tensor:
        seed = self.setup.seed if self.model.training and self.has_dropout else None
        arguments = cut.arguments(seed, self.updates, self.setup.stage, self.precision.compute)
        logits: Tensor = model(**arguments)
        self._logits_dtype = logits.dtype
        return logits

    def step(self, lr: float) -> float:
        """Clip and update by the library; what it skips was not finite on some rank."""
        norm = self._norm() if not fragments.masters(self.engine.optimizer) else None
        if norm is not None and not math.isfinite(norm):  # without masters it checks nothing
            self.engine.zero_grad()
        else:
            self.swapped.send_back()
            set_lr(self.inner, lr)
            self.engine.step()
        if norm is None:
            overflow = bool(self.engine.optimizer.overflow)
            norm = math.inf if overflow else float(self.engine.get_global_grad_norm())
        self._written = self._versions()
        self.updates += 1
        self.skipped += not math.isfinite(norm)
        return norm

    def _norm(self) -> float:
        """2-norm of gradients that every rank has whole."""
        squares = [g.double().square().sum() for _, g in self.held("grads")]
        return math.sqrt(torch.stack(squares).sum().item())

    # --- evaluation -----------------------------------------------------------------------------

    @torch.no_grad()
    def forward(
        self, microbatches: Sequence[MicroBatch], fn: Callable[[Any, MicroBatch], Tensor]
    ) -> list[Tensor]:
        """``fn(logits, batch)`` per micro-batch, without gradient and without dropout."""
        self._follow()
        self.model.eval()
        cuts = [self._cut(batch, fn) for batch in microbatches]
        return [fn(cut.logits(self._call(self.model, cut)), cut.batch) for cut in cuts]

    def events(self) -> list[tuple[str, str]]:
        """Which keys of the user's JSON were passed on, once."""
        keys, self._untold = self._untold, []
        if not keys:
            return []
        return [("deepspeed", f"engine.config: passed on to DeepSpeed: {', '.join(keys)}")]

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """Sum a few numbers over the data ranks, in fp64."""
        vector = torch.tensor(list(values), dtype=torch.float64, device=self.mesh.device)
        return [float(v) for v in sum_over(vector, self.mesh.groups["dp"]).tolist()]

    def broadcast(self, value: Any) -> Any:
        """Its ranks are the world's: nobody has to be told."""
        return value

    # --- state ----------------------------------------------------------------------------------

    def _versions(self) -> list[int]:
        """Counters of writes into the masters."""
        return [flat._version for flat in fragments.masters(self.engine.optimizer)]

    def _follow(self) -> None:
        """Send masters to what computes, if somebody else has written into them."""
        local = torch.tensor(self._versions() != self._written or self.swapped.written())
        if bool(sum_over(local.double(), self.mesh.groups["all"])):
            self._refresh()
        self.swapped.send_back()

    def _refresh(self) -> None:
        self.swapped.send_back()
        fragments.refresh(self.engine, self.swapped)
        self._written = self._versions()

    def held(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """See `engines.base.Engine`."""
        for name, parameter in self.parameters.items():
            fragment = self.fragments.get(name)
            if fragment is None:
                if kind == "weights":
                    yield name, fragments.frozen(parameter)
                continue
            value = self._part(kind, fragment)
            if value is not None:
                yield name, value

    def _part(self, kind: str, fragment: fragments.Fragment) -> Tensor | None:
        flat = fragment.flat
        if kind == "copies":
            return fragments.copy_of(fragment)
        if flat is not None and flat in self.swapped:
            there = self.swapped.values(flat).get(kind)
            if there is None and kind == "grads":
                return fragment.nothing(self.precision.gradients)
            return None if there is None else fragment.part(there)
        if kind == "grads":
            found = fragments.gradient(self.engine.optimizer, fragment)
            return fragment.nothing(self.precision.gradients) if found is None else found
        if flat is None:
            absent = kind != "weights" and kind not in self.optimizer_states()
            return None if absent else fragment.nothing(self.precision.master)
        if kind == "weights":
            return fragment.part(flat)
        state = self.inner.state[flat]
        return fragment.part(state[kind]) if kind in state else None

    @torch.no_grad()
    def full(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """See `engines.base.Engine`."""
        for name, value in self.held(kind):
            yield name, self._whole(value)

    def _whole(self, value: Tensor) -> Tensor:
        """The tensor of which every rank has a part; a collective call."""
        if not isinstance(value, FlatShard):
            return value
        whole = value.local.new_zeros(value.shape).view(-1)
        whole[value.start : value.start + len(value.local)] = value.local
        # Bytes of which all ranks but one have zeros: their sum is exact.
        dist.all_reduce(whole.view(torch.uint8), group=self.mesh.groups["all"])
        return whole.view(value.shape)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `engines.base.Engine`."""
        named = self.full("weights")
        if self.adapter and self.adapter_config and self.adapter_config.merges:
            named = self.adapter.merge(named)
        yield from to_hf_tensors(self.model_config, named)

    @torch.no_grad()
    def load_weights(self, stream: Iterable[tuple[str, Tensor]]) -> list[str]:
        """See `engines.base.Engine`."""
        held = dict(self.held("weights"))
        missing = {name for name in held if not is_adapter(name)}
        for name, value in stream:
            if name not in held:
                continue
            if held[name].shape != value.shape:
                raise CheckpointError(
                    f"tensor {name!r} has shape {tuple(value.shape)}, but the model's parameter "
                    f"has {tuple(held[name].shape)}"
                )
            place(held[name], lambda rows, v=value: v[rows])  # type: ignore[misc]
            missing.discard(name)
        self._refresh()
        return list(missing)

    @torch.no_grad()
    def start_adapter(self) -> None:
        """See `engines.base.Engine`."""
        if self.adapter is None:
            return
        held = dict(self.held("weights"))

        def whole(name: str) -> Tensor:
            return self._whole(held[name])

        for name, value in self.adapter.start(self.setup.seed, set(held), whole):
            place(held[name], lambda rows, v=value: v[rows])  # type: ignore[misc]
        self._refresh()

    def state_dict(self) -> State:
        """``model.<name>`` and ``optim.<name>.<state>`` tensors, live, as the native engine's."""
        whole = self.adapter is None
        tensors = {
            f"model.{n}": t
            for n, t in self.held("weights")
            if whole or n in self.fragments or is_adapter(n)
        }
        for name, fragment in self.fragments.items():
            if fragment.flat is not None:
                flat = fragment.flat
                away = flat in self.swapped
                state: Mapping[str, Tensor] = self.inner.state[flat]
                if away:
                    state = {k: self.swapped.values(flat)[k] for k in state}
                tensors |= {
                    f"optim.{name}.{kind}": value if value.dim() == 0 else fragment.part(value)
                    for kind, value in sorted(state.items())
                }
        return State(tensors, {"updates": self.updates, "skipped": self.skipped})

    def load_state_dict(self, state: Mapping[str, Any] | State) -> None:
        """See `engines.base.Engine`."""
        meta = state.meta if isinstance(state, State) else state
        self.updates, self.skipped = int(meta["updates"]), int(meta.get("skipped", 0))
        self._refresh()

    @property
    def loss_scale(self) -> float:
        """There is none."""
        return 1.0

    def optimizer_states(self) -> list[str]:
        """See `engines.base.Engine`."""
        if isinstance(self.setup.optimizer, SgdConfig):
            return ["momentum_buffer"] if self.setup.optimizer.momentum else []
        return ["exp_avg", "exp_avg_sq"]

    def scales(self) -> Iterator[tuple[str, Tensor]]:
        """Nothing is quantised."""
        yield from ()

    def watch_scales(
        self, listener: Callable[[Scaled], None]
    ) -> contextlib.AbstractContextManager[None]:
        """Nothing is quantised."""
        return contextlib.nullcontext()

    def dtypes(self) -> Found:
        """See `engines.base.Engine`."""
        updated = self.updates > self.skipped
        of_moment, of_grad = of_terms(self._terms)
        names, master = self.fragments, self.precision.master
        weights = {n: local_tensor(t) for n, t in self.held("weights") if n in names}
        grads = {n: local_tensor(t) for n, t in self.held("grads")}
        moments = {
            f"{n} {kind}": local_tensor(t)
            for kind in (self.optimizer_states() if updated else [])
            for n, t in self.held(kind)
        }
        sent = getattr(self.engine, "communication_data_type", None) or master
        return {
            "compute": {n: p.dtype for n, p in self.parameters.items()},
            "masters": {n: narrowest(t) for n, t in weights.items() if updated and len(t)},
            "moments": {n: of_moment(t) for n, t in moments.items() if len(t)},
            "gradients": {n: of_grad(t) for n, t in grads.items() if len(t)},
            "reductions": {"communication_data_type": sent},
            "logits": {"head": self._logits_dtype},
        }

    def share_of(self, batch: MicroBatch) -> Share:
        """See `engines.base.Engine`."""
        cut = self._cut(batch)
        index_t = torch.arange(cut.padded) if cut.index_t is None else cut.index_t.cpu()
        return Share(index_t, index_t)

    def modules(self) -> list[nn.Module]:
        """The one model."""
        return [self.model]

    def close(self) -> None:
        """The library's hooks and buffers, and the model."""
        self.engine.destroy()
        self.fragments.clear()
        self.parameters.clear()
        if self.folder is not None:
            self.folder.cleanup()
        self.engine = self.model = None
