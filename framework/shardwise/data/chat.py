"""Conversations as tokens, with a mask of what the assistant must learn.

The whole conversation is rendered once and encoded once: its ids are those that transformers'
``apply_chat_template`` gives, and that a server will feed the model. The mask is laid over them by
the offsets of the tokens in the text. Where an assistant's turn stands in the text

- the template says itself, by one ``{% generation %}`` for each assistant turn; or else
- follows from rendering prefixes: a turn begins where the earlier messages with a generation prompt
  end, exactly what the model is given when it generates, and ends where it ends as the last one.

So a turn is learned as it would be generated. Templates that show a turn otherwise once more
messages follow (those that drop earlier thoughts) have no such place: they are refused with the
mend.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardwise.data.conversation import SAYING, VARIABLES, Message, check_messages
from shardwise.data.fast_tokenizer import Tokenizer
from shardwise.data.renderer import describe, render_bounded
from shardwise.data.templates import REASONING, Rendered, render_template
from shardwise.errors import DataError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """The conversation as text, by the tokenizer's template (ChatML when it has none).

    ``variables`` (tools, documents, a template's own switches) reach the template. Raises DataError
    when the template refuses, fails, or tries what the sandbox forbids.
    """
    return _draw(tokenizer, messages, variables, add_generation_prompt).text


def write_out(tokenizer: Tokenizer, messages: Sequence[Message], **variables: Any) -> str:
    """`render` of messages without control tokens of their own, and without a first BOS."""
    checked = check_messages(messages)
    _refuse_control_tokens(tokenizer, checked, variables)
    text = render(tokenizer, checked, **variables)
    bos = tokenizer.special_tokens_map.get("bos_token", "")
    return text.removeprefix(bos)


def _draw(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    add_generation_prompt: bool = False,
) -> Rendered:
    names: dict[str, Any] = {**tokenizer.special_tokens_map, **variables}
    names["add_generation_prompt"] = add_generation_prompt
    source = tokenizer.chat_template or CHATML
    if source != CHATML:
        return render_bounded(source, messages, names)
    try:
        return render_template(source, messages, names)
    except Exception as error:
        raise DataError(describe(error)) from error


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    learn: Sequence[bool] | None = None,
    **variables: Any,
) -> tuple[list[int], list[bool]]:
    """(ids, loss_mask) of a conversation; both of one length.

    The mask covers each assistant turn and the token that ends it, not what the template puts after
    that. ``learn``: for each message whether it is learned; None: every assistant's. If the
    template ends a learned last turn with no stop token, EOS is added, so that stopping is learned.
    With ``add_generation_prompt`` the ids end where the model goes on, and nothing is learned.
    Raises DataError for messages that hold control tokens anywhere (content, role, or another field
    that a template may write), and for a turn whose place in the text cannot be told.
    """
    checked = check_messages(messages)
    _refuse_control_tokens(tokenizer, checked, variables)
    full = _draw(tokenizer, checked, variables, add_generation_prompt)
    ids, offsets = tokenizer.encode_with_offsets(full.text)
    mask = [False] * len(ids)
    if add_generation_prompt:
        return ids, mask
    wanted = [
        i
        for i, message in enumerate(checked)
        if message["role"] == "assistant" and (learn is None or learn[i])
    ]
    stops, places = set(tokenizer.stop_ids), np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    for turn, start, end in _spans(tokenizer, checked, variables, wanted, full):
        _refuse_loss(checked[turn], full.text[start:end], turn)
        inside = _inside(ids, places, start, end, tokenizer.control_ids)
        following = inside[-1] + 1 if inside else len(ids)
        ends = [k for k in inside if ids[k] in stops]
        if ends:
            inside = [k for k in inside if k <= ends[-1]]
        elif full.marked and following < len(ids) and ids[following] in stops:
            inside.append(following)  # the mark leaves out what ends the turn
        elif turn == len(checked) - 1:
            ids.append(tokenizer.eos_id)
            mask.append(True)
        for k in inside:
            mask[k] = True
    return ids, mask


def check_use(
    tokenizer: Tokenizer, messages: Sequence[Message], variables: Mapping[str, Any]
) -> list[str]:
    """Refuse a template that leaves out what messages and variables say; what a row is read with.

    Returns the fields that the template leaves out and that say nothing new: ids and names of tool
    results that stand in the order of their calls. Raises DataError for any other.
    """
    full = _draw(tokenizer, messages, variables).text

    def left_out(said: Sequence[Message], given: Mapping[str, Any]) -> bool:
        try:
            return _draw(tokenizer, said, given).text == full
        except DataError:  # it cannot do without
            return False

    found = []
    for field in SAYING:
        holder = next((i for i, m in enumerate(messages) if m.get(field) not in (None, [])), None)
        if holder is not None:
            names = REASONING if field in REASONING else (field,)
            without = [{k: v for k, v in m.items() if k not in names} for m in messages]
            if left_out(without, variables):
                if field not in ("name", "tool_call_id") or not _follow_calls(messages):
                    raise DataError(
                        f"the chat template does not use {field!r} of message {holder}; take a "
                        "template that does, or leave it out of the data"
                    )
                found.append(f"messages[].{field}")
    for field in VARIABLES:
        rest = {k: v for k, v in variables.items() if k != field}
        if field in variables and left_out(messages, rest):
            raise DataError(
                f"the chat template does not use {field!r} of the row; take a template that does, "
                "or list it under the source's ignore"
            )
    written = _squeezed(full)
    for i, message in enumerate(messages):
        text = _content(message)
        if not isinstance(message.get("content"), str | None) and "'type': 'text'" in full:
            raise DataError(
                f"the chat template takes no parts as the content of message {i}; write one text"
            )
        common = message["role"] in ("user", "assistant") and _squeezed(text) in written
        if text.strip() and not common:
            other = [*messages]
            other[i] = {**message, "content": text + "x"}
            if left_out(other, variables):
                raise DataError(
                    f"the chat template leaves out message {i} (of {message['role']}); take a "
                    "template that writes it, or leave it out of the data"
                )
    return found


def _follow_calls(messages: Sequence[Message]) -> bool:
    """Whether place alone says which call a tool's result, and each name, belongs to."""
    calls: list[Any] = []
    for message in messages:
        if message["role"] != "tool":
            if "name" in message:
                return False
            calls = [*message.get("tool_calls", [])]
            continue
        call = calls.pop(0) if calls and isinstance(calls[0], Mapping) else {}
        function = call.get("function")
        name = function.get("name") if isinstance(function, Mapping) else call.get("name")
        for said, called in (("tool_call_id", call.get("id")), ("name", name)):
            if said in message and message[said] != called:
                return False
    return True


def _content(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _spans(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    wanted: Sequence[int],
    full: Rendered,
) -> Iterator[tuple[int, int, int]]:
    """(message, start, end) of each turn in ``wanted``, in the text of all messages."""
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if len(full.marked) == len(turns):
        marked = dict(zip(turns, full.marked))
        yield from ((i, *marked[i]) for i in wanted)
        return
    for i in wanted:
        before = _draw(tokenizer, messages[:i], variables, add_generation_prompt=True).text
        last = i == len(messages) - 1
        after = full.text if last else _draw(tokenizer, messages[: i + 1], variables).text
        if not after.startswith(before):
            raise DataError(_unlike_its_prompt(i, before, after))
        if not full.text.startswith(after):
            raise DataError(
                f"the chat template renders message {i} otherwise once more messages follow (as "
                "those do that drop earlier thoughts), so the text does not hold it as it would be "
                "generated; set data.turns: apart to learn each assistant turn in an example of "
                f"its own, or give message {i} the weight 0"
            )
        yield i, len(before), len(after)


def _unlike_its_prompt(turn: int, before: str, after: str) -> str:
    """Why the text of a turn does not go on where generation starts."""
    same = next((k for k, (a, b) in enumerate(zip(before, after)) if a != b), len(after))
    prompt, stored = (text[max(0, same - 24) : same + 36] for text in (before, after))
    return (
        f"the chat template lets the model generate message {turn} after {prompt!r}, but renders "
        f"the given one as {stored!r}; begin its content as the model would go on from that prompt "
        "(with the thought, if the prompt opens one), or take a template that agrees with itself"
    )


def _refuse_loss(message: Message, text: str, turn: int) -> None:
    """Refuse a template that leaves out part of what is to be learned; spaces do not count."""
    written = _squeezed(text)
    thought = next((message[k] for k in REASONING if isinstance(message.get(k), str)), "")
    said = [_squeezed(thought), _squeezed(_content(message))]
    if any(t not in written for t in said) and len(written) < sum(map(len, said)):
        raise DataError(
            f"the chat template leaves out part of message {turn}: it writes {text[:80]!r}; mend "
            "the message, or take another template"
        )


def _inside(
    ids: Sequence[int],
    offsets: NDArray[np.int64],
    start: int,
    end: int,
    control: Container[int],
) -> list[int]:
    """Indices of the tokens that have a character of [start, end).

    A token that begins before ``start`` counts, unless it is a control token that swallowed a
    space. Some tokenizers take spaces out of offsets: what is left of a token of spaces is the
    empty range behind it.
    """
    begins, ends = offsets[:, 0], offsets[:, 1]
    empty = (begins == ends) & (begins > start) & (begins <= end)
    found = np.flatnonzero(((begins < end) & (ends > start) & (begins < ends)) | empty)
    return [k for k in found.tolist() if begins[k] >= start or ids[k] not in control]


def _refuse_control_tokens(
    tokenizer: Tokenizer, messages: Sequence[Message], variables: Mapping[str, Any]
) -> None:
    tokens = [token for token in tokenizer.special_tokens if token]
    holders = [(f"message {i}", message) for i, message in enumerate(messages)]
    for where, holder in [*holders, ("the row", variables)]:
        for field, value in holder.items():
            for text in (field, *_texts(value)):
                if found := next((token for token in tokens if token in text), None):
                    raise DataError(
                        f"{where} contains the control token {found!r} in its {field}, which "
                        "would end or forge a turn; remove it from the data"
                    )


def _texts(value: Any) -> Iterator[str]:
    """Every string inside plain data, the keys of mappings too."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case str() as text:
                yield text
            case Mapping() as mapping:
                waiting += [*mapping.keys(), *mapping.values()]
            case list() | tuple() as items:
                waiting += items
