"""Write the quantized model as ModelOpt's unified Hugging Face checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trtbuild.compress.metadata import read_json, write_json, write_metadata
from trtbuild.compress.request import Request
from trtbuild.compress.selection import Selection
from trtbuild.errors import ToolError

_SHARD_BYTES = 5_000_000_000
HF_QUANT_CONFIG = "hf_quant_config.json"


def export(model: nn.Module, selection: Selection, request: Request) -> None:
    """Write `model` to the request's output directory; the model cannot be used afterwards.

    Codes are computed from the weights in float32, and only what stays uncoded is rounded to bf16, on its way out:
    a model rounded before would be rounded twice. (The exporter's `dtype` says in what type it computes codes; it casts
    nothing that it leaves uncoded.)

    Raises:
        ToolError: ModelOpt could not undo the names that Transformers gave the tensors.
    """
    from modelopt.torch.export import export_hf_checkpoint

    parameter_names = {
        name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_floating_point()
    }
    handle = model.register_state_dict_post_hook(_caster(parameter_names))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with _experts_as_they_are(request):
            export_hf_checkpoint(model, dtype=torch.float32, export_dir=request.output, max_shard_size=_SHARD_BYTES)
    handle.remove()
    skipped = [str(item.message) for item in caught if "name" in str(item.message) and "skipped" in str(item.message)]
    if skipped:
        raise ToolError(f"ModelOpt exported tensors under names that no engine knows: {skipped[0]}")
    _complete_metadata(selection, request)


@contextmanager
def _experts_as_they_are(request: Request) -> Iterator[None]:
    """Correct two habits of ModelOpt 0.47's exporter with the experts of an INT4-AWQ model, for one export.

    It knows the projections of experts by the model's class name, and refuses other classes. And it gives the gate and
    up projections of an expert, row by row, the larger of both group scales (meant for NVFP4's one scale per tensor),
    which costs up to a bit of precision and which no reader of this format asks for.
    """
    from modelopt.torch.export import unified_export_hf as exporter

    known, sync = exporter.get_experts_list, exporter.sync_moe_gate_up_amax
    exporter.get_experts_list = _expert_projections
    if request.format == "int4_awq":
        exporter.sync_moe_gate_up_amax = lambda model: 0  # noqa: ARG005  the number of pairs that it changed
    try:
        yield
    finally:
        exporter.get_experts_list, exporter.sync_moe_gate_up_amax = known, sync


def _expert_projections(block: Any, model_type: str) -> list[list[nn.Module]]:  # noqa: ARG001  the exporter's signature
    """Each projection of all experts of a block: they get one common smoothing."""
    return [[getattr(expert, name) for expert in block.experts] for name in ("gate_proj", "down_proj", "up_proj")]


def _caster(parameter_names: set[str]) -> Any:
    """A hook that rounds to bf16 what the exporter takes out of the model and has not turned into codes."""

    def cast(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:  # noqa: ARG001
        for name, tensor in state.items():
            smooth = name.endswith("input_quantizer._pre_quant_scale")
            wide = isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.float32, torch.float16)
            if wide and (smooth or name in parameter_names):
                state[name] = tensor.to(torch.bfloat16)

    return cast


def _complete_metadata(selection: Selection, request: Request) -> None:
    """Complete both quantization configs: every unquantized layer named, both telling the same."""
    path = request.output / HF_QUANT_CONFIG
    nested = read_json(path)
    flat = read_json(request.output / "config.json")["quantization_config"]
    section = nested["quantization"]
    section["exclude_modules"] = sorted({*(section.get("exclude_modules") or ()), *selection.uncompressed})
    if request.format == "int4_awq":
        section |= {"group_size": request.group_size, "has_zero_point": False, "pre_quant_scale": True}
    flat["ignore"] = section["exclude_modules"]
    _check_producer(nested, flat)
    write_json(path, nested)
    write_metadata(request, flat)


def _check_producer(*configs: Mapping[str, Any]) -> None:
    """Engines recognise the format by its producer's name."""
    for config in configs:
        if config.get("producer", {}).get("name") != "modelopt":
            raise ToolError("ModelOpt's export does not name its producer", "use nvidia-modelopt 0.47")
