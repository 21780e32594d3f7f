"""Load a checkpoint directory into a Transformers model class, quantized layers with their own numerics.

Transformers itself reads ModelOpt's files silently wrong (it takes FP8 codes for weights), so nothing here goes
through `from_pretrained`: the class is built without storage, the layers that the files quantize are replaced, and
every tensor of the files must have exactly one place in the model, and the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from trtbuild.errors import ArtifactError, CompatibilityError
from trtbuild.runtime.checkpoint_files import (
    REBUILD,
    QuantizationFacts,
    TensorSource,
    open_tensors,
    read_json,
    read_quantization,
)
from trtbuild.runtime.checkpoint_fill import fill, positive_scale, replace_linear, restore_buffers
from trtbuild.runtime.experts import DiskNames, fused_experts, unfuse_experts
from trtbuild.runtime.joined import JoinedScales, join_kv_scales, join_scales
from trtbuild.runtime.linear import Form, share_inputs
from trtbuild.runtime.numerics import NUMERICS

_CODES = frozenset({"F8_E4M3", "U8", "I8"})  # types of weights that are codes
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run: evaluation mode, on its device, every parameter filled."""

    model: nn.Module
    config: Any
    quantization: QuantizationFacts
    kv_scales: dict[int, tuple[float, float]] | None  # layer index to (key scale, value scale)
    notes: list[str]


def load_model(
    engine_dir: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    weights: str,
    attn_implementation: str,
    trust_remote_code: bool = False,
    joined: JoinedScales | None = None,
) -> LoadedModel:
    """Return the model of `engine_dir`, computing in `dtype` on `device`.

    Args:
        engine_dir: config.json, model*.safetensors and, if quantized, hf_quant_config.json.
        device: Where every tensor ends up.
        dtype: The compute type; tensors that are not quantized are held in it.
        weights: "expanded" (quantized weights expanded once, faster), "packed" (kept as stored) or "auto":
            expanded on a CPU, packed on a GPU.
        attn_implementation: A name registered in Transformers' attention interface.
        trust_remote_code: Run the model code that lies in the directory.
        joined: Bring scales together as another engine would; None leaves the files' own.

    Raises:
        ArtifactError: A file or tensor is missing, unexpected, damaged or of the wrong shape.
        CompatibilityError: A quantization or architecture that this version cannot load.
    """
    engine_dir = Path(engine_dir)
    quantization = read_quantization(engine_dir)
    form = _form(weights, device)
    config = read_config(engine_dir, trust_remote_code=trust_remote_code)
    model = empty_model(config, dtype, attn_implementation, trust_remote_code=trust_remote_code)
    source = _match_names(engine_dir, model)
    layers = _quantized_layers(source, quantization)
    if any(layer.startswith(f"{experts}.") for experts, _ in fused_experts(model) for layer in layers):
        unfuse_experts(model)
    kv_scales = _take_kv_scales(model, source, quantization)
    with torch.no_grad():
        for layer, algorithm in layers.items():
            replace_linear(model, layer, algorithm, source, dtype=dtype, form=form, device=device)
        fill(model, source, device)
        restore_buffers(model, device)
        changed = 0 if joined is None else join_scales(model, joined)
    if joined is not None and joined.kv_cache and kv_scales is not None:
        kv_scales = join_kv_scales(kv_scales)
    share_inputs(model)
    model.requires_grad_(requires_grad=False)
    notes = _notes(quantization, form, dtype, len(layers))
    if joined is not None and joined.layers:
        notes.append(f"{changed} projections were brought to the weight scale of others that they are joined with")
    return LoadedModel(model=model.eval(), config=config, quantization=quantization, kv_scales=kv_scales, notes=notes)


def _form(weights: str, device: torch.device) -> Form:
    if weights == "auto":
        return "expanded" if device.type == "cpu" else "packed"
    if weights not in ("expanded", "packed"):
        raise ArtifactError(f"weights: {weights!r} is not one of auto, expanded, packed", "correct engine.json")
    return cast("Form", weights)


