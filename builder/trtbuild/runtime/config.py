"""What `engine.json` says: the limits and choices that an engine is loaded with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trtbuild.errors import ArtifactError
from trtbuild.runtime.drafts.config import SpeculativeConfig

SCHEMA_VERSION = 1
RUNTIME = "embedded"
POLICIES = ("GUARANTEED_NO_EVICT", "MAX_UTILIZATION")
DEVICES = ("auto", "cpu", "cuda")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float64")
WEIGHTS = ("auto", "expanded", "packed")
KV_DTYPES = ("auto", "fp8", "nvfp4", "int8")


@dataclass(frozen=True, slots=True)
class KvCacheConfig:
    """The paged KV cache: how much it holds, in which blocks, in which form."""

    dtype: str = "auto"
    tokens_per_block: int = 32
    max_tokens: int | None = 8192
    free_gpu_memory_fraction: float = 0.9
    enable_block_reuse: bool = True


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The limits and choices of one engine; every field has TensorRT-LLM's LLM-API name where one exists."""

    max_batch_size: int = 8
    max_num_tokens: int = 512
    max_seq_len: int = 1024
    kv_cache: KvCacheConfig = field(default_factory=KvCacheConfig)
    capacity_scheduler_policy: str = "GUARANTEED_NO_EVICT"
    enable_chunked_prefill: bool = True
    device: str = "auto"
    compute_dtype: str = "auto"
    weights: str = "auto"
    trust_remote_code: bool = False
    speculative: SpeculativeConfig | None = None

    def __post_init__(self) -> None:
        """Refuse values that no engine can run with.

        Raises:
            ArtifactError: naming the field, its value and what is allowed.
        """
        _check(self)

    @classmethod
    def read(cls, engine_dir: Path | str) -> EngineConfig:
        """The configuration in `engine_dir`/engine.json.

        Raises:
            ArtifactError: the file is missing, damaged, of another schema version or for another runtime.
        """
        path = Path(engine_dir) / "engine.json"
        data = _read_json(path)
        version = data.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{path}: schema_version is {version!r}, this version of trtbuild reads {SCHEMA_VERSION}",
                "build the package again with this version",
            )
        runtime = data.pop("runtime", None)
        if runtime != RUNTIME:
            raise ArtifactError(
                f"{path}: runtime is {runtime!r}, the embedded engine reads only {RUNTIME!r}",
                "build with runtime.kind: embedded",
            )
        kv_cache = data.pop("kv_cache", {})
        if not isinstance(kv_cache, dict):
            raise ArtifactError(f"{path}: kv_cache is {kv_cache!r}, not an object", "build the package again")
        section = data.pop("speculative", None)
        _refuse_unknown(path, data, cls, "")
        _refuse_unknown(path, kv_cache, KvCacheConfig, "kv_cache.")
        try:
            speculative = None if section is None else SpeculativeConfig.of(section)
            return cls(kv_cache=KvCacheConfig(**kv_cache), speculative=speculative, **data)
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error.message}", error.hint) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path}: there is no such file, so this is no engine directory", "give the package's engine/ directory"
        ) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read as JSON ({error})", "build the package again") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: holds {type(data).__name__}, not an object", "build the package again")
    return data


def _refuse_unknown(path: Path, data: Mapping[str, Any], cls: type[Any], prefix: str) -> None:
    known = [each.name for each in fields(cls) if each.name not in ("kv_cache", "speculative")]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ArtifactError(
            f"{path}: unknown key {prefix}{unknown[0]}; allowed are {', '.join(known)}",
            "build the package again with this version of trtbuild",
        )


def _check(config: EngineConfig) -> None:
    kv = config.kv_cache
    for name, count in (
        ("max_batch_size", config.max_batch_size),
        ("max_num_tokens", config.max_num_tokens),
        ("max_seq_len", config.max_seq_len),
        ("kv_cache.tokens_per_block", kv.tokens_per_block),
    ):
        _check_count(name, count)
    if kv.max_tokens is not None:
        _check_count("kv_cache.max_tokens", kv.max_tokens)
    for name, value, allowed in (
        ("kv_cache.dtype", kv.dtype, KV_DTYPES),
        ("capacity_scheduler_policy", config.capacity_scheduler_policy, POLICIES),
        ("device", config.device, DEVICES),
        ("compute_dtype", config.compute_dtype, COMPUTE_DTYPES),
        ("weights", config.weights, WEIGHTS),
    ):
        if value not in allowed:
            raise ArtifactError(f"{name}: {value!r} is not allowed; allowed are {', '.join(allowed)}")
    for name, flag in (
        ("enable_chunked_prefill", config.enable_chunked_prefill),
        ("trust_remote_code", config.trust_remote_code),
        ("kv_cache.enable_block_reuse", kv.enable_block_reuse),
    ):
        if not isinstance(flag, bool):
            raise ArtifactError(f"{name}: {flag!r} is not allowed; allowed are true and false")
    _check_fraction(kv.free_gpu_memory_fraction)
    if config.max_num_tokens < config.max_batch_size:
        raise ArtifactError(
            f"max_num_tokens: {config.max_num_tokens} is less than max_batch_size {config.max_batch_size}",
            f"raise it to at least {config.max_batch_size}: every running request takes one token a step",
        )
    if kv.max_tokens is not None and kv.max_tokens < kv.tokens_per_block:
        raise ArtifactError(
            f"kv_cache.max_tokens: {kv.max_tokens} is less than one block of {kv.tokens_per_block} tokens",
            f"raise it to at least {kv.tokens_per_block}",
        )


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArtifactError(f"{name}: {value!r} is not allowed; it is a whole number of at least 1")


def _check_fraction(value: object) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 < value <= 1
    if not good:
        raise ArtifactError(f"kv_cache.free_gpu_memory_fraction: {value!r} is not allowed; it is above 0 and at most 1")
