"""Commands that need no tensors import no torch, and little else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from shardwise import checkpoint
from tests.cli.conftest import write_recipe
from tests.models.test_travel import write_folder
from tests.report import synthetic

# One process calls them in this order, since imports only add up.
SCRIPT = """
import contextlib, io, json, os, sys
from shardwise.cli.main import main
for args, env in json.loads(sys.argv[1]):
    os.environ.update(env)
    sys.argv = ["shardwise", *args]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    for name in env:
        del os.environ[name]
    print(json.dumps([code, len(out.getvalue()), sorted(m for m in sys.modules if "." not in m)]))
"""
COMPUTING = {"torch", "safetensors", "tokenizers", "transformers", "plotly", "triton"}


def test_commands_without_tensors_import_no_torch(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path))
    write_folder(tmp_path / "hf")
    ten_lines = tmp_path / "ten_lines.yaml"
    ten_lines.write_text(f"init_from: {tmp_path}/hf\nstages: [{{kind: pretrain, steps: 1}}]\n")
    run = synthetic.write_run(tmp_path / "seen", summary_=synthetic.summary())
    saved = checkpoint.save(tmp_path / "checkpoints", 1, {"w": torch.zeros(2, 3)}, {})
    helped = ["", "train", "verify", "generate", "evaluate", "convert", "report", "schema", "data"]
    completed = {"_SHARDWISE_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    calls: list[tuple[list[str], dict[str, str], set[str]]] = [
        *(([*filter(None, [name]), "--help"], {}, {"numpy"}) for name in helped),
        ([], completed | {"COMP_WORDS": "shardwise ver"}, {"numpy"}),
        (
            [],
            completed | {"COMP_WORDS": f"shardwise train {recipe} en", "COMP_CWORD": "3"},
            {"numpy"},
        ),
        ([], {"_SHARDWISE_COMPLETE": "source_bash"}, {"numpy"}),
        (["config", "explain", "stages.sft"], {}, {"numpy"}),
        (["checkpoint", "inspect", str(saved)], {}, {"numpy"}),
        (["checkpoint", "inspect", str(saved.parent), "--json", "-"], {}, {"numpy"}),
        (["train", recipe, "--print-config"], {}, {"numpy"}),
        (["train", recipe, "stages.0.steps=3", "--print-config", "--json", "-"], {}, {"numpy"}),
        (["train", str(ten_lines), "--print-config"], {}, {"numpy"}),
        (["schema"], {}, {"numpy"}),
        (["config", "diff", recipe, recipe], {}, {"numpy"}),
        (["config", "diff", "dpo_paper", "dpo:trl_default"], {}, {"numpy"}),
        (["report", str(run)], {}, set()),
    ]
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([call[:2] for call in calls])],
        check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    assert len(told) == len(calls)
    for (args, env, unwanted), line in zip(calls, told, strict=True):
        code, length, modules = json.loads(line)
        assert code == 0 and length > 0, (args, env)
        assert (COMPUTING | unwanted) & set(modules) == set(), (args, env)
