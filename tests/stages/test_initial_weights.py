"""A stage refuses to start from another model than its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shardwise.checkpoint.convert import convert
from shardwise.config.load import load_config
from shardwise.errors import ConfigError
from shardwise.launch.plan import plan_local
from shardwise.models import registry as models
from shardwise.stages.initial_weights import check_initial_weights
from tests.cli.conftest import write_recipe
from tests.support import toy

HAS = toy.llama(qk_norm=True)


@pytest.fixture(params=["hf", "native"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with the weights of `HAS`."""
    folder = tmp_path / "hf"
    folder.mkdir()
    weights = models.build(HAS).state_dict()
    models.to_hf(folder, HAS, ((n, t) for n, t in weights.items() if n != "head.weight"))
    if request.param == "native":
        convert(folder, tmp_path / "native", to="native")
    return tmp_path / request.param


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"qk_norm": False},
            "qk_norm: True there, False here",
        ),  # would not ask for all
        ({"num_heads": 2, "num_kv_heads": 1, "head_dim": 16}, "num_heads: 4 there, 2 here"),
        ({"rope_base": 5e5}, "rope_base: 10000.0 there, 500000.0 here"),  # in no weight's shape
    ],
)
def test_another_model_is_refused(source: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        check_initial_weights(
            source, toy.llama(**{"qk_norm": True} | change), "init_from (x.yaml:3)"
        )
    assert str(refused.value).startswith(f"init_from (x.yaml:3): {source} holds another model")


@pytest.mark.parametrize("change", [{}, {"max_seq_len": 64}, {"head_dim": 8}, {"vocab_size": 0}])
def test_what_the_recipe_decides_is_free(source: Path, change: dict[str, object]) -> None:
    model = HAS.model_copy(update=change)
    check_initial_weights(source, model)
    check_initial_weights(source, model.as_scalar())


def test_refused_before_anything_starts(source: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("name: tiny", f"init_from: {source}", 1))
    with pytest.raises(ConfigError, match=r"init_from \(.*tiny\.yaml:1\): .* holds another model"):
        plan_local(path, (), 2)
    assert not load_config(path).config.directory.exists()
