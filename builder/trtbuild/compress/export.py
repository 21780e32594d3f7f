"""ModelOpt's unified Hugging Face checkpoint: written from a whole model, or its tensors for one decoder layer.

Codes are computed in the type of the weights: float32 on a CPU, where only what stays uncoded is rounded to bf16, on
its way out; on a GPU bf16, as ModelOpt does with a model that was loaded as its files are. (The exporter's `dtype` says
in what type it computes codes; it casts nothing that it leaves uncoded.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trtbuild.compress.groups import FUSED_BY_ENGINES
from trtbuild.compress.metadata import read_json, write_json, write_metadata
from trtbuild.compress.request import Request
from trtbuild.compress.selection import Selection
from trtbuild.errors import CompatibilityError, ToolError
from trtbuild.toolchain import version_of
from trtbuild.weight_formats import is_solved, takes_group

_SHARD_BYTES = 5_000_000_000
_INT8_MAX = 127
HF_QUANT_CONFIG = "hf_quant_config.json"


def export(model: nn.Module, selection: Selection, request: Request) -> None:
    """Write `model` to the request's output directory; the model cannot be used afterwards.

    Raises:
        ToolError: ModelOpt could not undo the names that Transformers gave the tensors.
    """
    from modelopt.torch.export import export_hf_checkpoint

    with _rounded(model, selection), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with _experts_as_they_are(selection), _int8_cache():
            export_hf_checkpoint(model, dtype=_type_of(model), export_dir=request.output, max_shard_size=_SHARD_BYTES)
    skipped = [str(item.message) for item in caught if "name" in str(item.message) and "skipped" in str(item.message)]
    if skipped:
        raise ToolError(f"ModelOpt exported tensors under names that no engine knows: {skipped[0]}")
    nested = read_json(request.output / HF_QUANT_CONFIG)
    flat = read_json(request.output / "config.json")["quantization_config"]
    _complete_metadata(nested, flat, selection, request)


@dataclass(frozen=True, slots=True)
class Exported:
    """One decoder layer: its tensors by their names in files, and what ModelOpt's config is made from."""

    tensors: dict[str, torch.Tensor]
    layers: dict[str, Any]  # format and group size by module, as ModelOpt's exporter collects them
    kv_cache: str | None


def export_frame(frame: nn.Module, layer: str, selection: Selection) -> Exported:
    """What ModelOpt's exporter makes of the decoder layer named `layer`, the only one that `frame` has.

    These are the functions that `export_hf_checkpoint` calls in turn (modelopt/torch/export/unified_export_hf.py
    @0.47.0), less those that write files. `frame` cannot be used afterwards.

    Raises:
        ToolError: ModelOpt could not undo the names that Transformers gave the tensors.
    """
    from modelopt.torch.export import quant_utils
    from modelopt.torch.export import unified_export_hf as exporter
    from modelopt.torch.export.quant_aware_conversion import QuantConversionUnsupportedError

    layers: dict[str, Any] = {}
    process = quant_utils.process_layer_quant_config

    def keep(found: dict[str, Any]) -> Any:
        layers.update(found)
        return process(found)

    quant_utils.process_layer_quant_config = keep
    try:
        with (
            _rounded(frame, selection),
            warnings.catch_warnings(),
            _experts_as_they_are(selection),
            _int8_cache(),
            _one_cache(),
        ):
            warnings.simplefilter("ignore")
            state, config = exporter._export_transformers_checkpoint(frame, _type_of(frame))  # noqa: SLF001
    except AssertionError as error:
        if "different quantization formats" not in str(error):
            raise
        raise CompatibilityError(
            f"compress.overrides: in {layer} layers that take the same input have several formats, which ModelOpt's "
            "exporter refuses",
            "give all layers of this model that take one input (attention and feed-forward side by side) one format",
        ) from error
    finally:
        quant_utils.process_layer_quant_config = process
    own = {name: tensor for name, tensor in state.items() if name.startswith(f"{layer}.")}
    try:
        tensors = exporter.revert_weight_conversion_quant_aware(frame, own)
    except QuantConversionUnsupportedError as error:
        raise ToolError(f"ModelOpt exports tensors under names that no engine knows: {error}") from error
    return Exported(dict(tensors), layers, config["quantization"]["kv_cache_quant_algo"])


def write_config(
    model: nn.Module, layers: Mapping[str, Any], kv_cache: str | None, selection: Selection, request: Request
) -> None:
    """Write the configs of a checkpoint whose decoder layers were exported one by one.

    Args:
        model: The class; knows how names in files differ from its own.
        layers: What `export_frame` found in all layers together.
        kv_cache: The format of the KV cache in ModelOpt's words.
        selection: Of the whole model.
        request: Where to write.
    """
    import modelopt
    from modelopt.torch.export import quant_utils
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.export.quant_aware_conversion import build_reverse_name_mapper, revert_quant_config_names

    section: dict[str, Any] = {"quant_algo": None, "kv_cache_quant_algo": None}
    section.update(quant_utils.process_layer_quant_config(dict(layers)))
    if kv_cache is not None:
        section["kv_cache_quant_algo"] = kv_cache
    revert_quant_config_names(section, build_reverse_name_mapper(model))
    nested = {"producer": {"name": "modelopt", "version": modelopt.__version__}, "quantization": section}
    _complete_metadata(nested, convert_hf_quant_config_format(nested), selection, request)


