"""The target and the runtime of a recipe for the embedded engine: values and their origins."""

from __future__ import annotations

from trtbuild.embedded_speculation import take_speculation
from trtbuild.model import ModelFacts
from trtbuild.serving_settings import DEPLOY_FILES
from trtbuild.setting_values import Settings
from trtbuild.settings import FROM_GPU_MEMORY, check_capacity, take_limits

_DEFAULT_MAX_NUM_TOKENS = 512
_GPU_ONLY = "only a GPU heeds it"


def take_embedded(settings: Settings, facts: ModelFacts) -> None:
    """The target and the runtime, for the embedded engine."""
    for name in ("gpu", "count"):
        settings.take(f"target.{name}", note=_GPU_ONLY if settings.given(f"target.{name}") else "")
    for name in ("kind", "version", "tensor_parallel_size", "pipeline_parallel_size"):
        settings.take(f"runtime.{name}")
    for name in ("device", "compute_dtype", "weights"):
        settings.take(f"runtime.{name}")
    take_limits(settings, facts, _DEFAULT_MAX_NUM_TOKENS, "default")
    _kv_cache(settings)
    take_speculation(settings, facts)


def _kv_cache(settings: Settings) -> None:
    batch, length = settings["runtime.max_batch_size"], settings["runtime.max_seq_len"]
    for name in ("tokens_per_block", "enable_block_reuse"):
        settings.take(f"runtime.kv_cache.{name}")
    settings.take("runtime.kv_cache.free_gpu_memory_fraction", note=_GPU_ONLY)
    from_memory = settings.recipe.runtime.device == "cuda" or settings.recipe.target.gpu is not None
    if from_memory:
        settings.take("runtime.kv_cache.max_tokens", None, FROM_GPU_MEMORY)
    else:
        settings.take("runtime.kv_cache.max_tokens", batch * length, "max_batch_size x max_seq_len")
    check_capacity(settings)


def embedded_files(_: Settings) -> tuple[tuple[str, ...], str]:
    """Every deployment file: the serve image carries this runtime."""
    return DEPLOY_FILES, "default"
