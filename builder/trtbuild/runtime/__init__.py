"""The embedded engine: a library that loads an engine directory and answers requests."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtbuild.runtime.config import EngineConfig, KvCacheConfig
    from trtbuild.runtime.drafts.config import SpeculativeConfig
    from trtbuild.runtime.engine import Engine
    from trtbuild.runtime.joined import JoinedScales
    from trtbuild.runtime.outputs import (
        Completion,
        EngineFacts,
        EngineStats,
        Output,
        RequestMetrics,
        TokenLogprob,
    )
    from trtbuild.runtime.request import Request
    from trtbuild.runtime.sampling_params import SamplingParams

_HOMES = {
    "Completion": "outputs",
    "Engine": "engine",
    "EngineConfig": "config",
    "EngineFacts": "outputs",
    "EngineStats": "outputs",
    "JoinedScales": "joined",
    "KvCacheConfig": "config",
    "Output": "outputs",
    "Request": "request",
    "RequestMetrics": "outputs",
    "SamplingParams": "sampling_params",
    "SpeculativeConfig": "drafts.config",
    "TokenLogprob": "outputs",
}

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineFacts",
    "EngineStats",
    "JoinedScales",
    "KvCacheConfig",
    "Output",
    "Request",
    "RequestMetrics",
    "SamplingParams",
    "SpeculativeConfig",
    "TokenLogprob",
]


def __getattr__(name: str) -> Any:
    """Load torch and the model classes only when a name is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
