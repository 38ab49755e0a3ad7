"""The command line: each command is one public function of the package.

Torch is imported only by the commands that compute: help, completion, recipes, schemas, reports and
a look at a checkpoint are instant.

Exit codes: `shardwise.errors.EXIT_CODES`; a rank that was lost gives its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from shardwise import __version__, terminal
from shardwise.cli import checkpoint, complete, data, launch, recipes
from shardwise.cli import config as configs
from shardwise.cli.evaluate import Adapters, TensorParallel, evaluate, named
from shardwise.cli.output import JsonOption, NoVerify, emit, json_alone
from shardwise.cli.serve import learn, serve
from shardwise.cli.sweep import sweep
from shardwise.config.redact import redact
from shardwise.errors import ConfigError, ExitCode, ShardwiseError, UserError
from shardwise.storage.durable import FAULTS, FORBIDDEN, StorageError, explain

_NO_MEMORY = re.compile(r"(?i)can't allocate memory|out of memory|cannot allocate memory")


class _Commands(TyperGroup):
    """Bad usage is quoted as everything else is: without secrets and control characters."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _quoting_safely():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with _quoting_safely():
            return super().invoke(ctx)


@contextlib.contextmanager
def _quoting_safely() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Of others, `message` may be a property.
        if isinstance(message := vars(error).get("message"), str):
            error.message = terminal.printable(redact(message))  # type: ignore[attr-defined]
        raise


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(configs.app, name="config")
app.add_typer(data.app, name="data")
app.add_typer(launch.app, name="launch")

Recipe = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[section.key=value]...",
        help="Over the recipe.",
        autocompletion=complete.overrides,
    ),
]
Nproc = Annotated[
    int | None, typer.Option("--nproc", min=1, metavar="N", help="Processes on this machine.")
]
Model = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT", help="A checkpoint, Hugging Face folder, GGUF file or hf:org/name."
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        terminal.say(f"shardwise {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks for every error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Distributed LLM training you can prove before you pay for the cluster."""
    del debug, version  # main() looks for --debug, which must hold before parsing too


app.command()(recipes.init)


@app.command()
def train(
    config: Recipe,
    overrides: Overrides = None,
    nproc: Nproc = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show each value and its source, then stop.")
    ] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Profile one step of each stage (RUN/trace).")
    ] = False,
    no_verify: NoVerify = False,
    json: JsonOption = None,
) -> None:
    """Run a recipe's stages; under torchrun, as one rank of it. Goes on where it was stopped."""
    overrides = [*(overrides or ()), *(["logging.trace=true"] if trace else [])]
    if print_config:
        from shardwise.config.export import print_config as show
        from shardwise.config.export import provenance_json
        from shardwise.config.load import load_config

        loaded = load_config(config, overrides)
        emit(provenance_json(loaded), show(loaded), json)
        return
    launch.check_ranks(nproc)
    # numpy's own thread pool would make a fork of this process unsafe; torch does the heavy work.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from shardwise.launch.train import train as run

    with json_alone(json):
        summary = run(config, overrides, nproc)
    if json is not None and os.environ.get("RANK", "0") == "0":
        emit(summary, "", json)


@app.command()
def verify(
    config: Recipe,
    overrides: Overrides = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            "--layout",
            "-l",
            metavar="L",
            help="May repeat; suite: the built-in ones.",
            autocompletion=complete.layouts,
        ),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(help="One stage by name; default: all.", autocompletion=complete.stages),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the blocks, as training does.")
    ] = False,
    updates_only: Annotated[
        bool,
        typer.Option("--updates-only", help="Compare updates; do not resume and generate: faster."),
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Try this engine.kind in place of the recipe's.", autocompletion=complete.engines
        ),
    ] = None,
    independence: Annotated[
        bool,
        typer.Option("--independence", help="Change documents: others of a row may not notice."),
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what was run, and how much was compared.")
    ] = False,
    device: Annotated[
        str,
        typer.Option(metavar="cpu|cuda", help="Where the ranks compute; one process: on the CPU."),
    ] = "cpu",
    no_verify: NoVerify = False,
    json: JsonOption = None,
    junit: Annotated[
        str | None, typer.Option("--junit", metavar="F", help="Write JUnit's XML to F.")
    ] = None,
) -> None:
    """Prove that layouts of a recipe compute what one process computes; exit code 1 if not."""
    # Ranks compute; this process compares small tensors, for which threads only wait.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from shardwise.verify import server

    with server.importing():
        from shardwise.cli.verify import Table, show
        from shardwise.verify.run import verify as run

    with Table(explain, silent=json == "-") as table:
        report = run(
            config,
            layout or (),
            stage=stage,
            overrides=overrides or (),
            compiled=compiled,
            whole=not updates_only,
            device=device,
            independence=independence,
            engine=engine,
            begin=table.begin,
            tell=table.tell,
            note=table.note,
        )
    show(report, json, junit, config.stem)


