"""Commands that read what a run or `data prepare` wrote. One tiny run serves them all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shardwise.launch.train import train
from tests.cli.conftest import Command, write_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two ranks."""
    folder = tmp_path_factory.mktemp("tiny")
    summary = train(write_recipe(folder), (), nproc=2)
    assert summary["stages"][0]["steps"] == 2
    return folder / "run"


@pytest.fixture
def ckpt(run: Path) -> Path:
    return run / "stages" / "pretrain" / "checkpoints" / "step_00000002"


def test_run_folder(run: Path) -> None:
    for name in ("config.yaml", "provenance.json", "metrics.jsonl", "summary.json", "report.html"):
        assert (run / name).stat().st_size > 0, name
    source = json.loads((run / "provenance.json").read_text())["stages.0.steps"]["source"]
    assert source.endswith("tiny.yaml:14")
    assert (run / "logs" / "rank_1.log").exists()


def test_inspect(shardwise: Command, ckpt: Path) -> None:
    code, out, _ = shardwise("checkpoint", "inspect", ckpt, "--json", "-")
    found = json.loads(out)
    assert code == 0 and found["step"] == 2
    assert any(t["name"].startswith("model.") for t in found["tensors"])
    code, out, _ = shardwise("checkpoint", "inspect", ckpt.parent)
    assert code == 0 and "step 2" in out


