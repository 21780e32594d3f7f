"""Files that a recipe names, held against its plan before anything is computed: drafts, adapters, conversion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtbuild.adapters import trtllm, trtllm_checkpoint, trtllm_draft, trtllm_tokenizer
from trtbuild.checkpoint_files import LocalFiles
from trtbuild.draft import DRAFT_ROLES, HEADS, Draft, other_tokens, read_draft
from trtbuild.draft_checks import refuse_other_sizes
from trtbuild.embedded_draft import read_embedded_draft
from trtbuild.embedded_speculation import TAKES_DRAFT as EMBEDDED_DRAFTS
from trtbuild.errors import CompatibilityError, Problem
from trtbuild.llm_speculation import TAKES_DRAFT
from trtbuild.plan import Plan
from trtbuild.recipe_file import LoadedRecipe
from trtbuild.releases import line_of
from trtbuild.source import local_path
from trtbuild.support import refused_scaling
from trtbuild.trtllm_engine_drafts import DRAFT_TARGET


def draft_of(loaded: LoadedRecipe) -> Draft | None:
    """What the files of ``speculative.draft`` say, for a runtime that takes them.

    Raises:
        RecipeError, ArtifactError, CompatibilityError: see `read_draft`.
    """
    speculative = loaded.recipe.speculative
    methods = {"trtllm-engine": (DRAFT_TARGET, *HEADS), "trtllm": TAKES_DRAFT, "embedded": EMBEDDED_DRAFTS}
    kind = loaded.recipe.runtime.kind
    if speculative.draft is None or speculative.method not in methods[kind]:
        return None
    read = read_embedded_draft if kind == "embedded" else read_draft
    return read(local_path(loaded, speculative.draft, at="speculative.draft"), speculative.method)


def refuse_unconvertible(plan: Plan, loaded: LoadedRecipe, draft: Draft | None) -> None:
    """Refuse a local checkpoint that the engine step could not convert; one on a hub is judged once it is here.

    Raises:
        CompatibilityError: the conversion's own sentence, or what speaks against a draft.
    """
    engine = plan.step("engine").parameters
    refuse_other_sizes(plan, loaded, _tokenizer(plan, loaded))
    if engine["runtime"] in ("trtllm", "embedded"):
        _refuse_draft(plan, loaded, draft)
    if engine["runtime"] != "trtllm-engine":
        return
    from trtbuild.convert.run import refuse_source

    spec = engine["spec"]
    sizes = {"tp_size": spec["tp_size"], "pp_size": spec["pp_size"]}
    if plan.source.repo_id is None and "heads" not in engine:
        refuse_scaling(spec["version"], refuse_source(Path(plan.source.path), **sizes))
    tokenizer = _tokenizer(plan, loaded)
    if "tokenizer_info" in engine and tokenizer is not None:
        trtllm_tokenizer.tokenizer_info(tokenizer)
    if draft is None or draft.facts is None:
        return
    directory = local_path(loaded, loaded.recipe.speculative.draft or "", at="speculative.draft")
    refuse_scaling(spec["version"], refuse_source(directory, **sizes))
    problem = None if tokenizer is None else other_tokens(tokenizer, directory)
    if problem is not None:
        raise CompatibilityError(str(problem))


def refuse_scaling(version: str, config: Mapping[str, Any]) -> None:
    """Refuse a rotary embedding that engines of a release do not compute."""
    problem = refused_scaling(line_of(version), (config.get("rotary_scaling") or {}).get("type"))
    if problem is not None:
        raise CompatibilityError(problem, "use a later runtime.version, or runtime.kind: trtllm")


def _refuse_draft(plan: Plan, loaded: LoadedRecipe, draft: Draft | None) -> None:
    """Refuse a draft that the engine step would refuse too: its tokens, and for the LLM API how it is stored."""
    place = loaded.recipe.speculative.draft
    if draft is None or place is None:
        return
    engine = plan.step("engine").parameters
    directory = local_path(loaded, place, at="speculative.draft")
    tokenizer = _tokenizer(plan, loaded)
    problem = None if tokenizer is None else other_tokens(tokenizer, directory)
    if problem is not None:
        raise CompatibilityError(str(problem))
    if draft.facts is not None and engine["runtime"] == "trtllm":
        layout = trtllm_checkpoint.Layout.of(engine["values"], gpu=plan.value("target.gpu"))
        checks = trtllm_checkpoint.check(LocalFiles(directory), engine["version"], layout)
        trtllm_draft.refuse(directory, checks, engine["version"])


def _tokenizer(plan: Plan, loaded: LoadedRecipe) -> Path | None:
    """The directory with the tokenizer, or None while it is on a hub: the engine step looks again."""
    named = plan.value("model.tokenizer")
    if named is not None:
        return local_path(loaded, named, at="model.tokenizer")
    return Path(plan.source.path) if plan.source.repo_id is None else None


def adapter_problems(loaded: LoadedRecipe, plan: Plan) -> list[Problem]:
    """What is wrong with the LoRA adapters of a recipe, before anything is compressed."""
    engine = plan.step("engine")
    adapters = {role: path for role, path in engine.files.items() if role not in DRAFT_ROLES}
    places = {name: local_path(loaded, path, at="model.adapters") for name, path in adapters.items()}
    if "lora" in engine.parameters:
        from trtbuild.convert.lora.adapter import Limits, read_adapter

        limits = Limits.of(engine.parameters["lora"])
        read = (read_adapter(name, place, limits) for name, place in places.items())
        return [problem for found in read if isinstance(found, list) for problem in found]
    return [
        problem
        for name, place in places.items()
        for problem in trtllm.check_adapter(name, place, engine.parameters["values"])
    ]
