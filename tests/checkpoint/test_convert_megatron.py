"""Megatron-core's own checkpoints, as it writes them, read under our names."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwise import checkpoint
from shardwise.checkpoint import megatron_names, torch_dist
from shardwise.checkpoint.convert import convert, open_model
from shardwise.config.load import load_config
from shardwise.engines.base import Setup
from shardwise.engines.megatron.config import MegatronConfig
from shardwise.engines.registry import build_engine
from shardwise.errors import UserError
from shardwise.losses.causal_lm import CausalLM
from shardwise.models import registry
from shardwise.parallel.layout import parse_layout
from tests.support import toy
from tests.support.engines import CPU, LR, OPTIMIZER, copies
from tests.support.families import small
from tests.support.megatron_files import written_here
from tests.support.pool import RankPool

pytest.importorskip("megatron.core")

LLAMA = toy.llama(num_layers=4, qkv_bias=True)
UNTIED = toy.llama(num_layers=3, tie_embeddings=False, head_dim=12, qk_norm=True)
GPT2 = toy.gpt2(dropout=0.0, attn_dropout=0.0, embed_dropout=0.0)
PRETRAIN = {"kind": "pretrain", "steps": 1}
CASES = [("tp2", LLAMA), ("pp2", LLAMA), ("tp2", UNTIED), ("pp2", UNTIED), ("tp2", GPT2)]


@contextlib.contextmanager
def its_own(layout: str, model: Any, out: str) -> Iterator[Any]:
    """An engine after one update, so that no weight is what it began as; what saves and loads."""
    from megatron.core import dist_checkpointing, parallel_state

    from shardwise.engines.megatron import names

    config = MegatronConfig(
        kind="megatron", layout=layout, precision="fp32", cpu_shim=True, optimizer="native"
    )
    setup = Setup(model, config, parse_layout(layout, 2), CPU, 7, "test", OPTIMIZER)
    it: Any = build_engine(setup)
    it.forward_backward([toy.batch(4)], CausalLM())
    it.step(LR)
    it._reshard()
    with torch.no_grad():
        masters = {n: p.data for n, p in it.named.parameters.items()}
        names.load(it.places, masters, it.mesh)
    if dist.get_rank() == 0:
        Path(out).mkdir()
    dist.barrier()
    parallel_state._DATA_PARALLEL_GROUP_WITH_CP = it.groups.dp_cp  # asked for a tied embedding

    def state(**options: Any) -> Any:
        metadata = {"dp_cp_group": it.groups.dp_cp, **options}
        return it.parts[0].module.sharded_state_dict(metadata=metadata)

    try:
        with it._inside(), written_here():
            yield it, state, dist_checkpointing
    finally:
        parallel_state._DATA_PARALLEL_GROUP_WITH_CP = None


def save(layout: str, model: Any, out: str, **options: Any) -> dict[str, Tensor]:
    """A checkpoint of Megatron's own, and the weights in it."""
    with its_own(layout, model, out) as (it, state, dist_checkpointing):
        dist_checkpointing.save(state(**options), out)
    found = copies(it, "weights")
    it.close()
    return found


Saved = tuple[Path, dict[str, Tensor]]


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """A checkpoint of two ranks, with config.json beside it, and what it was of; made once."""
    folder = tmp_path_factory.mktemp("megatron")
    made: dict[Path, dict[str, Tensor]] = {}

    def make(layout: str = "tp2", model: Any = LLAMA) -> Saved:
        path = folder / f"{layout}-{CASES.index((layout, model))}"
        if path not in made:
            made[path] = ranks.run(save, layout, model, str(path), world=2)[0]
            registry.write_config(path, model, {})
        return path, made[path]

    return make


def assert_equal(path: Path, wanted: dict[str, Tensor]) -> None:
    found = dict(checkpoint.read_tensors(path))
    assert found.keys() == {f"model.{name}" for name in wanted}
    for name, tensor in wanted.items():
        assert torch.equal(found[f"model.{name}"], tensor), name


