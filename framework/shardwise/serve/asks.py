"""What clients ask, checked: bodies of requests, as OpenAI documents them.

A field that would change the answer and is not served here is refused, unless its value asks for
nothing; an unknown one is refused with the nearest name. So no answer is other than was asked for.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shardwise.config.explain import nearest
from shardwise.data.chat import encode_chat
from shardwise.data.tokenizer import Tokenizer
from shardwise.errors import DataError
from shardwise.ops import rng
from shardwise.rollout.config import Sampling
from shardwise.serve.errors import ApiError

MAX_STOPS, MAX_STOP_CHARS = 4, 256


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request, and one client, may take. Times in seconds, sizes in bytes or tokens."""

    body_bytes: int = 1 << 20
    header_bytes: int = 16 << 10
    prompt_tokens: int = 4096
    completion_tokens: int = 1024
    choices: int = 8  # n
    per_minute: int = 120  # requests of one client
    in_flight_per_client: int = 8
    in_flight: int = 32
    connections: int = 256
    deadline: float = 120.0  # of an answer, queueing included
    read_timeout: float = 10.0  # of a request's headers, and of its body
    send_timeout: float = 20.0  # of a piece that a client does not take


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Part(_Body):
    type: Literal["text"]
    text: str


class _Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def plain(self) -> dict[str, Any]:
        """For the template; parts are joined first, so that none hides half a control token."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Number = Annotated[float, Field(strict=False, allow_inf_nan=False)]


class _Common(_Body):
    model: str | None = None
    n: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(strict=False, ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(strict=False, gt=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: dict[str, bool] | None = None
    user: str | None = None  # says nothing here: clients are known by their token
    metadata: dict[str, Any] | None = None
    # Served by no engine here; their neutral values ask for nothing.
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    logit_bias: dict[str, Any] | None = None

    def neutral(self) -> dict[str, tuple[Any, ...]]:
        """Fields that are not served, and the values that ask for nothing."""
        return {
            "frequency_penalty": (None, 0.0),
            "presence_penalty": (None, 0.0),
            "logit_bias": (None, {}),
        }


class ChatBody(_Common):
    """Of ``/v1/chat/completions``."""

    messages: Annotated[list[_Message], Field(min_length=1, max_length=1024)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    store: bool | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None

    def neutral(self) -> dict[str, tuple[Any, ...]]:
        """See `_Common.neutral`."""
        return super().neutral() | {
            "top_logprobs": (None, 0),
            "response_format": (None, {"type": "text"}),
            "tools": (None, []),
            "tool_choice": (None, "none", "auto"),
        }


class CompletionBody(_Common):
    """Of ``/v1/completions``."""

    prompt: str | list[Any]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: int | None = None
    store: bool | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def neutral(self) -> dict[str, tuple[Any, ...]]:
        """See `_Common.neutral`."""
        none = {"logprobs": (None, 0), "echo": (None, False), "suffix": (None, "")}
        return super().neutral() | none | {"best_of": (None, self.n)}


class FeedbackBody(_Body):
    """Of ``/v1/feedback``: an answer by its id, and a rating or what should have stood there."""

    id: Annotated[str, Field(max_length=64)]
    choice: Annotated[int, Field(ge=0, le=1024)] = 0
    rating: Literal[1, -1] | None = None
    correction: str | None = None


class UpdateBody(_Body):
    """Of ``/admin/update_weights``. ``version``: one of the adapter's folder; None: its pointer."""

    model: str
    version: str | None = None


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request, ready for an engine. ``asked``: messages or a text, as the log has it."""

    chat: bool
    asked: list[dict[str, Any]] | str
    prompt_tokens: list[int]
    num_choices: int
    sampling: Sampling
    stops: tuple[str, ...]
    seed: int
    stream: bool
    usage_chunk: bool
    logprobs: bool
    store: bool

    @property
    def key(self) -> int:
        """Of its draws: the same seed and prompt give the same answer."""
        return rng.key(self.seed, "serve")


def checked(body: type[BaseModel], data: Any) -> Any:
    """``data`` as a body of that kind. Raises ApiError that names the field."""
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        found = body.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(p) for p in first["loc"] if not _is_branch(p)) or "body"
        if first["type"] == "extra_forbidden":
            hint = nearest(str(first["loc"][-1])[:64], list(body.model_fields)) or ""
            message = f"{place[:100]!r} is not a field that is served here{hint}"
        else:
            message = f"{place[:100]}: {first['msg']}"
        raise ApiError(400, message, param=place[:100]) from None
    if isinstance(found, ChatBody | CompletionBody):
        for name, nothing in found.neutral().items():
            if getattr(found, name) not in nothing:
                raise ApiError(
                    400,
                    f"{name} is not served here; leave it out",
                    param=name,
                    code="unsupported_parameter",
                )
    return found


def _is_branch(part: Any) -> bool:
    """Whether a part of pydantic's path names a type of a union, and no field."""
    return isinstance(part, str) and (part in ("str", "_Part") or "[" in part)


