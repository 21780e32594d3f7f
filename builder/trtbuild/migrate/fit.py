"""Values that must agree with each other and with the model: older deployments took pairs that a recipe refuses."""

from __future__ import annotations

import math
from typing import cast

from trtbuild.compress_settings import fitting_group_sizes
from trtbuild.format_support import Part, refused_embedded, refused_flow
from trtbuild.migrate.drafts import fit_drafts, fit_lora
from trtbuild.migrate.legacy import Legacy
from trtbuild.migrate.llm_drafts import fit_section
from trtbuild.migrate.translate import Draft
from trtbuild.model import ModelFacts
from trtbuild.releases import Flow
from trtbuild.trtllm_instances import fitting, shared
from trtbuild.weight_formats import takes_group

_MOST_REQUESTS = 4096
_BATCH, _TOKENS, _LENGTH = "runtime.max_batch_size", "runtime.max_num_tokens", "runtime.max_seq_len"
_CHUNKED, _CAPACITY = "runtime.enable_chunked_prefill", "runtime.kv_cache.max_tokens"
_GRAPHS = "runtime.cuda_graph_config."
_DEVICES = "serving.gpu_device_ids"
_FRACTION = "runtime.kv_cache.free_gpu_memory_fraction"
_EXPERTS = ("runtime.moe_config.", "runtime.extra.moe_config.")
_DEFAULT_BATCH, _DEFAULT_LENGTH, _USUAL_FRACTION = 8, 2048, 0.9


def fit(draft: Draft, legacy: Legacy, facts: ModelFacts | None) -> None:
    """Change or remove values that contradict others; every change is a row of its own."""
    if facts is not None:
        _model(draft, facts, from_build=any(one.section == "build" for one in legacy.settings))
    elif _LENGTH not in draft.values and "serving.max_output_tokens" in draft.values:
        tokens = draft.values.get("serving.max_input_tokens", 0) + draft.values["serving.max_output_tokens"]
        draft.add(_LENGTH, tokens, "the longest prompt with the longest answer")
    _limits(draft, facts)
    _formats(draft, facts)
    _serving(draft, legacy)
    _ranks(draft)
    fit_section(draft)
    fit_drafts(draft)
    fit_lora(draft)
    if {_GRAPHS + "batch_sizes", _GRAPHS + "max_batch_size"} <= set(draft.values):
        draft.leave_out(_GRAPHS + "max_batch_size", "batch_sizes says it", is_loss=False)
    if draft.values.get(_GRAPHS + "enabled") is False:
        for path in [path for path in draft.values if path.startswith(_GRAPHS) and path != _GRAPHS + "enabled"]:
            draft.leave_out(path, "CUDA graphs are off", is_loss=False)
    target = draft.target
    if target.gpu is not None:
        draft.add("target.gpu", target.gpu, "--gpu")


def _model(draft: Draft, facts: ModelFacts, *, from_build: bool) -> None:
    context, length = facts.context_length, draft.values.get(_LENGTH)
    if length is None and from_build:
        # max_seq_len is deduced from the checkpoint's config: upstream's page of every release that was read.
        draft.add(_LENGTH, context, "trtllm-build takes the positions that the model knows")
    given = [*draft.values, *(f"runtime.extra.{path}" for path in draft.extras.values)]
    for path in (path for path in given if path.startswith(_EXPERTS) and not facts.num_experts):
        draft.leave_out(path, "the model has no experts", is_loss=False)
    if length is not None and length > context:
        draft.add(_LENGTH, context, f"{length} is more than the positions that the model knows")


def _limits(draft: Draft, facts: ModelFacts | None) -> None:
    values = draft.values
    batch = values.get(_BATCH, _DEFAULT_BATCH)
    if batch > _MOST_REQUESTS:
        draft.add(_BATCH, _MOST_REQUESTS, f"{batch} is more than a recipe takes")
        batch = _MOST_REQUESTS
    tokens = values.get(_TOKENS)
    usual = _DEFAULT_LENGTH if facts is None else min(_DEFAULT_LENGTH, facts.context_length)
    length = values.get(_LENGTH, usual)
    if tokens is not None and tokens < batch:
        draft.add(_TOKENS, batch, f"{tokens} is less than max_batch_size")
        tokens = batch
    if values.get(_CHUNKED) is False and tokens is not None and tokens < length:
        draft.add(_CHUNKED, value=True, note=f"prompts longer than max_num_tokens {tokens} would be refused without it")
    capacity = values.get(_CAPACITY, length)
    if capacity < length:
        draft.leave_out(_CAPACITY, f"{capacity} tokens could not hold one request of max_seq_len {length}")
    known = facts is not None or _LENGTH in values
    for name in ("serving.max_input_tokens", "serving.max_output_tokens") if known else ():
        limit = values.get(name, 0)
        if limit >= length:
            draft.leave_out(name, f"{limit} leaves no room in max_seq_len {length}, which limits it", is_loss=False)


