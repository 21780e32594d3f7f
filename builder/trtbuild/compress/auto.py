"""Choose a format for each layer by how much the model suffers from it: ModelOpt's AutoQuantize on the whole model.

nvidia-modelopt 0.47.0, modelopt/torch/quantization/algorithms.py. It calibrates every candidate, scores every layer
that shares a format in each of them, and solves for the least sum of scores (gradient) or the least largest score
(kl_div) within the budget. Two things are told to it: the bits that a weight takes in our files, scales included, and
that layers which are never compressed count in no budget (it would count them in bf16).
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from trtbuild.choice_memory import smallest_for_choice, too_small_for_choice
from trtbuild.compress.calibrate import forward_arguments
from trtbuild.compress.groups import format_groups
from trtbuild.compress.identity import resume_key
from trtbuild.compress.quantize import format_config
from trtbuild.compress.request import AutoFormat, Meter, Request
from trtbuild.compress.selection import Selection, select
from trtbuild.compress.source import load_source, pick_device
from trtbuild.errors import HostError, RecipeError, ToolError
from trtbuild.mixed_settings import NEEDS_GPU
from trtbuild.model import ModelFacts
from trtbuild.safetensors_header import TensorInfo
from trtbuild.weight_formats import file_bits

AUTO_FILE = "auto.json"
_SCORED = 32  # samples; what more of them would change is less than the difference between layers
_DIGITS = 6  # of a sensitivity: sums over sets of modules are taken in no fixed order


@dataclass(frozen=True, slots=True)
class Choice:
    """The format of each layer that gets one, by its name in files, and the table that it was chosen from."""

    formats: Mapping[str, str]
    table: Mapping[str, Any]

    def apply(self, request: Request) -> Request:
        """The request with the choice in the place of the wish."""
        return replace(request, format="none", overrides=tuple(self.formats.items()), auto=None)


def choose(
    request: Request,
    facts: ModelFacts,
    source: Mapping[str, TensorInfo],
    ids: Sequence[Sequence[int]],
    meter: Meter,
) -> Choice:
    """The formats for a request with `auto`; what an unfinished run of the same request has chosen is taken again.

    Raises:
        HostError: A format that is scored on a GPU alone, and there is none.
        RecipeError: A layer that a format cannot take; a limit on memory that the whole model does not fit in.
        ToolError: ModelOpt found no solution.
    """
    auto, device = request.auto, pick_device(request.device)
    if auto is None:
        raise RuntimeError("the request leaves nothing to choose")
    on_gpu = sorted(NEEDS_GPU.intersection(auto.formats))
    if on_gpu and device.type == "cpu":
        raise HostError(
            f"compress.auto_formats: {', '.join(on_gpu)} is scored by running the model in it, which needs a GPU",
            "use fp8 and int4_awq, or name formats in compress.overrides",
        )
    least = smallest_for_choice(facts, max(map(len, ids)))
    if device.type == "cpu" and request.max_memory is not None and request.max_memory < least:
        raise RecipeError([too_small_for_choice(request.max_memory, least)])
    key = resume_key(request, source, ids, device)
    kept = None if request.work is None else request.work / AUTO_FILE
    known = _kept(kept, key)
    if known is not None:
        return known
    torch.manual_seed(0)
    meter.advance(0, "load the whole model")
    model = load_source(request, device)
    for name in auto.formats:
        selection = select(model, source, replace(request, format=name, auto=None))
    found = _search(model, selection, request, auto, ids, meter)
    del model
    gc.collect()
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"key": key, "formats": dict(found.formats), "table": found.table}), "utf-8")
    return found


def _kept(path: Path | None, key: str) -> Choice | None:
    try:
        known = json.loads((path or Path()).read_text("utf-8"))
        return Choice(known["formats"], known["table"]) if known["key"] == key else None
    except (OSError, ValueError, KeyError):
        return None


def _search(
    model: nn.Module,
    selection: Selection,
    request: Request,
    auto: AutoFormat,
    ids: Sequence[Sequence[int]],
    meter: Meter,
) -> Choice:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.algorithms import QuantRecipe

    device = next(model.parameters()).device
    plain = sorted(name for name, module in model.named_modules()
                   if isinstance(module, nn.Linear) and name not in selection.compressed)  # fmt: skip
    configs = {name: _config(name, request.group_size) for name in auto.formats}
    arguments = {name: value for name, value in forward_arguments(model).items() if name != "logits_to_keep"}

    def forward(model: nn.Module, sample: torch.Tensor) -> torch.Tensor:
        meter.advance(0, "measure the sensitivity of layers")
        logits: torch.Tensor = model(input_ids=sample, **arguments).logits
        return logits

    def loss(logits: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits[0, :-1].float(), sample[0, 1:])

    samples = [torch.tensor([list(sample)], device=device) for sample in ids]
    with _grouped_by(_groups(model, selection, samples[0][:, :2], arguments)):
        model, state = mtq.auto_quantize(
            model,
            constraints={
                "effective_bits": auto.target_bits,
                "cost": {"excluded_module_name_patterns": plain},
            },
            quantization_formats=list(configs.values()),
            data_loader=samples,
            forward_step=forward,
            loss_func=loss if auto.method == "gradient" else None,
            disabled_layers=plain,
            num_calib_steps=len(samples),
            num_score_steps=min(len(samples), _SCORED),
            method=auto.method,
        )
    if not state["best"]["is_satisfied"]:
        raise ToolError(
            f"compress.target_bits: no choice of {', '.join(auto.formats)} takes {auto.target_bits:g} bits or less",
            "use a larger target, or smaller formats in compress.auto_formats",
        )
    names = {QuantRecipe(quant_cfg=config, name=name): name for name, config in configs.items()}
    return _choice(model, state, selection, auto, request.group_size, names)


def _config(name: str, group_size: int | None) -> dict[str, Any]:
    """ModelOpt's configuration of a format, with the bits of a weight in our files."""
    return format_config(name, group_size) | {"effective_bits": file_bits(name, group_size)}


