"""A repository with a draft model: what must hold between `tensorrt_llm`, `tensorrt_llm_draft` and `tensorrt_llm_bls`.

From NVIDIA/TensorRT-LLM docs/source/legacy/advanced/speculative-decoding.md @28af34e8: both engines reuse cache blocks
and share the memory of the GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping

from trtbuild.adapters.triton_config import Model
from trtbuild.errors import Problem

_ENGINE, _DRAFT, _BLS = "tensorrt_llm", "tensorrt_llm_draft", "tensorrt_llm_bls"
_FRACTION = "kv_cache_free_gpu_mem_fraction"


def check(models: Mapping[str, Model]) -> list[Problem]:
    """Every fault of a repository that has the model `tensorrt_llm_draft`, beside those of its engine's parameters."""
    draft, engine, bls = models[_DRAFT], models.get(_ENGINE), models.get(_BLS)
    problems = []
    if engine is None or draft.config.backend != engine.config.backend:
        backend = "is not here" if engine is None else f"has the backend {engine.config.backend!r}"
        message = f"its backend is {draft.config.backend!r}, and {_ENGINE} {backend}"
        problems.append(draft.problem(message, "use the same for both"))
    if bls is not None and bls.parameter(f"{_DRAFT}_model_name") != _DRAFT:
        message = f"nothing asks it: {_BLS} has the parameter {_DRAFT}_model_name"
        given = bls.parameter(f"{_DRAFT}_model_name")
        problems.append(draft.problem(f"{message} {given!r}", f"write {_DRAFT} there, or remove this model"))
    if engine is None:
        return problems
    for model in (engine, draft):
        if str(model.parameter("enable_kv_cache_reuse")).lower() not in ("true", "1"):
            message = "enable_kv_cache_reuse is off: every round of drafts would compute the whole prompt again"
            problems.append(model.problem(message, "write true"))
    if bool(draft.config.model_transaction_policy.decoupled) != bool(engine.config.model_transaction_policy.decoupled):
        problems.append(draft.problem(f"decoupled differs from that of {_ENGINE}", "make them equal"))
    shares = [_number(model.parameter(_FRACTION)) for model in (engine, draft)]
    if None not in shares and sum(share or 0 for share in shares) > 1:
        message = f"{_FRACTION} is {shares[1]:g}, and {_ENGINE} has {shares[0]:g}: together more than there is"
        problems.append(draft.problem(message, "let them add up to less than 1"))
    return problems


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None  # reported with the other parameters
