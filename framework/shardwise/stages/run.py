"""One rank of a run: from a valid recipe to its summary."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

from shardwise.checkpoint.convert import open_model
from shardwise.checkpoint.ranks import Ranks
from shardwise.config.export import provenance_json, resolved_yaml
from shardwise.config.load import LoadedConfig
from shardwise.config.run import RunConfig
from shardwise.config.schema import JobConfig, StageConfig
from shardwise.config.source import Source
from shardwise.config.start import located
from shardwise.data.chat import CHATML
from shardwise.data.config import DataConfig
from shardwise.data.datasets import training_texts
from shardwise.data.formats import FORMATS
from shardwise.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_fingerprint
from shardwise.engines.registry import check_layout
from shardwise.errors import ConfigError, DataError, ExitCode, ShardwiseError, UserError
from shardwise.metrics import declared
from shardwise.metrics.meters import host_info
from shardwise.metrics.progress import Progress
from shardwise.metrics.writers import MetricsLogger, check_listeners
from shardwise.models import travel
from shardwise.models.common.config import DecoderConfig
from shardwise.optim.schedules import global_batch_at
from shardwise.parallel import blocks, feasible
from shardwise.parallel.layout import parse_layout, world_of
from shardwise.parallel.mesh import init_distributed, pick_device
from shardwise.precision.policy import multiplies_bf16
from shardwise.resilience import attempts
from shardwise.resilience.ending import clear_ending, write_ending
from shardwise.resilience.gate import Gate
from shardwise.resilience.hang import BACKSTOP_S, watched
from shardwise.resilience.stop import Stop
from shardwise.rewards import FileTaskConfig
from shardwise.stages import bits, samples
from shardwise.stages.arithmetic import TRAINED
from shardwise.stages.base import ACTOR, CACHE_FOLDER, role_of, roles_of
from shardwise.stages.claim import claimed
from shardwise.stages.evaluation_configs import BitsConfig
from shardwise.stages.initial_weights import check_initial_weights, is_native
from shardwise.stages.lengths import check_lengths
from shardwise.stages.parts import check_parts, check_pipeline, check_step_scorer
from shardwise.stages.pipeline import Pipeline
from shardwise.stages.served import check_served
from shardwise.stages.sizes import check_sizes
from shardwise.stages.skipped import SkippedError, check_trained, may_skip
from shardwise.stages.summary import summarize
from shardwise.stages.taken_over import check_taken_over
from shardwise.stages.tokenizer_folder import TOKENIZER_FOLDER, filled, restore, section_of
from shardwise.storage.durable import StorageError, write_durably


def run_rank(loaded: LoadedConfig, token: str = "") -> dict[str, Any]:
    """Run every stage in this process, as one rank of what torchrun started, or as the only one.

    ``token``: of the lock that the launcher holds on the run's directory, if one does.
    Returns the summary; rank 0 also writes it to ``<run_dir>/summary.json``. Raises ConfigError
    before anything is started when the recipe cannot be, LockedError before anything is written
    when another run lives in the directory, and SkippedError (with the summary) when a stage
    skipped most of its updates.
    """
    run = loaded.config
    preflight(run, int(os.environ.get("WORLD_SIZE", "1")), loaded.provenance)
    main, gate = os.environ.get("RANK", "0") == "0", Gate()
    stop = Stop(run.resilience, gate)
    hook = register_optimizer_step_pre_hook(lambda *_: gate.updating())
    try:
        with stop:
            try:
                summary = _run(loaded, token, gate, stop)
            except Exception:
                stop.settle()
                raise
    except Exception as error:
        if main and stop.directory is not None:
            code = error.exit_code if isinstance(error, ShardwiseError) else ExitCode.FAILED
            write_ending(stop.directory, code, f"{error}")
        raise
    finally:
        hook.remove()
    if main:
        write_ending(run.directory, ExitCode.DONE, "done")
    return summary


def _run(loaded: LoadedConfig, token: str, gate: Gate, stop: Stop) -> dict[str, Any]:
    run = loaded.config
    if not token and os.environ.get("RANK", "0") == "0":  # else the launcher did
        read_samples(run)
    device = pick_device(run.engine.device)
    # On CPU the hearts judge who is late, not how long the others have waited.
    init_distributed(device, BACKSTOP_S if device.type == "cpu" else run.engine.timeout_s)
    with claimed(run.directory, token):
        stop.join(run.directory)
        _begin(run, token)
        with watched(stop, run.directory / "logs", run.engine.timeout_s):
            return _run_stages(loaded, gate)


def _begin(run: RunConfig, token: str) -> None:
    """Note in the run's folder, which is ours, that an attempt starts; a collective call."""
    hosts = Ranks.of(None).exchange(socket.gethostname())
    if dist.get_rank() == 0:
        world = len(hosts)
        layouts = {
            s.name: str(parse_layout(s.engine.layout, world_of(s.engine.layout, world)))
            for s in run.stages
        }
        attempts.begin(run.directory, hosts, layouts, attempts.attempt_id(token))
    clear_ending(run.directory)