def _formats(draft: Draft, facts: ModelFacts | None) -> None:
    values, cache = draft.values, "compress.kv_cache"
    _unloadable(draft)
    group = values.get("compress.group_size")
    weights = values.get("compress.format", "none")
    if group is not None and not takes_group(weights):
        draft.leave_out("compress.group_size", f"{group} belongs to INT4, and the weights are {weights}", is_loss=False)
    elif group is not None and facts is not None and group not in fitting_group_sizes(facts):
        draft.leave_out("compress.group_size", f"{group} does not divide every layer's inputs")
    if draft.target.kind != "embedded" and weights == "none" and cache in values:
        why = f"{values[cache]} needs quantized weights: TensorRT-LLM takes no other"
        draft.leave_out(cache, why)
    if weights == "none" and not {cache, "compress.sparsity"} & set(values):
        draft.leave_out("compress.exclude", "nothing is compressed", is_loss=False)
    if draft.target.kind == "trtllm-engine" and values.get("compress.sparsity") == "2:4":
        draft.leave_out("runtime.extra.gemm_plugin", "the plugin would bypass the kernels that use 2:4 weights")


def _unloadable(draft: Draft) -> None:
    """Formats that the new runtime does not load."""
    target, flows = draft.target, {"trtllm": "llm-api", "trtllm-engine": "engine"}
    for path, part in (("compress.format", "weights"), ("compress.kv_cache", "kv_cache")):
        name, why = draft.values.get(path, "none"), None
        if target.release is not None and target.kind in flows:
            flow = cast("Flow", flows[target.kind])
            why = refused_flow(cast("Part", part), name, flow, target.release.line)
        elif part == "kv_cache":
            why = refused_embedded(name)
        if why is not None:
            draft.leave_out(path, f"{name}: {why}")


def _ranks(draft: Draft) -> None:
    values, kind, count = draft.values, draft.target.kind, "target.count"
    sizes = [values.get(f"runtime.{name}_parallel_size", 1) for name in ("tensor", "pipeline", "context")]
    if kind != "embedded" and values.get(count, math.prod(sizes)) < math.prod(sizes):
        draft.add(count, math.prod(sizes), "tensor x pipeline x context parallel")
    groups = values.get(_DEVICES, ())
    highest = max((gpu for group in groups for gpu in group), default=-1)
    if kind != "embedded" and values.get(count, highest + 1) <= highest:
        draft.add(count, highest + 1, f"{_DEVICES} names GPU {highest}")
    _, instances = shared(groups)
    if instances > 1 and _CAPACITY not in values and values.get(_FRACTION, _USUAL_FRACTION) * instances > 1:
        draft.add(_FRACTION, fitting(instances), f"{instances} instances share a GPU")
    if any(len(group) != math.prod(sizes) for group in groups):
        draft.leave_out(_DEVICES, f"its groups do not give each of {math.prod(sizes)} ranks a GPU")
    elif groups:
        draft.settle("instance_count", len(groups), f"{_DEVICES} has a group for each")


def _serving(draft: Draft, legacy: Legacy) -> None:
    """The interface of clients: kept where the new runtime has it."""
    kind, layout = draft.target.kind, "serving.layout"
    if kind == "trtllm" and layout in draft.values:
        draft.leave_out(layout, "the LLM API is served by one model")
    elif kind == "trtllm-engine" and draft.values.get(layout) not in ("ensemble", "tokens"):
        draft.add(layout, "ensemble", "TensorRT engines are served by the five models")
    elif kind == "embedded" and legacy.clients == "ensemble" and layout not in draft.values:
        draft.add(layout, "ensemble", "clients ask the same five models")
    if kind == "trtllm-engine" and any((one.name, one.value) == ("backend", "python") for one in legacy.settings):
        draft.add("serving.backend", "python", "the engine's model is the container's python model, as it was")
        if len(draft.values.get(_DEVICES, ())) > 1:
            draft.leave_out(_DEVICES, "the container's python model has one instance")
    if draft.values.get(layout) not in ("ensemble", "tokens") and legacy.model_name not in (None, "tensorrt_llm"):
        draft.add("serving.model_name", legacy.model_name, "the name that clients ask")
