"""What a recipe asks of the LLM API that speculation does not go together with, by the table of versions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from trtbuild.compat import facts as table
from trtbuild.errors import Problem
from trtbuild.model import ModelFacts
from trtbuild.setting_values import Settings

_ONE, _TWO = "eagle3_one_model", "eagle3_two_model"
Asked = Callable[[Settings, ModelFacts], Problem | None]


def variant(method: str, *, one_model: bool) -> str:
    """A method as the table names it: EAGLE-3 by its two implementations."""
    return method if method != "eagle3" else _ONE if one_model else _TWO


def conflicts(settings: Settings, facts: ModelFacts, method: str, schema: str, version: str) -> Iterable[Problem]:
    """Every row of the table that holds for this method and version and that the recipe asks for."""
    one = settings.recipe.speculative.eagle3_one_model is not False
    named = variant(method, one_model=one) if method else ""
    for row in table("speculative")["excluded"]:
        if named not in row.get("methods", [named]) or schema not in row.get("schemas", [schema]):
            continue
        problem = _ASKED[row["with"]](settings, facts)
        if problem is not None:
            of_version = f" ({method}, TensorRT-LLM {version})" if "schemas" in row else ""
            yield Problem(problem.path, problem.message + of_version, problem.hint)


def _at(settings: Settings) -> str:
    given = settings.recipe.speculative.method == "none"
    return "runtime.extra.speculative_config" if given else "speculative.method"


def _stages(settings: Settings, _: ModelFacts) -> Problem | None:
    size = settings.recipe.runtime.pipeline_parallel_size
    message = f"speculative decoding does not run with pipeline_parallel_size {size}"
    hint = "use tensor_parallel_size instead, or no speculation"
    return Problem(_at(settings), message, hint) if size > 1 else None


def _contexts(settings: Settings, _: ModelFacts) -> Problem | None:
    size = settings.recipe.runtime.context_parallel_size
    message = f"speculative decoding does not run with context_parallel_size {size}"
    return Problem(_at(settings), message, "use context_parallel_size: 1, or no speculation") if size > 1 else None


def _sampler(settings: Settings, _: ModelFacts) -> Problem | None:
    extra = settings.recipe.runtime.extra
    name = next((name for name in ("sampler_type", "enable_trtllm_sampler") if extra.get(name)), "sampler_type")
    if extra.get(name) not in ("TRTLLMSampler", True):
        return None
    message = f"{extra[name]}: the C++ sampler does not verify drafts"
    return Problem(f"runtime.extra.{name}", message, "remove it, or use no speculation")


def _guided(settings: Settings, _: ModelFacts) -> Problem | None:
    backend = settings.recipe.runtime.guided_decoding_backend
    if backend is None:
        return None
    message = f"{backend}: these drafts do not follow a grammar"
    return Problem("runtime.guided_decoding_backend", message, "remove it, or use another speculative.method")


def _reuse(settings: Settings, _: ModelFacts) -> Problem | None:
    if not settings["runtime.kv_cache.enable_block_reuse"]:
        return None
    message = "true: a draft with an engine of its own does not run with block reuse"
    return Problem("runtime.kv_cache.enable_block_reuse", message, "set it to false, or use another runtime.version")


def _windows(settings: Settings, facts: ModelFacts) -> Problem | None:
    message = f"the model's layers have sliding windows of {facts.sliding_window} tokens"
    return Problem(_at(settings), message, "use none") if facts.sliding_window else None


def _overlap(settings: Settings, _: ModelFacts) -> Problem | None:
    if settings.recipe.runtime.extra.get("disable_overlap_scheduler") is not False:
        return None
    message = "false: TensorRT-LLM switches the overlap scheduler off for this method"
    return Problem("runtime.extra.disable_overlap_scheduler", message, "remove it, or write true")


def _two_models(settings: Settings, _: ModelFacts) -> Problem | None:
    if settings.recipe.speculative.eagle3_one_model is not False:
        return None
    message = "false: this version always takes one engine for model and draft"
    return Problem("speculative.eagle3_one_model", message, "remove it")


def _schedule(settings: Settings, _: ModelFacts) -> Problem | None:
    section = settings.recipe.speculative
    if section.draft_len_schedule is None or section.max_concurrency is None:
        return None
    message = f"{section.max_concurrency}: draft_len_schedule says from how many requests on nothing is drafted"
    return Problem("speculative.max_concurrency", message, "remove one of the two")


_ASKED: Mapping[str, Asked] = {
    "pipeline parallelism": _stages,
    "context parallelism": _contexts,
    "the C++ sampler": _sampler,
    "guided decoding": _guided,
    "block reuse": _reuse,
    "sliding windows": _windows,
    "the overlap scheduler": _overlap,
    "two models": _two_models,
    "draft_len_schedule beside max_concurrency": _schedule,
}
