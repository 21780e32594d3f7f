"""What decides a model repository."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trtbuild.adapters.triton_parameters import EngineParameters

OWN_MODEL_FILES = "trtbuild"


@dataclass(frozen=True, slots=True)
class RepositorySpec:
    """Everything that decides a model repository; sizes are in tokens.

    Only for layouts `ensemble` and `tokens`: `max_batch_size` (requests at a time), `engine` (what TensorRT-LLM's own
    backends read) and, beside it, `draft` (the same of a draft model, which proposes `draft_tokens` at a time), and
    `engine_line`, the release line where its backend has other tensors than the newest. Only
    for the runtime `trtllm`: `model_py` takes the container's own model files with ``upstream``, which then reads
    `llm_args` and finds the engine at `model_path`; `instance_count` instances each get a group of `gpu_device_ids`,
    such as ``0,1;2,3``; `lora_adapters` are directories in the engine directory, by the name that clients send. For
    `trtllm-engine`, `lora_adapters_dir` is where the engine directory has its adapters, by task id.
    """

    model_name: str
    runtime: str
    layout: str
    streaming: bool
    max_seq_len: int
    max_input_tokens: int
    max_output_tokens: int
    default_max_tokens: int
    # Relative to the model's directory: the package keeps engine/ beside model_repository/.
    engine_dir: str = "../../engine"
    trust_remote_code: bool = False
    max_batch_size: int = 1
    engine: EngineParameters | None = None
    draft: EngineParameters | None = None
    draft_tokens: int = 0
    engine_line: str | None = None
    model_py: str = OWN_MODEL_FILES
    instance_count: int = 1
    gpu_device_ids: str = ""
    lora_adapters_dir: str | None = None
    lora_adapters: Mapping[str, str] = field(default_factory=dict)
    llm_args: Mapping[str, Any] = field(default_factory=dict)
    model_path: str = "/package/engine"


def boolean(value: bool) -> str:  # noqa: FBT001 - a conversion has one argument
    """A truth value as a parameter's text."""
    return "true" if value else "false"
