"""The key of everything that decides the bytes of a compression: an unfinished one goes on only under the same key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from trtbuild.compress.batches import batch_tokens
from trtbuild.compress.request import Request
from trtbuild.manifest import digest_json
from trtbuild.safetensors_header import TensorInfo
from trtbuild.toolchain import COMPRESS_REVISION, version_of

_LIBRARIES = ("torch", "transformers", "nvidia-modelopt", "safetensors")


def resume_key(
    request: Request, source: Mapping[str, TensorInfo], ids: Sequence[Sequence[int]], device: torch.device
) -> str:
    """A digest of the request, its inputs, the libraries, and how this host computes.

    Args:
        request: Its places do not matter; its `key` names the source's bytes where it is given.
        source: The tensors of the source.
        ids: The calibration samples.
        device: Where layers run.
    """
    return digest_json(
        {
            "revision": COMPRESS_REVISION,
            "libraries": {name: version_of(name) for name in _LIBRARIES},
            "host": host_facts(device),
            "request": {
                "key": request.key,
                "format": request.format,
                "group_size": request.group_size,
                "sparsity": request.sparsity,
                "sparsity_method": request.sparsity_method,
                "kv_cache": request.kv_cache,
                "exclude": list(request.exclude),
                "overrides": [list(item) for item in request.overrides],
                "checkpoint": request.checkpoint,
                "auto": None if request.auto is None else asdict(request.auto),
                "trust_remote_code": request.trust_remote_code,
            },
            "files": _files(request, source) if request.key is None else None,
            "samples": [list(sample) for sample in ids],
            "batch_tokens": batch_tokens(device),
        }
    )


def host_facts(device: torch.device) -> dict[str, Any]:
    """How this host computes.

    Sums are split among threads and vector units, so that another number of them may end in other last bits.
    """
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "capability": list(torch.cuda.get_device_capability())}
    return {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _files(request: Request, source: Mapping[str, TensorInfo]) -> list[list[Any]]:
    """The source's files by what a change of their bytes would change."""
    files = []
    for name in sorted({"config.json", *(info.shard for info in source.values())}):
        status = (request.source / name).stat()
        files.append([name, status.st_size, status.st_mtime_ns, status.st_ino])
    return files
