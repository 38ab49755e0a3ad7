"""`shardwise checkpoint inspect|verify|diff`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shardwise.cli.output import JsonOption, emit, size
from shardwise.errors import CheckFailed, CheckpointError, UserError
from shardwise.terminal import one_line

app = typer.Typer(no_args_is_help=True, help="Look at checkpoints without loading them.")
Checkpoint = Annotated[
    Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a folder of them (its latest).")
]


def located(ckpt: Path) -> Path:
    """The checkpoint that is meant; UserError where there is none (a damaged one is no misuse)."""
    from shardwise.checkpoint import resolve

    if not ckpt.exists():
        raise UserError(f"{ckpt}: no such file or folder (from {Path.cwd()})")
    try:
        return resolve(ckpt)
    except CheckpointError as error:  # what is damaged is resolved by its name
        raise UserError(str(error)) from error


@app.command()
def inspect(ckpt: Checkpoint, json: JsonOption = None) -> None:
    """What a checkpoint holds, from its manifest alone."""
    from shardwise.checkpoint import inspect as run

    found = run(located(ckpt))
    lines = [
        f"{found.path}: step {found.step}, {found.num_tensors} tensors, "
        f"{found.num_elements:,} values, {size(found.num_bytes)}, digest {found.digest}"
    ]
    width = max((len(one_line(t.name)) for t in found.tensors), default=0)
    lines += [
        f"  {one_line(t.name):<{width}}  {t.dtype:<5} {'x'.join(map(str, t.shape)) or 'scalar'}"
        for t in found.tensors
    ]
    lines += [f"  {name}  {size(num)}" for name, num in found.files.items()]
    emit(found, "\n".join(lines), json)


@app.command()
def verify(ckpt: Checkpoint, json: JsonOption = None) -> None:
    """Read and hash every byte; exit code 1 and the damaged files and tensors if any differs."""
    from shardwise.checkpoint import verify as run

    path = located(ckpt)
    problems = run(path)
    result = {"path": path, "sound": not problems, "problems": problems}
    if not problems:
        emit(result, f"{path}: sound, every byte is as written", json)
        return
    if json is not None:
        emit(result, "", json)
    lines = "\n  ".join(map(str, problems))
    raise CheckFailed(f"{path}: {len(problems)} problems\n  {lines}")


@app.command()
def diff(a: Checkpoint, b: Checkpoint, json: JsonOption = None) -> None:
    """In what two checkpoints differ, whatever layouts wrote them; exit code 1 if they do."""
    from shardwise.checkpoint import diff as run

    found = run(located(a), located(b))
    lines = [f"only in {a}: {one_line(name)}" for name in found.only_a]
    lines += [f"only in {b}: {one_line(name)}" for name in found.only_b]
    lines += [
        f"{one_line(n)}: shape {list(x)} against {list(y)}" for n, (x, y) in found.shapes.items()
    ]
    lines += [f"{one_line(n)}: dtype {x} against {y}" for n, (x, y) in found.dtypes.items()]
    lines += [
        f"{one_line(v.name)}: {v.num_different} of {v.num_elements} values differ, "
        f"by at most {v.max_abs:.3g} ({v.max_rel:.3g} relative)"
        for v in found.values
    ]
    lines += [f"meta {one_line(key)}: {x!r} against {y!r}" for key, (x, y) in found.meta.items()]
    lines += [f"file {name} differs" for name in found.files]
    if not lines:
        emit(found.to_json(), "equal: tensors, meta and files", json)
        return
    if json is not None:
        emit(found.to_json(), "", json)
    raise CheckFailed("\n  ".join([f"{a} and {b} differ", *lines]))