def _groups(
    model: nn.Module, selection: Selection, sample: torch.Tensor, arguments: Mapping[str, Any]
) -> dict[str, str]:
    """For each layer the name of the group that shares its format: as engines join them, and what has one input."""
    group_of = {
        layer: name for name, members in format_groups(model, selection.compressed).items() for layer in members
    }
    inputs: dict[int, tuple[torch.Tensor, list[str]]] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:  # noqa: ARG001  the signature of a hook
            inputs.setdefault(id(args[0]), (args[0], []))[1].append(name)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(remember(name)) for name in selection.compressed]
    with torch.no_grad():
        model(input_ids=sample, **arguments)
    for handle in handles:
        handle.remove()
    for _, layers in inputs.values():
        joined = {group_of[layer] for layer in layers}
        first = min(joined)
        group_of = {layer: first if name in joined else name for layer, name in group_of.items()}
    return group_of


@contextmanager
def _grouped_by(group_of: Mapping[str, str]) -> Iterator[None]:
    """While open, ModelOpt decides about these groups and no others; its own rules know some names only."""
    from modelopt.torch.quantization.algorithms import _AutoQuantizeBaseSearcher as Searcher

    before = Searcher.quant_grouping_rules
    Searcher.quant_grouping_rules = [lambda model, name: group_of.get(name)]  # noqa: ARG005  ModelOpt's signature
    try:
        yield
    finally:
        Searcher.quant_grouping_rules = before


def _choice(
    model: nn.Module,
    state: Mapping[str, Any],
    selection: Selection,
    auto: AutoFormat,
    group_size: int | None,
    names: Mapping[Any, str],
) -> Choice:
    chosen: dict[str, str] = {}
    rows = []
    for key, stats in state["candidate_stats"].items():
        layers = [name for name in stats["module_names"] if name in selection.compressed]
        if not layers:
            continue
        best = names.get(state["best"]["recipe"][key], "none")
        chosen |= {selection.compressed[name]: best for name in layers if best != "none"}
        choices = [
            {
                "format": names.get(recipe, "none"),
                "bits": file_bits(names.get(recipe, "none"), group_size),
                "sensitivity": float(f"{score:.{_DIGITS}g}"),
            }
            for recipe, score in zip(stats["formats"], stats["scores"], strict=True)
        ]
        rows.append(
            {
                "layers": sorted(selection.compressed[name] for name in layers),
                "weights": sum(model.get_submodule(name).weight.numel() for name in layers),
                "chosen": best,
                "choices": choices,
            }
        )
    table = {
        "method": auto.method,
        "target_bits": auto.target_bits,
        "planned_bits": round(float(state["best"]["constraints"]["effective_bits"]), _DIGITS),
        "how": f"nvidia-modelopt AutoQuantize, {auto.method}; bits of a weight with its share of group scales",
        "groups": rows,
    }
    return Choice(chosen, table)
