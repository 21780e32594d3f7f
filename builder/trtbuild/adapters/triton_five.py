"""Layout `ensemble`: the five models of TensorRT-LLM's `inflight_batcher_llm` repository.

`tensorrt_llm` takes and gives token ids; in layout `tokens` it stands alone. Behind it is the embedded engine (our
python model), TensorRT-LLM's C++ backend, or the container's own python model over the same executor. Clients of the
five ask `ensemble` or `tensorrt_llm_bls`.
With a draft model there is a sixth, `tensorrt_llm_draft`, which `tensorrt_llm_bls` alone asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtbuild.adapters import triton_contract, triton_draft, triton_older, triton_parameters
from trtbuild.adapters.triton_config import Model, parse
from trtbuild.adapters.triton_copy import copy_model
from trtbuild.adapters.triton_spec import RepositorySpec, boolean
from trtbuild.errors import Problem
from trtbuild.releases import older_backend
from trtbuild.render import render

LAYOUT, TOKENS = "ensemble", "tokens"
ENGINE_MODEL, DRAFT_MODEL = "tensorrt_llm", "tensorrt_llm_draft"
_EXECUTED = (ENGINE_MODEL, DRAFT_MODEL)
_BLS, _LINE = "tensorrt_llm_bls", "engine_line"
MODELS = ("ensemble", "postprocessing", "preprocessing", ENGINE_MODEL, _BLS)
_EMBEDDED = "embedded"
_CANCELLATION_CHECK_PERIOD_MS = 50
# Threads of the BLS model: enough to fill the engine and to keep its queue from running dry.
_BLS_THREADS_PER_SLOT, _BLS_LEAST_THREADS = 2, 8
_CONTAINER_MODEL = "/app/all_models/inflight_batcher_llm/tensorrt_llm/1/model.py"


@dataclass(frozen=True, slots=True)
class _Written:
    """One model: its configuration's context, and where its Python comes from."""

    context: Mapping[str, Any]
    source: str | None


def write(spec: RepositorySpec, out: Path) -> None:
    """Write the models of `spec` under `out`: all five, or for layout `tokens` the one with the engine."""
    models = _models(spec)
    for name in model_names(spec.layout, drafts=spec.draft is not None):
        written = models[name]
        version = out / name / "1"
        version.mkdir(parents=True)
        text = _rendered(name, written, spec.engine_line)
        (out / name / "config.pbtxt").write_text(text, encoding="utf-8", newline="\n")
        if written.source is not None:
            copy_model(written.source, version)
        else:
            # Triton wants a version directory, and archives and copies drop empty ones.
            (version / ".keep").write_bytes(b"")


def model_names(layout: str, *, drafts: bool = False) -> tuple[str, ...]:
    """The models of a repository of layout `ensemble` or `tokens`."""
    return (ENGINE_MODEL,) if layout == TOKENS else (*MODELS, DRAFT_MODEL) if drafts else MODELS


def check(models: Sequence[Model]) -> list[Problem]:
    """Faults between the five models and their contract; an absent one is named.

    The model with a TensorRT engine may stand alone, for clients that send and read token ids.
    """
    ours = {model.name: model for model in models if model.parameter("layout") == LAYOUT}
    expected = MODELS if ours else ()
    ours |= {model.name: model for model in models if model.name in _EXECUTED and _is_trtllm(model)}
    if not ours:
        return []
    problems = [
        Problem(name, f"the model is missing, and the {LAYOUT} layout consists of {', '.join(MODELS)}", "put it back")
        for name in expected
        if name not in ours
    ]
    for name, model in ours.items():
        if name in (*MODELS, DRAFT_MODEL):
            problems += triton_contract.differences(model, _contract(model, ours), LAYOUT)
    for engine in (ours[name] for name in _EXECUTED if name in ours):
        problems += _parameters(engine) if _is_trtllm(engine) else []
    return problems + _agreement(ours)


def _rendered(name: str, written: _Written, line: str | None) -> str:
    """A model's configuration, as the engine's release line has it."""
    text, older = render(_template(name), written.context), older_backend(line)
    asks = name in ("ensemble", _BLS)
    if older is None:
        return text
    return triton_older.fit(text, older, executed=name in _EXECUTED, asks=asks, refuses=name == _BLS)


def _template(name: str) -> str:
    """The template of a model's configuration: a draft is an engine of another name."""
    return f"ensemble/{ENGINE_MODEL if name == DRAFT_MODEL else name}.pbtxt.j2"


def _parameters(engine: Model) -> list[Problem]:
    given = {name: str(value.string_value) for name, value in engine.config.parameters.items()}
    theirs = {name: text for name, text in given.items() if name not in _OURS}
    problems = triton_parameters.parameter_problems(theirs, f"{engine.name}/config.pbtxt")
    return problems + _instances(engine, given.get("gpu_device_ids", ""))


