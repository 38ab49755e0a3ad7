"""Every data-parallel layout computes what one plain process computes."""

from __future__ import annotations

import dataclasses
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardwise.config.schema import AdamWConfig, NativeConfig
from shardwise.engines.inputs import Cut
from shardwise.engines.native import NativeEngine
from shardwise.losses.causal_lm import CausalLM
from shardwise.losses.logprobs import valid_logprobs
from shardwise.models import registry
from shardwise.models.common.init import init_weights
from shardwise.ops.attention import has_branches, visible
from shardwise.parallel.layout import parse_layout
from shardwise.parallel.mesh import build_mesh
from tests.support import toy
from tests.support.pool import RankPool

ROWS, STEPS, LR = 8, 3, 1e-2
OPTIMIZER = AdamWConfig(lr=LR, eps=1e-4)


def build(layout: str, model: Any, **engine: Any) -> NativeEngine:
    config = NativeConfig.model_validate({"layout": layout, "compile": False, **engine})
    mesh = build_mesh(parse_layout(layout, dist.get_world_size()), torch.device("cpu"))
    return NativeEngine(model, config, mesh, seed=7, stage="test", optimizer=OPTIMIZER)


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(layout: str, model: Any, micro: int, rows: int = ROWS, **engine: Any) -> dict[str, Any]:
    """Three steps; returns metrics, first gradients, final weights and moments."""
    it = build(layout, model, **engine)
    out: dict[str, Any] = {"metrics": [], "norms": []}
    for step in range(STEPS):
        batch = toy.batch(rows, seed=step)
        share = rows // it.data_size
        mine = batch.split(share)[it.data_rank].split(micro)
        out["metrics"].append(it.forward_backward(mine, CausalLM(accuracy=True)))
        if step == 0:
            out["grads"] = {n: full(p.grad) for n, p in it.model.named_parameters()}
        out["norms"].append(it.step(LR))
    out["state"] = {n: full(t) for n, t in it.state_dict().tensors.items()}
    return out


def reference(model: Any, rows: int = ROWS, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """The same three steps, written out plainly: one process, no engine."""
    net = registry.build(model).to(dtype)
    init_weights(net, 7)
    decay, free = [], []
    for name, p in net.named_parameters():
        (free if ("norm" in name or "embed" in name or "bias" in name) else decay).append(p)
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.95),
        eps=1e-4,
    )
    out: dict[str, Any] = {"metrics": [], "norms": []}
    for step in range(STEPS):
        b = toy.batch(rows, seed=step)
        logits = net(b.input_ids_BT, b.position_ids_BT)
        nll = torch.nn.functional.cross_entropy(
            logits[b.loss_mask_BT], b.targets_BT[b.loss_mask_BT], reduction="mean"
        )
        optimizer.zero_grad()
        nll.backward()
        if step == 0:
            out["grads"] = {n: p.grad.clone() for n, p in net.named_parameters()}
        out["metrics"].append({"loss": nll.item()})
        out["norms"].append(torch.nn.utils.clip_grad_norm_(list(net.parameters()), 1.0).item())
        optimizer.step()
    out["state"] = {f"model.{n}": p.detach() for n, p in net.named_parameters()}
    return out


