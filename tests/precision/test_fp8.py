"""FP8 inside the engine: what is quantised, recorded, carried and left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from shardwise import checkpoint
from shardwise.config.schema import AdamWConfig, Fp8Config, NativeConfig
from shardwise.engines.native import NativeEngine
from shardwise.losses.causal_lm import CausalLM
from shardwise.losses.logprobs import valid_logprobs
from shardwise.ops import fp8
from shardwise.ops.fp8_linear import Site
from shardwise.parallel.layout import parse_layout, world_of
from shardwise.parallel.mesh import build_mesh
from shardwise.parallel.quantised import quantised_linears
from shardwise.precision.fp8 import recipe_of
from tests.support import toy
from tests.support.daily import daily
from tests.support.pool import RankPool

RECIPES = ["delayed", "current", "block", "mxfp8"]
OPTIMIZER = AdamWConfig(lr=1e-2, eps=1e-4)
MODEL = toy.llama(num_layers=4)


def build(layout: str = "dp1", recipe: str = "delayed", model: Any = MODEL, **engine: Any) -> Any:
    section = {"recipe": recipe, "amax_history_len": 3, **engine.pop("fp8", {})}
    config = {"layout": layout, "compile": False, "fp8": section, **engine}
    mesh = build_mesh(parse_layout(layout, dist.get_world_size()), torch.device("cpu"))
    options: dict[str, Any] = {"seed": 7, "stage": "test", "optimizer": OPTIMIZER}
    return NativeEngine(model, NativeConfig.model_validate(config), mesh, **options)


def step(it: NativeEngine, number: int, micro: int = 2, lr: float = 1e-2) -> dict[str, float]:
    batch = toy.batch(8, tokens=16, seed=number)
    mine = batch.split(8 // it.data_size)[it.data_rank].split(micro)
    metrics = it.forward_backward(mine, CausalLM())
    it.step(lr)
    return metrics


def scales(it: NativeEngine) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in it.state_dict().tensors.items() if n.startswith("fp8.")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- which layers ---------------------------------------------------------------------------------


def test_which_layers_are_quantised() -> None:
    every = Fp8Config(first_layers=0, last_layers=0)
    assert len(quantised_linears(MODEL, every)) == 4 * 7
    assert not any("head" in q.path for q in quantised_linears(MODEL, every))
    middle = [q.path for q in quantised_linears(MODEL, Fp8Config(modules=["*.mlp.*"]))]
    assert middle == [f"layers.{i}.mlp.{n}" for i in (1, 2) for n in ("gate", "up", "down")]


def test_widths_of_a_ranks_part() -> None:
    found = {q.path: q for q in quantised_linears(MODEL, Fp8Config())}
    assert found["layers.1.attn.q"].local(4, 2) == (8, 32)
    assert found["layers.1.attn.k"].local(4, 2) == (8, 32)  # two heads on four ranks: one head each
    assert found["layers.1.mlp.down"].local(4, 2) == (32, 12)


def test_formats_by_recipe() -> None:
    wanted = {"delayed": fp8.E5M2, "current": fp8.E5M2, "block": fp8.E4M3, "mxfp8": fp8.E4M3}
    for name, dtype in wanted.items():
        recipe = recipe_of(Fp8Config.model_validate({"recipe": name}))
        assert (recipe.forward, recipe.backward) == (fp8.E4M3, dtype)
    assert recipe_of(Fp8Config(recipe="block", format="hybrid")).backward == fp8.E5M2


def test_recipes_that_an_earlier_version_wrote_out_are_read() -> None:
    """It had a key ``domains``, null wherever nobody set it."""
    assert Fp8Config.model_validate({"recipe": "block", "domains": None}).recipe == "block"
    with pytest.raises(ValidationError, match="domains"):
        Fp8Config.model_validate({"domains": "tp2"})


# --- one linear layer -----------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", RECIPES)
def test_a_layers_products_are_those_of_its_quantised_operands(scaling: fp8.Scaling) -> None:
    """``y``, ``dx`` and ``dw``, each operand quantised along what its product sums over."""
    g = torch.Generator().manual_seed(0)
    x, w, grad = (torch.randn(s, generator=g) for s in ((2, 33, 160), (130, 160), (2, 33, 130)))
    recipe = fp8.Recipe(scaling)
    site = Site("a", recipe, torch.ones(3), torch.zeros(3))
    x.requires_grad_()
    w.requires_grad_()
    y = site.linear(x, w, None)
    y.backward(grad)

    def numbers(t: Tensor, operand: fp8.Operand) -> Tensor:
        t = t.detach()
        scale = fp8.scale_from_amax(fp8.amax(t), recipe.dtype(operand))
        return fp8.quantise(t, operand, recipe, scale).dequantise(torch.float64)

    x_NI, g_NO = x.flatten(0, 1), grad.flatten(0, 1)
    wanted = numbers(x_NI, "x") @ numbers(w, "w").T
    dx = numbers(g_NO, "g") @ numbers(w.T, "w").T
    dw = numbers(g_NO.T, "g") @ numbers(x_NI.T, "x").T
    assert x.grad is not None and w.grad is not None
    for found, exact in ((y.flatten(0, 1), wanted), (x.grad.flatten(0, 1), dx), (w.grad, dw)):
        assert (found.double() - exact).norm() < 1e-5 * exact.norm()
    assert torch.equal(site.amax_3, torch.stack([fp8.amax(x), fp8.amax(w), fp8.amax(grad)]))


# --- what is recorded -----------------------------------------------------------------------------


def record(**engine: Any) -> tuple[dict[str, Tensor], list[float]]:
    it = build(**engine)
    micro = 2
    losses = [step(it, n, micro)["loss"] for n in range(3)]
    return scales(it), losses


def test_recompute_records_each_amax_once(ranks: RankPool) -> None:
    [plain] = ranks.run(record, world=1)
    for kind in ("full", "selective"):
        [found] = ranks.run(record, world=1, recompute=kind)
        assert same(found[0], plain[0]) and found[1] == plain[1]


def look_on() -> tuple[bool, bool, bool]:
    it = build()
    it.forward([toy.batch(4)], valid_logprobs)  # before any history
    untouched = not any("history" in n and bool(t.any()) for n, t in scales(it).items())
    step(it, 0)
    before = scales(it)
    it.forward([toy.batch(4, seed=9)], valid_logprobs)
    kept = same(scales(it), before)
    streamed = dict(it.weights())["model.layers.1.self_attn.q_proj.weight"]
    master = dict(it.full("weights"))["layers.1.attn.q.weight"]
    return untouched, kept, torch.equal(streamed, master)


def test_evaluation_records_nothing_and_weights_stream_unquantised(ranks: RankPool) -> None:
    assert ranks.run(look_on, world=1) == [(True, True, True)]


def calibrated(it: NativeEngine) -> set[tuple[bool, ...]]:
    assert it.fp8 is not None
    return {tuple(site.calibrated) for site in it.fp8.sites.values()}


def one_step_of_history() -> tuple[Any, ...]:
    """Whether scales came from the first step, and the second step scaled by them."""
    it = build(fp8={"amax_history_len": 1})
    step(it, 0)
    before = scales(it)
    loss = step(it, 1)["loss"]
    current = build(recipe="current")
    step(current, 0)
    moved = any(n.endswith("scale") and bool((t != 1).any()) for n, t in before.items())
    return calibrated(it), moved, loss != step(current, 1)["loss"]


def test_a_history_of_one_step_delays_by_one(ranks: RankPool) -> None:
    [(known, moved, differs)] = ranks.run(one_step_of_history, world=1)
    assert known == {(True,) * 3} and moved and differs


def infinite_start() -> list[Any]:
    """What is known after an infinite first step and the finite ones behind it."""
    it = build()
    assert it.fp8 is not None
    found = []
    for amax in (torch.inf, 2.0, 2.0, 2.0):
        it.fp8.amax_S3.fill_(amax)
        it.fp8.finish_step(0)
        found.append((calibrated(it), it.fp8.scale_S3.unique().tolist()))
    return found


def test_a_scale_is_known_once_a_finite_history_has_given_it(ranks: RankPool) -> None:
    [found] = ranks.run(infinite_start, world=1)
    unknown = ({(False,) * 3}, [1.0])
    assert found[:2] == [unknown] * 2  # the infinity is still in the window
    assert found[-1] == ({(True,) * 3}, [224.0, 28672.0])


# --- what is carried ------------------------------------------------------------------------------


def run_and_save(root: str, layout: str, steps: int, total: int) -> dict[str, Any]:
    """Train ``steps``, save, train on to ``total``."""
    it = build(layout, precision="fp64")
    losses = [step(it, n)["loss"] for n in range(steps)]
    state = it.state_dict()
    checkpoint.save(root, steps, state.tensors, {"engine": state.meta}, {})
    losses += [step(it, n)["loss"] for n in range(steps, total)]
    return {"scales": scales(it), "losses": losses}


def resume(root: str, layout: str, steps: int, total: int) -> dict[str, Any]:
    it = build(layout, precision="fp64")
    found = checkpoint.load_latest(root, it.state_dict().tensors)
    assert found is not None
    it.load_state_dict(found.meta["engine"])
    losses = [step(it, n)["loss"] for n in range(steps, total)]
    return {"scales": scales(it), "losses": losses}


@pytest.mark.parametrize("layout", daily(["dp2.zero2", "tp2.sp"], 0))
def test_delayed_scaling_resumes_bitwise(ranks: RankPool, tmp_path: Path, layout: str) -> None:
    whole = ranks.run(run_and_save, str(tmp_path), layout, 3, 5, world=2)[0]
    found = ranks.run(resume, str(tmp_path), layout, 3, 5, world=2)[0]
    assert found["losses"] == whole["losses"][3:] and same(found["scales"], whole["scales"])


def test_histories_move_to_another_layout(ranks: RankPool, tmp_path: Path) -> None:
    """Amaxes are global, so they mean the same on any layout."""
    whole = ranks.run(run_and_save, str(tmp_path), "dp2.zero2", 3, 5, world=2)[0]
    for layout in ("tp2", "pp2", "dp2.zero3"):
        results = ranks.run(resume, str(tmp_path), layout, 3, 5, world=world_of(layout))
        held = {n: t for r in results for n, t in r["scales"].items()}
        assert results[0]["losses"] == pytest.approx(whole["losses"][3:], rel=1e-9)
        assert same(held, whole["scales"])


def lose_history(root: str) -> tuple[list[float], list[float]]:
    """A resume that forgets the tensors of FP8, beside one that does not."""
    found = []
    for forget in (False, True):
        it = build(precision="fp64")
        tensors = it.state_dict().tensors
        kept = {n: t for n, t in tensors.items() if not (forget and n.startswith("fp8."))}
        loaded = checkpoint.load_latest(root, kept, partial=True)
        assert loaded is not None
        it.load_state_dict(loaded.meta["engine"])
        found.append([step(it, n)["loss"] for n in range(3, 5)])
    return found[0], found[1]


def test_a_lost_history_would_show(ranks: RankPool, tmp_path: Path) -> None:
    """What the tests above would see if it were not carried."""
    [whole] = ranks.run(run_and_save, str(tmp_path), "dp1", 3, 5, world=1)
    [(kept, lost)] = ranks.run(lose_history, str(tmp_path), world=1)
    assert kept == whole["losses"][3:] and lost != kept
