"""DeepSpeed's own checkpoints, as its engine writes and reads them, against ours."""

from __future__ import annotations

import os
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise import checkpoint
from shardwise.checkpoint import deepspeed, deepspeed_names
from shardwise.checkpoint.convert import convert, open_model
from shardwise.checkpoint.pickles import archive
from shardwise.config.schema import ModelConfig
from shardwise.errors import UserError
from shardwise.models import registry
from tests.support import toy
from tests.support.pool import RankPool

pytest.importorskip("deepspeed")

TAG = "global_step2"
LAYOUTS = [(stage, bf16) for stage in (1, 2, 3) for bf16 in (False, True)]
IDS = [f"zero{stage}-{'bf16' if bf16 else 'fp32'}" for stage, bf16 in LAYOUTS]


# --- an engine of DeepSpeed's, without ours -----------------------------------------------------


class Part(nn.Module):
    """A module of which nothing is known but its parameters' names."""

    def forward(self, scale: Tensor) -> Tensor:
        """A loss in which each element of each parameter has a gradient of its own."""
        total = torch.zeros(())
        for parameter in self.parameters(recurse=False):
            wide = parameter.float()
            slope = torch.linspace(-1, 1, wide.numel()).view(wide.shape)
            total = total + (wide * slope * scale + wide.square()).sum()
        return total


class Tower(nn.Module):
    """A model with the parameters of transformers' own, under its names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        with torch.device("meta"):
            own = list(registry.build(config).named_parameters())
        generator = torch.Generator().manual_seed(0)
        named = ((n, torch.empty(p.shape).normal_(generator=generator)) for n, p in own)
        for name, tensor in registry.to_hf_tensors(config, named):
            *path, last = name.split(".")
            inner: nn.Module = self
            for part in path:
                if not hasattr(inner, part):
                    inner.add_module(part, Part())
                inner = getattr(inner, part)
            inner.register_parameter(last, nn.Parameter(tensor * 0.1))

    def forward(self, scale: Tensor) -> Tensor:
        """The sum over all parts."""
        parts = [m for m in self.modules() if isinstance(m, Part)]
        return torch.stack([m(scale) for m in parts if m._parameters]).sum()


def tower(config: ModelConfig, stage: int, bf16: bool, **more: Any) -> Any:
    """Two groups, as every recipe has them: one decays."""
    from shardwise.engines.deepspeed import library

    deepspeed = library.load("cpu")
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if bf16:
        settings |= {"data_types": {"grad_accum_dtype": "fp32"}}
        settings |= {"communication_data_type": "fp32"}
    model = Tower(config).to(torch.bfloat16 if bf16 else torch.float32)
    frozen = more.pop("frozen", None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name != frozen)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings | more)[0]


def held(engine: Any) -> dict[str, dict[str, Tensor]]:
    """Masters and moments, whole, by DeepSpeed's own word."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer = engine.optimizer
    optimizer._hp_optimizer_states_linked = False  # it links those of the first group alone
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._lazy_init_hp_params_optimizer_state()
    named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    found: dict[str, dict[str, Tensor]] = {
        "fp32": {n: safe_get_full_fp32_param(p).clone() for n, p in named}
    }
    for kind in ("exp_avg", "exp_avg_sq"):
        found[kind] = {n: safe_get_full_optimizer_state(p, kind).clone() for n, p in named}
    return found


def train(
    config: ModelConfig, stage: int, bf16: bool, out: str, frozen: str | None = None, **zero: Any
) -> Any:
    import torch.distributed as dist

    more = {"zero_optimization": {"stage": stage, **zero}}
    engine = tower(config, stage, bf16, frozen=frozen, **more)
    for update in range(2):
        engine.backward(engine(torch.tensor(float(update + dist.get_rank()))))
        engine.step()
    engine.save_checkpoint(out, tag=TAG)
    found = held(engine)
    engine.destroy()
    return found


def resume(config: ModelConfig, stage: int, bf16: bool, source: str) -> Any:
    engine = tower(config, stage, bf16, checkpoint={"load_universal": True})
    engine.load_checkpoint(source)
    found = held(engine)
    groups = engine.optimizer.optimizer.param_groups
    steps = {float(s["step"]) for s in engine.optimizer.optimizer.state.values()}
    result = (found, [(g["lr"], g["weight_decay"]) for g in groups], steps, engine.global_steps)
    engine.destroy()
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("deepspeed")