def read_ask(
    body: ChatBody | CompletionBody,
    tokenizer: Tokenizer,
    limits: Limits,
    max_seq_len: int,
    fallback_seed: int,
) -> Ask:
    """What a checked body asks for, in tokens. Raises ApiError."""
    if body.n > limits.choices:
        raise ApiError(400, f"n: at most {limits.choices}", param="n")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > MAX_STOPS or any(not 0 < len(s) <= MAX_STOP_CHARS for s in stops):
        message = f"stop: at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters"
        raise ApiError(400, message, param="stop")
    asked, tokens = _prompt(body, tokenizer)
    field = "messages" if isinstance(body, ChatBody) else "prompt"
    limit = min(limits.prompt_tokens, max_seq_len - 1)
    if len(tokens) > limit:
        raise ApiError(
            400,
            f"{field}: {len(tokens)} tokens; this server takes {limit}",
            param=field,
            code="context_length_exceeded",
        )
    wanted = body.max_tokens
    if isinstance(body, ChatBody):
        wanted = body.max_completion_tokens or wanted
    if wanted is not None and wanted > limits.completion_tokens:
        message = f"max_tokens: at most {limits.completion_tokens}"
        raise ApiError(400, message, param="max_tokens")
    temperature = 1.0 if body.temperature is None else body.temperature
    sampling = Sampling(
        temperature=max(temperature, 1e-6) if temperature else 1.0,
        greedy=temperature == 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        max_new_tokens=min(wanted or min(128, limits.completion_tokens), max_seq_len - len(tokens)),
        stop_strings=tuple(stops),
    ).stopping_at(tokenizer.stop_ids)
    return Ask(
        chat=isinstance(body, ChatBody),
        asked=asked,
        prompt_tokens=tokens,
        num_choices=body.n,
        sampling=sampling,
        stops=tuple(stops),
        seed=fallback_seed if body.seed is None else body.seed,
        stream=bool(body.stream),
        usage_chunk=bool((body.stream_options or {}).get("include_usage")),
        logprobs=body.logprobs is True if isinstance(body, ChatBody) else body.logprobs is not None,
        store=body.store is not False,
    )


def _prompt(
    body: ChatBody | CompletionBody, tokenizer: Tokenizer
) -> tuple[list[dict[str, Any]] | str, list[int]]:
    """As it is logged, and in tokens. What a client writes never becomes a control token."""
    if isinstance(body, ChatBody):
        messages = [m.plain() for m in body.messages]
        try:
            return messages, encode_chat(tokenizer, messages, add_generation_prompt=True)[0]
        except DataError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from None
    if not isinstance(body.prompt, str):
        raise ApiError(400, "prompt: one text; lists and token ids are not served", param="prompt")
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    try:
        return body.prompt, [start, *tokenizer.encode(body.prompt)]
    except DataError as error:
        raise ApiError(400, f"prompt: {error}", param="prompt") from None
