"""Layout `llm`: one model with the tokenization inside."""

from __future__ import annotations

import shutil
from pathlib import Path

from trtbuild.adapters import triton_contract
from trtbuild.adapters.triton_config import Model, parse
from trtbuild.adapters.triton_spec import RepositorySpec, boolean
from trtbuild.errors import Problem
from trtbuild.render import data_dir, render

LAYOUT = "llm"
_CANCELLATION_CHECK_PERIOD_MS = 50
_TEMPLATE = "llm/config.pbtxt.j2"


def write(spec: RepositorySpec, out: Path) -> None:
    """Write the model of `spec` under `out`."""
    model = out / spec.model_name
    version = model / "1"
    version.mkdir(parents=True)
    (model / "config.pbtxt").write_text(render(_TEMPLATE, _context(spec)), encoding="utf-8")
    for source in sorted((data_dir("model_repo") / spec.layout).glob("*.py")):
        shutil.copyfile(source, version / source.name)


def check(model: Model) -> list[Problem]:
    """Inputs, outputs and parameters against what the template declares: clients rely on every one."""
    return triton_contract.differences(model, parse(render(_TEMPLATE, _context(_ANY_SPEC))), LAYOUT)


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
    }
    return {
        "model_name": spec.model_name,
        "decoupled": boolean(spec.streaming),
        "parameters": list(parameters.items()),
    }


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
