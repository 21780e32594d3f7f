"""The speculative section of a migrated recipe: what belongs together, and what the user must still fill in."""

from __future__ import annotations

from trtbuild.draft import HEADS
from trtbuild.llm_speculation import LLM_FIELDS, TAKES_DRAFT
from trtbuild.migrate.translate import Draft
from trtbuild.trtllm_common import SPECULATIVE_FIELDS
from trtbuild.trtllm_engine_drafts import DRAFT_TARGET

FILL_IN = "/FILL-IN/draft-checkpoint"
_METHOD, _CHECKPOINT = "speculative.method", "speculative.draft"
_SHARE, _FRACTION = "speculative.draft_kv_cache_share", "runtime.kv_cache.free_gpu_memory_fraction"
_REUSE, _STAGES = "runtime.kv_cache.enable_block_reuse", "runtime.pipeline_parallel_size"
_GUIDE = "runtime.guided_decoding_backend"
_USUAL, _LARGEST = 0.9, 0.95


def fit_drafts(draft: Draft) -> None:
    """Change or remove values of the section that contradict each other or the rest of the recipe."""
    values, engines = draft.values, draft.target.kind == "trtllm-engine"
    fields = SPECULATIVE_FIELDS if engines else LLM_FIELDS
    method = str(values.get(_METHOD, "none"))
    if method != "none" and values.get(_STAGES, 1) > 1:
        draft.leave_out(_METHOD, f"does not run with pipeline_parallel_size {values[_STAGES]}")
        method = "none"
    if engines and method not in ("none", DRAFT_TARGET) and _GUIDE in values:
        draft.leave_out(_METHOD, f"{method} drafts do not follow a grammar, and {_GUIDE} asks for one")
        method = "none"
    for path in [path for path in values if path.startswith("speculative.") and path != _METHOD]:
        if path.removeprefix("speculative.") not in fields[method]:
            lost = method == "none"
            why = "nothing drafts" if lost else f"follows from {method}"
            draft.leave_out(path, why, is_loss=lost)
    if method in ((DRAFT_TARGET, *HEADS) if engines else TAKES_DRAFT) and _CHECKPOINT not in values:
        what = {DRAFT_TARGET: "the draft model's original checkpoint", "eagle3": "the draft of EAGLE-3"}.get(
            method, "the converted model with heads"
        )
        draft.add(_CHECKPOINT, FILL_IN, f"FILL IN: {what}")
    if method != DRAFT_TARGET or not engines:
        return
    if values.get(_REUSE) is False:
        draft.add(_REUSE, value=True, note="every round of drafts would compute the whole prompt again without it")
    if _SHARE in values:
        theirs, ours = values[_SHARE], values.get(_FRACTION, _USUAL)
        draft.add(_FRACTION, min(round(ours + theirs, 4), _LARGEST), "what model and draft took together")
        draft.add(_SHARE, round(theirs / (ours + theirs), 3), "the draft's part of it")


def fit_lora(draft: Draft) -> None:
    """Every engine's configuration has a rank; it says something only where modules are adapted."""
    rank, modules = "runtime.lora_config.max_lora_rank", "runtime.lora_config.lora_target_modules"
    if draft.target.kind == "trtllm-engine" and rank in draft.values and not draft.values.get(modules):
        draft.leave_out(rank, "no module is adapted", is_loss=False)
        draft.values.pop(modules, None)