def _instances(engine: Model, gpu_device_ids: str) -> list[Problem]:
    """Each model instance has a group of GPUs of its own."""
    count, groups = sum(group.count for group in engine.config.instance_group), len(gpu_device_ids.split(";"))
    if not gpu_device_ids or count == groups:
        return []
    message = f"instance_group counts {count} instances, and gpu_device_ids has {groups} groups"
    return [engine.problem(message, "make them equal: semicolons divide the groups")]


def _is_trtllm(model: Model) -> bool:
    """Whether TensorRT-LLM itself executes this model."""
    return model.config.backend == "tensorrtllm" or "gpt_model_path" in model.config.parameters


def _contract(model: Model, models: Mapping[str, Model]) -> Any:
    """What the templates declare for a model of this name in a repository of this runtime."""
    engine = models.get(ENGINE_MODEL)
    spec = _ANY_SPEC
    if engine is not None and _is_trtllm(engine):
        parameters = triton_parameters.EngineParameters(gpt_model_path="/any")
        spec = replace(spec, runtime="trtllm-engine", engine=parameters)
        if DRAFT_MODEL in models:
            spec = replace(spec, draft=parameters, draft_tokens=1)
    spec = replace(spec, engine_line=None if engine is None else engine.parameter(_LINE))
    written = _models(spec).get(model.name)
    if written is None:
        return model.config  # a draft of the embedded engine, which `_agreement` refuses
    wanted = parse(_rendered(model.name, written, spec.engine_line))
    if _is_trtllm(model) and model.name in _EXECUTED:
        wanted.ClearField("parameters")  # judged by triton_parameters
    return wanted


def _agreement(models: Mapping[str, Model]) -> list[Problem]:
    """What must be the same in every model: transaction policy, batch size, runtime, limits."""
    problems: list[Problem] = []
    engine = models.get(ENGINE_MODEL)
    if engine is None:
        return []
    decoupled = bool(engine.config.model_transaction_policy.decoupled)
    for model in models.values():
        if model.config.max_batch_size != engine.config.max_batch_size:
            message = f"max_batch_size is {model.config.max_batch_size}, and {engine.name} has "
            problems.append(model.problem(f"{message}{engine.config.max_batch_size}", "make them equal"))
        if model.name == _BLS and bool(model.config.model_transaction_policy.decoupled) != decoupled:
            message = f"decoupled is {boolean(not decoupled)}, and {engine.name} has {boolean(decoupled)}"
            problems.append(model.problem(message, "a chain streams if and only if its engine does: make them equal"))
        for name in ("runtime", "streaming", "max_seq_len", "max_input_tokens", "max_output_tokens", "tokenizer_dir"):
            problems += _differs(model, models, name)
    bls = models.get(_BLS)
    problems += triton_draft.check(models) if DRAFT_MODEL in models else []
    return problems + ([] if bls is None else _bls(bls, models))


def _differs(model: Model, models: Mapping[str, Model], name: str) -> list[Problem]:
    """A parameter against the first model that has it."""
    ours = [one for key, one in sorted(models.items()) if one.parameter("layout") == LAYOUT]
    first = next((one for one in ours if one.parameter(name) is not None), None)
    value = model.parameter(name)
    if model not in ours or first is None or value is None or value == first.parameter(name):
        return []
    message = f"parameter {name} is {value!r}, and {first.name} has {first.parameter(name)!r}"
    return [model.problem(message, "make them equal")]


def _bls(bls: Model, models: Mapping[str, Model]) -> list[Problem]:
    problems = []
    if bls.parameter("accumulate_tokens") not in (None, "true"):
        message = f"parameter accumulate_tokens is {bls.parameter('accumulate_tokens')!r}"
        problems.append(bls.problem(message, "write true: pieces decoded one by one lose spaces and break characters"))
    engine = bls.parameter("tensorrt_llm_model_name")
    if engine is not None and engine not in models:
        message = f"parameter tensorrt_llm_model_name is {engine!r}, which is not in this repository"
        problems.append(bls.problem(message, f"write {ENGINE_MODEL}"))
    draft = bls.parameter("tensorrt_llm_draft_model_name")
    if draft and draft not in models:
        message = f"parameter tensorrt_llm_draft_model_name is {draft!r}, which is not in this repository"
        problems.append(bls.problem(message, "put the model there, or leave the parameter empty"))
    if bls.parameter("multimodal_encoders_name"):
        message = f"parameter multimodal_encoders_name is {bls.parameter('multimodal_encoders_name')!r}"
        problems.append(bls.problem(f"{message}, and this model uses none", "leave it empty"))
    postprocessing = models.get("postprocessing")
    count = 0 if postprocessing is None else sum(group.count for group in postprocessing.config.instance_group)
    if postprocessing is not None and count > 1:
        message = f"{count} instances: the pieces of a stream could overtake each other"
        problems.append(postprocessing.problem(message, "use one"))
    return problems


