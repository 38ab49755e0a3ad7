"""`shardwise.serve`: a model, and adapters over it, for OpenAI's clients."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch

from shardwise import terminal
from shardwise.checkpoint.convert import open_model
from shardwise.data.tokenizer import Tokenizer, load_tokenizer
from shardwise.errors import UserError
from shardwise.models import travel
from shardwise.models.common.config import DecoderConfig
from shardwise.rollout.engine import RolloutEngine
from shardwise.rollout.generator import Generator
from shardwise.serve.asks import Limits
from shardwise.serve.clients import ADMIN_TOKEN, TOKEN, is_loopback, read_tokens
from shardwise.serve.log import LogWriter
from shardwise.serve.served import Served, check_names
from shardwise.serve.service import Service
from shardwise.serve.worker import Worker

EngineBuilder = Callable[[DecoderConfig, Tokenizer], RolloutEngine]
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
) -> None:
    """Serve a model until a signal ends it.

    ``name``: of the model without an adapter. ``adapters``, by name: folders of PEFT's, or those
    that `shardwise.learn` fills, whose pointer is followed. ``log``: where to keep what is asked,
    answered and rated; None: nothing is kept. Tokens come from the files, or from the environment
    variables `clients.TOKEN` and `clients.ADMIN_TOKEN`; an address that others can reach needs one.
    Raises UserError, also for a port in use.
    """
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
    with bind(host, port) as socket:
        writer = None if log is None else LogWriter(Path(log), rotate_bytes)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"

        def build(config: DecoderConfig, tokenizer: Tokenizer) -> RolloutEngine:
            return Generator(
                config, _DTYPES[precision], device, limits.in_flight, decode_text=tokenizer.decode
            )

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
    base = dict(model.tensors)
    served = {own: Served(own, config, base, folder) for own, folder in folders.items()}
    engines = {own: build(config, tokenizer) for own in served}
    for own, one in served.items():
        one.version = one.wanted()
        engines[own].update_weights(one.weights(one.version), hf_names=False)
    return Service(Worker(engines), served, tokenizer, config.max_seq_len, limits, writer)


def _path(given: Path | str | None) -> Path | None:
    return None if given is None else Path(given)
