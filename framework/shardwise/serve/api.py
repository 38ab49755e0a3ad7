"""`shardwise.serve`: a model, and adapters over it, for OpenAI's clients."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from shardwise import terminal
from shardwise.checkpoint.convert import OpenModel, open_model
from shardwise.data.tokenizer import Tokenizer, load_tokenizer
from shardwise.errors import UserError
from shardwise.launch.together import check_world, is_rank, start
from shardwise.models import travel
from shardwise.models.common.config import DecoderConfig
from shardwise.rollout.engine import RolloutEngine
from shardwise.rollout.generator import Generator
from shardwise.serve.asks import Limits
from shardwise.serve.clients import ADMIN_TOKEN, TOKEN, is_loopback, read_tokens
from shardwise.serve.crew import Crew
from shardwise.serve.log import LogWriter
from shardwise.serve.served import Served, check_names
from shardwise.serve.service import Service
from shardwise.serve.worker import Worker

EngineBuilder = Callable[[str, DecoderConfig, Tokenizer], RolloutEngine]  # the name first
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def serve(
    ckpt: Path | str,
    *,
    name: str = "base",
    adapters: Mapping[str, Path | str] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    log: Path | str | None = None,
    token_file: Path | str | None = None,
    admin_token_file: Path | str | None = None,
    limits: Limits | None = None,
    watch_every: float = 1.0,
    rotate_bytes: int = 64 << 20,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    tp: int = 1,
) -> None:
    """Serve a model until a signal ends it.

    ``name``: of the model without an adapter. ``adapters``, by name: folders of PEFT's, or those
    that `shardwise.learn` fills, whose pointer is followed. ``log``: where to keep what is asked,
    answered and rated; None: nothing is kept. Tokens come from the files, or from the environment
    variables `clients.TOKEN` and `clients.ADMIN_TOKEN`; an address that others can reach needs one.
    ``tp``: ranks that share each engine, every one with some heads of the model and of the cache;
    they are started here, or by torchrun, and the first of them listens.
    Raises UserError, also for a port in use.
    """
    if tp > 1 and not is_rank():
        start(f"{__name__}:serve_rank", _as_json(locals()), tp)
        return
    if is_rank():
        check_world(tp)
    limits = limits or Limits()
    for library in ("starlette", "uvicorn"):
        if importlib.util.find_spec(library) is None:
            raise UserError(f"{library} is not installed: pip install 'shardwise[serve]'")
    from shardwise.serve.http import Api
    from shardwise.serve.listen import bind, server

    tokens = read_tokens(_path(token_file), TOKEN)
    admin_tokens = read_tokens(_path(admin_token_file), ADMIN_TOKEN)
    if not tokens and not is_loopback(host):
        raise UserError(
            f"--host {host}: others can reach this address, so clients need a token: give "
            f"--token-file FILE, or set {TOKEN}"
        )
    if set(tokens) & set(admin_tokens):
        raise UserError("the admin's token is a client's, too; give the admin one of its own")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    crew: list[Crew] = []

    def build(own: str, config: DecoderConfig, tokenizer: Tokenizer) -> RolloutEngine:
        if tp > 1 and not crew:
            crew.append(Crew(config, tp, device))
        slots, mesh = limits.in_flight, crew[0].mesh if crew else None
        dtype, decode = _DTYPES[precision], tokenizer.decode
        engine = Generator(config, dtype, device, slots, decode_text=decode, mesh=mesh)
        return crew[0].add(own, engine) if crew else engine

    if int(os.environ.get("RANK", "0")) > 0:
        open_engines(ckpt, [name, *check_names(adapters or {}, name)], build)
        crew[0].follow()
        return
    with bind(host, port) as socket:
        writer = None if log is None else LogWriter(Path(log), rotate_bytes)
        service = open_service(ckpt, name, adapters or {}, limits, writer, build)
        try:
            at = f"[{host}]" if ":" in host else host
            kept = f"kept in {log}" if log else "not kept"
            terminal.say(
                f"http://{at}:{socket.getsockname()[1]}/v1 serves {', '.join(service.models)}; "
                f"what is asked and answered is {kept}"
            )
            server(Api(service, tokens, admin_tokens).app(watch_every), limits).run([socket])
        finally:
            service.close()
            for ranks in crew:
                ranks.end()


def serve_rank(said: dict[str, Any], _: str) -> None:
    """One of the ranks that `serve` starts, with what it was given."""
    serve(**said | {"limits": Limits(**said["limits"])})


def _as_json(said: dict[str, Any]) -> dict[str, Any]:
    paths = ("ckpt", "log", "token_file", "admin_token_file")
    files = {k: str(said[k]) for k in paths if said[k] is not None}
    adapters = {n: str(p) for n, p in (said["adapters"] or {}).items()}
    limits = dataclasses.asdict(said["limits"] or Limits())
    return {**said, **files, "adapters": adapters, "limits": limits}


def open_service(
    ckpt: Path | str,
    name: str,
    adapters: Mapping[str, Path | str],
    limits: Limits,
    writer: LogWriter | None,
    build: EngineBuilder,
) -> Service:
    """Load a model and start its engines, one for it and for each adapter."""
    folders: dict[str, Path | None] = {name: None}
    folders |= check_names(adapters, name)
    model, config, tokenizer, engines = open_engines(ckpt, folders, build)
    base = dict(model.tensors)
    served = {own: Served(own, config, base, folder) for own, folder in folders.items()}
    for own, one in served.items():
        one.version = one.wanted()
        engines[own].update_weights(one.weights(one.version), hf_names=False)
    return Service(Worker(engines), served, tokenizer, config.max_seq_len, limits, writer)


def open_engines(
    ckpt: Path | str, names: Iterable[str], build: EngineBuilder
) -> tuple[OpenModel, DecoderConfig, Tokenizer, dict[str, RolloutEngine]]:
    """A model, its config and tokenizer, and by name engines for it that have no weights yet."""
    model = open_model(ckpt)
    if model.beside is not None:
        raise UserError(f"{ckpt}: holds an adapter that cannot be merged; serve one that can be")
    if not model.has_tokenizer:
        raise UserError(f"{ckpt}: comes without a tokenizer; put tokenizer.json beside the weights")
    with tempfile.TemporaryDirectory() as folder:
        travel.write(Path(folder), model.files)
        tokenizer = load_tokenizer(folder)
    config = model.config
    assert isinstance(config, DecoderConfig)
    if config.vocab_size == 0:  # a recipe's "the tokenizer's size"
        config = config.model_copy(update={"vocab_size": tokenizer.vocab_size})
    return model, config, tokenizer, {own: build(own, config, tokenizer) for own in names}


def _path(given: Path | str | None) -> Path | None:
    return None if given is None else Path(given)
