"""Read the checkpoint that is to be compressed: its facts, its tensors, and the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from trtbuild.checkpoint_files import open_directory
from trtbuild.compress.request import Request
from trtbuild.errors import ArtifactError, HostError, Problem, RecipeError
from trtbuild.model import INDEX, ModelFacts, read_facts
from trtbuild.runtime.checkpoint import load_model
from trtbuild.runtime.checkpoint_files import weight_files
from trtbuild.runtime.experts import unfuse_experts
from trtbuild.safetensors_header import HeaderError, TensorInfo, read_header


def check_source(request: Request) -> ModelFacts:
    """Return the source's facts; they were checked by the plan, but files may have changed since.

    Raises:
        ArtifactError: A shard is missing, truncated or contradicts its header.
        CompatibilityError: The weights are pickles.
        RecipeError: The source is quantized already.
    """
    facts = read_facts(open_directory(request.source))
    if facts.quantization is not None:
        wanted = ("quant_algo", "bits", "group_size", "kv_cache_quant_algo")
        details = [f"{name} {facts.quantization.parameters[name]}" for name in wanted
                   if facts.quantization.parameters.get(name)]  # fmt: skip
        what = ", ".join([facts.quantization.method, *details])
        raise RecipeError(
            [
                Problem(
                    "model.path",
                    f"{request.source} is already quantized ({what})",
                    "give the original bf16 or fp16 checkpoint; trtbuild quantizes it",
                )
            ]
        )
    return facts


def read_tensors(directory: Path) -> dict[str, TensorInfo]:
    """Return the description of every tensor of the directory's model, by name.

    Raises:
        ArtifactError: A file of the model is missing, or a header does not fit its file.
    """
    files = open_directory(directory)
    tensors: dict[str, TensorInfo] = {}
    sizes = files.names_and_sizes()
    for path in weight_files(directory):
        shard = path.relative_to(directory).as_posix()
        if shard not in sizes:
            raise ArtifactError(f"{directory}: {shard} is missing, {INDEX} names it", "write it again")
        try:
            tensors.update({info.name: info for info in read_header(files, shard)[1]})
        except HeaderError as error:
            raise ArtifactError(f"{directory}: {error}", "write it again") from error
    return tensors


def pick_device(wanted: str) -> torch.device:
    """Return the device to calibrate on; "auto" takes a GPU where there is one.

    Raises:
        HostError: cuda is wanted and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise HostError("device: cuda is wanted, but PyTorch sees no GPU", "use device: cpu, or install the driver")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def load_source(request: Request, device: torch.device) -> nn.Module:
    """Return the model with separate experts, in float32 on a CPU (three times faster there than bf16), else bf16.

    Raises:
        ArtifactError: A tensor is missing, unexpected, mis-shaped, or holds NaN or infinity.
        CompatibilityError: An architecture that cannot be loaded.
    """
    loaded = load_model(
        request.source,
        device=device,
        dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
        weights="expanded",
        attn_implementation="sdpa",
        trust_remote_code=request.trust_remote_code,
    )
    refuse_nonfinite(dict(loaded.model.named_parameters()), request.source)
    unfuse_experts(loaded.model)
    return loaded.model


def refuse_nonfinite(tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    """Raise for tensors that hold NaN or infinity: their scales would make the whole layer NaN.

    Raises:
        ArtifactError: Names the tensors.
    """
    damaged = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if damaged:
        shown = ", ".join(damaged[:3]) + (f" and {len(damaged) - 3} more" if len(damaged) > 3 else "")
        raise ArtifactError(f"{where}: {shown} holds NaN or infinite values", "use an undamaged checkpoint")
