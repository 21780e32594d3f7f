"""Copy a checkpoint tensor by tensor, rounded to bf16: names and shards stay as they are, no model class is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trtbuild.compress.metadata import write_metadata
from trtbuild.compress.request import Meter, Request
from trtbuild.compress.source import read_tensors, refuse_nonfinite
from trtbuild.model import INDEX

_ROUNDED = (torch.float32, torch.float64, torch.float16)


def copy_checkpoint(
    request: Request, shards: list[str], meter: Meter, replaced: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write the source's `shards` and metadata to the output, floating-point tensors in bf16.

    Args:
        request: Where the source, the tokenizer and the output are.
        shards: The source's safetensors files.
        meter: Told after every shard.
        replaced: Tensors, by their name in the files, that take the place of the source's.

    Raises:
        ArtifactError: A tensor holds NaN or infinity.
    """
    remaining = dict(replaced or {})
    for number, shard in enumerate(shards):
        tensors = {}
        with safe_open(request.source / shard, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = remaining.pop(name, None)
                tensor = file.get_tensor(name) if tensor is None else tensor
                tensors[name] = tensor.to(torch.bfloat16).contiguous() if tensor.dtype in _ROUNDED else tensor
        refuse_nonfinite(
            {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}, request.source
        )
        save_file(tensors, request.output / shard, metadata={"format": "pt"})
        meter.advance(1, f"copy: file {number + 1} of {len(shards)}")
    if remaining:
        raise KeyError(f"no tensor {next(iter(remaining))} in {request.source}")
    if (request.source / INDEX).exists():
        _write_index(request.output)
    write_metadata(request, None)


def _write_index(output: Path) -> None:
    tensors = read_tensors(output)
    index = {
        "metadata": {"total_size": sum(info.bytes for info in tensors.values())},
        "weight_map": {name: tensors[name].shard for name in sorted(tensors)},
    }
    (output / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
