"""Which methods and draft lengths are possible for a recipe: those of which a plan can be made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.embedded_speculation import EMBEDDED_FIELDS, METHODS, TAKES_DRAFT
from trtbuild.errors import CompatibilityError, Problem, RecipeError, TrtbuildError
from trtbuild.pipeline import Prepared, prepare_loaded
from trtbuild.recipe_edit import with_section
from trtbuild.recipe_file import LoadedRecipe, parse_recipe
from trtbuild.source import local_path
from trtbuild.speculation_advice import Candidate
from trtbuild.yaml_text import yaml_key, yaml_scalar

LENGTHS = (1, 2, 3, 5, 7)
_MATCHED = (2, 4)
_SECTION = "speculative"
# What the candidates themselves decide.
_OURS = ("draft", "max_draft_len", "draft_len_schedule", "max_concurrency", "max_matching_ngram_size", "choices")
_LIMITS = ("max_batch_size", "max_num_tokens", "max_seq_len")


@dataclass(frozen=True, slots=True)
class Possible:
    """What can be measured: candidates, with each the section of engine.json, and a sentence for what cannot.

    `plain` is the recipe without speculation, `embedded` the same as a recipe of the embedded engine.
    """

    plain: Prepared
    embedded: Prepared
    candidates: tuple[Candidate, ...]
    sections: tuple[Mapping[str, Any], ...]
    refused: tuple[str, ...]


def find_possible(loaded: LoadedRecipe, draft: Path | None = None) -> Possible:
    """The candidates for a recipe, every one of which its own runtime and the embedded engine take.

    Args:
        loaded: the recipe.
        draft: a draft's directory; by default what the recipe names.

    Raises:
        RecipeError: the recipe is wrong, or no method is possible.
        CompatibilityError: the model does not run on the embedded engine, or no method goes with it.
    """
    plain = prepare_loaded(_with(loaded, None))
    try:
        embedded = prepare_loaded(_embedded(plain, None))
    except CompatibilityError as error:
        message = f"acceptance is measured on the embedded engine, which does not run this recipe's model: {error}"
        raise CompatibilityError(message) from error
    candidates: list[Candidate] = []
    sections: list[Mapping[str, Any]] = []
    refused: dict[str, str] = {}
    for candidate in _asked(loaded, draft):
        if any(one.method != candidate.method and "draft" in one.section for one in candidates):
            continue  # one directory is the draft of one method
        asked = dict(candidate.section) | {"max_draft_len": candidate.length}
        try:
            if loaded.recipe.runtime.kind != "embedded":
                prepare_loaded(_with(plain.loaded, asked))
            planned = prepare_loaded(_embedded(plain, asked)).plan.step("engine").parameters[_SECTION]
        except TrtbuildError as error:
            refused.setdefault(candidate.method, f"{candidate.method} is not possible: {error}")
            continue
        candidates.append(candidate)
        sections.append(_with_place(planned, candidate, plain.loaded))
    measured = {candidate.method for candidate in candidates}
    if measured & set(TAKES_DRAFT):
        measured |= set(TAKES_DRAFT)  # that the draft is not of another method is no news
    sentences = tuple(text for method, text in refused.items() if method not in measured)
    if not candidates:
        raise CompatibilityError("no method of speculation is possible for this recipe:\n" + "\n".join(sentences))
    return Possible(plain, embedded, tuple(candidates), tuple(sections), sentences)


def _asked(loaded: LoadedRecipe, draft: Path | None) -> Iterator[Candidate]:
    """Every candidate that the embedded engine's methods allow, the cheapest family first.

    A draft is that of the recipe's method, else of the first that takes it: a draft model comes last, since others have
    its files too.
    """
    said = loaded.recipe.speculative
    place = str(draft) if draft is not None else said.draft
    drafting = [said.method] if said.method in TAKES_DRAFT else [name for name in METHODS if name in TAKES_DRAFT]
    for method in sorted(METHODS, key=lambda name: (name in TAKES_DRAFT, name == "draft_target")):
        if method in TAKES_DRAFT:
            given = place is not None and method in drafting
            families: list[dict[str, Any]] = [{"draft": place}] if given else []
        else:
            families = [{"max_matching_ngram_size": size} for size in _MATCHED]
        kept = _kept(loaded, method)
        yield from (Candidate({"method": method} | family | kept, length) for family in families for length in LENGTHS)


def _kept(loaded: LoadedRecipe, method: str) -> dict[str, Any]:
    """What the recipe says of the same method besides what is tried."""
    section = loaded.document.get(_SECTION)
    if not isinstance(section, Mapping) or section.get("method") != method:
        return {}
    names = [name for name in EMBEDDED_FIELDS[method] if name not in _OURS]
    return {name: section[name] for name in names if name in section}


def _with(loaded: LoadedRecipe, section: Mapping[str, Any] | None) -> LoadedRecipe:
    """The recipe, with what ``--set`` has changed, and with this section."""
    return parse_recipe(with_section(loaded.effective_text(), _SECTION, section), loaded.path)


def _embedded(plain: Prepared, section: Mapping[str, Any] | None) -> LoadedRecipe:
    """The recipe as one of the embedded engine: of another runtime's the model, its compression and the limits."""
    loaded = plain.loaded
    if loaded.recipe.runtime.kind == "embedded":
        return _with(loaded, section)
    model = {name: value for name, value in loaded.document["model"].items() if name != "adapters"}
    document: dict[str, Any] = {"schema_version": 1, "model": model}
    document |= {name: loaded.document[name] for name in ("compress", "store") if name in loaded.document}
    document["runtime"] = {"kind": "embedded"} | {name: plain.plan.value(f"runtime.{name}") for name in _LIMITS}
    if section is not None:
        document[_SECTION] = section
    text = "".join(f"{yaml_key(name)}: {yaml_scalar(value)}\n" for name, value in document.items())
    return parse_recipe(text, loaded.path)


def _with_place(planned: Mapping[str, Any], candidate: Candidate, loaded: LoadedRecipe) -> Mapping[str, Any]:
    """The section of engine.json, with the draft where the recipe has it."""
    draft = candidate.section.get("draft")
    if draft is None:
        return planned
    return dict(planned) | {"draft": str(local_path(loaded, draft, at="speculative.draft"))}


def refuse_nothing_to_draft(draft: Path | None) -> None:
    """Refuse a draft that is no directory, in the words of the option.

    Raises:
        RecipeError: it is none.
    """
    if draft is not None and not draft.is_dir():
        raise RecipeError([Problem("--draft", f"{draft} is no directory", "name a checkpoint directory")])


def batches(plan_batch: int, wanted: Sequence[int] = (1, 4, 16, 64)) -> tuple[list[int], str | None]:
    """The numbers of requests to measure with, and a sentence where the recipe's limit leaves some out."""
    taken = [batch for batch in wanted if batch <= plan_batch]
    beyond = [batch for batch in wanted if batch > plan_batch]
    if not beyond:
        return taken, None
    return taken, f"{', '.join(map(str, beyond))} requests at once are beyond runtime.max_batch_size {plan_batch}"
