"""Fill in every setting that a recipe leaves open, and say where each value came from."""

from __future__ import annotations

from collections.abc import Callable

from trtbuild.compress_settings import take_compress
from trtbuild.gates import default_max_perplexity_ratio
from trtbuild.model import ModelFacts
from trtbuild.serving_settings import take_deploy, take_serving
from trtbuild.setting_values import Settings
from trtbuild.training_settings import take_training

_DEFAULT_MAX_SEQ_LEN = 2048
FROM_GPU_MEMORY = "from the free GPU memory at start"
# An evaluation predicts at least one token from one.
_LEAST_SEQ_LEN = 3


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
    take_compress(settings, facts)
    settings.take("speculative.method")
    take_training(settings, facts)
    take_runtime(settings, facts)
    take_serving(settings)
    take_deploy(settings, deploy_files(settings))
    _quality(settings)


def _model(settings: Settings) -> None:
    for name in ("path", "revision", "tokenizer", "trust_remote_code"):
        settings.take(f"model.{name}")


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


def _quality(settings: Settings) -> None:
    names, kv_cache = settings.recipe.compress.formats or ("none",), settings["compress.kv_cache"]
    sparsity = settings["compress.sparsity"]
    settings.take(
        "quality.max_perplexity_ratio",
        max(default_max_perplexity_ratio(name, kv_cache, sparsity) for name in names),
        f"default for {' and '.join(names)}{'' if sparsity == 'none' else f' with {sparsity}'}",
    )
    for name in ("max_kl_divergence", "min_top1_agreement", "tokens", "data"):
        settings.take(f"quality.{name}")
