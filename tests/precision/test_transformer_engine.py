"""The whole Transformer Engine path on a stand-in, against the emulation."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from shardwise.config.schema import AdamWConfig, NativeConfig
from shardwise.engines.native import NativeEngine
from shardwise.errors import ConfigError
from shardwise.losses.causal_lm import CausalLM
from shardwise.models.dense.cohere import CohereConfig
from shardwise.ops import fp8
from shardwise.ops import transformer_engine as library
from shardwise.parallel.layout import parse_layout, world_of
from shardwise.parallel.mesh import build_mesh
from shardwise.precision.fp8 import backend
from shardwise.verify.pool import RankError
from tests.contracts.signatures import groups
from tests.contracts.transformer_engine import installed
from tests.support import toy
from tests.support.daily import daily
from tests.support.pool import RankPool

RELEASES = groups("transformer_engine")
MODELS = {
    "llama": toy.llama(num_kv_heads=4, hidden_size=128, ffn_size=64),
    "wide": toy.llama(num_kv_heads=4, hidden_size=256, ffn_size=256),  # two tiles of a block
    "gpt2": toy.gpt2(hidden_size=128, dropout=0.0),
    "cohere": CohereConfig.model_validate(  # whose norm the feed-forward reads, too
        toy.llama(num_kv_heads=4, hidden_size=128, ffn_size=64).model_dump(
            include={"vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads"}
            | {"ffn_size", "max_seq_len"}
        )
    ),
}


def train(
    layout: str, recipe: str, release: str | None, model: str = "llama", **engine: Any
) -> dict[str, Any]:
    """Three steps by the library's stand-in, or emulated; everything that they leave."""
    fp8 = {
        "recipe": recipe,
        "backend": "te" if release else "emulated",
        "amax_history_len": 2,
        "first_layers": 0,
        "last_layers": 0,
    }
    config = NativeConfig.model_validate(
        {"layout": layout, "compile": False, "precision": "fp64", "fp8": fp8} | engine
    )
    mesh = build_mesh(parse_layout(layout, dist.get_world_size()), torch.device("cpu"))
    out: dict[str, Any] = {"loss": [], "norms": []}
    with installed(release) if release else contextlib.nullcontext() as state:
        it = NativeEngine(
            MODELS[model], config, mesh, seed=7, stage="t", optimizer=AdamWConfig(eps=1e-4)
        )
        for step in range(3):
            batch = toy.batch(4, tokens=8, seed=step)
            mine = batch.split(4 // it.data_size)[it.data_rank].split(1)
            out["loss"].append(it.forward_backward(mine, CausalLM())["loss"])
            if step == 0:
                out["grads"] = dict(it.full("grads"))
            out["norms"].append(it.step(1e-2))
        out["fp8"] = {n: t.clone() for n, t in it.state_dict().tensors.items() if "fp8" in n}
        out["modules"] = list(state.calls) if state else []
    return out


def far(got: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """What differs by more than rounding."""
    found = []
    for name, grad in want["grads"].items():
        if not torch.allclose(got["grads"][name], grad, rtol=0, atol=1e-9 * float(grad.norm())):
            found.append(f"gradient {name}")
    for kind in ("loss", "norms"):
        if got[kind] != pytest.approx(want[kind], rel=1e-9):
            found.append(kind)
    found += [n for n, t in got["fp8"].items() if not torch.equal(t, want["fp8"][n])]
    return found


@pytest.mark.parametrize(
    "model,layout,recipe",
    daily(
        [
            ("llama", "dp1.zero0", "delayed"),
            ("gpt2", "dp1.zero0", "current"),
            ("wide", "dp1.zero0", "block"),
            ("llama", "tp2", "delayed"),
            ("llama", "tp2.sp", "delayed"),
            ("llama", "tp2.sp", "current"),
            ("wide", "tp2.sp", "block"),
            ("llama", "tp2.sp", "mxfp8"),
            ("gpt2", "tp2.sp", "delayed"),
            ("gpt2", "dp2.zero3", "mxfp8"),
            ("llama", "dp2.zero2", "delayed"),
            ("llama", "pp2.1f1b", "delayed"),
            ("cohere", "tp2.sp", "mxfp8"),
        ],
        *(4, 9, 11),
    ),
)
def test_equals_the_emulation(ranks: RankPool, model: str, layout: str, recipe: str) -> None:
    world = world_of(layout)
    want = ranks.run(train, layout, recipe, None, model, world=world)
    got = ranks.run(train, layout, recipe, RELEASES[-1], model, world=world)
    for mine, theirs in zip(got, want):
        assert far(mine, theirs) == []
    fused = recipe in ("block", "mxfp8") or model == "gpt2"  # whose mlp has one layer in front
    fused = fused and model != "cohere"
    assert ("LayerNormLinear" in got[0]["modules"]) == fused


@pytest.mark.parametrize("release", RELEASES[:-1])
def test_every_release_is_called_rightly(ranks: RankPool, release: str) -> None:
    with installed(release):
        for scaling in library.NEEDS:
            assert library.library_recipe(fp8.Recipe(scaling)).scaling == scaling
    got = ranks.run(train, "dp1.zero0", "delayed", release, "gpt2", world=1)
    want = ranks.run(train, "dp1.zero0", "delayed", RELEASES[-1], "gpt2", world=1)
    assert far(got[0], want[0]) == []
    assert set(got[0]["modules"]) == {"Linear", "LayerNormLinear"}


def test_recompute_is_the_library_s_own(ranks: RankPool) -> None:
    [want] = ranks.run(train, "dp1.zero0", "delayed", None, world=1)
    [got] = ranks.run(train, "dp1.zero0", "delayed", RELEASES[-1], world=1, recompute="full")
    assert far(got, want) == []


def resume(release: str, layout: str) -> bool:
    """Two steps, a save, one more; and that one again from what was saved, in a new engine."""
    config = NativeConfig.model_validate({"layout": layout, "compile": False, "fp8": FP8})

    def make() -> NativeEngine:
        mesh = build_mesh(parse_layout(layout, dist.get_world_size()), torch.device("cpu"))
        optimizer = AdamWConfig(eps=1e-4)
        return NativeEngine(MODELS["gpt2"], config, mesh, seed=7, stage="t", optimizer=optimizer)

    def step(it: NativeEngine, seed: int) -> float:
        batch = toy.batch(4, tokens=8, seed=seed)
        loss = it.forward_backward(
            batch.split(4 // it.data_size)[it.data_rank].split(1), CausalLM()
        )
        it.step(1e-2)
        return loss["loss"]

    with installed(release):
        unbroken = make()
        for seed in range(2):
            step(unbroken, seed)
        state = unbroken.state_dict()
        saved = {n: t.clone() for n, t in state.tensors.items()}
        want = step(unbroken, 2)
        resumed = make()
        for name, tensor in resumed.state_dict().tensors.items():
            tensor.copy_(saved[name])
        resumed.load_state_dict(state.meta)
        got = step(resumed, 2)
        after, others = unbroken.state_dict().tensors, resumed.state_dict().tensors
        whole = {n: t for n, t in after.items() if n.startswith("fp8")}
        assert whole
        return got == want and all(torch.equal(t, others[n]) for n, t in whole.items())


FP8 = {
    "recipe": "delayed",
    "backend": "te",
    "amax_history_len": 3,
    "first_layers": 0,
    "last_layers": 0,
}


@pytest.mark.parametrize("layout", ["dp1.zero0", "tp2.sp"])
def test_histories_survive_a_resume(ranks: RankPool, layout: str) -> None:
    assert all(ranks.run(resume, RELEASES[-1], layout, world=world_of(layout)))


def chosen(**changes: Any) -> tuple[str, str]:
    """The backend and why, where the library could run."""
    fp8 = FP8 | {"backend": changes.pop("backend", "auto")}
    layout = changes.get("layout", "dp1.zero0")
    engine = NativeConfig.model_validate({"layout": layout, "fp8": fp8} | changes)
    return backend(engine, parse_layout(layout, world_of(layout)), torch.device("cpu"))


def test_who_computes_and_why() -> None:
    assert chosen() == ("emulated", "Transformer Engine runs on CUDA only, not on cpu")
    with pytest.raises(ConfigError, match=r"fp8\.backend: te, but .* CUDA only.* use auto"):
        chosen(backend="te")
    with installed(RELEASES[-1]):
        assert chosen() == ("te", "it can run here")
        assert chosen(backend="emulated")[0] == "emulated"
        name, why = chosen(recompute="selective")
        assert name == "emulated" and "engine.recompute=full" in why
        name, why = chosen(layout="pp2.zbv")
        assert name == "emulated" and "use 1f1b or interleaved" in why
        with pytest.raises(ConfigError, match="use 1f1b"):
            chosen(layout="pp2.zbv", backend="te")


def wrong(what: str) -> None:
    """One step of an adapter with a mistake, on the oldest release."""

    def misspelt(*args: Any, **kwargs: Any) -> Any:
        return library._loaded().Linear(*args, parallelmode=None)

    @contextlib.contextmanager
    def modern(recipe: Any, group: Any, enabled: bool = True) -> Any:
        with library._loaded().fp8_autocast(enabled=enabled, recipe=recipe):
            yield

    faults = {
        "keyword": mock.patch.object(library, "linear", misspelt),
        "renamed": mock.patch.object(library, "computing", modern),
    }
    with faults[what]:
        train("dp1.zero0", "delayed", RELEASES[0])


@pytest.mark.parametrize("what,says", [("keyword", "parallelmode"), ("renamed", "'recipe'")])
def test_the_contract_can_fail(ranks: RankPool, what: str, says: str) -> None:
    with pytest.raises(RankError, match=f"(Linear|fp8_autocast) of transformer_engine 2.*{says}"):
        ranks.run(wrong, what, world=1)


def per_call_scales(release: str) -> bool:
    """Whether the gradients' scales differ when the first backward pass may move them on."""
    [one, other] = [train("dp1.zero0", "delayed", release)["fp8"] for _ in range(2)]
    with mock.patch.object(library, "step", library.computing):
        third = train("dp1.zero0", "delayed", release)["fp8"]
    assert all(torch.equal(t, other[n]) for n, t in one.items())
    return any(not torch.equal(t, third[n]) for n, t in one.items())


def test_the_step_matters(ranks: RankPool) -> None:
    assert ranks.run(per_call_scales, RELEASES[-1], world=1) == [True]
