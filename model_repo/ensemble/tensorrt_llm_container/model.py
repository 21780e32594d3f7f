"""The Triton Python model `tensorrt_llm` for TensorRT engines: the one that TensorRT-LLM's own container carries.

Triton's TensorRT-LLM containers hold the python form of the inflight batcher under /app/all_models, from where
upstream's guide copies it. It fits the TensorRT-LLM beside it, so it is loaded from there and is no part of this
repository.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from model_repo.ensemble.settings import Settings


class TritonPythonModel:
    """Hands everything on to the container's model."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the container's model.py and start its model."""
        path = Path(Settings(args).text("container_model_py"))
        spec = importlib.util.spec_from_file_location("trtllm_container_model", path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise pb_utils.TritonModelException(
                f"{path}: there is no such file; start this repository in a container such as "
                "nvcr.io/nvidia/tritonserver:YY.MM-trtllm-python-py3 with TensorRT-LLM <= 1.2, or use backend "
                "tensorrtllm"
            )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._model: Any = module.TritonPythonModel()
        self._model.initialize(args)

    def execute(self, requests: list[Any]) -> Any:
        """The container's answer."""
        return self._model.execute(requests)

    def finalize(self) -> None:
        """End the container's model."""
        self._model.finalize()
