"""A running server over a tiny model, and clients for it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from shardwise.adapters.peft import PeftAdapter, Update
from shardwise.adapters.peft_write import write
from shardwise.data.tokenizer import ByteTokenizer
from shardwise.models import registry
from shardwise.models.common.init import init_weights
from shardwise.serve.api import open_service
from shardwise.serve.asks import Limits
from shardwise.serve.http import Api
from shardwise.serve.listen import bind, server
from shardwise.serve.log import LogWriter
from shardwise.serve.service import Service
from tests.rollout.oracle import Oracle
from tests.support import toy

CONFIG = toy.llama(vocab_size=ByteTokenizer().vocab_size, max_seq_len=256)
LIMITS = Limits(
    body_bytes=4096, prompt_tokens=200, completion_tokens=64, per_minute=100_000, choices=4
)


def write_model(folder: Path) -> Path:
    """A Hugging Face folder of an untrained model over bytes."""
    model = registry.build(CONFIG)
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Layers that outweigh the embedding: a tied head would else repeat its input.
            noise = 0.02 if "embed" in name else 0.3
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=noise)
    registry.to_hf(folder, CONFIG, model.named_parameters())
    ByteTokenizer().save(folder)
    return folder


def write_adapter(folder: Path, seed: int = 0) -> Path:
    """An adapter of PEFT's over that model, which changes what it says."""
    g = torch.Generator().manual_seed(seed)
    made = Update(torch.randn(2, 32, generator=g), torch.randn(32, 2, generator=g), 8.0)
    write(folder, PeftAdapter({"layers.0.attn.q": made}, rslora=False), CONFIG)
    return folder


class SlowOracle(Oracle):
    """One that takes its time over a step, so that others can come and go in between."""

    pause = 0.0

    def step(self):  # type: ignore[no-untyped-def]
        time.sleep(self.pause)
        return super().step()


@dataclasses.dataclass
class Running:
    """A server that listens."""

    service: Service
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def engine(self, name: str = "base") -> SlowOracle:
        return self.service.worker._engines[name]  # type: ignore[return-value]


@contextlib.contextmanager
def running(
    ckpt: Path,
    *,
    adapters: Mapping[str, Path] | None = None,
    log: Path | None = None,
    limits: Limits = LIMITS,
    tokens: tuple[str, ...] = (),
    admin: tuple[str, ...] = (),
    rotate_bytes: int = 64 << 20,
) -> Iterator[Running]:
    """A server, until the block ends."""
    writer = None if log is None else LogWriter(log, rotate_bytes)
    service = open_service(
        ckpt, "base", adapters or {}, limits, writer,
        lambda _, config, tokenizer: SlowOracle(config, decode_text=tokenizer.decode),
    )  # fmt: skip
    with bind("127.0.0.1", 0) as socket:
        made = server(Api(service, tokens, admin).app(0.02), limits)
        thread = threading.Thread(target=made.run, args=([socket],), daemon=True)
        thread.start()
        while not made.started:
            assert thread.is_alive()
            time.sleep(0.005)
        try:
            yield Running(service, socket.getsockname()[1])
        finally:
            made.should_exit = True
            thread.join(20)
            service.close()
            assert not thread.is_alive()


def until(condition, seconds: float = 10.0) -> None:  # type: ignore[no-untyped-def]
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)
