"""From what an engine draws to the documents that OpenAI's clients read."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from shardwise.data.tokenizer import Tokenizer
from shardwise.serve.asks import Ask
from shardwise.serve.texts import TextStream
from shardwise.serve.worker import Piece


@dataclasses.dataclass
class Choice:
    """One of the ``n`` answers, as far as it has come.

    ``weights``: (first token, checksum) of those that drew; more than one after a swap.
    """

    stream: TextStream
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    told: int = 1  # of the stream's bounds: log-probabilities up to there are sent
    weights: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    ended: str = ""  # the engine's reason

    @property
    def finish_reason(self) -> str | None:
        """As OpenAI says it: "length" is also of an answer that a deadline cut."""
        if not self.ended:
            return None
        return "stop" if self.ended == "stop" or self.stream.stopped else "length"


class Answer:
    """The answer to one request: takes pieces in, gives documents out."""

    def __init__(
        self, ask: Ask, answer_id: str, model: str, created: int, tokenizer: Tokenizer
    ) -> None:
        self.ask, self.id, self.model, self.created = ask, answer_id, model, created
        self._tokenizer = tokenizer
        self.choices = [
            Choice(TextStream(tokenizer.decode, ask.stops)) for _ in range(ask.num_choices)
        ]

    def take(self, piece: Piece) -> str:
        """Note a piece; the text that it adds to its choice."""
        choice = self.choices[piece.choice]
        done = piece.completion
        if piece.token_ids and (not choice.weights or choice.weights[-1][1] != piece.weights):
            choice.weights.append((len(choice.token_ids), piece.weights))
        choice.token_ids += piece.token_ids
        choice.logprobs += piece.logprobs
        added = choice.stream.push(piece.token_ids, last=done is not None)
        choice.text += added
        if done is not None:
            choice.ended, choice.logprobs = done.finish_reason, list(done.logprobs)
            choice.token_ids = list(done.token_ids)
        return added

    @property
    def ended(self) -> bool:
        """Whether every choice has."""
        return all(choice.ended for choice in self.choices)

    @property
    def fingerprint(self) -> str | None:
        """The checksum of the weights that drew the newest token."""
        seen = [choice.weights[-1][1] for choice in self.choices if choice.weights]
        return seen[-1] if seen else None

    def document(self) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for i, choice in enumerate(self.choices):
            said: dict[str, Any] = {
                "index": i,
                "finish_reason": choice.finish_reason,
                "logprobs": self._logprobs(choice) if self.ask.logprobs else None,
                "weights": choice.weights,
            }
            if self.ask.chat:
                message = {"role": "assistant", "content": choice.text, "refusal": None}
                choices.append({**said, "message": message})
            else:
                choices.append({**said, "text": choice.text})
        kind = "chat.completion" if self.ask.chat else "text_completion"
        return {**self._frame(kind), "choices": choices, "usage": self.usage()}

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """What a stream of a chat begins with: each choice's role."""
        if self.ask.chat:
            for i in range(len(self.choices)):
                yield self._chunk(i, {"role": "assistant", "content": ""}, "")

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """`take` a piece, and give what it adds to the stream."""
        added, choice = self.take(piece), self.choices[piece.choice]
        if added:
            chunk = self._chunk(piece.choice, {"content": added}, added)
            if self.ask.logprobs:
                chunk["choices"][0]["logprobs"] = self._logprobs(choice, choice.told)
                choice.told = choice.stream.num_whole
            yield chunk
        if choice.ended:
            yield self._chunk(piece.choice, {}, "", last=True)

    def usage_chunk(self) -> dict[str, Any]:
        """What ends a stream whose client asked for it (``stream_options.include_usage``)."""
        return {**self._frame(self._kind), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens asked and answered."""
        prompt, drawn = len(self.ask.prompt_tokens), sum(len(c.token_ids) for c in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
        }

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.ask.chat else "text_completion"

    def _frame(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _chunk(
        self, index: int, delta: dict[str, Any], text: str, *, last: bool = False
    ) -> dict[str, Any]:
        """One event."""
        choice = self.choices[index]
        said: dict[str, Any] = {"index": index, "finish_reason": None, "logprobs": None}
        if last:
            said["finish_reason"], said["weights"] = choice.finish_reason, choice.weights
        said |= {"delta": delta} if self.ask.chat else {"text": text}
        return {**self._frame(self._kind), "choices": [said]}

    def _logprobs(self, choice: Choice, start: int = 1) -> dict[str, Any]:
        """Of the tokens whose text was sent whole, from a bound of the stream's on.

        Their bytes, put together, are that text: a character's, or a word's, are divided among its
        tokens; what the tokenizer divides otherwise stands at the first. Control tokens have none,
        and are left out.
        """
        stream, known = choice.stream, self._tokenizer.byte_lengths
        sizes = [int(known[i]) if i < len(known) else 0 for i in choice.token_ids]
        found: list[tuple[bytes, float, int]] = []
        bounds = stream.bounds[start - 1 : stream.num_whole]
        for (first, begin), (behind, end) in itertools.pairwise(bounds):
            data, at = choice.text[begin:end].encode(), 0
            told = [i for i in range(first, behind) if sizes[i]]
            lengths = [sizes[i] for i in told]
            if sum(lengths) != len(data):
                lengths = [len(data), *[0] * (len(told) - 1)]
            for i, length in zip(told, lengths, strict=False):
                found.append((data[at : at + length], choice.logprobs[i], begin))
                at += length
        tokens = [data.decode(errors="replace") for data, _, _ in found]
        if not self.ask.chat:
            return {
                "tokens": tokens,
                "token_logprobs": [logprob for _, logprob, _ in found],
                "top_logprobs": None,
                "text_offset": [offset for _, _, offset in found],
            }
        content = [
            {"token": token, "logprob": logprob, "bytes": list(data), "top_logprobs": []}
            for token, (data, logprob, _) in zip(tokens, found, strict=True)
        ]
        return {"content": content, "refusal": None}

    def record(self) -> dict[str, Any]:
        """What the log has of it, but time and client."""
        sampling = self.ask.sampling.model_dump(mode="json")
        return {
            "id": self.id,
            "model": self.model,
            "prompt": self.ask.asked,
            "sampling": sampling,
            "seed": self.ask.seed,
            "choices": [
                {
                    "text": c.text,
                    "token_ids": c.token_ids,
                    "logprobs": c.logprobs,
                    "weights": c.weights,
                    "finish_reason": c.ended,
                }
                for c in self.choices
            ],
        }
