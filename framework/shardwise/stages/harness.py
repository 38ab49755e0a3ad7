"""Evaluation by the tasks of lm-eval (EleutherAI's harness), on any engine and layout.

The one place that imports the library. It asks for three things (`TemplateLM`): the
log-probability of continuations, of whole texts, and completions; the engine's forward pass and the
rollout's generator answer. Every rank asks the same, so the library sees one process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from shardwise.data.chat import render
from shardwise.engines.base import Engine
from shardwise.errors import UserError
from shardwise.ops import rng
from shardwise.parallel.collectives import gather_json
from shardwise.precision.policy import precision_of
from shardwise.rollout.config import Sampling
from shardwise.rollout.generator import Generator
from shardwise.rollout.sequences import Request
from shardwise.stages.base import StageContext
from shardwise.stages.evaluation_configs import LmEvalConfig
from shardwise.stages.scoring import TextEncoder, score
from shardwise.stages.served import Served, serve

MAX_NEW_TOKENS = 256  # where a task does not say, as in lm-eval
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Of a task's generation_kwargs, what is not done here, and the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
}


def evaluate(config: LmEvalConfig, ctx: StageContext, engine: Engine) -> dict[str, Any]:
    """Every figure of every task as ``task.metric``, ``task.metric,filter`` where one is named."""
    found = measure(config, ctx, engine)
    figures = {
        f"{task}.{name.removesuffix(',none')}": value
        for task, row in found["results"].items()
        for name, value in row.items()
        if isinstance(value, (int, float))
    }
    return figures | {"lm_eval_version": found["lm_eval_version"]}


def measure(
    config: LmEvalConfig, ctx: StageContext, engine: Engine, samples: bool = False
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` gives, as plain JSON, on every rank; a collective call.

    ``samples``: with what the model said to each question. Raises UserError for an unknown task
    and for data that cannot be had.
    """
    from importlib.metadata import version

    # The library's own tasks are thousands of files, which take ten seconds to list.
    manager = TaskManager(include_defaults=not all(map(_stands_alone, config.tasks)))
    for task in config.tasks:
        if not (_is_file(task) or manager.match_tasks([task])):
            raise UserError(
                f"evaluation {config.name}: lm-eval {version('lm_eval')} has no task {task!r}; "
                "`lm-eval ls tasks` lists them, and a path that ends in .yaml is a task of your own"
            )
    try:
        found = simple_evaluate(
            EngineLM(config, ctx, engine),
            tasks=list(config.tasks),
            task_manager=manager,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            apply_chat_template=config.texts == "chat",
            log_samples=samples,
            # Not this process's generators: everything here draws from keys of its own.
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    except OSError as error:  # its hub's errors are, too
        raise UserError(
            f"evaluation {config.name}: the data of {', '.join(config.tasks)} cannot be had: "
            f"{error}"
        ) from error
    if found is not None:
        found = {k: found[k] for k in ("results", "versions", "samples") if k in found}
        found = json.loads(json.dumps(found, default=str))
    # The library answers on the first rank of a machine alone.
    assert dist.group.WORLD is not None
    [whole, *_] = filter(None, gather_json(found, dist.group.WORLD))
    return {**whole, "lm_eval_version": version("lm_eval")}


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _stands_alone(task: str) -> bool:
    """Whether a task is a file that is no group: a group names tasks that are elsewhere."""
    return _is_file(task) and not re.search(r"^group\s*:", Path(task).read_text(), re.MULTILINE)


class EngineLM(TemplateLM):  # type: ignore[misc]
    """An engine's model as lm-eval asks for it."""

    max_gen_toks = MAX_NEW_TOKENS
    tokenizer_name = ""

    def __init__(self, config: LmEvalConfig, ctx: StageContext, engine: Engine) -> None:
        super().__init__()
        self.config, self.ctx, self.engine = config, ctx, engine
        self.encoder, self.tokenizer = TextEncoder(ctx.tokenizer), ctx.tokenizer
        self.max_length = ctx.run.model.max_seq_len
        self._served: Served[Generator] | None = None

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return int(self.ctx.tokenizer.eos_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing precedes."""
        return self.encoder.start_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """As `TextEncoder.encode`, or the text alone."""
        if add_special_tokens is False:
            return self.ctx.tokenizer.encode(string, allow_special=True)
        return self.encoder.encode(string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model's own template writes it."""
        text = render(self.ctx.tokenizer, chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"].strip()  # of an answer that the model goes on with
        return text[: text.rindex(begun) + len(begun)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, for the library's records."""
        return self.ctx.tokenizer.chat_template if chat_template else None

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return score(self.engine, pairs, self.config.micro_batch, self.max_length)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of whole texts, in windows that do not overlap in what they score."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        flat = [("", *window) for of_text in windows for window in of_text]
        scores = iter(self._loglikelihood_tokens(flat))
        return [sum(next(scores)[0] for _ in of_text) for of_text in windows]

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        windows = utils.get_rolling_token_windows(
            self.tok_encode(text), self.prefix_token_id, self.max_length, 1
        )
        return map(utils.make_disjoint_window, windows)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A completion of each prompt, cut before the first of its stop strings.

        The ranks of the world share the prompts, and all get every completion.
        """
        served, key = self._serve(), rng.key(self.ctx.run.seed, "lm_eval", self.config.name)
        stop_ids = self.ctx.tokenizer.stop_ids
        mine: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for i in range(served.group, len(requests), served.groups):
            groups.setdefault(json.dumps(requests[i].args[1], sort_keys=True), []).append(i)
        for said, indices in groups.items():
            sampling = sampling_of(json.loads(said), self.config.name)
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise UserError(
                    f"evaluation {self.config.name}: the task asks for {sampling.max_new_tokens} "
                    f"new tokens, and the model takes {self.max_length} with the prompt"
                )
            prompts = [
                self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in indices
            ]
            asked = [Request(i, ids[-room:]) for i, ids in zip(indices, prompts)]
            for done in served.generator.generate(asked, sampling.stopping_at(stop_ids), key):
                text = self.ctx.tokenizer.decode(done.token_ids)
                for stop in sampling.stop_strings:
                    text = text.split(stop)[0]
                mine[done.prompt_id] = text
        assert dist.group.WORLD is not None
        parts = gather_json(list(mine.items()), dist.group.WORLD)[:: served.tp]
        whole = {i: text for part in parts for i, text in part}
        return [whole[i] for i in range(len(requests))]

    def _serve(self) -> Served[Generator]:
        """A generator with the engine's weights; a collective call when it is made."""
        if self._served is None:
            ctx, adapter = self.ctx, self.engine.adapter_config
            dtype = precision_of(ctx.precision, ctx.device).compute
            self._served = serve(ctx, dtype, said=self.config.rollout, adapter=adapter)
            self._served.generator.update_weights(self.engine.weights())
        return self._served


def sampling_of(said: Mapping[str, Any], name: str) -> Sampling:
    """A task's generation_kwargs. Raises UserError for what is not done here."""
    rest = dict(said)
    lengths = [int(n) for key in _LENGTHS if (n := rest.pop(key, None)) is not None]
    until = rest.pop("until", None) or []
    temperature = float(rest.pop("temperature", None) or 0.0)
    samples = rest.pop("do_sample", None)
    greedy = temperature == 0.0 if samples is None else not samples
    found: dict[str, Any] = {
        "greedy": greedy,
        "temperature": 1.0 if greedy or temperature == 0.0 else temperature,
        "max_new_tokens": [*lengths, MAX_NEW_TOKENS][0],
        "stop_strings": tuple(s for s in ([until] if isinstance(until, str) else until) if s),
    }
    for key in ("top_p", "top_k"):
        if (value := rest.pop(key, None)) is not None and not greedy:
            found[key] = value
    if odd := [key for key, value in rest.items() if value not in _NEUTRAL.get(key, ())]:
        raise UserError(
            f"evaluation {name}: the task's generation_kwargs ask for {', '.join(odd)}, which is "
            "not done here; leave it out of a task of your own, or use lm-eval's own models"
        )
    return Sampling(**found)