def write_uniform_config(section: Mapping[str, object], selection: Selection, request: Request) -> None:
    """Write the configs of a checkpoint whose quantized layers are all alike, without ModelOpt.

    Args:
        section: Format and group size as ModelOpt names them.
        selection: Of the whole model.
        request: Where to write.
    """
    producer = {"name": "modelopt", "version": version_of("nvidia-modelopt")}
    whole = {"quant_algo": section["quant_algo"], "kv_cache_quant_algo": None, **section, "exclude_modules": []}
    flat = {"ignore": [], "quant_algo": section["quant_algo"], "producer": producer, "quant_method": "modelopt"}
    _complete_metadata({"producer": producer, "quantization": whole}, flat, selection, request)


def _type_of(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


@contextmanager
def _one_cache() -> Iterator[None]:
    """While open, the exporter does not give the GPU's memory back after every linear layer: that waits for the GPU."""
    empty = torch.cuda.empty_cache
    torch.cuda.empty_cache = lambda: None
    try:
        yield
    finally:
        torch.cuda.empty_cache = empty


def _add_smoothing(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:  # noqa: ARG001
    """A hook that adds ones as smoothing of INT4 layers that are joined to no other.

    TensorRT-LLM does not load these without; it ignores the smoothing of joined layers, and loads no experts in this
    format (NVIDIA/TensorRT-LLM: tensorrt_llm/_torch/modules/linear.py @ed53795b, `W4A16_AWQ_LinearMethod`).
    """
    joined = {leaf for group in FUSED_BY_ENGINES for leaf in group} | {"qkv_proj", "gate_up_proj"}
    for layer in [name.removesuffix(".weight_scale") for name in state if name.endswith(".weight_scale")]:
        if layer.rpartition(".")[2] not in joined and ".experts." not in layer:
            size = state[f"{layer}.weight"].shape[1]
            state[f"{layer}.pre_quant_scale"] = torch.ones(size, dtype=torch.bfloat16)


@contextmanager
def _rounded(model: nn.Module, selection: Selection) -> Iterator[None]:
    """While open, what the exporter takes out of the model and has not turned into codes is bf16."""
    names = {
        name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_floating_point()
    }
    handles = [model.register_state_dict_post_hook(_caster(names))]
    if any(map(is_solved, selection.formats.values())):
        handles.append(model.register_state_dict_post_hook(_add_smoothing))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _experts_as_they_are(selection: Selection) -> Iterator[None]:
    """Correct two habits of ModelOpt 0.47's exporter with the experts of an AWQ model, for one export.

    It knows the projections of experts by the model's class name, and refuses other classes. And it gives the gate and
    up projections of an expert, row by row, the larger of both group scales (meant for NVFP4's one scale per tensor),
    which costs up to a bit of precision and which no reader of this format asks for. (For W4A8 it fails; the one
    scale per tensor that those projections must share is set by the exporter's own fusion.)
    """
    from modelopt.torch.export import unified_export_hf as exporter

    known, sync = exporter.get_experts_list, exporter.sync_moe_gate_up_amax
    exporter.get_experts_list = _expert_projections
    experts = {chosen for name, chosen in selection.formats.items() if ".experts." in name}
    if any(map(takes_group, experts or selection.formats.values())):
        exporter.sync_moe_gate_up_amax = lambda model: 0  # noqa: ARG005  the number of pairs that it changed
    try:
        yield
    finally:
        exporter.get_experts_list, exporter.sync_moe_gate_up_amax = known, sync


@contextmanager
def _int8_cache() -> Iterator[None]:
    """While open, the exporter of ModelOpt 0.47 takes a KV cache in INT8, which it would refuse.

    Its scales are the largest magnitude / 127, as in its TensorRT-LLM export (`get_kv_cache_scaling_factor`).
    """
    from modelopt.torch.export import unified_export_hf as exporter

    original = exporter.postprocess_state_dict

    def postprocess(state: dict[str, Any], bound: float, cache: str | None, *more: Any, **named: Any) -> Any:
        if cache == "INT8":
            bound, cache = _INT8_MAX, "NVFP4"  # one that is handled alike
        return original(state, bound, cache, *more, **named)

    exporter.postprocess_state_dict = postprocess
    try:
        yield
    finally:
        exporter.postprocess_state_dict = original


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


def _complete_metadata(nested: dict[str, Any], flat: dict[str, Any], selection: Selection, request: Request) -> None:
    """Complete both quantization configs and write them: every unquantized layer named, both telling the same."""
    section = nested["quantization"]
    section["exclude_modules"] = sorted({*(section.get("exclude_modules") or ()), *selection.uncompressed})
    if not selection.mixed and takes_group(request.single):
        section |= {"group_size": request.group_size, "has_zero_point": False, "pre_quant_scale": True}
    flat["ignore"] = section["exclude_modules"]
    _check_producer(nested, flat)
    write_json(request.output / HF_QUANT_CONFIG, nested)
    write_metadata(request, flat)


def _check_producer(*configs: Mapping[str, Any]) -> None:
    """Engines recognise the format by its producer's name."""
    for config in configs:
        if config.get("producer", {}).get("name") != "modelopt":
            raise ToolError("ModelOpt's export does not name its producer", "use nvidia-modelopt 0.47")