def assert_same(mine: dict[str, Any], wanted: dict[str, Any], bound: float) -> None:
    for a, b in zip(mine["metrics"], wanted["metrics"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=bound)
    assert mine["norms"] == pytest.approx(wanted["norms"], rel=bound)
    for part in ("grads", "state"):
        # A key bias has no gradient but rounding (softmax ignores it): hence a floor.
        floor = 1e-6 * max(v.norm() for v in wanted[part].values())
        for name, value in wanted[part].items():
            error = (mine[part][name] - value).norm() / value.norm().clamp_min(floor)
            assert error < bound, f"{part} {name}: {error:.2e}"


LAYOUTS = [
    ("dp1.zero1", 1),
    ("dp2.zero0", 2),
    ("dp2.zero1", 2),
    ("dp2.zero2", 2),
    ("dp2.zero3", 2),
    ("dp4.hsdp2.zero3", 4),
    ("dp4.hsdp2.zero1", 4),
]


@pytest.mark.parametrize("layout,world", LAYOUTS)
@pytest.mark.parametrize("micro", [2, 1])
def test_layouts_equal_one_plain_process(
    ranks: RankPool, layout: str, world: int, micro: int
) -> None:
    model = toy.llama()
    results = ranks.run(train, layout, model, micro, world=world, precision="fp64")
    for result in results:
        assert_same(result, reference(model), 1e-9)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(ranks: RankPool, recompute: str) -> None:
    options = {"precision": "fp64", "recompute": recompute}
    [result] = ranks.run(train, "dp1", toy.llama(), 2, world=1, **options)
    assert_same(result, reference(toy.llama()), 1e-9)


def test_dropout_is_equal_on_every_layout(ranks: RankPool) -> None:
    one = ranks.run(train, "dp1", toy.gpt2(), 8, world=1, precision="fp64")[0]
    clean = ranks.run(train, "dp1", toy.gpt2(dropout=0.0), 8, world=1, precision="fp64")[0]
    assert one["metrics"] != clean["metrics"], "dropout does something"
    for layout, micro in (("dp2.zero1", 2), ("dp2.zero3", 1)):
        for result in ranks.run(train, layout, toy.gpt2(), micro, world=2, precision="fp64"):
            assert_same(result, one, 1e-9)
    [result] = ranks.run(train, "dp1", toy.gpt2(), 4, world=1, precision="fp64", recompute="full")
    assert_same(result, one, 1e-9)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_near_fp64_and_agrees_across_ranks(
    ranks: RankPool, precision: str
) -> None:
    wanted = reference(toy.llama())
    one = ranks.run(train, "dp1", toy.llama(), 2, world=1, precision=precision)[0]
    two = ranks.run(train, "dp2.zero2", toy.llama(), 2, world=2, precision=precision)
    eps = torch.finfo(torch.bfloat16 if precision == "bf16" else torch.float16).eps
    for result in (one, *two):
        for name, value in wanted["grads"].items():
            lost = (one["grads"][name] / _scale(one) - value).norm()
            error = (result["grads"][name] / _scale(result) - value).norm()
            assert error <= 8 * lost + eps * value.norm(), name
    assert two[0]["norms"] == two[1]["norms"]
    assert two[0]["metrics"] == two[1]["metrics"]


def _scale(result: dict[str, Any]) -> float:
    """Raw gradients carry the loss scale; the norms that `step` returns do not."""
    raw = torch.stack([g.double().norm() for g in result["grads"].values()]).norm().item()
    return raw / result["norms"][0]


def overflow(layout: str) -> tuple[float, bool, float]:
    """Poison one rank's gradient; returns its norm, whether weights moved, the new loss scale."""
    it = build(layout, toy.llama(), precision="fp16")
    before = {n: full(t) for n, t in it.state_dict().tensors.items()}
    mine = toy.batch(4).split(4 // it.data_size)[it.data_rank].split(2)
    it.forward_backward(mine, CausalLM())
    if it.data_rank == it.data_size - 1:
        parameter = next(p for p in it.model.parameters() if p.grad is not None)
        parameter.grad.to_local()[0] = float("inf")
    assert it.scale is not None
    old = it.scale.value
    norm = it.step(LR)
    same = all(torch.equal(before[n], full(t)) for n, t in it.state_dict().tensors.items())
    return norm, not same, it.scale.value / old


def norm_of_large_gradients(rows: int) -> tuple[float, float]:
    it = build("dp1", toy.llama(), precision="fp32")
    weight = torch.nn.Parameter(torch.zeros(rows, 64))
    weight.grad = torch.rand(rows, 64, generator=torch.Generator().manual_seed(0))
    it.named.parameters = {"w": weight}
    return it.named.grad_norm(), float(weight.grad.double().norm())


def test_the_norm_of_a_large_gradient_is_exact(ranks: RankPool) -> None:
    """Summed one by one in fp32, squares of four million elements lose a ten-thousandth."""
    [(norm, exact)] = ranks.run(norm_of_large_gradients, 1 << 16, world=1)
    assert norm == pytest.approx(exact, rel=1e-7)


def test_ranks_agree_on_an_overflow(ranks: RankPool) -> None:
    for norm, moved, ratio in ranks.run(overflow, "dp2.zero2", world=2):
        assert norm == float("inf")
        assert not moved, "weights and moments are bitwise the same"
        assert ratio < 1.0, "the loss scale backs off on every rank"


def resume(layout: str, steps: int, **engine: Any) -> dict[str, Tensor]:
    """Train ``steps``, copy all state into a fresh engine, train ``steps`` more."""
    first = build(layout, toy.gpt2(), **engine)
    _steps(first, 0, steps)
    saved = {n: full(t) for n, t in first.state_dict().tensors.items()}
    meta = first.state_dict().meta
    second = build(layout, toy.gpt2(), **engine)
    _steps(second, 0, 1)  # so that stale gathered weights would show
    _copy(second.state_dict().tensors, first.state_dict().tensors)
    second.load_state_dict(meta)
    assert all(torch.equal(saved[n], full(t)) for n, t in second.state_dict().tensors.items())
    _steps(second, steps, 2 * steps)
    return {n: full(t) for n, t in second.state_dict().tensors.items()}


def unbroken(layout: str, steps: int, **engine: Any) -> dict[str, Tensor]:
    it = build(layout, toy.gpt2(), **engine)
    _steps(it, 0, 2 * steps)
    return {n: full(t) for n, t in it.state_dict().tensors.items()}


@torch.no_grad()
def _copy(into: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(source[name])


def _steps(it: NativeEngine, first: int, last: int) -> None:
    for step in range(first, last):
        mine = toy.batch(4, seed=step).split(4 // it.data_size)[it.data_rank].split(2)
        it.forward_backward(mine, CausalLM())
        it.step(LR)


@pytest.mark.parametrize("layout,world", [("dp1", 1), ("dp2.zero1", 2), ("dp2.zero3", 2)])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resume_is_bitwise_with_dropout(
    ranks: RankPool, layout: str, world: int, precision: str
) -> None:
    broken = ranks.run(resume, layout, 2, world=world, precision=precision)
    clean = ranks.run(unbroken, layout, 2, world=world, precision=precision)
    for a, b in zip(broken, clean, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in b)


def stream(layout: str) -> dict[str, Tensor]:
    it = build(layout, toy.llama())
    _steps(it, 0, 1)
    it.forward([toy.batch(2)], lambda logits, b: logits.shape)  # leaves gathered weights behind
    return {n: t.clone() for n, t in it.weights()}


def test_weights_stream_full_tensors_under_hugging_face_names(ranks: RankPool) -> None:
    [one] = ranks.run(stream, "dp1", world=1)
    for two in ranks.run(stream, "dp2.zero3", world=2):
        assert two.keys() == one.keys()
        assert "model.layers.0.self_attn.q_proj.weight" in two
        assert all(t.shape == one[n].shape for n, t in two.items())


def twice() -> str:
    it = build("dp1", toy.llama())
    batch = [toy.batch(4)]
    it.forward_backward(batch, CausalLM())
    with pytest.raises(RuntimeError) as caught:
        it.forward_backward(batch, CausalLM())
    it.step(LR)
    it.forward_backward(batch, CausalLM())
    return str(caught.value)


def test_gradients_are_not_summed_over_two_calls(ranks: RankPool) -> None:
    assert "without a step between them" in ranks.run(twice, world=1)[0]


def outputs_alive() -> list[int]:
    """How many earlier logits live when a micro-batch of a forward-only pass is looked at."""
    it = build("pp2", toy.llama())
    seen: list[Any] = []
    alive: list[int] = []

    def look(logits: Tensor, batch: Any) -> Tensor:
        alive.append(sum(r() is not None for r in seen))
        seen.append(weakref.ref(logits))
        return logits.sum()

    assert len(it.forward(toy.batch(6).split(1), look)) == 6
    return alive


def test_a_pipeline_without_gradient_keeps_no_logits(ranks: RankPool) -> None:
    assert ranks.run(outputs_alive, world=2) == [[], [0] * 6]


def test_padding_is_a_document_and_no_branch() -> None:
    layout = parse_layout("tp2.sp", 2)
    mesh: Any = SimpleNamespace(layout=layout, device=torch.device("cpu"), place={"cp": 0})
    batch = toy.batch(2, tokens=9)
    batch = dataclasses.replace(batch, segment_ids_BT=torch.arange(9).expand(2, -1) // 4)
    arguments = Cut(batch, mesh, toy.llama()).arguments(None, 0, "s", torch.float32)
    segments = arguments["segment_ids_BT"]
    assert segments.shape == (2, 10) and not has_branches(segments)
    assert not visible(segments[:, -1:], segments[:, :-1]).any()


def log_probabilities(layout: str, tied: bool, wide: bool) -> dict[str, Any]:
    """Of an engine, by an fp32 product of its hidden states and head; and one update."""
    model = toy.llama(num_layers=4, tie_embeddings=tied)
    config = NativeConfig(layout=layout, precision="bf16", compile=False)
    mesh = build_mesh(parse_layout(layout, dist.get_world_size()), torch.device("cpu"))
    it = NativeEngine(model, config, mesh, seed=7, optimizer=OPTIMIZER, wide_logits=wide)
    last = it.chunks.get(mesh.layout.num_chunks - 1)
    hidden: list[Tensor] = []
    hook = None
    if last is not None:
        hook = last.head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    batch = toy.batch(4)
    found = it.forward(batch.split(2), valid_logprobs)
    out: dict[str, Any] = {"found": torch.cat(found)}
    head = dict(it.full("weights"))["embed.weight" if tied else "head.weight"].bfloat16()
    if hook is not None:
        hook.remove()
        logits_NV = torch.cat(hidden).float() @ head.float().T  # of the valid tokens
        mask_BT = batch.loss_mask_BT
        exact_N = logits_NV.log_softmax(-1).gather(-1, batch.targets_BT[mask_BT][:, None])[:, 0]
        out["exact"] = torch.zeros(mask_BT.shape).masked_scatter(mask_BT, exact_N)
    out["loss"] = it.forward_backward(batch.split(2), CausalLM())["loss"]
    out["norm"] = it.step(LR)
    return out


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout,world", [("dp1", 1), ("tp2", 2), ("tp2.sp", 2), ("pp2.zbv", 2)])
def test_wide_logits_are_an_fp32_product(
    ranks: RankPool, layout: str, world: int, tied: bool
) -> None:
    [narrow] = ranks.run(log_probabilities, "dp1", tied, False, world=1)
    assert (narrow["found"] - narrow["exact"]).abs().max() > 1e-4
    mask = toy.batch(4).loss_mask_BT
    for result in ranks.run(log_probabilities, layout, tied, True, world=world):
        if "exact" in result:
            torch.testing.assert_close(result["found"], result["exact"], rtol=1e-6, atol=1e-6)
        mean = -float(result["found"].sum() / mask.sum())
        # Attention of small heads differs between training and evaluation on CPU.
        assert result["loss"] == pytest.approx(mean, rel=1e-3)
        assert result["norm"] == pytest.approx(narrow["norm"], rel=2e-2)
