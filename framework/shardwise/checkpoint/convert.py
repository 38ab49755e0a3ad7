"""`shardwise convert`: a model from one of the formats we read into one of those we write.

Reads a native checkpoint, a Hugging Face folder, an adapter of PEFT's, a GGUF file or a checkpoint
of DeepSpeed's or Megatron's; writes a Hugging Face folder or a native checkpoint (fp32 masters,
step 0), with all that travels with a model (`models.travel`), or the adapter of a checkpoint in
PEFT's form. Between native and DeepSpeed's form the optimizer's state goes with the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from shardwise import hub, integrity
from shardwise.adapters import peft, peft_own, peft_read, peft_write
from shardwise.adapters.config import LowRankConfig
from shardwise.adapters.peft import PeftAdapter
from shardwise.checkpoint import (
    adapted,
    deepspeed,
    deepspeed_names,
    deepspeed_universal,
    loading,
    manifest,
    megatron_names,
    optimizer_state,
    saving,
    steps,
    torch_dist,
    torch_dist_write,
)
from shardwise.checkpoint.optimizer_state import OptimizerState
from shardwise.config import yaml12
from shardwise.config.adapters import AdapterConfig
from shardwise.config.schema import ModelConfig
from shardwise.data.tokenizer import load_tokenizer
from shardwise.errors import CheckpointError, UserError
from shardwise.models import registry as models
from shardwise.models import text_part, travel
from shardwise.models.common.config import DecoderConfig
from shardwise.models.config_file import read_json

log = logging.getLogger(__name__)
Target = Literal["hf", "native", "peft", "deepspeed", "megatron"]
MODEL_FILE = "model.json"  # the model section, where no recipe says it: no run, or another head
RUN_FILE = "config.yaml"  # the resolved recipe, in one that a run wrote
STAGE_FILE = "stage.json"  # which of its stages, beside it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A model on disk. ``parts`` (full tensors, under our names, CPU) can be iterated once."""

    format: Literal["native", "hf", "gguf", "peft", "deepspeed", "megatron"]
    config: ModelConfig
    parts: Iterator[tuple[str, Tensor]]  # of the model, and of an adapter that stands beside it
    files: dict[str, bytes]  # what travels with it (`models.travel`)
    adapter: AdapterConfig | None = None  # merged into ``parts``, or among them
    path: Path = Path()
    optimizer: OptimizerState | None = None  # of a checkpoint of DeepSpeed's

    @property
    def beside(self) -> AdapterConfig | None:
        """The adapter, if it cannot be merged."""
        return None if self.adapter is None or self.adapter.merges else self.adapter

    @property
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """``parts``, of a plain model. Raises UserError for one with an adapter beside it."""
        if self.beside is not None:
            raise UserError(
                f"{self.path}: its adapter of kind {self.beside.kind} is no change of weights and "
                "cannot be merged; serve it as it is (generate, evaluate), go on with it "
                "(adapter.start: parent), or train lora or dora for a plain model"
            )
        return self.parts

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer of a kind that we read came with it."""
        return bool(self.files.keys() & {travel.TOKENIZER, travel.SENTENCEPIECE})


def open_model(path: Path | str, base: Path | None = None, trust_pickle: bool = False) -> OpenModel:
    """Open a native checkpoint (or a folder of them), a Hugging Face folder or a GGUF file.

    Or an adapter's folder as PEFT writes it, over ``base`` or the base model that it names; or,
    with ``trust_pickle``, a checkpoint of DeepSpeed's or Megatron's, whose config and tokenizer
    are those of ``base`` or of the folder around it. ``path`` may be a name on the hub.
    Raises CheckpointError when it is damaged, UserError when it is none of these.
    """
    path = hub.local_folder(path, "model")
    if path.is_file() and path.suffix == ".gguf":
        return _open_gguf(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: {'not a GGUF file' if path.exists() else 'does not exist'}; give a "
            "checkpoint folder, a Hugging Face folder or a .gguf file"
        )
    if (path / manifest.NAME).exists() or steps.latest(path) is not None:
        return _open_native(steps.resolve(path))
    if peft_read.is_adapter_folder(path):
        return _open_peft(path, peft_base(path, base))
    for whose, kind in (("DeepSpeed", deepspeed), ("Megatron-core", torch_dist)):
        if (found := kind.find(path)) is None:
            continue
        if trust_pickle:
            config, files = _described(found, base, whose)
            opened = _open_deepspeed if kind is deepspeed else _open_megatron
            return opened(found, config, files)
        if not any(path.glob("*.safetensors")):
            raise UserError(
                f"{path}: is a checkpoint of {whose}'s, which is made of pickles: programs that "
                "could do anything. If you trust where it comes from, convert it first: shardwise "
                f"convert {path} OUT --to native --trust-pickle"
            )
    config, tensors = models.from_hf(path)
    return OpenModel("hf", config, tensors, travel.read(path), path=path)


def _described(
    folder: Path, base: Path | None, whose: str
) -> tuple[DecoderConfig, dict[str, bytes]]:
    """The config and what travels with a model, of a format that has neither."""
    log.warning(
        "%s: is made of pickles, which are programs. They are not run, but read as data, in a "
        "process without files and network; still, convert only what you trust",
        folder,
    )
    place = base or deepspeed.config_of(folder)
    if place is None:
        raise UserError(
            f"{folder}: {whose} writes no config of the model; name a checkpoint, or a folder "
            "with a config.json, that has it and the tokenizer (--base)"
        )
    if (place / travel.CONFIG).is_file():
        return models.read_config(place), travel.read(place)
    like = open_model(place)
    assert isinstance(like.config, DecoderConfig)
    return like.config, like.files


def _open_deepspeed(folder: Path, config: DecoderConfig, files: dict[str, bytes]) -> OpenModel:
    found = deepspeed.read(folder)
    return OpenModel(
        "deepspeed",
        config,
        deepspeed_names.weights(found, config),
        files,
        path=folder,
        optimizer=deepspeed_names.optimizer(found, config),
    )


def _open_megatron(folder: Path, config: DecoderConfig, files: dict[str, bytes]) -> OpenModel:
    found = torch_dist.read(folder)
    if found.unread:
        log.warning("%s: its optimizer's state is left out: %s", folder, found.unread)
    if fill := megatron_names.fill(found, config):
        log.warning(
            "%s: %d rows that fill its vocabulary up to %d are left out. Its softmax counted them, "
            "so losses begin lower than they were there; to go on exactly, let vocab_size be %d in "
            "the config.json of --base",
            *(folder, fill, config.vocab_size + fill, config.vocab_size + fill),
        )
    return OpenModel(
        "megatron",
        config,
        megatron_names.weights(found, config),
        files,
        path=folder,
        optimizer=megatron_names.optimizer(found, config),
    )


def peft_base(folder: Path, base: Path | None = None) -> Path:
    """The base model of an adapter in PEFT's form. Raises UserError if it is not there."""
    if base is not None:
        return base
    said = read_json(folder / peft.CONFIG).get("base_model_name_or_path")
    if isinstance(said, str) and said and Path(said).exists():
        return Path(said)
    try:  # where PEFT writes a name without a mark
        return hub.local_folder(f"{hub.PREFIX}{said}", "model")
    except UserError as error:
        raise UserError(
            f"{folder / peft.CONFIG}: base_model_name_or_path is {said!r}, which is no file and no "
            "folder here; give the base model (convert --base), or write its path there (as a "
            f"name on the hub: {error})"
        ) from error


