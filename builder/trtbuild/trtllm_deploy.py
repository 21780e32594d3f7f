"""Deployment files for the runtimes of TensorRT-LLM: which there can be, and what decides them.

Both run in the Triton container of the planned release. A server gets 2 GB of /dev/shm, as in upstream's `docker run`
(triton-inference-server/tensorrtllm_backend README.md @00b49475), and with more than two GPUs 1 GB for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from trtbuild import trtllm_engine_settings, trtllm_settings
from trtbuild.errors import Problem
from trtbuild.model import ModelFacts
from trtbuild.recipe import Recipe
from trtbuild.serving_settings import DEPLOY_FILES
from trtbuild.setting_values import Settings

_ENGINE = "trtllm-engine"
_SERVER_GB = 2
_PER_HOST = "gpus_per_node"


def deploy_files(settings: Settings) -> tuple[tuple[str, ...], str]:
    """The deployment files that there can be, and why."""
    recipe = settings.recipe
    is_engine = recipe.runtime.kind == _ENGINE
    release = (trtllm_engine_settings if is_engine else trtllm_settings).planned_release(recipe)
    if release.container is None:
        return (), f"no Triton container has TensorRT-LLM {release.version}"
    if not is_engine and hosts(recipe) > 1:
        return ("dockerfile", "launch"), f"a compose file starts one host, and these are {hosts(recipe)}"
    return DEPLOY_FILES, "default"


def deploy_refusals(settings: Settings) -> Iterable[Problem]:
    """Files that the recipe asks for and that there cannot be."""
    there, why = deploy_files(settings)
    others = [name for name in settings.recipe.deploy.files if name not in there]
    if settings.given("deploy.files") and others:
        hint = f"use [{', '.join(there)}], or remove it" if there else "remove it, or use a release with a container"
        yield Problem("deploy.files", f"{', '.join(others)}: {why}", hint)


def hosts(recipe: Recipe) -> int:
    """How many hosts the ranks of the LLM API are spread over; ``runtime.extra.gpus_per_node`` says it."""
    per_host = _per_host(recipe)
    return 1 if per_host is None else math.ceil(trtllm_settings.world_size(recipe) / per_host)


def _per_host(recipe: Recipe) -> int | None:
    given = recipe.runtime.extra.get(_PER_HOST)
    # The argument schema refuses anything else; this is drafted all the same.
    return given if isinstance(given, int) and not isinstance(given, bool) and given > 0 else None


def deploy_parameters(settings: Settings, facts: ModelFacts) -> dict[str, Any]:
    """What only these runtimes have among the parameters of the step `deploy`."""
    is_engine = settings.recipe.runtime.kind == _ENGINE
    planned = trtllm_engine_settings.planned_release if is_engine else trtllm_settings.planned_release
    container = planned(settings.recipe).container
    if container is None:
        return {}
    gpus = _gpus(settings)
    launch = _engine_launch(settings, facts) if is_engine else _llm_launch(settings, gpus)
    return {
        "serve_image": container.image,
        "gpus": gpus,
        "shm_size": f"{max(_SERVER_GB, gpus)}gb",
        "launch": launch | {"container": container.image},
    } | ({"stock_model": True} if settings.has("serving.model_py") and _is_stock(settings) else {})


def _is_stock(settings: Settings) -> bool:
    return bool(settings["serving.model_py"] == "upstream")


def _gpus(settings: Settings) -> int:
    """How many GPUs one host must show: every number that an instance names, else one for each rank there."""
    groups: Sequence[Sequence[int]] = settings["serving.gpu_device_ids"]
    named = [gpu for group in groups for gpu in group]
    if named:
        return max(named) + 1
    if settings.recipe.runtime.kind == _ENGINE:
        return trtllm_engine_settings.ranks(settings.recipe)
    world, per_host = trtllm_settings.world_size(settings.recipe), _per_host(settings.recipe)
    return world if per_host is None else min(world, per_host)


def _engine_launch(settings: Settings, facts: ModelFacts) -> dict[str, Any]:
    """What decides the script that starts the server of a TensorRT engine."""
    drafted = trtllm_engine_settings.draft_server_parameters(settings, facts)
    more = {"draft": drafted["draft"]} if drafted else {}
    return trtllm_engine_settings.server_parameters(settings, facts) | {
        "world_size": trtllm_engine_settings.ranks(settings.recipe),
        "mode": settings["serving.communication_mode"],
        **more,
    }


def _llm_launch(settings: Settings, gpus: int) -> dict[str, Any]:
    """What decides the script that starts the server of the LLM API."""
    runtime = settings.recipe.runtime
    stock = _is_stock(settings)
    model = settings["serving.model_name"]
    return {
        "tensor_parallel_size": runtime.tensor_parallel_size,
        "pipeline_parallel_size": runtime.pipeline_parallel_size,
        "context_parallel_size": runtime.context_parallel_size,
        "instances": max(1, len(settings["serving.gpu_device_ids"])),
        "hosts": hosts(settings.recipe),
        "gpus": gpus,
        "arguments": f"model_repository/{model}/1/model.yaml" if stock else "engine/llm_args.yaml",
        "fixed_place": stock,
        "kv_scales": settings["compress.kv_cache"] != "none",
    }
