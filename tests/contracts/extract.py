"""Reads the signatures of the calls we make out of a library's released source, without running it.

    python -m tests.contracts.extract transformer_engine 2.18.0=path/to/source ...

writes ``tests/contracts/transformer_engine.json`` from the unpacked source of each release (a
checkout of its tag, or its wheel or sdist). A name is looked up where its users import it from and
followed through the packages' own imports, so moves inside a library need no change here, and a
name that a release does not offer has no row for it.
"""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

# What we call: `ops/apex.py`, `engines/deepspeed`, `ops/flash.py`, `engines/megatron`,
# `ops/transformer_engine.py`. A class stands for its constructor.
CALLS = {
    "apex": ("apex.optimizers.FusedAdam", "apex.optimizers.FusedAdam.step"),
    "deepspeed": (
        "deepspeed.init_distributed",
        "deepspeed.initialize",
        "deepspeed.runtime.zero.Init",
        *(
            f"deepspeed.runtime.engine.DeepSpeedEngine.{name}"
            for name in (
                "backward",
                "destroy",
                "forward",
                "get_global_grad_norm",
                "set_gradient_accumulation_boundary",
                "step",
            )
        ),
        "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3.get_param_id",
        "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3._get_param_partition_rank",
        "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3._get_fp32_grad_state_partition",
        "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3._partition_all_parameters",
        "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3._unflatten_partitioned_parameters",
        "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer.update_lp_params",
        "deepspeed.runtime.bf16_optimizer.BF16_Optimizer.update_lp_params",
        "deepspeed.runtime.bf16_optimizer.BF16_Optimizer.clear_lp_grads",
    ),
    "flash_attn": ("flash_attn.flash_attn_func", "flash_attn.flash_attn_varlen_func"),
    "megatron_core": tuple(
        f"megatron.core.{name}"
        for name in (
            "distributed.DistributedDataParallel",
            "distributed.DistributedDataParallel.start_param_sync",
            "distributed.DistributedDataParallelConfig",
            "distributed.finalize_model_grads",
            "models.gpt.gpt_layer_specs.get_gpt_layer_local_spec",
            # Which it calls from 0.17 on, and so below.
            "models.gpt.gpt_layer_specs.get_gpt_layer_local_submodules",
            "models.gpt.gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec",
            "models.gpt.gpt_layer_specs.get_gpt_layer_with_transformer_engine_submodules",
            "models.gpt.gpt_model.GPTModel",
            "models.gpt.gpt_model.GPTModel.forward",
            "optimizer.OptimizerConfig",
            "optimizer.ParamKey",
            "optimizer.ParamPredicate",
            "optimizer.distrib_optimizer.DistributedOptimizer._copy_main_params_to_model_params",
            "optimizer.distrib_optimizer.DistributedOptimizer._get_model_param_range_map",
            "optimizer.distrib_optimizer.DistributedOptimizer.step_with_ready_grads",
            "optimizer.distrib_optimizer.DistributedOptimizer.zero_grad",
            "optimizer.get_megatron_optimizer",
            "optimizer.optimizer.MegatronOptimizer.clip_grad_norm",
            "optimizer.optimizer.MegatronOptimizer.get_grad_norm",
            "optimizer.optimizer.MixedPrecisionOptimizer.prepare_grads",
            "pipeline_parallel.p2p_communication.P2PCommunicator",
            "pipeline_parallel.schedules.forward_backward_no_pipelining",
            "pipeline_parallel.schedules.forward_backward_pipelining_with_interleaving",
            "pipeline_parallel.schedules.forward_backward_pipelining_without_interleaving",
            "tensor_parallel.mappings.copy_to_tensor_model_parallel_region",
            "tensor_parallel.mappings.gather_from_sequence_parallel_region",
            "tensor_parallel.random.model_parallel_cuda_manual_seed",
            "transformer.transformer_block.TransformerBlockSubmodules",
        )
    ),
    "transformer_engine": (
        "transformer_engine.pytorch.Linear",
        "transformer_engine.pytorch.Linear.forward",
        "transformer_engine.pytorch.LayerNormLinear",
        "transformer_engine.pytorch.LayerNormLinear.forward",
        "transformer_engine.pytorch.autocast",
        "transformer_engine.pytorch.fp8_autocast",
        "transformer_engine.pytorch.checkpoint",
        *(
            f"transformer_engine.pytorch.{module}.{name}"
            for module in ("quantization", "fp8")  # from 2.9, and before it
            for name in (
                "check_fp8_support",
                "check_mxfp8_support",
                "check_fp8_block_scaling_support",
                "FP8GlobalStateManager.is_first_fp8_module",
                "FP8GlobalStateManager.reduce_and_update_fp8_tensors",
            )
        ),
        "transformer_engine.pytorch.module.base.TransformerEngineBaseModule.init_fp8_metadata",
        "transformer_engine.common.recipe.Format",
        "transformer_engine.common.recipe.DelayedScaling",
        "transformer_engine.common.recipe.Float8CurrentScaling",
        "transformer_engine.common.recipe.Float8BlockScaling",
        "transformer_engine.common.recipe.MXFP8BlockScaling",
    ),
}

Parameter = dict[str, str]  # name, kind, and, where there is one, the default's source


