"""Speculation in the embedded engine: the recipe's section as values and in ``engine.json``, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trtbuild import compat
from trtbuild.draft import DRAFT_ROLE, Draft
from trtbuild.eagle3_draft import Eagle3, few, misfits
from trtbuild.errors import Problem
from trtbuild.llm_speculation_refusals import length_refusals, missing_draft
from trtbuild.medusa_draft import MedusaHeads, medusa_misfits, tree_problems
from trtbuild.model import ModelFacts
from trtbuild.setting_values import Settings
from trtbuild.trtllm_common import draft_refusals, unread_speculative
from trtbuild.weight_formats import KV_CACHE_BITS

DRAFT_PLACE = "draft"
_PLAIN_BITS = 16  # on a GPU, where the share counts, caches are in bf16
_METHOD, _DRAFT, _LENGTH = "speculative.method", "speculative.draft", "speculative.max_draft_len"
_ALL = ("max_draft_len", "max_concurrency", "draft_len_schedule")
_NGRAM = ("max_matching_ngram_size", "is_keep_all", "is_use_oldest", "is_public_pool")
# What each method reads of the recipe's section; the others are for other runtimes.
EMBEDDED_FIELDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("none", "eagle", "redrafter", "lookahead", "mtp"), ()),
    "ngram": (*_ALL, *_NGRAM),
    "draft_target": ("draft", *_ALL, "draft_kv_cache_share"),
    "medusa": ("draft", *_ALL, "choices"),
    "eagle3": ("draft", *_ALL),
}
METHODS = tuple(name for name, fields in EMBEDDED_FIELDS.items() if fields)
TAKES_DRAFT = tuple(name for name, fields in EMBEDDED_FIELDS.items() if "draft" in fields)
# As TensorRT-LLM has them (`_compat/llm_args/newest.toml`, NGramDecodingConfig).
_DEFAULTS: Mapping[str, Any] = {
    "max_matching_ngram_size": 2, "is_keep_all": True, "is_use_oldest": True, "is_public_pool": True,
}  # fmt: skip
_USUAL_LENGTH = {"ngram": 4, "draft_target": 5, "medusa": 3, "eagle3": 3}
_FOR_THIS_MODEL = "use a draft that was trained for this model"
# Keys of an EAGLE-3 draft's config that change its arithmetic; ModelOpt's own training never sets them.
_OTHER_ARITHMETIC = ("norm_before_fc", "eh_proj_before_attn")


def take_speculation(settings: Settings, facts: ModelFacts) -> None:
    """The values of the section, besides the method itself."""
    method = settings.recipe.speculative.method
    for name in EMBEDDED_FIELDS[method]:
        path = f"speculative.{name}"
        if name == "max_draft_len":
            settings.take(path, *_length(settings))
        elif name == "draft_kv_cache_share":
            settings.take(path, _share(settings, facts), "by bytes a token")
        else:
            settings.take(path, _DEFAULTS.get(name))


def _length(settings: Settings) -> tuple[int, str]:
    """How many tokens are drafted at a time where the recipe is silent, and who says so."""
    section = settings.recipe.speculative
    heads = settings.draft.medusa if settings.draft else None
    if section.method == "medusa" and section.choices:
        return max(map(len, section.choices)), "speculative.choices"
    return (heads.num_heads, "draft") if heads else (_USUAL_LENGTH[section.method], "default")


def _share(settings: Settings, facts: ModelFacts) -> float | None:
    """The draft's part of the memory in which both caches hold as many tokens."""
    draft = settings.draft.facts if settings.draft else None
    if draft is None:
        return None
    ours = facts.kv_elements_per_token * KV_CACHE_BITS.get(settings["compress.kv_cache"], _PLAIN_BITS)
    theirs = draft.kv_elements_per_token * _PLAIN_BITS
    return round(theirs / (ours + theirs), 4)


def speculation_parameters(settings: Settings) -> dict[str, Any]:
    """The section of ``engine.json``; nothing without a method. JSON has no whole numbers as keys: a list of pairs."""
    method = settings.recipe.speculative.method
    if method == "none":
        return {}
    said: dict[str, Any] = {"method": method}
    for name in EMBEDDED_FIELDS[method]:
        value = settings[f"speculative.{name}"]
        if name == "draft":
            said[name] = DRAFT_PLACE
        elif name == "draft_len_schedule" and value is not None:
            said[name] = [[batch, length] for batch, length in sorted(value.items())]
        elif name == "choices" and value is not None:
            said[name] = list(map(list, value))
        elif value is not None:
            said[name] = value
    return {"speculative": said}


def embedded_draft_files(settings: Settings) -> dict[str, str]:
    """The draft's directory by its role in the engine step."""
    section = settings.recipe.speculative
    return {DRAFT_ROLE: section.draft} if section.draft and section.method in TAKES_DRAFT else {}


def speculation_refusals(settings: Settings, facts: ModelFacts) -> Iterable[Problem]:
    """Methods, fields and drafts that the embedded engine does not take."""
    section = settings.recipe.speculative
    method = section.method
    if method not in ("none", *METHODS):
        yield Problem(_METHOD, f"{method}: the embedded engine has no such method", f"use {', '.join(METHODS)} or none")
        return
    yield from unread_speculative(settings.recipe, EMBEDDED_FIELDS)
    if method == "none":
        return
    yield from length_refusals(settings)
    longest, tokens = settings[_LENGTH], settings["runtime.max_num_tokens"]
    if longest >= tokens:
        message = f"{longest}: with the token before it a draft is longer than a step (runtime.max_num_tokens {tokens})"
        yield Problem(_LENGTH, message, f"use less than {tokens}")
    if section.draft_len_schedule is not None and section.max_concurrency is not None:
        message = f"{section.max_concurrency}: draft_len_schedule says from how many requests on nothing is drafted"
        yield Problem("speculative.max_concurrency", message, "remove one of the two")
    if method in TAKES_DRAFT:
        yield from missing_draft(section)
    yield from _choices(settings)
    draft = settings.draft or Draft()
    if draft.facts is not None:
        yield from _draft_model(settings, facts, draft.facts)
    if draft.medusa is not None:
        yield from _medusa(settings, facts, draft.medusa)
    if draft.eagle3 is not None:
        yield from _eagle3(settings, facts, draft.eagle3)


