"""Fill in every setting that a recipe leaves open, and say where each value came from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trtbuild.draft import Draft
from trtbuild.errors import Problem
from trtbuild.gates import default_max_perplexity_ratio
from trtbuild.model import ModelFacts
from trtbuild.plan import Value
from trtbuild.recipe import Recipe

_DEFAULT_MAX_SEQ_LEN = 2048
_CALIBRATION_LENGTH = 512
FROM_GPU_MEMORY = "from the free GPU memory at start"
DEPLOY_FILES = ("dockerfile", "compose", "launch")
# An evaluation predicts at least one token from one, and a served request needs room for an answer.
_LEAST_SEQ_LEN, _LEAST_INPUT_TOKENS = 3, 2
# What TensorRT-LLM's inflight_batcher_llm repository calls the model with the engine.
_ENSEMBLE_MODEL = "tensorrt_llm"
_FIXED_NAMES = {
    "ensemble": "the five models of layout ensemble have fixed names",
    "tokens": "the model of layout tokens has a fixed name",
}
_NOTHING_COMPRESSED = (
    "is set while nothing is compressed",
    "remove it, or set compress.format, compress.kv_cache or compress.sparsity",
)
GROUP_SIZES = (128, 64, 32, 16)


@dataclass(slots=True)
class Settings:
    """All settings of one recipe by dotted path, collected in order, and the problems met on the way.

    `draft` is what the files of ``speculative.draft`` say, for runtimes that take one.
    """

    recipe: Recipe
    document: Mapping[str, Any]
    overridden: frozenset[str]
    values: list[Value] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    draft: Draft | None = None

    def __getitem__(self, path: str) -> Any:
        return next(value.value for value in self.values if value.path == path)

    def given(self, path: str) -> bool:
        """Whether the recipe or ``--set`` states this setting; null is silence, but it switches a gate off."""
        here: Any = self.document
        for key in path.split("."):
            if not isinstance(here, Mapping) or key not in here:
                return False
            here = here[key]
        return here is not None or path.startswith("quality.")

    def take(self, path: str, default: Any = None, origin: str = "default", *, note: str = "") -> Any:
        """Record a setting: the recipe's value, or `default` with its origin where the recipe is silent.

        `note` is added to the origin.
        """
        value = recipe_value(self.recipe, path)
        if not self.given(path):
            value = default if default is not None or value is None else value
        self.put(path, value, origin, note=note)
        return value

    def put(self, path: str, value: Any, origin: str, *, note: str = "") -> None:
        """Record `value` for a setting that the recipe may state in other words; `origin` is where it does not."""
        if self.given(path):
            origin = "--set" if self._was_set(path) else "recipe"
        self.values.append(Value(path, value, f"{origin}; {note}" if note else origin))

    def has(self, path: str) -> bool:
        """Whether a value of this setting was recorded."""
        return any(value.path == path for value in self.values)

    def _was_set(self, path: str) -> bool:
        """Whether ``--set`` gave this value, the section around it, or a part of it."""
        return any(f"{path}.".startswith(f"{key}.") or key.startswith(f"{path}.") for key in self.overridden)

    def problem(self, path: str, message: str, hint: str = "") -> None:
        """Note one thing wrong with the recipe."""
        self.problems.append(Problem(path, message, hint))


def recipe_value(recipe: Recipe, path: str) -> Any:
    """What the recipe has at a dotted path; its own default where it is silent."""
    value: Any = recipe
    for key in path.split("."):
        value = getattr(value, key)
    return value


def resolve(
    settings: Settings,
    facts: ModelFacts,
    take_runtime: Callable[[Settings, ModelFacts], None],
    deploy_files: Callable[[Settings], tuple[tuple[str, ...], str]],
) -> None:
    """Fill `settings` for this model, in the order in which a plan shows them.

    Args:
        settings: are filled.
        facts: of the model.
        take_runtime: takes the sections `target` and `runtime`, which differ between the kinds of runtime.
        deploy_files: which deployment files there can be for this runtime, and why.
    """
    _model(settings)
    _compress(settings, facts)
    settings.take("speculative.method")
    take_runtime(settings, facts)
    _serving(settings)
    _deploy(settings, deploy_files(settings))
    _quality(settings)


def _model(settings: Settings) -> None:
    for name in ("path", "revision", "tokenizer", "trust_remote_code"):
        settings.take(f"model.{name}")


def _compress(settings: Settings, facts: ModelFacts) -> None:
    compress_format = settings.take("compress.format")
    _group_size(settings, facts, compress_format)
    settings.take("compress.kv_cache")
    sparsity = settings.take("compress.sparsity")
    if sparsity == "none" and settings.recipe.compress.sparsity_method is not None:
        settings.problem(
            "compress.sparsity_method", "is set while compress.sparsity is none", "set sparsity: 2:4 or remove it"
        )
    settings.take("compress.sparsity_method", "sparsegpt" if sparsity != "none" else None)
    _calibration(settings, facts)
    settings.take("compress.max_memory")
    exclude = settings.take("compress.exclude")
    if exclude and not is_compressed(settings):
        settings.problem("compress.exclude", *_NOTHING_COMPRESSED)


def is_compressed(settings: Settings) -> bool:
    """Whether anything happens to the weights or the KV cache."""
    return any(settings[f"compress.{name}"] != "none" for name in ("format", "kv_cache", "sparsity"))


def _calibration(settings: Settings, facts: ModelFacts) -> None:
    context = facts.context_length
    short = context < _CALIBRATION_LENGTH
    origin = f"default: {_CALIBRATION_LENGTH}, at most the model's {context}" if short else "default"
    for name in ("data", "column", "count"):
        settings.take(f"compress.calibration.{name}")
    length = settings.take("compress.calibration.length", min(_CALIBRATION_LENGTH, context), origin)
    settings.take("compress.calibration.seed")
    if not is_compressed(settings):
        for name in ("data", "column", "count", "length", "seed"):
            if settings.given(f"compress.calibration.{name}"):
                settings.problem(f"compress.calibration.{name}", *_NOTHING_COMPRESSED)
    elif length > context:
        message = f"{length} is more than the model's context of {context} tokens"
        settings.problem("compress.calibration.length", message, f"use at most {context}")


def fitting_group_sizes(facts: ModelFacts) -> list[int]:
    """The group sizes that divide the input size of every linear layer, largest first."""
    return [size for size in GROUP_SIZES if not any(inputs % size for inputs in facts.linear_input_sizes)]


def _group_size(settings: Settings, facts: ModelFacts, compress_format: str) -> None:
    path, given = "compress.group_size", settings.recipe.compress.group_size
    if compress_format != "int4_awq":
        if given is not None:
            settings.problem(
                path, f"{given} is set while compress.format is {compress_format}", "remove it or use int4_awq"
            )
        settings.take(path)
        return
    fitting = fitting_group_sizes(facts)
    if given is None and not fitting:
        sizes = ", ".join(str(size) for size in facts.linear_input_sizes)
        settings.problem(
            path, f"no group of {GROUP_SIZES} divides every input size ({sizes})", "use another format, such as fp8"
        )
    misfits = [inputs for inputs in facts.linear_input_sizes if given is not None and inputs % given]
    if misfits:
        hint = f"use {fitting[0]}" if fitting else "use another format, such as fp8"
        settings.problem(path, f"{given} does not divide the input size {misfits[0]} of a linear layer", hint)
    origin = "default" if fitting[:1] == [128] else "model: the largest that divides every input size"
    settings.take(path, fitting[0] if fitting else None, origin)


def take_limits(settings: Settings, facts: ModelFacts, usual_tokens: int, origin: str) -> None:
    """How much a runtime does at the same time; `usual_tokens` of one step come from `origin`."""
    batch = settings.take("runtime.max_batch_size")
    length = settings.take(
        "runtime.max_seq_len",
        min(facts.context_length, _DEFAULT_MAX_SEQ_LEN),
        f"default: {_DEFAULT_MAX_SEQ_LEN}, at most the model's {facts.context_length}",
    )
    if length > facts.context_length:
        settings.problem(
            "runtime.max_seq_len",
            f"{length} is more than the {facts.context_length} positions the model knows",
            f"use at most {facts.context_length}",
        )
    if length < _LEAST_SEQ_LEN:
        message = f"{length} leaves no token to predict when quality is measured"
        settings.problem("runtime.max_seq_len", message, f"use at least {_LEAST_SEQ_LEN}")
    chunked = settings.take("runtime.enable_chunked_prefill")
    usual, origin = (usual_tokens, origin) if chunked else (length, "max_seq_len, without chunked prefill")
    tokens = settings.take("runtime.max_num_tokens", max(usual, batch), origin)
    if tokens < batch:
        settings.problem(
            "runtime.max_num_tokens", f"{tokens} is less than max_batch_size {batch}", f"use at least {batch}"
        )
    if not chunked and tokens < length:
        settings.problem(
            "runtime.max_num_tokens",
            f"{tokens} is less than max_seq_len {length} while chunked prefill is off",
            f"raise it to {length} or set enable_chunked_prefill: true",
        )
    settings.take("runtime.capacity_scheduler_policy")


def check_capacity(settings: Settings) -> None:
    """The longest request must fit into the KV cache."""
    tokens, length = settings["runtime.kv_cache.max_tokens"], settings["runtime.max_seq_len"]
    if tokens is not None and tokens < length:
        settings.problem(
            "runtime.kv_cache.max_tokens",
            f"{tokens} is less than max_seq_len {length}: the longest request would never fit",
            f"raise it to {length} or lower runtime.max_seq_len",
        )


def _serving(settings: Settings) -> None:
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


def _deploy(settings: Settings, files: tuple[tuple[str, ...], str]) -> None:
    settings.take("deploy.image", f"localhost/{_image_part(settings['serving.model_name'])}:latest", "model_name")
    settings.take("deploy.labels")
    settings.take("deploy.files", *files)


def _image_part(model_name: str) -> str:
    """A model's name as a part of an image's name: lower case, single separators between letters or digits."""
    return "-".join(re.findall(r"[a-z0-9]+", model_name.lower())) or "model"


def _quality(settings: Settings) -> None:
    weight_format, kv_cache = settings["compress.format"], settings["compress.kv_cache"]
    settings.take(
        "quality.max_perplexity_ratio",
        default_max_perplexity_ratio(weight_format, kv_cache),
        f"default for {weight_format}",
    )
    for name in ("max_kl_divergence", "min_top1_agreement", "tokens", "data"):
        settings.take(f"quality.{name}")
