"""Fill in the sections `serving` and `deploy` of a recipe."""

from __future__ import annotations

import re

from trtbuild.setting_values import Settings

DEPLOY_FILES = ("dockerfile", "compose", "launch")
# A served request needs room for an answer.
_LEAST_INPUT_TOKENS = 2
# What TensorRT-LLM's inflight_batcher_llm repository calls the model with the engine.
_ENSEMBLE_MODEL = "tensorrt_llm"
_FIXED_NAMES = {
    "ensemble": "the five models of layout ensemble have fixed names",
    "tokens": "the model of layout tokens has a fixed name",
}


def take_serving(settings: Settings) -> None:
    """The Triton model repository."""
    length = settings["runtime.max_seq_len"]
    if settings.recipe.runtime.kind == "trtllm-engine":
        settings.take("serving.layout", "ensemble", "what serves a TensorRT engine")
    else:
        settings.take("serving.layout")
    for name in ("model_name", "streaming"):
        settings.take(f"serving.{name}")
    fixed = _FIXED_NAMES.get(settings["serving.layout"])
    if fixed is not None and settings["serving.model_name"] != _ENSEMBLE_MODEL:
        message = f"{settings['serving.model_name']!r}: {fixed}"
        settings.problem("serving.model_name", message, f"remove it, or write {_ENSEMBLE_MODEL}")
    for name in ("max_input_tokens", "max_output_tokens"):
        limit = settings.take(f"serving.{name}", length - 1, "max_seq_len - 1")
        if limit >= length:
            settings.problem(
                f"serving.{name}", f"{limit} leaves no room in max_seq_len {length}", f"use at most {length - 1}"
            )
    _instances(settings)
    longest = settings["serving.max_input_tokens"]
    if longest < _LEAST_INPUT_TOKENS and settings.given("serving.max_input_tokens"):
        message = f"{longest} leaves no token to predict when quality is measured"
        settings.problem("serving.max_input_tokens", message, f"use at least {_LEAST_INPUT_TOKENS}")
    most = settings["serving.max_output_tokens"]
    usual = settings.recipe.serving.default_max_tokens
    if settings.given("serving.default_max_tokens") and usual > most:
        settings.problem(
            "serving.default_max_tokens", f"{usual} is more than max_output_tokens {most}", f"use at most {most}"
        )
    settings.take("serving.default_max_tokens", min(usual, most))


def _instances(settings: Settings) -> None:
    """Which model files or backend serve, and on which GPUs: settings of TensorRT-LLM's runtimes."""
    kind = settings.recipe.runtime.kind
    if kind == "trtllm":
        settings.take("serving.model_py")
    if kind in ("trtllm", "trtllm-engine"):
        settings.take("serving.gpu_device_ids")
    if kind == "trtllm-engine":
        settings.take("serving.backend", "tensorrtllm")
        settings.take("serving.communication_mode", *_communication_mode(settings))


def _communication_mode(settings: Settings) -> tuple[str, str]:
    """How the server of an engine reaches its ranks: a leader serves one instance of one engine."""
    runtime = settings.recipe.runtime
    if len(settings["serving.gpu_device_ids"]) > 1:
        return "orchestrator", "several instances need it"
    if settings.recipe.speculative.method == "draft_target" and (
        runtime.tensor_parallel_size * runtime.pipeline_parallel_size > 1
    ):
        return "orchestrator", "two engines with several ranks need it"
    return "leader", "default"


def take_deploy(settings: Settings, files: tuple[tuple[str, ...], str]) -> None:
    """The deployment files; `files` are those that the runtime can have, and why."""
    settings.take("deploy.image", f"localhost/{_image_part(settings['serving.model_name'])}:latest", "model_name")
    settings.take("deploy.labels")
    settings.take("deploy.files", *files)


def _image_part(model_name: str) -> str:
    """A model's name as a part of an image's name: lower case, single separators between letters or digits."""
    return "-".join(re.findall(r"[a-z0-9]+", model_name.lower())) or "model"
