"""Layout `llm`: one model with the tokenization inside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from trtbuild.adapters import triton_contract, triton_llmapi
from trtbuild.adapters.triton_config import Model, parse
from trtbuild.adapters.triton_spec import OWN_MODEL_FILES, RepositorySpec, boolean
from trtbuild.errors import Problem
from trtbuild.render import data_dir, render

LAYOUT = "llm"
_CANCELLATION_CHECK_PERIOD_MS = 50
_TEMPLATE = "llm/config.pbtxt.j2"
_MODEL_FILES = (OWN_MODEL_FILES, triton_llmapi.UPSTREAM)


def write(spec: RepositorySpec, out: Path) -> None:
    """Write the model of `spec` under `out`."""
    model = out / spec.model_name
    version = model / "1"
    version.mkdir(parents=True)
    if spec.model_py == triton_llmapi.UPSTREAM:
        triton_llmapi.render_stock(
            model, _stock_context(spec), llm_args=spec.llm_args, period_ms=_CANCELLATION_CHECK_PERIOD_MS
        )
        return
    (model / "config.pbtxt").write_text(render(_TEMPLATE, _context(spec)), encoding="utf-8")
    for source in sorted((data_dir("model_repo") / spec.layout).glob("*.py")):
        shutil.copyfile(source, version / source.name)


def check(model: Model) -> list[Problem]:
    """Inputs, outputs and parameters against what the template declares: clients rely on every one."""
    return triton_contract.differences(model, parse(render(_TEMPLATE, _context(_ANY_SPEC))), LAYOUT)


def refusals(spec: RepositorySpec) -> list[Problem]:
    """What this layout cannot write of a spec."""
    problems = []
    if spec.model_py not in _MODEL_FILES:
        hint = f"use {' or '.join(_MODEL_FILES)}"
        problems.append(Problem("serving.model_py", f"{spec.model_py!r} is not known", hint))
    extra = _trtllm_only(spec)
    if spec.runtime != "trtllm" and extra:
        message = f"the runtime {spec.runtime} has no {', '.join(extra)}"
        problems.append(Problem("serving", message, "leave them out, or use the runtime trtllm"))
    return problems


def _trtllm_only(spec: RepositorySpec) -> list[str]:
    given = {
        "model_py": spec.model_py != OWN_MODEL_FILES,
        "instance_count": spec.instance_count != 1,
        "gpu_device_ids": bool(spec.gpu_device_ids),
        "lora_adapters": bool(spec.lora_adapters),
    }
    return [name for name, is_given in given.items() if is_given]


def _context(spec: RepositorySpec) -> dict[str, object]:
    parameters = {
        "layout": spec.layout,
        "runtime": spec.runtime,
        "engine_dir": spec.engine_dir,
        "max_seq_len": spec.max_seq_len,
        "max_input_tokens": spec.max_input_tokens,
        "max_output_tokens": spec.max_output_tokens,
        "default_max_tokens": spec.default_max_tokens,
        "streaming": boolean(spec.streaming),
        "trust_remote_code": boolean(spec.trust_remote_code),
        "cancellation_check_period_ms": _CANCELLATION_CHECK_PERIOD_MS,
    } | _trtllm_parameters(spec)
    return {
        "model_name": spec.model_name,
        "decoupled": boolean(spec.streaming),
        "instance_count": spec.instance_count,
        "parameters": list(parameters.items()),
    }


def _stock_context(spec: RepositorySpec) -> dict[str, Any]:
    parameters = {
        "layout": spec.layout,
        "runtime": spec.runtime,
        "model_py": spec.model_py,
        "streaming": boolean(spec.streaming),
    } | _trtllm_parameters(spec)
    return {
        "model_name": spec.model_name,
        "decoupled": boolean(spec.streaming),
        "instance_count": spec.instance_count,
        "model_path": spec.model_path,
        "parameters": list(parameters.items()),
    }


def _trtllm_parameters(spec: RepositorySpec) -> dict[str, object]:
    """What only that runtime reads, where it was asked for."""
    parameters: dict[str, object] = {}
    if spec.gpu_device_ids:
        parameters["gpu_device_ids"] = spec.gpu_device_ids
    if spec.lora_adapters:
        parameters["lora_adapters"] = json.dumps(dict(spec.lora_adapters), sort_keys=True)
    return parameters


_ANY_SPEC = RepositorySpec(
    model_name="any",
    runtime="embedded",
    layout=LAYOUT,
    streaming=True,
    max_seq_len=2,
    max_input_tokens=1,
    max_output_tokens=1,
    default_max_tokens=1,
)
