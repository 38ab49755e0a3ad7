"""Adapters against the real PEFT, in both directions, and folders not as they should be."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shardwise.adapters import peft as ours
from shardwise.adapters.peft import CONFIG, WEIGHTS, PeftAdapter, Update
from shardwise.adapters.peft_read import check_base, read
from shardwise.adapters.peft_write import to_peft, write
from shardwise.errors import CheckpointError
from shardwise.models import registry
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.init import load_weights

peft = pytest.importorskip("peft", exc_type=ImportError)

from tests.models.families import hf_model, inputs  # noqa: E402

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class Base:
    """A model on disk, as both sides see it."""

    folder: Path
    config: DecoderConfig
    weights: dict[str, Tensor]  # ours

    def theirs(self) -> Any:
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, attn_implementation="eager"
        )

    def logits(self, changed: dict[str, Tensor]) -> Tensor:
        """Of our model with some weights changed."""
        model = registry.build(self.config)
        load_weights(model, (self.weights | changed).items())
        with torch.no_grad():
            return model(*inputs())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    made: dict[str, Base] = {}

    def of(name: str) -> Base:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            hf_model(name).save_pretrained(folder)
            config, named = registry.from_hf(folder)
            made[name] = Base(folder, config, dict(named))
        return made[name]

    return of


def random_parts(model: Any) -> Any:
    """Give every part of an adapter numbers that matter."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_magnitude" in name:
                value.mul_(1.0 + 0.2 * torch.rand_like(value))
            elif value.requires_grad:
                value.add_(0.1 * torch.randn_like(value))
    return model


