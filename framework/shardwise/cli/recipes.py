"""`shardwise init`."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from shardwise.cli.evaluate import named
from shardwise.cli.output import JsonOption, NoVerify, emit


class Stage(enum.StrEnum):
    """Stages that a recipe can be written for."""

    PRETRAIN = "pretrain"
    SFT = "sft"
    DPO = "dpo"
    REWARD = "reward"
    GRPO = "grpo"


class Adapter(enum.StrEnum):
    """What may be trained in place of all weights."""

    LORA = "lora"
    QLORA = "qlora"


def init(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face folder, a checkpoint, a GGUF file, or hf:org/name of the hub.",
        ),
    ],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="A file, folder or glob, or hf:org/name; its format is told."
        ),
    ],
    stage: Annotated[Stage, typer.Option(help="What the model is to learn by.")],
    adapter: Annotated[
        Adapter | None, typer.Option(help="Train this in place of all weights.")
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Processes; default: one for each GPU, or one."),
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="The ranks are GPUs of so much memory, not here."),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Data to measure on; default: a share of DATA."),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="OURS=THEIRS", help="A column of DATA by another name; may repeat."),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens of a row; default: by the data.")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(metavar="X", help="Times through the data; default: by stage.")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of grpo: a verifier, or path.py:name; default: answer."),
    ] = None,
    out: Annotated[str, typer.Option(metavar="FILE", help="Where to write.")] = "recipe.yaml",
    force: Annotated[bool, typer.Option("--force", help="Over a recipe that is there.")] = False,
    no_verify: NoVerify = False,
    json: JsonOption = None,
) -> None:
    """Write a recipe for a model and data that fits this machine, with a reason for each choice."""
    from shardwise.recipes.api import init as run

    done = run(
        model,
        data,
        stage=stage.value,
        adapter=adapter and adapter.value,
        ranks=ranks,
        gpu_memory=gpu_memory,
        held_out=held_out,
        columns=named(column or [], "--column"),
        seq_len=seq_len,
        epochs=epochs,
        reward=reward,
        out=out,
        force=force,
    )
    emit(done, "\n".join(done.lines()), json)
