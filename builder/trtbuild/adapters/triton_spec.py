"""What decides a model repository."""

from __future__ import annotations

from dataclasses import dataclass

from trtbuild.adapters.triton_parameters import EngineParameters


@dataclass(frozen=True, slots=True)
class RepositorySpec:
    """Everything that decides a model repository; sizes are in tokens.

    `max_batch_size` (requests at a time) and `engine` (what TensorRT-LLM's own backends read) are of layout `ensemble`.
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


def boolean(value: bool) -> str:  # noqa: FBT001 - a conversion has one argument
    """A truth value as a parameter's text."""
    return "true" if value else "false"
