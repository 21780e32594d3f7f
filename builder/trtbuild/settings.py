"""Fill in every setting that a recipe leaves open, and say where each value came from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trtbuild.errors import Problem
from trtbuild.gates import default_max_perplexity_ratio
from trtbuild.model import ModelFacts
from trtbuild.plan import Value
from trtbuild.recipe import Recipe

_DEFAULT_MAX_SEQ_LEN = 2048
_DEFAULT_MAX_NUM_TOKENS = 512
GROUP_SIZES = (128, 64, 32, 16)
EVALUATION_LENGTH = 512


@dataclass(slots=True)
class Settings:
    """All settings of one recipe by dotted path, collected in order, and the problems met on the way."""

    recipe: Recipe
    document: Mapping[str, Any]
    overridden: frozenset[str]
    values: list[Value] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def __getitem__(self, path: str) -> Any:
        return next(value.value for value in self.values if value.path == path)

    def given(self, path: str) -> bool:
        """Whether the recipe or ``--set`` states this setting."""
        here: Any = self.document
        for key in path.split("."):
            if not isinstance(here, Mapping) or key not in here:
                return False
            here = here[key]
        return True

    def take(self, path: str, default: Any = None, origin: str = "default") -> Any:
        """Record a setting: the recipe's value, or `default` with its origin where the recipe is silent."""
        value: Any = self.recipe
        for key in path.split("."):
            value = getattr(value, key)
        if self.given(path):
            self.values.append(Value(path, value, "--set" if path in self.overridden else "recipe"))
        else:
            value = default if default is not None or value is None else value
            self.values.append(Value(path, value, origin))
        return value

    def problem(self, path: str, message: str, hint: str = "") -> None:
        """Note one thing wrong with the recipe."""
        self.problems.append(Problem(path, message, hint))


def resolve(settings: Settings, facts: ModelFacts) -> None:
    """Fill `settings` for this model, in the order in which a plan shows them."""
    _model(settings)
    _compress(settings, facts)
    settings.take("speculative.method")
    _runtime(settings, facts)
    _serving(settings)
    _deploy(settings)
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
    for name in ("data", "column", "count", "length", "seed"):
        settings.take(f"compress.calibration.{name}")
    length = settings["compress.calibration.length"]
    if length > facts.context_length:
        message = f"{length} is more than the model's context of {facts.context_length} tokens"
        settings.problem("compress.calibration.length", message, f"use at most {facts.context_length}")
    settings.take("compress.exclude")


def _group_size(settings: Settings, facts: ModelFacts, compress_format: str) -> None:
    path, given = "compress.group_size", settings.recipe.compress.group_size
    if compress_format != "int4_awq":
        if given is not None:
            settings.problem(
                path, f"{given} is set while compress.format is {compress_format}", "remove it or use int4_awq"
            )
        settings.take(path)
        return
    fitting = [size for size in GROUP_SIZES if not any(inputs % size for inputs in facts.linear_input_sizes)]
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


def _runtime(settings: Settings, facts: ModelFacts) -> None:
    for name in (
        "kind",
        "version",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "device",
        "compute_dtype",
        "weights",
    ):
        settings.take(f"runtime.{name}")
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
    chunked = settings.take("runtime.enable_chunked_prefill")
    tokens = settings.take(
        "runtime.max_num_tokens", max(_DEFAULT_MAX_NUM_TOKENS, batch) if chunked else max(length, batch)
    )
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
    _kv_cache(settings, batch, length)


def _kv_cache(settings: Settings, batch: int, length: int) -> None:
    for name in ("tokens_per_block", "enable_block_reuse", "free_gpu_memory_fraction"):
        settings.take(f"runtime.kv_cache.{name}")
    from_memory = settings.recipe.runtime.device == "cuda" or settings.recipe.target.gpu is not None
    if from_memory:
        tokens = settings.take("runtime.kv_cache.max_tokens", None, "from the free GPU memory at start")
    else:
        tokens = settings.take("runtime.kv_cache.max_tokens", batch * length, "max_batch_size x max_seq_len")
    if tokens is not None and tokens < length:
        settings.problem(
            "runtime.kv_cache.max_tokens",
            f"{tokens} is less than max_seq_len {length}: the longest request would never fit",
            f"raise it to {length} or lower runtime.max_seq_len",
        )


def _serving(settings: Settings) -> None:
    length = settings["runtime.max_seq_len"]
    for name in ("layout", "model_name", "streaming"):
        settings.take(f"serving.{name}")
    for name in ("max_input_tokens", "max_output_tokens"):
        limit = settings.take(f"serving.{name}", length - 1, "max_seq_len - 1")
        if limit >= length:
            settings.problem(
                f"serving.{name}", f"{limit} leaves no room in max_seq_len {length}", f"use at most {length - 1}"
            )
    most = settings["serving.max_output_tokens"]
    usual = settings.recipe.serving.default_max_tokens
    if settings.given("serving.default_max_tokens") and usual > most:
        settings.problem(
            "serving.default_max_tokens", f"{usual} is more than max_output_tokens {most}", f"use at most {most}"
        )
    settings.take("serving.default_max_tokens", min(usual, most))


def _deploy(settings: Settings) -> None:
    settings.take("deploy.image", f"localhost/{_image_part(settings['serving.model_name'])}:latest", "model_name")
    settings.take("deploy.labels")
    settings.take("deploy.files")


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
