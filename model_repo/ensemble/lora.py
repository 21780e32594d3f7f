"""The package's own LoRA adapters: an engine that does not have one in its cache gets its arrays with the request.

The engine reads them at start (`lora_prefetch_dir`); where its cache has since given one up, it refuses a request with
`lora_task_id` alone (NVIDIA/TensorRT-LLM cpp/tensorrt_llm/batch_manager/peftCacheManager.cpp, addRequestPeft: "LoRA
task N not found in cache. Please send LoRA weights with request").
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from model_repo.llm.wire import Array

_FILES = {"lora_weights": "model.lora_weights.npy", "lora_config": "model.lora_config.npy"}
_NOT_CACHED = "not found in cache"


def arrays_for(directory: Path | None, inputs: Mapping[str, Array], refusal: str) -> dict[str, Array]:
    """What to send along where the engine has refused a request for want of its adapter; nothing in any other case.

    Args:
        directory: of the adapters, by task id.
        inputs: the request to the engine.
        refusal: the engine's words.
    """
    if directory is None or _NOT_CACHED not in refusal or "lora_task_id" not in inputs or "lora_weights" in inputs:
        return {}
    place = directory / str(int(inputs["lora_task_id"].reshape(-1)[0]))
    if not all((place / file).is_file() for file in _FILES.values()):
        return {}
    return {name: np.load(place / file, allow_pickle=False)[np.newaxis] for name, file in _FILES.items()}