@pytest.mark.parametrize("layout,model", CASES)
def test_weights_are_the_engine_s_own(
    saved: Callable[..., Saved],
    tmp_path: Path,
    layout: str,
    model: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, wanted = saved(layout, model)
    done = convert(source, tmp_path / "native", "native", trust_pickle=True)
    assert done["source_format"] == "megatron"
    assert_equal(tmp_path / "native", wanted)
    filled = "1 rows that fill its vocabulary up to 62" in caplog.text  # of 61, on two ranks
    assert filled == (layout == "tp2")


def test_layers_that_are_saved_each_by_itself(ranks: RankPool, tmp_path: Path) -> None:
    source = tmp_path / "in"
    options = {"non_homogeneous_layers": True}
    wanted = ranks.run(save, "pp2", GPT2, str(source), **options, world=2)[0]
    assert "decoder.layers.1.mlp.linear_fc1.weight" in torch_dist.read(source).shapes
    registry.write_config(source, GPT2, {})
    convert(source, tmp_path / "native", "native", trust_pickle=True)
    assert_equal(tmp_path / "native", wanted)


def described(source: Path, change: Callable[[str], str], *more: str) -> None:
    """Rewrite what a checkpoint says of itself: tensors under other names, and some more."""
    path = source / torch_dist.METADATA
    said = pickle.loads(path.read_bytes())  # noqa: S301 (of our own making)
    tensors = {change(name): about for name, about in said.state_dict_metadata.items()}
    about = tensors["decoder.final_layernorm.weight"]
    said.state_dict_metadata = tensors | dict.fromkeys(more, about)
    said.storage_data = {
        dataclasses.replace(index, fqn=change(index.fqn)): place
        for index, place in said.storage_data.items()
    }
    path.write_bytes(pickle.dumps(said))


def test_a_run_s_folder_a_base_and_names_of_the_local_layers(
    saved: Callable[..., Saved], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, wanted = saved("tp2", UNTIED)
    step = shutil.copytree(source, tmp_path / "run" / "iter_0000012")
    (tmp_path / "run" / torch_dist.POINTER).write_text("12")
    base = (tmp_path / "base").resolve()
    base.mkdir()
    (step / "config.json").rename(base / "config.json")
    norms = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    there = "decoder.layers."

    def local(name: str) -> str:
        rest = name.removeprefix(there)
        return there + norms[rest] if rest in norms else name

    described(step, local, "optimizer.state.exp_avg.decoder.final_layernorm.weight")
    assert "decoder.layers.input_layernorm.weight" in torch_dist.read(step).shapes
    with pytest.raises(UserError, match="--base"):
        convert(tmp_path / "run", tmp_path / "hf", trust_pickle=True)
    convert(tmp_path / "run", tmp_path / "hf", base=base, trust_pickle=True)
    assert "optimizer's state is left out" in caplog.text
    found = dict(open_model(tmp_path / "hf").tensors)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def save_with_its_optimizer(layout: str, model: Any, out: str) -> None:
    """As Megatron saves torch's Adam; moments that tell whose they are, after seven updates."""
    from megatron.core.optimizer.optimizer import FP32Optimizer
    from megatron.core.optimizer.optimizer_config import OptimizerConfig

    with its_own(layout, model, out) as (it, state_of, dist_checkpointing):
        module = it.parts[0].module
        inner = torch.optim.Adam(module.parameters())
        for p in module.parameters():
            moments = {"exp_avg": 2 * p.data, "exp_avg_sq": p.data.square()}
            inner.state[p] = {"step": torch.tensor(7.0), **moments}
        theirs = FP32Optimizer(inner, OptimizerConfig(optimizer="adam"), lambda *_: None)
        state = state_of()
        state |= {"optimizer": theirs.sharded_state_dict(state), "iteration": 9}
        dist_checkpointing.save(state, out)
    it.close()


@pytest.mark.parametrize("layout,model", [("tp2", LLAMA), ("pp2", UNTIED)])
def test_moments_come_with_the_weights(
    ranks: RankPool, tmp_path: Path, layout: str, model: Any
) -> None:
    source = tmp_path / "in"
    ranks.run(save_with_its_optimizer, layout, model, str(source), world=2)
    registry.write_config(source, model, {})
    convert(source, tmp_path / "native", "native", trust_pickle=True)
    found = dict(checkpoint.read_tensors(tmp_path / "native"))
    weights = {n.removeprefix("model."): t for n, t in found.items() if n.startswith("model.")}
    for name, weight in weights.items():
        assert torch.equal(found[f"optim.{name}.exp_avg"], 2 * weight), name
        assert torch.equal(found[f"optim.{name}.exp_avg_sq"], weight.square()), name
        assert float(found[f"optim.{name}.step"]) == 7.0
    meta = checkpoint.read_meta(tmp_path / "native")
    assert meta["engine"] == {"updates": 9, "skipped": 2}


# --- written --------------------------------------------------------------------------------------


def through_megatron(layout: str, model: Any, source: str, out: str) -> None:
    """Loaded by Megatron into an engine's model of other weights, and saved by it."""
    with its_own(layout, model, out) as (it, state_of, dist_checkpointing):
        found = dist_checkpointing.load(state_of(), source)
        assert found.pop("checkpoint_version") == 3.0 and found.pop("iteration") == 0
        it.parts[0].module.load_state_dict(found)
        dist_checkpointing.save(state_of(), out)
    it.close()


@pytest.mark.parametrize("layout,model", [("tp2", LLAMA), ("pp2", UNTIED), ("tp2", GPT2)])
def test_megatron_loads_what_is_written(
    ranks: RankPool, tmp_path: Path, layout: str, model: Any
) -> None:
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in registry.build(model).named_parameters()}
    wanted = {n: torch.randn(shape) for n, shape in shapes.items()}
    registry.to_hf(tmp_path / "hf", model, wanted.items())
    done = convert(tmp_path / "hf", tmp_path / "megatron", "megatron")
    assert done["format"] == "megatron"
    for name in (torch_dist.POINTER, "release/.metadata", "release/common.pt"):
        assert (tmp_path / "megatron" / name).exists()
    # Read by us, and by Megatron on two ranks.
    convert(tmp_path / "megatron", tmp_path / "back", "native", trust_pickle=True)
    assert_equal(tmp_path / "back", wanted)
    source, again = tmp_path / "megatron" / "release", tmp_path / "again"
    ranks.run(through_megatron, layout, model, str(source), str(again), world=2)
    registry.write_config(again, model, {})
    convert(again, tmp_path / "native", "native", trust_pickle=True)
    assert_equal(tmp_path / "native", wanted)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "granite", "olmo2", "olmo3"])