def theirs(base: Base, folder: Path, **settings: Any) -> Any:
    """An adapter that PEFT makes and saves; returns its model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
        model = random_parts(peft.get_peft_model(base.theirs(), config))
        model.save_pretrained(folder)
    return model


def check_read(base: Base, folder: Path, model: Any) -> PeftAdapter:
    """What PEFT computes with an adapter is what we read."""
    adapter = read(folder, base.config)
    with torch.no_grad():
        expected = model.eval()(inputs()[0]).logits
    torch.testing.assert_close(
        base.logits(dict(ours.merge(base.weights.items(), adapter))), expected, atol=1e-4, rtol=1e-4
    )
    assert float((base.logits({}) - expected).abs().max()) > 1e-2  # it does something
    return adapter


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"},
    "dora": {"r": 2, "use_dora": True, "target_modules": LINEAR},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 3},
        "alpha_pattern": {r"model\.layers\.[02]\.mlp\.up_proj": 5},
    },
    "ends": {"r": 4, "target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    "layers": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "saved": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_is_read(kind: str, bases: Any, tmp_path: Path) -> None:
    base = bases("llama2")
    model = theirs(base, tmp_path / "a", **KINDS[kind])
    adapter = check_read(base, tmp_path / "a", model)
    stored = load_file(tmp_path / "a" / WEIGHTS)
    held = [t for u in adapter.updates.values() for t in (u.A_RI, u.B_OR, u.magnitude_O)]
    held += [*adapter.saved.values(), *adapter.base.values()]
    assert len([t for t in held if t is not None]) == len(stored)
    if kind == "ends":
        check_base(adapter, tmp_path, base.weights)
        other = base.weights | {"embed.weight": base.weights["embed.weight"] + 1e-3}
        with pytest.raises(CheckpointError, match="another base model"):
            check_base(adapter, tmp_path, other)
    # Bit by bit: what was read is written as it was, but for the base's own weights.
    raw, tensors = to_peft(adapter, base.config)
    expected = {k: v for k, v in stored.items() if ".base_layer." not in k}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[k], expected[k]) for k in expected)
    # More than were asked for, where PEFT's own matching by endings finds more (layernorm).
    assert {*(raw["modules_to_save"] or [])} >= {*KINDS[kind].get("modules_to_save", [])}


@pytest.mark.parametrize("kind", ["none", "lora_only", "all"])
@pytest.mark.parametrize("name", ["gpt2", "qwen2-window"])
def test_biases_and_fused_modules_are_read(
    name: str, kind: str, bases: Any, tmp_path: Path
) -> None:
    base = bases(name)
    targets = ["c_attn", "c_fc"] if name == "gpt2" else ["q_proj", "up_proj"]
    settings: dict[str, Any] = {"bias": kind, "fan_in_fan_out": name == "gpt2"}
    model = theirs(base, tmp_path, r=4, lora_alpha=5, target_modules=targets, **settings)
    adapter = check_read(base, tmp_path, model)
    if name == "gpt2":
        paths = {path for path in adapter.updates if path.startswith("layers.0.")}
        assert paths == {f"layers.0.{x}" for x in ("attn.q", "attn.k", "attn.v", "mlp.up")}
        if kind != "none":
            with pytest.raises(CheckpointError, match="bias: trained whole beside an adapter"):
                to_peft(adapter, base.config)
            return
        _, tensors = to_peft(adapter, base.config)
        stored = load_file(tmp_path / WEIGHTS)
        assert all(torch.equal(stored[k], v) for k, v in tensors.items())


def random_adapter(
    base: Base, paths: list[str], rslora: bool = False, dora: bool = False
) -> PeftAdapter:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    updates = {}
    for path in paths:
        rows, columns = base.weights[f"{path}.weight"].shape
        if path == "embed":
            rows, columns = columns, rows
        magnitude = 1.0 + normal(rows).abs() if dora else None
        updates[path] = Update(normal(4, columns), normal(rows, 4), 6.0, magnitude)
    return PeftAdapter(updates, rslora)


LLAMA = [f"layers.{i}.{m}" for i in range(3) for m in ("attn.q", "attn.o", "mlp.gate")]
GPT2 = [f"layers.{i}.attn.{x}" for i in range(3) for x in "qkv"] + ["layers.1.mlp.down"]


@pytest.mark.parametrize(
    ("name", "paths", "rslora", "dora"),
    [
        ("llama2", LLAMA, False, False),
        ("llama2", [*LLAMA, "embed", "head"], True, False),
        ("llama2", LLAMA[:-1], False, True),
        ("gpt2", GPT2, False, False),  # three updates in one module, of thrice the rank
        ("gpt2", [*GPT2[:7], "layers.2.mlp.up"], True, False),  # k and v of the last stand still
        ("gpt2", GPT2, False, True),
        ("gpt_neox", GPT2, False, True),  # of each head, queries, keys and values in turn
        ("gpt_neox", GPT2[:7], False, False),
        ("phi3", GPT2[:7], True, False),  # more queries than keys in one module
    ],
)
def test_what_we_write_loads_in_peft(
    name: str, paths: list[str], rslora: bool, dora: bool, bases: Any, tmp_path: Path
) -> None:
    base = bases(name)
    adapter = random_adapter(base, paths, rslora, dora)
    write(tmp_path, adapter, base.config, str(base.folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base.theirs(), tmp_path)
        result = model.load_adapter(tmp_path, "again")
    assert not result.missing_keys and not result.unexpected_keys
    check_read(base, tmp_path, model)


def test_a_head_start_is_kept(bases: Any, tmp_path: Path) -> None:
    base = bases("llama2")
    adapter = dataclasses.replace(random_adapter(base, LLAMA), base_hash="abc")
    write(tmp_path, adapter, base.config)
    assert read(tmp_path, base.config).base_hash == "abc"


def test_a_part_of_a_fused_module_has_no_magnitudes(bases: Any) -> None:
    base = bases("gpt2")
    with pytest.raises(CheckpointError, match=r"c_attn: PEFT's DoRA has magnitudes of the whole"):
        to_peft(random_adapter(base, ["layers.0.attn.q"], dora=True), base.config)


# --- refused --------------------------------------------------------------------------------------


def set_key(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        raw = json.loads((folder / CONFIG).read_text()) | {key: value}
        (folder / CONFIG).write_text(json.dumps(raw))

    return change


def rename(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        stored = load_file(folder / WEIGHTS)
        save_file({k.replace(old, new): v for k, v in stored.items()}, folder / WEIGHTS)

    return change


def only_pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no targets": (set_key("target_modules", None), r"adapter_config\.json: no target_modules"),
    "other targets": (
        set_key("target_modules", ["v_proj"]),
        "do not name model.layers.0.self_attn",
    ),
    "all-linear": (set_key("peft_type", "IA3"), r"peft_type = 'IA3'.*merge it"),
    "pissa": (set_key("init_lora_weights", "pissa"), "path_initial_model_for_weight_conversion"),
    "qalora": (set_key("use_qalora", True), "use_qalora"),
    "rank": (set_key("r", 5), r"shape \(4, 32\).*r, rank_pattern"),
    "no rank": (set_key("r", 0), "r is 0"),
    "magnitudes": (set_key("use_dora", True), "A, B of A, B, magnitude"),
    "groups": (set_key("alpha_pattern", {"(a+)+": 2}), "pattern that is not read"),
    "bad pattern": (set_key("rank_pattern", {"[": 2}), "rank_pattern"),
    "prefix": (rename("base_model.model.", ""), "does not begin with base_model.model."),
    "module": (rename("q_proj", "z_proj"), "z_proj is no linear layer"),
    "norm": (rename("self_attn.q_proj.lora_A", "input_layernorm.lora_A"), "no linear layer"),
    "stray": (rename("q_proj.lora_B.weight", "q_proj.lora_C.weight"), "no such parameter"),
    "pickle": (only_pickled, r"adapter_model\.bin does, and pickled weights are not loaded"),
    "damage": (cut_short, "is damaged"),
}


@pytest.fixture(scope="module")
def sound(bases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sound")
    base = bases("llama2")
    write(folder, random_adapter(base, ["layers.0.attn.q"]), base.config)
    return folder


@pytest.mark.parametrize("what", REFUSED)
def test_folders_that_are_refused(what: str, sound: Path, bases: Any, tmp_path: Path) -> None:
    change, message = REFUSED[what]
    folder = tmp_path / "a"
    shutil.copytree(sound, folder)
    read(folder, bases("llama2").config)
    change(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        read(folder, bases("llama2").config)
    assert str(folder) in str(error.value)


def test_another_base_is_refused(sound: Path, bases: Any) -> None:
    with pytest.raises(CheckpointError, match="another base model's"):
        read(sound, bases("gpt2").config)
    config = bases("llama2").config
    with pytest.raises(CheckpointError, match="another base model's"):
        read(sound, config.model_copy(update={"hidden_size": 64}))


def test_a_tied_end_cannot_be_updated(bases: Any, tmp_path: Path) -> None:
    base = bases("llama2")
    write(tmp_path, random_adapter(base, ["head"]), base.config)
    tied = base.config.model_copy(update={"tie_embeddings": True})
    with pytest.raises(CheckpointError, match=r"lm_head is no linear|shares its weight"):
        read(tmp_path, tied)
    assert ours.PREFIX.endswith(".")
