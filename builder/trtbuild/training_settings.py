"""Fill in the section `speculative.train` of a recipe, and plan the step that trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trtbuild.errors import Problem
from trtbuild.model import ModelFacts
from trtbuild.plan import Step
from trtbuild.planned_draft import TRAINABLE, USUAL_HEADS, planned_captured
from trtbuild.setting_values import Settings

PROMPTS_ROLE = "prompts"
_AT = "speculative.train"
_LENGTH = 256
_USUAL_STEPS = 3
_LEARNING_RATE = {"medusa": 1e-3, "eagle3": 5e-4}
_PLAIN = ("prompts", "column", "samples", "held_out")
_OWN = {"medusa": ("num_heads",), "eagle3": ("ttt_steps", "draft_vocab_size")}
# Decoders whose layers read embeddings as they are and whose head reads the last norm's output as it is, which the
# formats of drafts suppose. Gemma scales its embeddings and its logits, Granite both; Phi-3's names are others.
_CLASSES = (
    *("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"),
    *("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
)


def trains(settings: Settings) -> bool:
    """Whether the plan has a step that trains."""
    section = settings.recipe.speculative
    return section.train is not None and section.method in TRAINABLE


def take_training(settings: Settings, facts: ModelFacts) -> None:
    """The values of the section, and what is wrong with them."""
    section = settings.recipe.speculative
    if section.train is None:
        return
    if section.method not in TRAINABLE:
        why = "without a speculative.method nothing is trained" if section.method == "none" else "it has no heads"
        settings.problem(_AT, f"{section.method}: {why}", f"use {' or '.join(TRAINABLE)}, or remove it")
        return
    if section.draft is not None:
        settings.problem("speculative.draft", f"is given, and {_AT} would make another", "remove one of the two")
    for name in _PLAIN:
        settings.take(f"{_AT}.{name}")
    _lengths(settings, facts)
    for name in ("epochs", "batch_size"):
        settings.take(f"{_AT}.{name}")
    settings.take(f"{_AT}.learning_rate", _LEARNING_RATE[section.method], f"default for {section.method}")
    settings.take(f"{_AT}.num_layers")
    if section.method == "medusa":
        settings.take(f"{_AT}.num_heads", USUAL_HEADS)
    else:
        _eagle3(settings, facts)
    settings.take(f"{_AT}.seed")
    for method, names in _OWN.items():
        for name in names if method != section.method else ():
            if settings.given(f"{_AT}.{name}"):
                settings.problem(f"{_AT}.{name}", f"is for {method}, and the method is {section.method}", "remove it")


def _lengths(settings: Settings, facts: ModelFacts) -> None:
    context, at = facts.context_length, f"{_AT}.max_seq_len"
    origin = f"default: {_LENGTH}, at most the model's {context}" if context < _LENGTH else "default"
    length = settings.take(at, min(_LENGTH, context), origin)
    if length > context:
        settings.problem(at, f"{length} is more than the model's context of {context} tokens", f"use at most {context}")
    at = f"{_AT}.max_answer_tokens"
    answer = settings.take(at, length // 2, "default: half of max_seq_len")
    if answer >= length:
        settings.problem(at, f"{answer} leaves no room for a prompt in max_seq_len {length}", f"use less than {length}")


def _eagle3(settings: Settings, facts: ModelFacts) -> None:
    settings.take(f"{_AT}.ttt_steps", _USUAL_STEPS)
    drafted, at = settings.take(f"{_AT}.draft_vocab_size"), f"{_AT}.draft_vocab_size"
    if drafted is not None and drafted > facts.vocab_size:
        message = f"{drafted} is more than the model's vocabulary of {facts.vocab_size}"
        settings.problem(at, message, "use less, or remove it to draft every token")
    captured = planned_captured(settings.recipe.speculative, facts)
    at = "speculative.eagle3_layers_to_capture"
    if len(captured) < 2:
        settings.problem(at, f"{list(captured)}: a draft is trained on two layers or more", "name more layers")
    beyond = [layer for layer in captured if layer >= facts.num_layers]
    if beyond and settings.recipe.runtime.kind != "trtllm":  # whose own rules say it
        message = f"{beyond[0]}: the model has {facts.num_layers} layers"
        settings.problem(at, message, f"name layers from 0 to {facts.num_layers - 1}")


def training_refusals(settings: Settings, facts: ModelFacts) -> Iterable[Problem]:
    """Models that no heads can be trained for here."""
    if trains(settings) and facts.architecture not in _CLASSES:
        message = f"{facts.architecture}: drafts are trained for {', '.join(_CLASSES)}"
        yield Problem(_AT, message, "give a draft that was trained elsewhere (speculative.draft), or another method")


def draft_steps(
    settings: Settings, facts: ModelFacts, tools: Mapping[str, Mapping[str, str | None]], device: str
) -> tuple[Step, ...]:
    """The step that trains, where the recipe asks for one; the engine step reads what it makes."""
    if not trains(settings):
        return ()
    parameters = _parameters(settings, facts) | {"device": device}
    files = {PROMPTS_ROLE: settings[f"{_AT}.prompts"]}
    return (Step("draft", parameters, ("fetch", "compress"), tools["draft"], files),)


def _parameters(settings: Settings, facts: ModelFacts) -> dict[str, Any]:
    method = settings.recipe.speculative.method
    names = (
        *("column", "samples", "held_out", "max_seq_len", "max_answer_tokens", "epochs", "batch_size"),
        *("learning_rate", "num_layers", *_OWN[method], "seed"),
    )
    captured = list(planned_captured(settings.recipe.speculative, facts)) if method == "eagle3" else None
    return {
        "method": method,
        "format": settings["compress.format"],
        "trust_remote_code": settings["model.trust_remote_code"],
        "captured": captured,
    } | {name: settings[f"{_AT}.{name}"] for name in names}
