"""Every command and code block of the site, the README and CONTRIBUTING does what is said of it."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shardwise import checkpoint
from shardwise.checkpoint.convert import convert
from tests.docs.pages import ROOT, SMALL, Page, blocks, marks, train
from tests.support.pool import RankPool

PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = [page for page in PAGES if "_build" not in page.parts]


def named(page: Path) -> str:
    """For the report of a test."""
    return str(page.relative_to(ROOT))


RECIPE = """\
model: {family: llama, hidden_size: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, ffn_size: 64}
engine: {compile: false}
stages:
  - kind: pretrain
    steps: 4
    batch: {global_batch: 4, micro_batch: 2, seq_len: 32}
    data: {sources: [{kind: text, path: corpus/*.txt}]}
"""


@pytest.fixture(scope="session")
def prepared(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pages are given: a small quickstart run, its model, and files of data."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "corpus").mkdir()
    for name in [*(f"{i}.txt" for i in range(12)), "held_out.text"]:
        (folder / "corpus" / name).write_text(f"{name}: the quick brown fox jumps. " * 40)
    recipe = str(ROOT / "configs" / "quickstart.yaml")
    (folder / "recipe.yaml").write_text(RECIPE)
    with contextlib.chdir(folder):
        ranks.run(train, recipe, SMALL, world=1)
    last = folder / "runs" / "quickstart" / "stages" / "grpo" / "checkpoints"
    convert(checkpoint.resolve(last), folder / "model", "hf")
    return folder


@pytest.fixture
def given(prepared: Path) -> Callable[[str, Path], None]:
    """Puts a thing of `prepared`, or a file of the project, into a page's folder."""

    def put(name: str, folder: Path) -> None:
        source = prepared / name if (prepared / name).exists() else ROOT / name
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy(source, target)

    return put


def run_page(page: Path, folder: Path, ranks: RankPool, request: pytest.FixtureRequest) -> int:
    """Run a page's blocks, without ``slow`` only those before the first slow one."""
    runner = Page(folder, ranks, request)
    slow = request.node.get_closest_marker("slow") is not None
    found = blocks(page, runner.evaluate)
    for number, example in enumerate(found):
        if not slow and "slow" in marks(example.document.text[: example.start]):
            return number
        try:
            example.evaluate()
        except BaseException as error:
            error.add_note(f"{page.relative_to(ROOT)}:{example.line}")
            raise
    return len(found)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_page_does_what_it_says(
    page: Path, tmp_path: Path, ranks: RankPool, request: pytest.FixtureRequest,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run_page(page, tmp_path, ranks, request)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if "<!-- slow -->" in p.read_text()], ids=named)
def test_a_slow_page_does_what_it_says(
    page: Path, tmp_path: Path, ranks: RankPool, request: pytest.FixtureRequest,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run_page(page, tmp_path, ranks, request)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target