def _run_stages(loaded: LoadedConfig, gate: Gate) -> dict[str, Any]:
    """`run_rank` in a directory that is ours."""
    rank = dist.get_rank()
    began = time.perf_counter()
    run = with_precision(loaded.config)
    directory = run.directory
    if rank == 0:
        _store_recipe(directory, run, loaded)
    dist.barrier()
    tokenizer = prepare_tokenizer(run, directory, rank)
    run = with_vocabulary(run, tokenizer)
    # Before the watchers, which tell others that a run has begun. On every rank, so that none waits
    # in a collective call while another reads for longer than such calls may take.
    if samples.ready_tokenizer(run) is None:
        samples.check_conversations(run, tokenizer)
    samples.check_documents(run, tokenizer, directory / CACHE_FOLDER)
    resolved = run.model_dump(mode="json")
    steps = [(s.name, s.steps) for s in run.training]
    progress = Progress(steps, declared=declared.of(resolved), rank=rank)
    logger = MetricsLogger(directory, run.logging, run.name, resolved, rank=rank)
    pipeline = Pipeline(run, tokenizer, logger, progress, gate)
    try:
        logger.note("started", f"{dist.get_world_size()} ranks")
        before = time.perf_counter() - began
        expected = pipeline.expected()
        start_metrics = pipeline.start_metrics()
        results = pipeline.run_all()
    except BaseException:
        with contextlib.suppress(StorageError):  # what went wrong before is what is told
            logger.close()
        raise
    finally:
        progress.close()
    logger.close()
    summary = summarize(run, results, pipeline.gemm, host_info(), start_metrics)
    if pipeline.stopped:
        summary["stopped"] = pipeline.stopped
    summary["expected_seconds"] = {"before": before, **expected}
    summary["wall_seconds"] = time.perf_counter() - began
    if rank == 0:
        text = json.dumps(summary, indent=1)
        write_durably(directory / "summary.json", text.encode())
    dist.barrier()
    if pipeline.stopped:
        raise SkippedError(pipeline.stopped, summary)
    return summary


def preflight(
    run: RunConfig,
    world_size: int,
    provenance: Mapping[str, Source] | None = None,
    *,
    here: bool = True,
    files: bool = True,
) -> None:
    """Refuse what cannot work, before a process group, a file or a model exists.

    ``provenance`` (of `LoadedConfig`) lets the message say which line of which file to mend.
    ``here``: it will run on this machine, whose devices it may have; ``files``: what the recipe
    names lies on this machine.
    """

    def named(key: str) -> str:
        source = (provenance or {}).get(key, Source())
        return key if source.kind == "default" else f"{key} ({source})"

    check_listeners(run.logging)
    check_sizes(run, world_size)
    check_lengths(run, named)
    for i, stage in enumerate(run.stages):
        key = f"stages.{i}"
        try:
            check_job(run, stage, world_size, here=here)
        except ConfigError as error:
            where = named(f"{key}.engine.layout").removeprefix(f"{key}.engine.layout")
            raise ConfigError(f"{key}, {stage.name}{where}: {error}") from error
        check_step_scorer(run, stage, key, named, files=files)
        if not isinstance(stage, StageConfig):
            continue
        check_parts(run, stage, key, named)
        if stage.batch.seq_len > run.model.max_seq_len:
            raise ConfigError(
                f"{named(f'{key}.batch.seq_len')}: {stage.batch.seq_len} exceeds "
                f"{named('model.max_seq_len')} {run.model.max_seq_len}; lower one or raise the "
                "other"
            )
    trains = run.tokenizer.kind == "bpe" and run.tokenizer.path is None
    if trains and all(source.kind == "indexed" for source in tokenizer_data(run).sources):
        raise ConfigError(
            f"{named('tokenizer.kind')}: bpe is trained on text, and the sources hold tokens only; "
            "give tokenizer.path"
        )
    if files:
        _check_files(run, named)