def _choices(settings: Settings) -> Iterable[Problem]:
    """Trees that are none, and those that do not go with the other numbers."""
    section, at = settings.recipe.speculative, "speculative.choices"
    if section.choices is None or section.method != "medusa":
        return
    heads = settings.draft.medusa if settings.draft else None
    depth = max((len(path) for path in section.choices), default=0)
    wrong = tree_problems(section.choices, heads.num_heads if heads else depth)
    if wrong:
        shown = list(map(list, section.choices))
        yield Problem(at, f"{shown}: {wrong[0]}", "name every path that a longer one goes on from, once")
        return
    if section.max_draft_len not in (None, depth):
        message = f"the longest path has {depth} tokens, and max_draft_len is {section.max_draft_len}"
        yield Problem(at, message, "remove max_draft_len")
    tokens = settings["runtime.max_num_tokens"]
    if len(section.choices) >= tokens:
        message = f"{len(section.choices)} tokens and the one before them are more than a step takes ({tokens})"
        yield Problem(at, message, f"name fewer than {tokens}, or raise runtime.max_num_tokens")


def _medusa(settings: Settings, facts: ModelFacts, heads: MedusaHeads) -> Iterable[Problem]:
    for message in medusa_misfits(heads, facts):
        yield Problem(_DRAFT, message, "use heads that were trained for this model")
    longest = settings[_LENGTH]
    if longest > heads.num_heads:
        message = f"{longest}: the draft has {heads.num_heads} heads, each of which drafts one token"
        yield Problem(_LENGTH, message, f"use at most {heads.num_heads}")


def _eagle3(settings: Settings, facts: ModelFacts, draft: Eagle3) -> Iterable[Problem]:
    if draft.captured is None:
        message = "does not say which layers of the model it reads (eagle_aux_hidden_state_layer_ids)"
        yield Problem(_DRAFT, message, _FOR_THIS_MODEL)
        return
    beyond = [layer for layer in draft.captured if not 0 <= layer < facts.num_layers]
    if beyond:
        yield Problem(_DRAFT, f"reads layer {beyond[0]}, and the model has {facts.num_layers} layers", _FOR_THIS_MODEL)
    other = [name for name in _OTHER_ARITHMETIC if draft.eagle_config.get(name)] + ["fc_norm"] * draft.fc_norm
    if other or (draft.eagle_config.get("parallel_draft_step") or 1) > 1:
        name = other[0] if other else "parallel_draft_step"
        yield Problem(
            _DRAFT, f"has {name} in its config, which the embedded engine does not compute", "use another draft"
        )
    longest = settings["runtime.max_seq_len"]
    if draft.context_length < longest:
        message = f"knows {draft.context_length} positions, and runtime.max_seq_len is {longest}"
        yield Problem(_DRAFT, message, f"use runtime.max_seq_len: {draft.context_length}, or another draft")
    for message in few(misfits(draft, facts, len(draft.captured))):
        yield Problem(_DRAFT, message, _FOR_THIS_MODEL)


def _draft_model(settings: Settings, facts: ModelFacts, draft: ModelFacts) -> Iterable[Problem]:
    reason = compat.refusal(draft.model_type)
    if reason is not None:
        reason = f"{draft.architecture} ({draft.model_type}): {reason}"
    elif compat.causal_lm_class(draft.model_type) is None and not draft.remote_code:
        reason = f"Transformers knows no causal language model of type {draft.model_type!r}"
    yield from draft_refusals(settings, facts, draft, reason)
    if draft.quantization is not None and draft.quantization.method != "modelopt":
        message = f"is quantized by {draft.quantization.method}, which the embedded engine does not read"
        yield Problem(_DRAFT, message, "use the original bf16 or fp16 checkpoint, or one that trtbuild quantized")
    if draft.vocab_size > facts.vocab_size:
        message = f"has a vocabulary of {draft.vocab_size}, and the model knows {facts.vocab_size} tokens"
        hint = "use a draft model of the same family: its token ids go to the model as they are"
        yield Problem(_DRAFT, message, hint)


def speculation_warnings(settings: Settings) -> list[str]:
    """What is allowed and may still surprise."""
    recipe = settings.recipe
    if recipe.speculative.method not in METHODS:
        return []
    warnings = []
    if recipe.runtime.device == "cuda" or (recipe.target.gpu is not None and recipe.runtime.device != "cpu"):
        warnings.append(
            "on a GPU drafts are verified on the general path, which is slower than the fast one without drafts"
        )
    batch, tokens = settings["runtime.max_batch_size"], settings["runtime.max_num_tokens"]
    full = batch * (len(recipe.speculative.choices or ()) or settings[_LENGTH]) + batch
    if full > tokens and recipe.speculative.draft_len_schedule is None:
        warnings.append(
            f"a full batch would verify {full} tokens in a step, and runtime.max_num_tokens is {tokens}: its drafts "
            "will be shorter"
        )
    return warnings