def _models(spec: RepositorySpec) -> dict[str, _Written]:
    """What is written for each model."""
    embedded = spec.runtime == _EMBEDDED
    common = {
        "max_batch_size": spec.max_batch_size,
        "decoupled": boolean(spec.streaming),
        "max_queue_delay_microseconds": 0,
        "max_queue_size": 0,  # no limit: the engine has a queue of its own
        "logits_type": "TYPE_FP32",
        "llm_name": ENGINE_MODEL,
        # Only our own engine model says what went before: with the C++ backend, BLS keeps account of it.
        "text_state": embedded,
        "instance_count": 1,
    }
    base = {"layout": LAYOUT, "runtime": spec.runtime}
    limits = {
        name: getattr(spec, name)
        for name in ("max_seq_len", "max_input_tokens", "max_output_tokens", "default_max_tokens")
    }
    tokenizer = {"tokenizer_dir": spec.engine_dir, "trust_remote_code": boolean(spec.trust_remote_code)}
    streams = {"streaming": boolean(spec.streaming), "cancellation_check_period_ms": _CANCELLATION_CHECK_PERIOD_MS}
    # Upstream's preprocessing reads this one without a default and takes an empty text as none (model.py @01259b15).
    no_images = {"multimodal_model_path": ""}
    threads = max(_BLS_THREADS_PER_SLOT * spec.max_batch_size, _BLS_LEAST_THREADS)
    bls = {
        "accumulate_tokens": "true",
        "tensorrt_llm_model_name": ENGINE_MODEL,
        "tensorrt_llm_draft_model_name": "" if spec.draft is None else DRAFT_MODEL,
        "multimodal_encoders_name": "",
        "max_running_requests": threads,
    }
    if spec.draft is not None:
        bls["num_draft_tokens"] = spec.draft_tokens
    if (older := older_backend(spec.engine_line)) is not None:
        bls |= {"engine_input_names": triton_older.names(older), "engine_lacks": triton_older.refused(older)}
    if spec.lora_adapters_dir is not None:
        bls["lora_adapters_dir"] = f"{spec.engine_dir}/{spec.lora_adapters_dir}"
    parameters = {
        "preprocessing": base | tokenizer | {"add_special_tokens": "true"} | no_images | limits,
        "postprocessing": base | tokenizer | {"skip_special_tokens": "true"},
        "ensemble": base,
        _BLS: base | streams | bls,
    }
    made = {
        name: _Written(
            common | {"parameters": list(chosen.items())}, None if name == "ensemble" else f"ensemble/{name}"
        )
        for name, chosen in parameters.items()
    }
    made[ENGINE_MODEL] = _engine_model(spec, common, base | streams | limits)
    if spec.draft is not None:
        made[DRAFT_MODEL] = _trtllm_model(spec.draft, common, DRAFT_MODEL, spec.engine_line)
    return made


def _engine_model(spec: RepositorySpec, common: Mapping[str, Any], ours: Mapping[str, Any]) -> _Written:
    if spec.engine is not None:
        return _trtllm_model(spec.engine, common, ENGINE_MODEL, spec.engine_line)
    context = dict(common) | _TYPES | {"name": ENGINE_MODEL, "backend": "python", "unset": []}
    chosen = {name: value for name, value in ours.items() if name != "default_max_tokens"}
    chosen |= {"engine_dir": spec.engine_dir, "exclude_input_in_output": "true", "max_beam_width": 1}
    return _Written(context | {"parameters": list(chosen.items())}, f"ensemble/{ENGINE_MODEL}")


def _trtllm_model(
    engine: triton_parameters.EngineParameters, common: Mapping[str, Any], name: str, line: str | None
) -> _Written:
    """A model that TensorRT-LLM executes, with one instance for each group of GPUs."""
    chosen: dict[str, Any] = engine.written()
    context = dict(common) | _TYPES | {"name": name, "backend": engine.backend, "unset": engine.unset()}
    context |= {"instance_count": len(engine.gpu_device_ids or ((),))}
    source = None
    if engine.backend == "python":
        chosen["container_model_py"] = _CONTAINER_MODEL
        source = "ensemble/tensorrt_llm_container"
    if line is not None:
        chosen[_LINE] = line
    return _Written(context | {"parameters": list(chosen.items())}, source)


_TYPES = {"encoder_input_features_type": "TYPE_FP16", "prompt_embedding_table_type": "TYPE_FP16"}
# Parameters of trtbuild's own in a model that TensorRT-LLM executes.
_OURS = ("container_model_py", _LINE)
_ANY_SPEC = RepositorySpec(
    model_name=ENGINE_MODEL,
    runtime=_EMBEDDED,
    layout=LAYOUT,
    streaming=True,
    max_seq_len=2,
    max_input_tokens=1,
    max_output_tokens=1,
    default_max_tokens=1,
)
