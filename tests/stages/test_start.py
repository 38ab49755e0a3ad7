"""A recipe that says nothing of its model but where it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import constants

from shardwise import hub
from shardwise.checkpoint.convert import open_model
from shardwise.verify.run import verify
from tests.models.test_gguf import _write as write_gguf
from tests.models.test_travel import write_folder
from tests.stages.recipes import recipe, run, run_and_die, weights
from tests.stages.test_adapters import refused
from tests.support.hub import HubCache
from tests.support.pool import RankPool


def ten_lines(folder: Path, start: Path | str, kind: str = "sft") -> dict[str, Any]:
    config = recipe(folder, kind, init_from=str(start))
    del config["model"]
    return config


def test_it_trains_what_the_whole_recipe_trains(ranks: RankPool, tmp_path: Path) -> None:
    write_folder(start := tmp_path / "hf")
    said = {
        "init_from": str(start),
        "model": open_model(start).config.model_dump(mode="json"),
        "tokenizer": {"kind": "file", "path": str(start / "tokenizer.json")},
    }
    ranks.run(run, recipe(tmp_path / "whole", "sft") | said, world=2)
    ranks.run(run, ten_lines(tmp_path / "short", start), world=2)
    one, two = weights(tmp_path / "whole", "sft"), weights(tmp_path / "short", "sft")
    assert one.keys() == two.keys() and all(one[n].equal(two[n]) for n in one)
    # And on, from what was trained.
    ranks.run(run, ten_lines(tmp_path / "on", tmp_path / "short/stages/sft/checkpoints"), world=1)


def test_it_starts_from_a_gguf_file(ranks: RankPool, tmp_path: Path) -> None:
    write_gguf(start := tmp_path / "m.gguf", "Q8_0")
    config = ten_lines(tmp_path / "run", start, "pretrain")
    config["stages"][0] |= {"steps": 1, "optimizer": {"lr": 1e-12}}
    ranks.run(run, config, world=2)
    found = weights(tmp_path / "run", "pretrain")
    for name, value in open_model(start).tensors:
        assert found[f"model.{name}"].sub(value).abs().max() < 1e-8


def test_verify_and_overrides(tmp_path: Path) -> None:
    write_folder(start := tmp_path / "hf")
    config = ten_lines(tmp_path / "run", start) | {"model": {"max_seq_len": 96}}
    report = verify(config, ["tp2"], whole=False)
    assert report.passed


def at_hub(cache: Path, config: dict[str, Any], what: Any) -> Any:
    """In a rank: what a cache of the hub says now."""
    constants.HF_HUB_CACHE = str(cache)
    hub._snapshot.cache_clear()
    return what(config)


def dies(config: dict[str, Any]) -> None:
    run_and_die(config, "sft", 2)


def test_another_commit_of_the_hub_is_another_start(
    ranks: RankPool, tmp_path: Path, hub_cache: HubCache
) -> None:
    write_folder(start := tmp_path / "hf")
    old = hub_cache.add("org/name", start)
    config = ten_lines(tmp_path / "run", "hf:org/name")
    ranks.run(at_hub, hub_cache.folder, config, dies, world=1)
    (start / "generation_config.json").write_text('{"eos_token_id": [257, 258], "top_k": 3}')
    new = hub_cache.add("org/name", start)
    assert old != new
    [(code, words)] = ranks.run(at_hub, hub_cache.folder, config, refused, world=1)
    assert code == 2
    assert f"(now hf:org/name@{new}; write init_from: hf:org/name@{old})" in words
    pinned = config | {"init_from": f"hf:org/name@{old}"}
    ranks.run(at_hub, hub_cache.folder, pinned, run, world=1)