def _check_files(run: RunConfig, named: Callable[[str], str]) -> None:
    """Refuse a run whose start, tokenizer or data is not there, or does not fit."""
    try:
        start = run.start
    except UserError as error:
        raise ConfigError(f"{named('init_from')}: {error}") from error
    if start is not None:
        first = next(iter(run.training), run.stages[0])
        scalar = first.head == "scalar"
        model = run.model
        assert isinstance(model, DecoderConfig)
        check_initial_weights(start, model.as_scalar() if scalar else model, named("init_from"))
        if is_native(start):
            check_trained(start, may_skip(first), named("init_from"))
        if run.init_optimizer:
            check_taken_over(run, named("init_optimizer"))
    if run.tokenizer.path is not None:
        try:
            located(run.tokenizer.path)
        except UserError as error:
            raise ConfigError(f"{named('tokenizer.path')}: {error}") from error
    check_evaluations(run, named)
    for i, stage in samples.pending_stages(run):
        _check_sources(f"stages.{i}", stage, named)


def check_evaluations(run: RunConfig, named: Callable[[str], str] = str) -> None:
    """Refuse an evaluation that has nothing to measure; ``named``: a key as a message shows it."""
    for i, evaluation in enumerate(run.evaluations):
        try:
            evaluation.check()
        except UserError as error:
            raise ConfigError(f"{named(f'evaluations.{i}.kind')}: {error}") from error
    for evaluation in (e for e in run.evaluations if isinstance(e, BitsConfig)):
        for stage in run.training:
            if stage.head == "vocabulary" and stage.name in (evaluation.stages or [stage.name]):
                bits.data_of(evaluation, run, stage)
    for i, evaluation in enumerate(run.evaluations):
        _check_sources(f"evaluations.{i}", evaluation, named)


def _check_sources(key: str, part: Any, named: Callable[[str], str]) -> None:
    """Of a stage's data or an evaluation's, those that are not there."""
    data = getattr(part, "data", None)
    for name in ("sources", "validation"):
        for j, source in enumerate(getattr(data, name, ())):
            try:
                source.check(getattr(data, "reads", tuple(FORMATS)))
            except DataError as error:
                where = named(f"{key}.data.{name}.{j}.path")
                raise ConfigError(f"{where}: {error} (from {Path.cwd()})") from error
    task = getattr(part, "task", None)
    if isinstance(task, FileTaskConfig) and task.from_ is None:
        try:
            task.check()
        except DataError as error:
            raise ConfigError(f"{named(f'{key}.task.path')}: {error}") from error


def read_samples(run: RunConfig) -> None:
    """Read every conversation and ranking of a run, as its stages will.

    Does nothing if the tokenizer is trained first. Raises DataError with file and line.
    """
    if (tokenizer := samples.ready_tokenizer(run)) is not None:
        samples.check_conversations(run, tokenizer)


def check_job(run: RunConfig, job: JobConfig, world_size: int, *, here: bool = True) -> None:
    """`check_stage` of a stage; of another job, whether its model can be laid out so."""
    if isinstance(job, StageConfig):
        check_stage(run, job, world_size, here=here)
        return
    assert isinstance(run.model, DecoderConfig)
    wanted = parse_layout(job.engine.layout, world_size)
    rows = wanted.dp * wanted.pp
    feasible.check(feasible.Case(wanted, run.model, False, rows, 1, job.engine.precision))
    check_served(run, job, world_size)


def check_stage(run: RunConfig, stage: StageConfig, world_size: int, *, here: bool = True) -> None:
    """Refuse a layout that this model, batch or engine cannot have; ``here``: see `preflight`."""
    assert isinstance(run.model, DecoderConfig)
    updates = getattr(stage, "updates_per_rollout", 1)
    sizes = {global_batch_at(stage.batch, s) for s in range(stage.batch.ramp_steps + 1)}
    for name in roles_of(stage):
        role = role_of(stage, name)
        if role.ranks is not None and max(role.ranks) >= world_size:
            raise ConfigError(
                f"stages.{stage.name}.roles.{name}.ranks: {role.ranks} go beyond the {world_size} "
                f"ranks of this run; start {max(role.ranks) + 1}, or place it on lower ranks"
            )
        ranks = world_size if role.ranks is None else len(role.ranks)
        wanted = parse_layout(role.engine.layout, world_of(role.engine.layout, ranks))
        check_layout(role.engine, wanted, stage)
        optimizer = role.optimizer or stage.optimizer
        fused = optimizer.kind if optimizer.in_backward and name in TRAINED else ""
        device = pick_device(role.engine.device) if here else None
        compiled = blocks.wants_compile(role.engine, device)
        cases = [
            feasible.Case(
                wanted,
                run.model,
                compiled,
                size // updates,
                stage.batch.micro_batch,
                role.engine.precision,
                role.engine.fp8,
                fused,
                role.engine.max_grad_norm,
            )
            for size in sorted(sizes)
        ]
        try:
            parse_layout(role.engine.layout, ranks)
        except ConfigError as error:  # of another number of ranks
            raise ConfigError(f"{error}{feasible.offer(cases, ranks)}") from None
        feasible.check(*cases)
        if name == ACTOR:
            check_pipeline(run, stage, wanted)
    check_served(run, stage, world_size)