Saved = tuple[Path, dict[str, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def saved(ranks: RankPool, folder: Path) -> Callable[..., Saved]:
    """A checkpoint of two ranks, with config.json beside it, and what it was of; made once."""
    made: dict[Any, Saved] = {}

    def make(stage: int, bf16: bool, config: Any = None, frozen: str | None = None) -> Saved:
        config = config or toy.llama()
        key = (stage, bf16, config.family, frozen)
        if key not in made:
            path = folder / "-".join(map(str, key))
            what = ranks.run(train, config, stage, bf16, str(path), frozen, world=2)[0]
            registry.write_config(path, config, {})
            made[key] = (path, what)
        return made[key]

    return make


def ours(config: ModelConfig, found: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a native checkpoint has to hold."""
    result = {}
    for kind, tensors in found.items():
        for name, tensor in registry.from_hf_tensors(config, tensors.items()):
            result["model." + name if kind == "fp32" else f"optim.{name}.{kind}"] = tensor
            result[f"optim.{name}.step"] = torch.tensor(2.0)
    return result


def assert_equal(path: Path, wanted: dict[str, Tensor]) -> None:
    found = dict(checkpoint.read_tensors(path))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor), name


# --- in and out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage,bf16", LAYOUTS, ids=IDS)
def test_masters_and_moments_are_the_engine_s_own(
    saved: Callable[..., Saved], tmp_path: Path, stage: int, bf16: bool
) -> None:
    source, what = saved(stage, bf16)
    done = convert(source, tmp_path / "native", "native", trust_pickle=True)
    assert done["source_format"] == "deepspeed"
    assert_equal(tmp_path / "native", ours(toy.llama(), what))
    assert checkpoint.read_meta(tmp_path / "native")["engine"] == {"updates": 2, "skipped": 0}
    assert checkpoint.list_steps(tmp_path / "native") == [2]


@pytest.mark.parametrize("stage,bf16", LAYOUTS, ids=IDS)
def test_an_engine_goes_on_from_what_is_written(
    saved: Callable[..., Saved], ranks: RankPool, tmp_path: Path, stage: int, bf16: bool
) -> None:
    """Native, universal, and DeepSpeed's engine again: nothing is lost, the config's word holds."""
    source, what = saved(1, False)
    convert(source, tmp_path / "native", "native", trust_pickle=True)
    convert(tmp_path / "native", tmp_path / "universal", "deepspeed")
    arguments = (toy.llama(), stage, bf16, str(tmp_path / "universal"))
    for found, groups, steps, updates in ranks.run(resume, *arguments, world=2):
        for kind, tensors in what.items():
            assert found[kind].keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert torch.equal(found[kind][name], tensor), (kind, name)
        assert groups == [(1e-2, 0.1), (1e-2, 0.0)] and steps == {2.0} and updates == 2
    convert(tmp_path / "universal", tmp_path / "back", "native", trust_pickle=True)
    assert_equal(tmp_path / "back", ours(toy.llama(), what))


def test_gpt2_s_transposed_and_fused_tensors(saved: Callable[..., Saved], tmp_path: Path) -> None:
    config = toy.gpt2()
    source, what = saved(2, False, config)
    convert(source, tmp_path / "native", "native", trust_pickle=True)
    assert_equal(tmp_path / "native", ours(config, what))
    convert(tmp_path / "native", tmp_path / "universal", "deepspeed")
    convert(tmp_path / "universal", tmp_path / "back", "native", trust_pickle=True)
    assert_equal(tmp_path / "back", ours(config, what))


def test_hugging_face(saved: Callable[..., Saved], tmp_path: Path) -> None:
    source, what = saved(3, True)
    convert(source / TAG, tmp_path / "hf", "hf", trust_pickle=True)  # the folder of one step
    assert not any("exp_avg" in p.name for p in (tmp_path / "hf").iterdir())
    wanted = ours(toy.llama(), what)
    for name, tensor in open_model(tmp_path / "hf").tensors:
        assert torch.equal(tensor, wanted[f"model.{name}"])


@pytest.mark.parametrize("stage", [1, 3])
def test_what_stood_still_has_weights_but_no_moments(
    saved: Callable[..., Saved], tmp_path: Path, stage: int
) -> None:
    frozen = "model.layers.0.self_attn.q_proj.weight"
    source, what = saved(stage, False, frozen=frozen)
    convert(source, tmp_path / "native", "native", trust_pickle=True)
    found = dict(checkpoint.read_tensors(tmp_path / "native"))
    start = dict(Tower(toy.llama()).named_parameters())[frozen]
    assert torch.equal(found["model.layers.0.attn.q.weight"], start)
    assert not [n for n in found if n.startswith("optim.layers.0.attn.q.")]
    assert torch.equal(
        found["optim.embed.weight.exp_avg"], what["exp_avg"]["model.embed_tokens.weight"]
    )


def own_model(out: str, stage: int) -> dict[str, Tensor]:
    """One of our models, in the hands of another program."""
    from shardwise.engines.deepspeed import library

    deepspeed = library.load("cpu")
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    torch.manual_seed(0)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    model = registry.build(toy.llama())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    ids = torch.arange(8)[None]
    engine.backward(engine(ids, ids).logsumexp(-1).mean())
    engine.step()
    engine.save_checkpoint(out, tag=TAG)
    found = {n: p.detach().clone() for n, p in model.named_parameters()}
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [0, 2])
def test_our_own_names(ranks: RankPool, tmp_path: Path, stage: int) -> None:
    """Tied embeddings included; without ZeRO the optimizer's numbers are the model's order."""
    what = ranks.run(own_model, str(tmp_path / "in"), stage, world=2)[0]
    (tmp_path / "base").mkdir()
    registry.write_config(tmp_path / "base", toy.llama(), {})
    with pytest.raises(UserError, match="--base"):
        convert(tmp_path / "in", tmp_path / "out", "native", trust_pickle=True)
    options = {"base": tmp_path / "base", "trust_pickle": True}
    convert(tmp_path / "in", tmp_path / "out", "native", **options)
    found = dict(checkpoint.read_tensors(tmp_path / "out"))
    kinds = ("exp_avg", "exp_avg_sq", "step")
    assert found.keys() == {
        *(f"model.{n}" for n in what),
        *(f"optim.{n}.{kind}" for n in what for kind in kinds),
    }
    assert all(torch.equal(found[f"model.{n}"], t) for n, t in what.items())
    assert all(float(found[f"optim.{n}.step"]) == 1.0 for n in what)


def test_a_start_without_an_optimizer(tmp_path: Path) -> None:
    """Of weights alone: Adam before its first update."""
    config = toy.llama()
    with torch.device("cpu"):
        model = registry.build(config)
    registry.to_hf(tmp_path / "hf", config, model.named_parameters())
    convert(tmp_path / "hf", tmp_path / "universal", "deepspeed")
    convert(tmp_path / "universal", tmp_path / "back", "native", trust_pickle=True)
    found = dict(checkpoint.read_tensors(tmp_path / "back"))
    assert torch.equal(found["model.embed.weight"], model.get_parameter("embed.weight"))
    moments = [t for n, t in found.items() if n.startswith("optim.")]
    assert moments and not any(t.any() for t in moments)


# --- refused --------------------------------------------------------------------------------------


def test_pickles_are_read_only_when_they_are_trusted(
    saved: Callable[..., Saved], tmp_path: Path
) -> None:
    source, _ = saved(1, False)
    with pytest.raises(UserError, match="--trust-pickle"):
        convert(source, tmp_path / "out", "native")
    assert not (tmp_path / "out").exists()


def copied(source: Path, tmp_path: Path) -> Path:
    shutil.copytree(source, tmp_path / "in")
    return tmp_path / "in" / TAG


def drop(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def truncate_most(path: Path) -> None:
    os.truncate(path, 500)


def flip(path: Path) -> None:
    """One bit of the largest part."""
    with zipfile.ZipFile(path) as file:
        largest = max((file.read(name) for name in file.namelist()), key=len)
    data = bytearray(path.read_bytes())
    data[data.index(largest) + len(largest) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("hurt", [drop, truncate, truncate_most, flip, empty])
@pytest.mark.parametrize(
    "stage,name",
    [
        (2, "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        (2, "mp_rank_00_model_states.pt"),
        (3, "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        (3, "zero_pp_rank_1_mp_rank_00_model_states.pt"),
    ],
)
def test_what_is_partial_or_damaged_is_refused_by_name(
    saved: Callable[..., Saved], tmp_path: Path, stage: int, name: str, hurt: Callable[[Path], None]
) -> None:
    source, _ = saved(stage, True)
    path = copied(source, tmp_path) / name
    hurt(path)
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "in", tmp_path / "out", "native", trust_pickle=True)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2 and not (tmp_path / "out").exists()


def everything(folder: Path) -> dict[str, Tensor]:
    found = deepspeed.read(folder)
    state = deepspeed_names.optimizer(found, toy.llama())
    assert state is not None
    held = [*deepspeed_names.weights(found, toy.llama()), *state.tensors()]
    return {name: tensor.clone() for name, tensor in held}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_bit_anywhere_is_noticed_or_harmless(
    saved: Callable[..., Saved], tmp_path: Path, stage: int
) -> None:
    source, _ = saved(stage, True)
    wanted, dice, noticed = everything(source / TAG), random.Random(stage), 0
    for number in range(20):
        folder = shutil.copytree(source / TAG, tmp_path / str(number))
        path = dice.choice(sorted(folder.glob("*.pt")))
        data = bytearray(path.read_bytes())
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        try:
            found = everything(folder)
        except UserError as error:
            assert str(path) in str(error)
            noticed += 1
            continue
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert noticed >= 10


def test_a_universal_one_must_be_whole(tmp_path: Path) -> None:
    model = registry.build(toy.llama())
    registry.to_hf(tmp_path / "hf", toy.llama(), model.named_parameters())
    convert(tmp_path / "hf", tmp_path / "in", "deepspeed")
    zero = tmp_path / "in" / "global_step0" / "zero"
    one = zero / "model.norm.weight"
    for gone in (one / "exp_avg.pt", one / "fp32.pt", one, zero / "optimizer_state.pt"):
        kept = gone.rename(tmp_path / "kept")
        with pytest.raises(UserError, match=str(gone)):
            convert(tmp_path / "in", tmp_path / "out", "native", trust_pickle=True)
        kept.rename(gone)
    flip(one / "exp_avg.pt")
    with pytest.raises(UserError, match=str(one / "exp_avg.pt")):
        convert(tmp_path / "in", tmp_path / "out", "native", trust_pickle=True)
    assert not (tmp_path / "out").exists()


def test_addresses_that_are_wrong_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    """DeepSpeed's own, of 0.19.8: read as they stand they would mix parameters up."""
    source = tmp_path / "in"
    ranks.run(train, toy.llama(), 2, False, str(source), round_robin_gradients=True, world=2)
    registry.write_config(source, toy.llama(), {})
    with pytest.raises(UserError, match=r"rank_0_.*round_robin_gradients"):
        convert(source, tmp_path / "out", "native", trust_pickle=True)


def test_groups_in_parts(ranks: RankPool, tmp_path: Path) -> None:
    """Stage 3 cuts groups further, to offload them."""
    source = tmp_path / "in"
    what = ranks.run(train, toy.llama(), 3, False, str(source), sub_group_size=3000, world=2)[0]
    registry.write_config(source, toy.llama(), {})
    convert(source, tmp_path / "native", "native", trust_pickle=True)
    assert_equal(tmp_path / "native", ours(toy.llama(), what))


@pytest.mark.parametrize(
    "name,what",
    [
        ("mp_rank_01_model_states.pt", "tensor parallelism"),
        ("layer_00-model_states.pt", "a pipeline"),
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "a pipeline"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "experts"),
    ],
)
def test_models_cut_otherwise_are_refused(
    saved: Callable[..., Saved], tmp_path: Path, name: str, what: str
) -> None:
    step = copied(saved(1, False)[0], tmp_path)
    (step / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name}: .*{what}"):
        convert(tmp_path / "in", tmp_path / "out", "native", trust_pickle=True)


def test_another_model_s_config_is_refused(saved: Callable[..., Saved], tmp_path: Path) -> None:
    source, _ = saved(1, False)
    for changes, why in (({"hidden_size": 64}, "shape"), ({"num_layers": 1}, "not part")):
        base = tmp_path / why
        base.mkdir()
        registry.write_config(base, toy.llama(**changes), {})
        with pytest.raises(UserError, match=why):
            convert(source, tmp_path / "out", "hf", base=base, trust_pickle=True)
        assert not (tmp_path / "out").exists()


def test_without_a_sandbox_nothing_is_read(
    saved: Callable[..., Saved], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = saved(1, False)
    answer = b'{"lacking": {"seccomp": "no kernel"}}'
    program = tmp_path / "program.py"
    program.write_text(f"import os\nos.write(1, {len(answer).to_bytes(8, 'little') + answer!r})\n")
    monkeypatch.setattr(archive, "PROGRAM", program)
    with pytest.raises(UserError, match=r"cannot close the sandbox .*no kernel"):
        convert(source, tmp_path / "out", "native", trust_pickle=True)
    assert not (tmp_path / "out").exists()