def test_a_model_that_megatron_would_compute_otherwise_is_refused(
    saved: Callable[..., Saved], tmp_path: Path, family: str
) -> None:
    """Granite's tensors have Llama's names: its multipliers would be lost in silence."""
    model = load_config({"model": small(family, vocab_size=61), "stages": [PRETRAIN]}).config.model
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in registry.build(model).named_parameters()}
    registry.to_hf(tmp_path / "hf", model, ((n, torch.zeros(s)) for n, s in shapes.items()))
    with pytest.raises(UserError, match=f"{family} computes"):
        convert(tmp_path / "hf", tmp_path / "megatron", "megatron")
    with pytest.raises(UserError, match=f"{family} computes"):
        convert(saved()[0], tmp_path / "out", "native", base=tmp_path / "hf", trust_pickle=True)
    assert not (tmp_path / "megatron").exists() and not (tmp_path / "out").exists()


# --- refused --------------------------------------------------------------------------------------


def test_pickles_are_read_only_when_they_are_trusted(
    saved: Callable[..., Saved], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"Megatron-core's.*--trust-pickle"):
        convert(saved()[0], tmp_path / "out", "native")
    assert not (tmp_path / "out").exists()


def drop(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def zarr(path: Path) -> None:
    path.write_text(json.dumps({"sharded_backend": "zarr"}))


def interleaved(path: Path) -> None:
    torch.save({"args": argparse.Namespace(rotary_interleaved=True)}, path)


@pytest.mark.parametrize(
    "name,hurt",
    [
        ("__1_0.distcp", drop),
        ("__1_0.distcp", truncate),
        (".metadata", drop),
        (".metadata", truncate),
        ("metadata.json", drop),
        ("metadata.json", zarr),
        ("common.pt", drop),
        ("common.pt", interleaved),
    ],
)
def test_what_is_partial_damaged_or_unknown_is_refused_by_name(
    saved: Callable[..., Saved], tmp_path: Path, name: str, hurt: Callable[[Path], None]
) -> None:
    source = shutil.copytree(saved()[0], tmp_path / "in")
    hurt(source / name)
    with pytest.raises(UserError) as caught:
        convert(source, tmp_path / "out", "native", trust_pickle=True)
    assert str(source / name) in str(caught.value)
    assert caught.value.exit_code == 2 and not (tmp_path / "out").exists()


def everything(source: Path) -> dict[str, Tensor]:
    return dict(megatron_names.weights(torch_dist.read(source), LLAMA))


def test_a_bit_anywhere_is_noticed_or_harmless(saved: Callable[..., Saved], tmp_path: Path) -> None:
    source, wanted = saved()
    dice, noticed = random.Random(0), 0
    files = sorted(p for p in source.iterdir() if p.name != "config.json")
    for number in range(12):
        folder = shutil.copytree(source, tmp_path / str(number))
        path = folder / files[number % len(files)].name
        data = bytearray(path.read_bytes())
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        try:
            found = everything(folder)
        except UserError as error:
            assert str(folder) in str(error)
            noticed += 1
            continue
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert noticed >= 4


def test_parts_that_are_not_a_whole_are_refused(
    saved: Callable[..., Saved], tmp_path: Path
) -> None:
    source = shutil.copytree(saved()[0], tmp_path / "in")
    path = source / torch_dist.METADATA
    said = pickle.loads(path.read_bytes())  # noqa: S301 (of our own making)
    name = "decoder.layers.mlp.linear_fc2.weight"
    said.state_dict_metadata[name].chunks.pop()
    path.write_bytes(pickle.dumps(said))
    with pytest.raises(UserError, match=f"the parts of {name} are not the whole"):
        convert(source, tmp_path / "out", trust_pickle=True)
    assert not list(tmp_path.glob("*out*"))


def test_other_models_are_refused(saved: Callable[..., Saved], tmp_path: Path) -> None:
    source, _ = saved()
    for changes, why in (
        ({"hidden_size": 64}, "has the shape"),
        ({"num_layers": 2}, "is of 4 layers"),
        ({"qkv_bias": False}, "linear_qkv.bias is no part"),
    ):
        base = tmp_path / why
        base.mkdir()
        registry.write_config(base, LLAMA.model_copy(update=changes), {})
        with pytest.raises(UserError, match=why):
            convert(source, tmp_path / "out", base=base, trust_pickle=True)
    copy = shutil.copytree(source, tmp_path / "in")
    described(copy, lambda name: name.replace("mlp.linear_fc1.weight", "mlp.experts.weight1"))
    with pytest.raises(UserError, match=r"holds no decoder.layers.mlp.linear_fc1.weight"):
        convert(copy, tmp_path / "out", trust_pickle=True)
    assert not list(tmp_path.glob("*out*"))