def tokenizer_data(run: RunConfig) -> DataConfig:
    """Whose text trains a BPE: the first stage's that has documents."""
    for stage in run.training:
        data = getattr(stage, "data", None)
        if isinstance(data, DataConfig):
            return data
    raise ConfigError(
        "tokenizer.kind: bpe is trained on the documents of a pretrain stage, and there is none; "
        "add one, or give tokenizer.path"
    )


def prepare_tokenizer(run: RunConfig, directory: Path, rank: int) -> Tokenizer:
    """Make or copy the tokenizer once, on rank 0; every rank reads the saved one.

    A damaged folder comes back from a checkpoint. Raises ConfigError, on all ranks alike, when the
    folder holds that of another section.
    """
    folder = directory / TOKENIZER_FOLDER
    asked = tokenizer_fingerprint(run.tokenizer)
    sound = rank != 0 or section_of(folder) is not None
    if not sound and (source := restore(folder, directory / "stages")):
        logging.warning("%s: taken from %s", folder, source)
    elif not sound:
        texts = None
        if run.tokenizer.kind == "bpe" and run.tokenizer.path is None:
            texts = training_texts(tokenizer_data(run), run.tokenizer.sample_bytes, run.seed)
        tokenizer = load_tokenizer(run.tokenizer, texts)
        if tokenizer.chat_template is None and any(s.kind != "pretrain" for s in run.stages):
            tokenizer.chat_template = CHATML  # said aloud, so that whoever loads it talks alike
        with filled(folder, asked) as fresh:
            tokenizer.save(fresh, _of_start(run, tokenizer))
    dist.barrier()
    made = section_of(folder)
    if made and made != asked:  # empty: made before markers said of what
        raise ConfigError(
            f"tokenizer: {folder} was made from another tokenizer section, or its file has "
            "changed, and the run's checkpoints speak its tokens; take the section back, or start "
            "afresh with another run_dir"
        )
    return load_tokenizer(folder)


def _of_start(run: RunConfig, tokenizer: Tokenizer) -> dict[str, bytes]:
    """The configs that came with the model that a run starts from.

    Their token ids are left out if its tokenizer is another one.
    """
    files = {} if (start := run.start) is None else open_model(start).files
    kept = {name: files[name] for name in travel.MODEL if name in files}
    own = tokenizer.files()[travel.TOKENIZER]
    if files.get(travel.TOKENIZER, own) == own:
        return kept
    read = {name: travel.parse(files, name) for name in kept}
    return {
        name: travel.dump({k: v for k, v in config.items() if not k.endswith("_token_id")})
        for name, config in read.items()
    }


def with_vocabulary(run: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """Fill in ``model.vocab_size: 0``; refuse a model too small for its tokenizer."""
    size = run.model.vocab_size
    if size == 0:
        model = run.model.model_copy(update={"vocab_size": tokenizer.vocab_size})
        return run.model_copy(update={"model": model})
    if size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {size} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            "use 0 to take the tokenizer's"
        )
    return run


def with_precision(run: RunConfig) -> RunConfig:
    """Say what ``engine.precision: auto`` is here: the same on all ranks, a part of the lineage."""

    def named(part: Any) -> Any:
        """A run, stage or role with its engine's precision by name, and that of its roles."""
        updates: dict[str, Any] = {}
        if part.engine.precision == "auto":
            device = pick_device(part.engine.device)
            able = torch.tensor([float(multiplies_bf16(device))], device=device)
            dist.all_reduce(able, op=dist.ReduceOp.MIN)
            precision = "bf16" if float(able) else "fp32"
            updates["engine"] = part.engine.model_copy(update={"precision": precision})
        if (roles := getattr(part, "roles", None)) is not None:
            said = {n: named(r) for n in type(roles).model_fields if (r := getattr(roles, n))}
            updates["roles"] = roles.model_copy(update=said)
        return part.model_copy(update=updates)

    return named(run).model_copy(update={"stages": [named(s) for s in run.stages]})  # type: ignore[no-any-return]


def _store_recipe(directory: Path, run: RunConfig, loaded: LoadedConfig) -> None:
    """The resolved recipe with the source of each value."""
    write_durably(directory / "config.yaml", resolved_yaml(run).encode())
    text = json.dumps(provenance_json(loaded), indent=1)
    write_durably(directory / "provenance.json", text.encode())