@app.command()
def generate(
    ckpt: Model,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="May be given repeatedly.")],
    system: Annotated[str | None, typer.Option(help="A system message before each.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default, as below: the model's own word, else 128.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0, and the default: the likeliest token.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="0, and the default: all.")] = None,
    top_p: Annotated[float | None, typer.Option(min=1e-6, max=1.0)] = None,
    samples: Annotated[int, typer.Option(min=1, help="Completions of each prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed gives the same completions.")] = 0,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    adapter: Adapters = None,
    tp: TensorParallel = 1,
    no_verify: NoVerify = False,
    json: JsonOption = None,
) -> None:
    """Complete prompts; a chat model is asked, a base model continues the text."""
    from shardwise.launch.generate import generate as run

    if precision not in ("fp32", "bf16"):
        raise UserError(f"--precision {precision}: allowed: fp32, bf16")
    said = {"max_new_tokens": max_new_tokens, "top_k": top_k, "top_p": top_p}
    if temperature is not None:
        said |= {"temperature": temperature or 1.0, "greedy": temperature == 0.0}
    sampling = {key: value for key, value in said.items() if value is not None}
    done = run(
        ckpt,
        prompt,
        sampling=sampling,
        num_samples=samples,
        raw=raw,
        system=system,
        precision=precision,  # type: ignore[arg-type]  # checked above
        seed=seed,
        adapters=named(adapter or []),
        tp=tp,
    )
    texts = [f"{c.adapter}: {c.text}" if c.adapter else c.text for group in done for c in group]
    result = [{"prompt": p, "completions": group} for p, group in zip(prompt, done)]
    emit(result, "\n---\n".join(texts), json)


app.command()(evaluate)
app.command()(serve)
app.command()(learn)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="A checkpoint, a Hugging Face folder, a .gguf, DeepSpeed's, Megatron's.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    to: Annotated[
        str,
        typer.Option(
            help="hf, native, peft, deepspeed or megatron.",
            autocompletion=complete.among("hf", "native", "peft", "deepspeed", "megatron"),
        ),
    ] = "hf",
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16 (hf only); default: as stored.")
    ] = None,
    merge_adapter: Annotated[
        bool, typer.Option("--merge-adapter", help="Of an adapter's checkpoint: the whole model.")
    ] = False,
    base: Annotated[
        Path | None,
        typer.Option(
            help="The base of a PEFT folder; default: what it names. Of a checkpoint of "
            "DeepSpeed's or Megatron's: a model with its config and tokenizer."
        ),
    ] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Read DeepSpeed's and Megatron's pickles.")
    ] = False,
    no_verify: NoVerify = False,
    json: JsonOption = None,
) -> None:
    """Convert a model, with its tokenizer and chat template."""
    from shardwise.checkpoint.convert import convert as run

    done = run(source, out, to, dtype, merge_adapter, base, trust_pickle)  # type: ignore[arg-type]
    part = f" ({done['part']})" if done["part"] else ""
    emit(done, f"{done['source_format']} -> {done['format']}: {done['out']}{part}", json)


