"""Copy a checkpoint tensor by tensor, rounded to bf16: names and shards stay as they are, no model class is needed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trtbuild.compress.metadata import write_json, write_metadata
from trtbuild.compress.request import Meter, Request
from trtbuild.compress.source import refuse_nonfinite
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
    weight_map: dict[str, str] = {}
    size = 0
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
        weight_map |= dict.fromkeys(tensors, shard)
        size += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, request.output / shard, metadata={"format": "pt"})
        meter.advance(1, f"copy: file {number + 1} of {len(shards)}")
    if remaining:
        raise KeyError(f"no tensor {next(iter(remaining))} in {request.source}")
    if (request.source / INDEX).exists():
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(request.output / INDEX, index)
    write_metadata(request, None)
