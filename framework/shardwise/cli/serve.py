"""`shardwise serve` and `shardwise learn`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from shardwise.cli.evaluate import Adapters, Model, TensorParallel, named
from shardwise.cli.output import JsonOption, NoVerify, emit, json_alone
from shardwise.errors import ExitCode, UserError


def _limit(help_: str) -> Any:
    return typer.Option(min=1, help=help_, rich_help_panel="Limits")


def serve(
    ckpt: Model,
    adapter: Adapters = None,
    name: Annotated[str, typer.Option(help="Of the model without an adapter.")] = "base",
    host: Annotated[
        str, typer.Option(help="Where to listen; any but this machine's own needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    log: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep what is asked, answered and rated, redacted. Without it nothing is kept.",
        ),
    ] = None,
    rotate_mb: Annotated[
        int, typer.Option(min=1, help="Set the log's file aside when it is larger.")
    ] = 64,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Clients' tokens, one a line; default: $SHARDWISE_SERVE_TOKEN."
        ),
    ] = None,
    admin_token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Of who may swap weights by a call; default: $SHARDWISE_SERVE_ADMIN_TOKEN.",
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    tp: TensorParallel = 1,
    max_prompt_tokens: Annotated[int, _limit("Of a request.")] = 4096,
    max_completion_tokens: Annotated[int, _limit("Of a choice.")] = 1024,
    max_in_flight: Annotated[int, _limit("Requests that are answered at once.")] = 32,
    per_client: Annotated[int, _limit("Of those, from one client.")] = 8,
    per_minute: Annotated[int, _limit("Requests of a client.")] = 120,
    deadline: Annotated[int, _limit("Seconds of an answer, waiting included.")] = 120,
    no_verify: NoVerify = False,
) -> None:
    """Serve a model to OpenAI's clients, until a signal ends it."""
    if precision not in ("fp32", "bf16"):
        raise UserError(f"--precision {precision}: allowed: fp32, bf16")
    adapters = named(adapter or [])
    from shardwise.serve.api import serve as run
    from shardwise.serve.asks import Limits

    run(
        ckpt,
        name=name,
        adapters=adapters,
        host=host,
        port=port,
        log=log,
        token_file=token_file,
        admin_token_file=admin_token_file,
        precision=precision,  # type: ignore[arg-type]  # checked above
        rotate_bytes=rotate_mb << 20,
        tp=tp,
        limits=Limits(
            prompt_tokens=max_prompt_tokens,
            completion_tokens=max_completion_tokens,
            in_flight=max_in_flight,
            in_flight_per_client=per_client,
            per_minute=per_minute,
            deadline=float(deadline),
        ),
    )


def learn(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="What serve --log wrote.")],
    ckpt: Annotated[str, typer.Option(metavar="CKPT", help="The base model that is served.")],
    adapter: Annotated[
        Path,
        typer.Option(
            metavar="OUT", help="The adapter's folder: versions, and the pointer servers follow."
        ),
    ],
    method: Annotated[
        str, typer.Option(help="sft, dpo, kto, or several, in order: sft,dpo.")
    ] = "sft",
    epochs: Annotated[float, typer.Option(min=0.01, help="Over what is learned.")] = 4.0,
    batch: Annotated[int, typer.Option(min=2, help="Answers, or pairs, of a step.")] = 8,
    lr: Annotated[float, typer.Option(min=1e-9, help="Peak learning rate.")] = 1e-3,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter (LoRA).")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the adapter's start and the order.")] = 0,
    probe: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Held-out text of the forgetting probe; may repeat. Default: what the "
            "checkpoint's recipe measured.",
        ),
    ] = None,
    held_out: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Share of the prompts, never trained on.")
    ] = 0.25,
    min_lift: Annotated[
        float,
        typer.Option(
            min=-1.0, max=1.0, help="Of accuracy on held-out fed-back tasks; below 0: may fall."
        ),
    ] = 0.0,
    max_forgetting: Annotated[
        float, typer.Option(min=0.0, help="How much worse than the base's the probe may be.")
    ] = 0.01,
    per_client: Annotated[
        int, typer.Option(min=1, help="Votes of one client that count, its newest.")
    ] = 1000,
    max_chars: Annotated[int, typer.Option(min=1, help="Of a prompt with its answer.")] = 16_000,
    no_verify: NoVerify = False,
    json: JsonOption = None,
) -> None:
    """Train an adapter on a log's feedback, for servers to go over to; exit code 1 if refused."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    methods = tuple(method.split(","))
    if set(methods) - {"sft", "dpo", "kto"} or len(set(methods)) < len(methods):
        raise UserError(f"--method {method}: allowed: sft, dpo, kto, each once, with commas")
    from shardwise.serve.feedback import Filter
    from shardwise.serve.gate import Bounds
    from shardwise.serve.learn import Training
    from shardwise.serve.learn import learn as run

    with json_alone(json):
        found = run(
            log,
            ckpt,
            adapter,
            training=Training(methods, epochs, batch, lr, rank, seed),  # type: ignore[arg-type]
            rules=Filter(per_client, max_chars),
            bounds=Bounds(min_lift, max_forgetting),
            held_out=held_out,
            probe_texts=probe or (),
        )
    emit(found, _told(found), json)
    if not found["accepted"]:
        raise typer.Exit(ExitCode.FAILED)


def _told(found: dict[str, Any]) -> str:
    """What came of it, in lines."""
    if found["version"] is None:
        return "nothing in the log that is not learned yet"
    before, after = found["fed_back"]["before"], found["fed_back"]["after"]
    lines = [
        f"held-out fed-back tasks ({after['tasks']}): accuracy {before['accuracy']:.3f} -> "
        f"{after['accuracy']:.3f}, bits a token {before['bits']:.3f} -> {after['bits']:.3f}",
        *(f"forgetting: {name} worse by {by:+.4f}" for name, by in found["forgetting"].items()),
        *(f"dropped: {count} {why}" for why, count in found["dropped"].items()),
    ]
    if found["accepted"]:
        return "\n".join([*lines, f"served from now on: {found['folder']}"])
    return "\n".join([*lines, *found["reasons"], f"refused, kept in {found['folder']}"])
