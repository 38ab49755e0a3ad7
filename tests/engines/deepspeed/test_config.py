"""Keys of the deepspeed engine, and a user's own JSON beside them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from shardwise.config.load import load_config
from shardwise.engines.deepspeed import library, user_config
from shardwise.engines.deepspeed.config import DeepSpeedConfig
from shardwise.errors import ConfigError
from shardwise.parallel.layout import parse_layout
from shardwise.stages.run import preflight
from tests.engines.test_registry import recipe


def check(engine: dict[str, Any], world: int = 2, **stage: Any) -> None:
    loaded = load_config(recipe({"kind": "deepspeed", **engine}, **stage))
    preflight(loaded.config, world, loaded.provenance)


@pytest.mark.parametrize(
    "engine,message",
    [
        ({"layout": "tp2"}, "no tensor parallelism; drop tp2"),
        ({"layout": "pp2"}, "no pipeline parallelism; drop pp2"),
        ({"layout": "dp2.hsdp1"}, "shards over all data ranks; drop hsdp1"),
        ({"layout": "dp2.zero0", "precision": "bf16"}, "sums bf16 gradients in bf16"),
        ({"precision": "fp16"}, "trains in bf16 or fp32"),
        ({"layout": "dp2.zero0", "offload_optimizer": "cpu"}, "needs ZeRO"),
        ({"layout": "dp2.zero2", "offload_param": "cpu"}, "needs zero3"),
        ({"fp8": {}}, "has no FP8"),
    ],
)
def test_layouts_and_precisions_that_it_has_not_are_refused(
    engine: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(engine)


@pytest.mark.parametrize(
    "said,message",
    [
        ({"zero_optimization": {"stage": 3}}, r"stage \(.*ds.json:4\): 3, but engine.layout dp2"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping \(.*:3\): 0.5, but engine.max_grad_norm"),
        ({"bf16": {"enabled": True}}, "bf16.enabled .*but that of engine.precision fp32 is False"),
        ({"train_micro_batch_size_per_gpu": 3}, "3, but stages.pretrain.batch.micro_batch is 2"),
        ({"train_batch_size": 9}, "9, but stages.pretrain.batch.global_batch is 8"),
        ({"gradient_accumulation_steps": 3}, "3, but what stages.pretrain.batch comes to is 2"),
        ({"prescale_gradients": True}, "divided once; leave it out"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "engine.offload_optimizer: nvme needs zero3",
        ),
        ({"communication_data_type": "bf16"}, "reduced in fp32"),
        ({"fp16": {"enabled": True}}, "bf16 or fp32"),
        ({"scheduler": {"type": "WarmupLR"}}, "schedule says the learning rate"),
        ({"optimizer": {"type": "Lion"}}, "'Lion', but stages.pretrain.optimizer.kind is 'adamw'"),
        (
            {"optimizer": {"type": "Adam", "params": {"lr": 1.0}}},
            r"lr .*: 1.0, but stages.pretrain.optimizer.lr is 0.0003",
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
            "'Adam', but stages.pretrain.optimizer.kind is 'adamw'",
        ),
    ],
)
def test_what_contradicts_the_recipe_is_named_with_file_and_line(
    tmp_path: Path, said: dict[str, Any], message: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"steps_per_print": 5} | said, indent=1))
    batch = {"global_batch": 8, "micro_batch": 2}
    with pytest.raises(ConfigError, match=message) as error:
        check({"config": str(path)}, batch=batch)
    assert "stages.0, pretrain" in str(error.value)


def test_what_agrees_or_is_auto_is_no_contradiction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text")
    path = tmp_path / "ds.json"
    said = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "optimizer": {"type": "Adam", "params": {"lr": "auto", "betas": [0.9, 0.95]}},
        "scheduler": None,
        "zero_optimization": {"stage": 1, "overlap_comm": True},
    }
    path.write_text("\ufeff" + json.dumps(said, indent="\t"))
    check({"config": str(path)}, batch={"global_batch": 8, "micro_batch": 2})
    config = DeepSpeedConfig(kind="deepspeed", config=path)
    assert user_config.passed_on(config) == ["zero_optimization.overlap_comm"]
    merged = user_config.merged(
        config, {"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}}
    )
    assert merged["zero_optimization"] == {"stage": 1, "overlap_comm": True}
    assert merged["bf16"] == {"enabled": False} and "optimizer" not in merged


def test_the_file_is_part_of_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"steps_per_print": 7}')
    engine = load_config(recipe({"kind": "deepspeed", "config": str(path)})).config.engine
    path.unlink()
    again = DeepSpeedConfig.model_validate(engine.model_dump())
    assert user_config.content(again) == {"steps_per_print": 7}


@pytest.mark.parametrize(
    "content,message",
    [
        (b"{", "is not JSON"),
        (b"[1]", "is a list, not a JSON object"),
        (b"\xff", "cannot be read"),
        (b'{"a": ' + b" " * user_config.MAX_BYTES + b"1}", "bytes is no DeepSpeed config"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_no_config_is_named(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"ds.json: .*{message}"):
        check({"config": str(path)})


def test_old_releases_are_refused_by_number() -> None:
    assert "0.16.4 is older than 0.19.8" in str(library.untrusted("0.16.4"))
    assert library.untrusted("0.19.8") is None


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "version", lambda: None)
    with pytest.raises(ConfigError, match=r"pip install 'shardwise\[deepspeed\]'"):
        library.load.__wrapped__("cpu")


def test_layouts_that_it_has() -> None:
    config = DeepSpeedConfig(kind="deepspeed", precision="bf16")
    for text in ("dp4.zero1", "dp4.zero2", "dp4.zero3"):
        assert config.refusal(parse_layout(text, 4)) is None


def test_a_build_that_was_killed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "py311_cpu" / "async_io"
    folder.mkdir(parents=True)
    library.check_build("async_io")
    lock, part = folder / "lock", folder / "one.o"
    for file in (lock, part):
        file.touch()
        os.utime(file, (0, 0))
    with pytest.raises(ConfigError, match=r"async_io/lock: .* was killed; delete this file"):
        library.check_build("async_io")
    os.utime(part)  # somebody builds
    library.check_build("async_io")