def _open_peft(folder: Path, base: Path) -> OpenModel:
    """The base with the adapter in it."""
    model = open_model(base)
    adapter = _read_peft(folder, base, model)
    checked = _of_base(adapter, folder, model.tensors)
    tensors = peft.merge(checked, adapter)
    return OpenModel("peft", model.config, tensors, model.files | travel.read(folder))


def _read_peft(folder: Path, base: Path, model: OpenModel) -> PeftAdapter:
    """Raises UserError if the folder says that it belongs to other weights."""
    assert isinstance(model.config, DecoderConfig)
    adapter = peft_read.read(folder, model.config)
    if adapter.base_hash not in (None, found := adapted.weights_hash(base)):
        raise UserError(
            f"{folder / peft.WEIGHTS}: belongs to other weights than those in {base} (hash "
            f"{found}, trained on {adapter.base_hash}); give the base that it was trained on"
        )
    return adapter


def _of_base(
    adapter: PeftAdapter, folder: Path, named: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    for name, value in named:
        peft_read.check_base(adapter, folder, {name: value})
        yield name, value


def _open_native(path: Path) -> OpenModel:
    files = loading.read_files(path)
    if MODEL_FILE in files:
        section = json.loads(files[MODEL_FILE])
    elif RUN_FILE in files:
        data = yaml12.parse(files[RUN_FILE].decode(), f"{path / RUN_FILE}").data
        section = data.get("model") if isinstance(data, dict) else None
    else:
        raise CheckpointError(f"{path}: holds neither {RUN_FILE} nor {MODEL_FILE}: which model?")
    if not isinstance(section, dict):
        raise CheckpointError(f"{path}: its {RUN_FILE} or {MODEL_FILE} describes no model")
    cls = models.config_class(str(section.get("family")))
    config = cls.model_validate_json(json.dumps(section), strict=True)
    said = adapted.read(files)
    if said is not None:
        adapter, base = said
        assert isinstance(config, DecoderConfig)
        tensors = _merged(path, config, adapter, base)
        return OpenModel("native", config, tensors, travel.among(files), adapter, path)
    prefix = "model."
    tensors = (
        (name.removeprefix(prefix), tensor)
        for name, tensor in loading.read_tensors(path, lambda n: n.startswith(prefix))
    )
    return OpenModel("native", config, tensors, travel.among(files))


def _merged(
    path: Path, model: DecoderConfig, adapter: AdapterConfig, base: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """An adapter's checkpoint with its base. The latter is opened with the first tensor."""
    place = adapted.base_of(path, base)
    if place is None:
        tensors = adapted.initial_tensors(model, int(base["seed"]))
    else:
        tensors = open_model(place).tensors
    yield from adapted.merged(path, model, adapter, tensors)


def _open_gguf(path: Path) -> OpenModel:
    from shardwise.models.gguf import from_gguf

    model = from_gguf(path)
    return OpenModel("gguf", model.config, model.tensors, model.files())


def convert(
    source: Path | str,
    out: Path | str,
    to: Target = "hf",
    dtype: str | None = None,
    merge_adapter: bool = False,
    base: Path | str | None = None,
    trust_pickle: bool = False,
) -> dict[str, Any]:
    """Write the model at ``source`` to the new or empty folder ``out``; returns what was written.

    ``merge_adapter``: of a source that holds an adapter, the base with it merged. Without it, a
    checkpoint with an adapter becomes a folder of PEFT's (``to`` peft), and such a folder a
    checkpoint to go on with (``to`` native). ``base``: of a folder of PEFT's that names none; or
    whose config and tokenizer go with a checkpoint of DeepSpeed's or Megatron's (`open_model`).

    ``dtype`` (fp32, bf16, fp16; Hugging Face only) defaults to the stored one. A native checkpoint
    is always fp32, ready for ``init_from``. ``to`` deepspeed: a universal checkpoint, under the
    names of transformers' model. ``to`` megatron: weights in Megatron-core's ``torch_dist``, in the
    dtype that they have.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; give a new one")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: allowed: {', '.join(DTYPES)}")
    if dtype not in (None, "fp32") and to in ("native", "deepspeed"):
        raise UserError(f"--dtype {dtype}: a {to} checkpoint holds fp32 weights")
    model = open_model(source, None if base is None else Path(base), trust_pickle)
    holds_adapter = model.adapter is not None or model.format == "peft"
    forms = {"native": "peft", "peft": "native"}  # of an adapter by itself
    if model.beside is not None:
        _ = model.tensors  # says why not
    if to == "peft" and model.adapter is None:
        raise UserError(f"{source}: holds no adapter of a stage's, and PEFT's form is for those")
    if holds_adapter and not merge_adapter and forms[model.format] != to:
        raise UserError(
            f"{source}: holds an adapter, no whole model; add --merge-adapter to write its base "
            f"with the adapter in it, or write the adapter by itself (--to {forms[model.format]})"
        )
    if to == "peft":
        written = _write_peft(model, steps.resolve(Path(source)), out)
    elif to == "native" and holds_adapter and not merge_adapter:
        written = _write_adapter(Path(source), None if base is None else Path(base), out)
    elif to == "hf":
        written = _write_hf(model, out, DTYPES[dtype] if dtype else None)
    elif to == "native":
        written = _write_native(model, out, str(source))
    elif to == "deepspeed":
        written = _write_deepspeed(model, Path(source), out)
    elif to == "megatron":
        written = _write_megatron(model, out)
    else:
        raise UserError(f"--to {to}: allowed: hf, native, peft, deepspeed, megatron")
    return {
        "source": str(source),
        "source_format": model.format,
        "out": str(written),
        "format": to,
        "family": model.config.family,
        "tokenizer": model.has_tokenizer,
        "files": sorted(model.files),
        "part": text_part.described(model.path) if model.format == "hf" else "",
    }


def _write_hf(model: OpenModel, out: Path, dtype: torch.dtype | None) -> Path:
    with _staged(out) as folder:
        _fill_hf(model, folder, dtype)
    return out


@contextlib.contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder that becomes ``out`` at the end, so that it is complete or as it was."""
    final = out.resolve()
    staged = final.with_name(f".{final.name}.tmp-{secrets.token_hex(6)}")
    try:
        staged.mkdir(parents=True)
        yield staged
        staged.rename(final)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _write_peft(model: OpenModel, checkpoint: Path, out: Path) -> Path:
    """The adapter of a checkpoint by itself; the base is named, not read."""
    said = adapted.read(loading.read_files(checkpoint))
    assert said is not None and isinstance(model.config, DecoderConfig)
    config, base = said
    if not isinstance(config, LowRankConfig):
        raise UserError(f"{checkpoint}: PEFT has no form for adapters of kind {config.kind}")
    place = adapted.base_of(checkpoint, base)
    if place is not None and (part := text_part.described(place)):
        raise UserError(
            f"{checkpoint}: PEFT would look for its places in all of {place}, and it was trained "
            f"on {part}; write the model with it merged: --to hf --merge-adapter"
        )
    # Others find the base exported, which has another hash than a checkpoint.
    known = None if place is None or (place / manifest.NAME).exists() else str(base["hash"])
    adapter = peft_own.to_peft(adapted.own_tensors(checkpoint), config, known)
    with _staged(out) as folder:
        tokenizer = {n: d for n, d in model.files.items() if n not in travel.MODEL}
        travel.write(folder, tokenizer)
        peft_write.write(folder, adapter, model.config, "" if place is None else str(place))
    return out


def own_adapter(folder: Path, base: Path) -> tuple[LowRankConfig, dict[str, Tensor]]:
    """The adapter of a folder of PEFT's as our stages train it: its config and its parameters."""
    found = _read_peft(folder, base, open_model(base))
    return peft_own.to_own(found, f"{folder / peft.CONFIG}")


def _write_adapter(folder: Path, base: Path | None, out: Path) -> Path:
    """A folder of PEFT's as a checkpoint with an adapter, for ``adapter.start: parent``."""
    base = peft_base(folder, base)
    model = open_model(base)
    config, own = own_adapter(folder, base)
    section = model.config.model_dump_json().encode()
    files = {
        MODEL_FILE: section,
        adapted.ADAPTER_FILE: adapted.description(config, base, 0, out),
        **model.files,
        **travel.read(folder),
    }
    meta = {"converted_from": folder.name, "model": json.loads(section)}
    tensors = {f"model.{name}": tensor.float() for name, tensor in own.items()}
    return saving.save(out, 0, tensors, meta, files)


def _fill_hf(model: OpenModel, folder: Path, dtype: torch.dtype | None) -> None:
    travel.write(folder, model.files)
    tokenizer = load_tokenizer(folder) if model.has_tokenizer else None
    models.to_hf(
        folder,
        model.config,
        model.tensors,
        dtype=dtype,
        carried=model.files,
        stop_ids=tokenizer.stop_ids if tokenizer else (),
        named_ids=tokenizer.named_ids if tokenizer else None,
    )
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    integrity.write_sums(folder, (name for name in found if name != integrity.SUMS_FILE))


def _write_native(model: OpenModel, out: Path, source: str) -> Path:
    tensors = {f"model.{name}": tensor.float() for name, tensor in model.tensors}
    section = model.config.model_dump_json().encode()
    files = {MODEL_FILE: section, **model.files}
    meta = {"converted_from": Path(source).name, "model": json.loads(section)}
    if (state := model.optimizer) is None:
        return saving.save(out, 0, tensors, meta, files)
    tensors |= {name: tensor.float() for name, tensor in state.tensors()}
    meta["engine"] = {"updates": state.steps, "skipped": state.skipped}
    return saving.save(out, state.steps, tensors, meta, files)


def _write_deepspeed(model: OpenModel, source: Path, out: Path) -> Path:
    state = model.optimizer
    if model.format == "native" and model.adapter is None:
        state = optimizer_state.of_native(steps.resolve(source))
    assert isinstance(model.config, DecoderConfig)
    with _staged(out) as folder:
        deepspeed_universal.write(folder, model.config, model.tensors, state)
        models.write_config(folder, model.config, model.files)
        travel.write(folder, {n: d for n, d in model.files.items() if n not in travel.MODEL})
    return out


def _write_megatron(model: OpenModel, out: Path) -> Path:
    assert isinstance(model.config, DecoderConfig)
    with _staged(out) as folder:
        parts = megatron_names.parts(model.config, model.tensors)
        torch_dist_write.write(folder, parts, megatron_names.objects(model.config))
        models.write_config(folder, model.config, model.files)
        travel.write(folder, {n: d for n, d in model.files.items() if n not in travel.MODEL})
    return out
