"""`shardwise evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shardwise.cli.output import JsonOption, NoVerify, emit, json_alone
from shardwise.errors import UserError

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A checkpoint, a Hugging Face folder, a GGUF file, or hf:org/name.",
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=PATH", help="A PEFT folder; each over the one base, by its name."),
]

TensorParallel = Annotated[
    int, typer.Option(min=1, help="Ranks that share the model, each with some of its heads.")
]


def _files(what: str) -> Any:
    return typer.Option(metavar="FILE", help=f"{what} May repeat.")


def evaluate(
    ckpt: Model,
    bits_per_byte: Annotated[list[Path] | None, _files("Measure how it predicts a text.")] = None,
    problems: Annotated[
        list[Path] | None, _files("Ask the problems of a file (jsonl: prompt, answer).")
    ] = None,
    multiple_choice: Annotated[
        list[Path] | None,
        _files("Score choices (jsonl: question, choices, answer: index or letter)."),
    ] = None,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(metavar="TASKS", help="Tasks of lm-eval, or a .yaml of your own; commas."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Choices and tasks by the model's chat template.")
    ] = False,
    prompt: Annotated[str, typer.Option(help="Of choices: what stands before one.")] = "{question}",
    column: Annotated[
        list[str] | None, typer.Option(metavar="OURS=THEIRS", help="A field of the file's.")
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Of texts: tokens of context.")] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of answers to problems.")] = 16,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Of tasks: examples before a question.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of tasks: questions of each.")] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="fp32|bf16", help="Default: the recipe's, else fp32.")
    ] = None,
    adapter: Adapters = None,
    tp: TensorParallel = 1,
    no_verify: NoVerify = False,
    json: JsonOption = None,
) -> None:
    """Measure a model; without options, what the recipe of its checkpoint measured."""
    if precision not in (None, "fp32", "bf16"):
        raise UserError(f"--precision {precision}: allowed: fp32, bf16")
    texts = "chat" if chat else "raw"
    columns = named(column or [], "--column")
    asked = [
        *(_bits(file, seq_len) for file in bits_per_byte or []),
        *(_problems(file, columns, max_new_tokens) for file in problems or []),
        *(
            {"kind": "multiple_choice", "path": f, "texts": texts, "prompt": prompt}
            | {"columns": columns}
            for f in multiple_choice or []
        ),
    ]
    if tasks := [task for said in lm_eval or [] for task in said.split(",") if task]:
        said = {"kind": "lm_eval", "tasks": tasks, "texts": texts}
        asked.append(said | {"num_fewshot": num_fewshot, "limit": limit})
    for i, one in enumerate(asked):  # two files of one kind go by numbers
        number = [other["kind"] for other in asked[:i]].count(one["kind"]) + 1
        one["name"] = one["kind"] if number == 1 else f"{one['kind']}_{number}"
    from shardwise.launch.evaluate import evaluate as run

    with json_alone(json):
        found = run(ckpt, named(adapter or []), asked, precision, tp)
    by_name = found if adapter else {"": found}
    text = "\n".join(
        f"{name} {key}: {value}".lstrip()
        for name, figures in by_name.items()
        for key, value in figures.items()
    )
    emit(found, text, json)


def _bits(file: Path, seq_len: int) -> dict[str, Any]:
    data = {"validation": [{"path": file}]}
    return {"kind": "bits_per_byte", "data": data, "seq_len": seq_len, "stride": seq_len // 2}


def _problems(file: Path, columns: dict[str, str], max_new_tokens: int) -> dict[str, Any]:
    task = {"kind": "file", "path": file, "columns": columns, "held_out": 1.0}
    return {"kind": "problems", "task": task, "max_new_tokens": max_new_tokens}


def named(said: list[str], option: str = "--adapter") -> dict[str, str]:
    """Values by name, of ``NAME=VALUE``."""
    found: dict[str, str] = {}
    for one in said:
        name, equals, value = one.partition("=")
        if not (name and equals and value) or name in found:
            what = "NAME=PATH" if option == "--adapter" else "OURS=THEIRS"
            raise UserError(f"{option} {one}: write {what}, each name once")
        found[name] = value
    return found