def test_verify_finds_a_flipped_bit(shardwise: Command, ckpt: Path, tmp_path: Path) -> None:
    code, out, _ = shardwise("checkpoint", "verify", ckpt)
    assert code == 0 and "sound" in out
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in ckpt.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    shard = max(broken.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    code, out, err = shardwise("checkpoint", "verify", broken, "--json", "-")
    assert code == 1 and shard.name in err and "Traceback" not in err
    assert json.loads(out)["sound"] is False
    assert shardwise("checkpoint", "diff", ckpt, ckpt)[0] == 0


def test_a_missing_checkpoint_is_bad_usage(shardwise: Command, ckpt: Path, tmp_path: Path) -> None:
    for args in (["inspect"], ["verify"], ["diff", ckpt]):
        for path, message in (("nothing", "no such file or folder"), ("", "no checkpoint here")):
            code, _, err = shardwise("checkpoint", *args, tmp_path / path)
            assert code == 2 and message in err, err
    for path in ("nothing", ""):
        assert shardwise("evaluate", tmp_path / path)[0] == 2
        assert shardwise("generate", tmp_path / path, "-p", "a")[0] == 2
    (tmp_path / "step_00000001").mkdir()  # by its name a checkpoint: a damaged one
    assert shardwise("checkpoint", "verify", tmp_path / "step_00000001")[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", [["train"], ["launch", "local"]])
def test_json_on_stdout_is_alone(shardwise: Command, run: Path, command: list[str]) -> None:
    recipe = run.parent / "tiny.yaml"
    code, out, err = shardwise(*command, recipe, "--nproc", 2, "--json", "-")
    assert code == 0 and json.loads(out)["name"] == "tiny", err
    assert "report: " in err  # what a rank prints goes there


def test_report(shardwise: Command, run: Path, tmp_path: Path) -> None:
    code, out, _ = shardwise("report", run, "--out", tmp_path / "r.html")
    assert code == 0 and out.strip() == str(tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size > 1000
    assert shardwise("report", tmp_path)[0] == 2
    code, out, _ = shardwise("report", run, "--live")  # it has ended: no waiting
    assert code == 0 and out.strip() == str(run / "report.html")


def test_runs_are_compared(shardwise: Command, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    page = tmp_path / "both.html"
    code, out, err = shardwise("report", run, other, "--out", page, "--json", "-")
    assert code == 0, err
    found = json.loads(out)
    assert found["report"] == str(page) and page.exists() and found["differences"] == {}
    assert len(found["runs"]) == 2 and found["figures"]
    code, _, err = shardwise("report", run, other, run, "--out", page)
    assert code == 2 and "named twice" in err


def test_what_breaks_is_told_whatever_its_message_is(
    shardwise: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OddError(Exception):
        message = property(lambda self: "cannot be set")

    def broken(*_: object) -> None:
        raise OddError("what really happened")

    monkeypatch.setattr("shardwise.report.api.report", broken)
    code, _, err = shardwise("report", run)
    assert code == 70 and "what really happened" in err


def test_convert_there_and_back(shardwise: Command, ckpt: Path, tmp_path: Path) -> None:
    code, out, err = shardwise("convert", ckpt, tmp_path / "hf", "--to", "hf")
    assert code == 0, err
    names = {p.name for p in (tmp_path / "hf").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    code, _, err = shardwise("convert", tmp_path / "hf", tmp_path / "native", "--to", "native")
    assert code == 0, err
    code, out, _ = shardwise("checkpoint", "diff", ckpt, tmp_path / "native", "--json", "-")
    found = json.loads(out)
    assert code == 1  # the optimizer is gone; no weight has changed
    assert all(name.startswith("optim.") for name in found["only_a"])
    assert found["only_b"] == [] and found["values"] == [] and found["dtypes"] == {}
    code, _, err = shardwise("convert", tmp_path / "native", tmp_path / "again", "--dtype", "bf16")
    assert code == 0, err


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--to", "onnx"], "allowed: hf, native"),
        (["--dtype", "int3"], "allowed: fp32, bf16, fp16"),
        (["--to", "native", "--dtype", "bf16"], "fp32 weights"),
    ],
)
def test_convert_refuses(
    shardwise: Command, ckpt: Path, tmp_path: Path, args: list[str], part: str
) -> None:
    code, _, err = shardwise("convert", ckpt, tmp_path / "out", *args)
    assert code == 2 and part in err and not (tmp_path / "out").exists()
    code, _, err = shardwise("convert", tmp_path / "nothing", tmp_path / "out")
    assert code == 2 and "does not exist" in err
    assert shardwise("convert", ckpt, tmp_path / ".." / tmp_path.name / "..")[0] == 2  # not empty


def test_data_prepare_and_inspect(shardwise: Command, tmp_path: Path) -> None:
    rows = [json.dumps({"body": f"document number {i}"}) for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    store = tmp_path / "store"
    code, out, err = shardwise(
        "data", "prepare", tmp_path / "rows.jsonl", "--out", store, "--field", "body",
        "--json", "-",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["num_documents"] == 5
    code, out, _ = shardwise("data", "inspect", store)
    assert code == 0 and "5 documents" in out and "document number 0" in out
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    code, _, err = shardwise("data", "prepare", tmp_path / "bad.jsonl", "-o", tmp_path / "b")
    assert code == 2 and "bad.jsonl" in err and "line 2" in err
    assert not (tmp_path / "b.bin").exists()


def test_data_prepare_trains_a_tokenizer(shardwise: Command, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 50)
    code, out, err = shardwise(
        "data", "prepare", tmp_path / "a.txt", "-o", tmp_path / "s", "--bpe", 300
    )
    assert code == 0, err
    assert "1 documents" in out
    code, _, err = shardwise(
        "data", "prepare", tmp_path / "a.txt", "-o", tmp_path / "s", "--bpe", 300,
        "--tokenizer", "x",
    )  # fmt: skip
    assert code == 2 and "choose" in err


def test_generate(shardwise: Command, ckpt: Path) -> None:
    args = ["generate", ckpt, "-p", "the quick", "--raw", "--max-new-tokens", 3, "--json", "-"]
    code, out, err = shardwise(*args, "--temperature", 1, "--samples", 2, "-p", "fox")
    assert code == 0, err
    found = json.loads(out)
    assert [row["prompt"] for row in found] == ["the quick", "fox"]
    assert [len(row["completions"]) for row in found] == [2, 2]
    assert shardwise(*args, "--temperature", 1, "--samples", 2, "-p", "fox")[1] == out
    assert shardwise(*args, "--precision", "fp8")[0] == 2
    assert shardwise("generate", ckpt.parents[4], "-p", "a")[0] == 2


def test_evaluate_needs_evaluations(shardwise: Command, ckpt: Path) -> None:
    code, _, err = shardwise("evaluate", ckpt)
    assert code == 2 and "no evaluations" in err


def test_data_inspect_knows_the_byte_tokenizer(shardwise: Command, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    assert shardwise("data", "prepare", tmp_path / "a.txt", "-o", tmp_path / "s")[0] == 0
    code, out, err = shardwise("data", "inspect", tmp_path / "s", "--tokenizer", "bytes")
    assert code == 0 and "some text" in out, err


def test_data_prepare_refuses_what_it_would_misread(shardwise: Command, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.JSONL").write_text('{"text": "one"}\n{"text": "two"}\n')
    prepare = ["data", "prepare", folder, "-o", tmp_path / "s"]
    code, out, err = shardwise(*prepare)
    assert code == 0 and "2 documents" in out, err
    (folder / "notes.txt").write_text("three")
    code, _, err = shardwise(*prepare)
    assert code == 2 and "(.jsonl, .txt); say which to read with --kind" in err
    code, out, err = shardwise(*prepare, "--kind", "jsonl")
    assert code == 0 and "2 documents" in out, err
    code, _, err = shardwise(*prepare, "--kind", "jsonl", "--bpe", 5)
    assert code == 2 and "--bpe 5: bytes and control tokens alone need 260" in err
    (tmp_path / "corpus.bin").write_text("mine")
    code, _, err = shardwise("data", "prepare", tmp_path / "corpus.bin", "-o", tmp_path / "corpus")
    assert code == 2 and "would be written over" in err
    assert (tmp_path / "corpus.bin").read_text() == "mine"