def read_config(directory: Path, *, trust_remote_code: bool) -> Any:
    """The Transformers configuration of a checkpoint, without its quantization.

    Raises:
        ArtifactError: The file is missing, or Transformers cannot read it.
    """
    read_json(directory / "config.json")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ArtifactError(f"{directory / 'config.json'}: Transformers cannot read it: {error}", REBUILD) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def empty_model(config: Any, dtype: torch.dtype, attn_implementation: str, *, trust_remote_code: bool) -> nn.Module:
    """The model class with every tensor on the meta device.

    Raises:
        CompatibilityError: Transformers has no causal language model of this type.
    """
    # Transformers' default for experts, grouped matrix products, has no float64 kernel.
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                **experts,
            )
    except ValueError as error:
        raise CompatibilityError(
            f"model type {config.model_type!r}: Transformers cannot build it: {error}",
            "use a decoder-only language model of an architecture that this Transformers version knows",
        ) from error


def _match_names(directory: Path, model: nn.Module) -> TensorSource:
    files = open_tensors(directory)
    names = DiskNames(model)
    disk_name: dict[str, str] = {}
    for name in files.names:
        place = names.in_model(name)
        if place in disk_name:
            raise ArtifactError(f"{directory}: tensors {disk_name[place]} and {name} are the same weight", REBUILD)
        disk_name[place] = name
    return TensorSource(files, disk_name)


def _quantized_layers(source: TensorSource, quantization: QuantizationFacts) -> dict[str, str]:
    """The format of each linear layer whose weights the files hold as codes; their type must be the one announced."""
    layers = {}
    for place, name in sorted(source.disk_name.items()):
        kind = source.files.dtype(name) if place.endswith(".weight") else ""
        if kind not in _CODES:
            continue
        algorithm = quantization.of(name.removesuffix(".weight"))
        if algorithm is None or kind != NUMERICS[algorithm].weight:
            raise ArtifactError(
                f"{name} holds codes in {kind}, but the checkpoint says quant_algo {algorithm}", REBUILD
            )
        layers[place.removesuffix(".weight")] = algorithm
    if quantization.algorithm and not layers:
        raise ArtifactError(
            f"the checkpoint says quant_algo {quantization.algorithm}, but no tensor is quantized", REBUILD
        )
    return layers


def _take_kv_scales(
    model: nn.Module, source: TensorSource, quantization: QuantizationFacts
) -> dict[int, tuple[float, float]] | None:
    """The scales of a quantized KV cache by layer index; every attention layer must have both."""
    found: dict[int, dict[str, float]] = {}
    for place in [place for place in source.disk_name if place.endswith((".k_scale", ".v_scale"))]:
        attention, _, leaf = place.rpartition(".")
        # The exporter names them below k_proj and v_proj, also where the projections are fused (Phi-3).
        index = int(model.get_submodule(attention.rpartition(".")[0]).layer_idx)
        tensor = source.take(place)
        found.setdefault(index, {})[leaf] = positive_scale(place, tensor)
    if quantization.kv_cache is None and not found:
        return None
    wanted = range(int(model.config.get_text_config().num_hidden_layers))
    missing = [index for index in wanted if len(found.get(index, {})) != 2]
    if missing:
        raise ArtifactError(
            f"the KV cache is quantized, but layers {missing[:_SHOWN]} have no k_scale and v_scale", REBUILD
        )
    return {index: (found[index]["k_scale"], found[index]["v_scale"]) for index in wanted}


def _notes(quantization: QuantizationFacts, form: Form, dtype: torch.dtype, layers: int) -> list[str]:
    if quantization.algorithm is None or form == "packed":
        return []
    name = str(dtype).removeprefix("torch.")
    return [
        f"{layers} {quantization.algorithm} layers are expanded to {name} for speed; weights: packed keeps them stored"
    ]