class Source:
    """The Python files of one release."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.parsed: dict[str, ast.Module | None] = {}

    def module(self, name: str) -> ast.Module | None:
        """The module of that dotted name, or None."""
        if name not in self.parsed:
            stem = self.root.joinpath(*name.split("."))
            paths = [p for p in (stem / "__init__.py", stem.with_suffix(".py")) if p.exists()]
            text = paths[0].read_text(encoding="utf-8") if paths else None
            self.parsed[name] = None if text is None else ast.parse(text)
        return self.parsed[name]

    def find(self, dotted: str) -> ast.AST | None:
        """The definition behind a public name, followed through imports; None if there is none."""
        parts = dotted.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            name = ".".join(parts[:cut])
            if self.module(name) is not None:
                found = self.member(name, parts[cut])
                for part in parts[cut + 1 :]:
                    found = _method(found, part)
                return found
        return None

    def member(self, module: str, name: str) -> ast.AST | None:
        """A name of a module: defined there, or imported into it."""
        tree = self.module(module)
        for node in [] if tree is None else tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                return node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.member(self._origin(module, node), alias.name)
        return None

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        """The absolute name of the module that an import names."""
        if not node.level:
            return node.module or ""
        package = module.split(".")
        if not self.root.joinpath(*package, "__init__.py").exists():
            package = package[:-1]
        package = package[: len(package) - (node.level - 1)]
        return ".".join([*package, *(node.module or "").split(".")])


def _method(found: ast.AST | None, name: str) -> ast.FunctionDef | None:
    body = found.body if isinstance(found, ast.ClassDef) else []
    return next((n for n in body if isinstance(n, ast.FunctionDef) and n.name == name), None)


def parameters(found: ast.AST) -> list[Parameter]:
    """Of a function, a method or a constructor (of dataclasses and enums too), without self."""
    if isinstance(found, ast.FunctionDef):
        rows = _of_function(found)
        return rows[1:] if rows and rows[0]["name"] in ("self", "cls") else rows
    assert isinstance(found, ast.ClassDef)
    init = _method(found, "__init__")
    if init is not None:
        return parameters(init)
    if any("Enum" in ast.unparse(base) for base in found.bases):
        names = [n.targets[0].id for n in found.body if isinstance(n, ast.Assign)]  # type: ignore[attr-defined]
        return [{"name": name, "kind": "member"} for name in names]
    rows = []
    for node in found.body:  # a dataclass
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            default = {} if node.value is None else {"default": ast.unparse(node.value)}
            rows.append({"name": node.target.id, "kind": "positional_or_keyword", **default})
    return rows


def _of_function(found: ast.FunctionDef) -> list[Parameter]:
    a = found.args
    rows: list[Parameter] = []
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + list(a.defaults)
    for number, (argument, default) in enumerate(zip(plain, defaults)):
        kind = "positional_only" if number < len(a.posonlyargs) else "positional_or_keyword"
        rows.append(_row(argument.arg, kind, default))
    if a.vararg:
        rows.append(_row(a.vararg.arg, "var_positional", None))
    rows += [_row(k.arg, "keyword_only", d) for k, d in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg:
        rows.append(_row(a.kwarg.arg, "var_keyword", None))
    return rows


def _row(name: str, kind: str, default: ast.expr | None) -> Parameter:
    return {"name": name, "kind": kind} | (
        {} if default is None else {"default": ast.unparse(default)}
    )


def extract(library: str, sources: dict[str, Path]) -> dict[str, Any]:
    """The data file: for each call, each signature it has had and the versions that have it."""
    calls: dict[str, list[dict[str, Any]]] = {call: [] for call in CALLS[library]}
    for version, root in sources.items():
        source = Source(root)
        for call, rows in calls.items():
            found = source.find(call)
            if found is None:
                continue
            signature = parameters(found)
            for row in rows:
                if row["parameters"] == signature:
                    row["versions"].append(version)
                    break
            else:
                rows.append({"versions": [version], "parameters": signature})
    return {"library": library, "versions": list(sources), "calls": calls}


def as_json(data: dict[str, Any]) -> str:
    """Readable in a diff: one line a parameter."""
    lines = [f' "library": {json.dumps(data["library"])},']
    lines += [f' "versions": {json.dumps(data["versions"])},', ' "calls": {']
    for call, rows in data["calls"].items():
        lines.append(f"  {json.dumps(call)}: [")
        for row in rows:
            lines.append(f'   {{"versions": {json.dumps(row["versions"])}, "parameters": [')
            lines.append(",\n".join(f"    {json.dumps(p)}" for p in row["parameters"]))
            lines.append("   ]}" + ("," if row is not rows[-1] else ""))
        lines.append("  ]" + ("," if call != list(data["calls"])[-1] else ""))
    return "\n".join(["{", *lines, " }", "}"]) + "\n"


def main() -> None:
    """Write the data of one library."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("library", choices=sorted(CALLS))
    parser.add_argument("release", nargs="+", help="VERSION=FOLDER, oldest first")
    arguments = parser.parse_args()
    sources = {v: Path(p) for v, p in (r.split("=", 1) for r in arguments.release)}
    data = extract(arguments.library, sources)
    (HERE / f"{arguments.library}.json").write_text(as_json(data), encoding="utf-8")


if __name__ == "__main__":
    main()