@app.command()
def report(
    run: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="A run's directory; several: compared."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Default: RUN/report.html; of several, comparison.html in the folder that holds "
            "all of them, or here."
        ),
    ] = None,
    live: Annotated[
        bool,
        typer.Option("--live", help="Write it anew until every run has ended."),
    ] = False,
    json: JsonOption = None,
) -> None:
    """Write a run's self-contained HTML report, or one that compares several."""
    from shardwise.report import api
    from shardwise.report.live import follow

    with json_alone(json):
        if live:
            follow(run, out, lambda page: terminal.say(f"{page}: written anew while a run goes on"))
    if len(run) == 1:
        page = api.report(run[0], out)
        emit({"report": page}, str(page), json)
    else:
        page, found = api.compare(run, out)
        emit({"report": page, **found}, str(page), json)


app.command()(sweep)


@app.command()
def schema(json: JsonOption = None) -> None:
    """Print the JSON Schema of a recipe, for an editor."""
    from shardwise.config.export import json_schema

    emit(json_schema(), "", json or "-")


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="With --cluster: its files, too.")
    ] = None,
    overrides: Overrides = None,
    cluster: Annotated[
        bool,
        typer.Option(
            "--cluster",
            help="Compare all nodes before a run, under the torchrun that would start it.",
        ),
    ] = False,
    nproc: Nproc = None,
    timeout: Annotated[
        float, typer.Option(min=1.0, metavar="S", help="With --cluster: for all of it.")
    ] = 30.0,
    min_bandwidth: Annotated[
        float,
        typer.Option(min=0.0, metavar="GB/S", help="With --cluster: a slower link is a failure."),
    ] = 0.0,
    json: JsonOption = None,
) -> None:
    """What this machine has, which optional libraries are used, and why the others are not.

    With --cluster: whether all nodes are fit for a run; exit code 1 if not.
    """
    if cluster:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings are our findings
        launch.preflight(config, overrides or (), nproc, timeout, min_bandwidth, json)
        return
    if config is not None or nproc is not None:
        raise UserError("CONFIG and --nproc go with --cluster: shardwise doctor --cluster CONFIG")
    from shardwise.launch.doctor import as_text
    from shardwise.launch.doctor import doctor as run

    found = run()
    emit(found, as_text(found), json)


def main() -> None:
    """Entry point: one line for an error that is the user's, a traceback for one that is ours."""
    terminal.log_to_stderr()
    debug = sys.argv[1:2] == ["--debug"]
    try:
        app(prog_name="shardwise")
    except ShardwiseError as error:
        if debug:
            _complain(traceback.format_exc())
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not isinstance(error, ConfigError):  # a bad recipe is bad on all ranks
            kind = "" if error.exit_code == ExitCode.REQUEUE else "error: "
            _complain(f"{kind}{error}" if rank == "0" else f"rank {rank}: {error}")
        if "RANK" in os.environ and (rank == "0" or error.exit_code == ExitCode.USAGE):
            from shardwise.resilience.attempts import refused

            refused(error.exit_code, str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        if debug:
            _complain(traceback.format_exc())
        named = "" if error.filename is None else f"{error.filename}: "
        if error.errno in FAULTS - FORBIDDEN:
            _complain(f"error: {explain(error, error.filename or Path.cwd())}")
            sys.exit(StorageError.exit_code)
        _complain(f"error: {named}{error.strerror or error}")
        # Without a file it is no mistake of the user's: a lost connection.
        sys.exit(UserError.exit_code if named else ShardwiseError.exit_code)
    except Exception as error:
        if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
            _complain(f"error: out of memory: {error}; use a smaller model, batch or length")
            sys.exit(ShardwiseError.exit_code)
        from shardwise.resilience.ending import CONSEQUENCE

        if "RANK" in os.environ and CONSEQUENCE.search(str(error)):
            _complain(f"rank {os.environ['RANK']}: lost another rank, which says why: {error}")
            sys.exit(ShardwiseError.exit_code)
        _complain(traceback.format_exc())
        _complain("error: this is a bug in shardwise; please report the lines above")
        sys.exit(ExitCode.BUG)


def _complain(text: str) -> None:
    """To stderr, without secrets: messages quote overrides, paths and values."""
    terminal.say(text.rstrip("\n"), sys.stderr, secrets=True)
