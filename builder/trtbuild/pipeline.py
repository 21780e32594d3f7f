"""`prepare`: gather facts and make the plan. `build`: execute it, reuse what is there, and put the package in place."""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtbuild import __version__, evidence, package
from trtbuild.adapters import container, trtllm, trtllm_tokenizer
from trtbuild.draft import DRAFT_ROLE, HEADS, HEADS_ROLE, Draft, other_tokens, read_draft
from trtbuild.errors import CompatibilityError, GateError, HostError, Problem, RecipeError
from trtbuild.gates import check_gates
from trtbuild.manifest import canonical_json, digest_entries, digest_json, entries_json
from trtbuild.model import read_facts
from trtbuild.paths import cache_dir
from trtbuild.plan import STEP_KINDS, Plan, Step, step_key, until
from trtbuild.planner import make_plan
from trtbuild.recipe_file import LoadedRecipe, load_recipe
from trtbuild.report import Reporter
from trtbuild.source import Fetched, digest_paths, fetch, local_path, locate, missing_files, recipe_path
from trtbuild.steps import Work, check_repository, deploy_spec, run_step
from trtbuild.store import Artifact, Store, remove_tree
from trtbuild.toolchain import require, tool_versions
from trtbuild.trtllm_engine_drafts import DRAFT_TARGET

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A recipe with its plan; nothing has been built yet."""

    loaded: LoadedRecipe
    plan: Plan
    store: Path


@dataclass(frozen=True, slots=True)
class Built:
    """What a build left: the package and its digest, or the directory of the step after which it stopped."""

    path: Path
    digest: str | None


@dataclass(slots=True)
class _Run:
    """One execution of a plan."""

    prepared: Prepared
    store: Store
    reporter: Reporter
    fetched: Fetched
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    files: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)


def prepare(recipe: Path, overrides: Sequence[str] = ()) -> Prepared:
    """Read the recipe and the model's facts, and plan. Touches no tensor data.

    Raises:
        RecipeError, CompatibilityError, ArtifactError: see `load_recipe`, `read_facts` and `make_plan`.
    """
    loaded = load_recipe(recipe, overrides)
    source, files = locate(loaded)

    def check(plan: Plan) -> list[Problem]:
        deploy = deploy_spec(plan.step("deploy"), engine_digest="")
        missing = missing_files(loaded, plan.steps)
        return [*missing, *container.check_deploy(deploy), *(() if missing else _check_adapters(loaded, plan))]

    draft = _draft(loaded)
    plan = make_plan(loaded, read_facts(files), source, tool_versions(), check=check, draft=draft)
    _foresee_conversion(plan, loaded, draft)
    configured = loaded.recipe.store
    store = local_path(loaded, configured, at="store") if configured is not None else cache_dir() / "store"
    return Prepared(loaded=loaded, plan=plan, store=store)


def _draft(loaded: LoadedRecipe) -> Draft | None:
    """What the files of ``speculative.draft`` say, for a runtime that takes them.

    Raises:
        RecipeError, ArtifactError, CompatibilityError: see `read_draft`.
    """
    speculative = loaded.recipe.speculative
    takes = loaded.recipe.runtime.kind == "trtllm-engine" and speculative.method in (DRAFT_TARGET, *HEADS)
    if speculative.draft is None or not takes:
        return None
    return read_draft(local_path(loaded, speculative.draft, at="speculative.draft"), speculative.method)


def _foresee_conversion(plan: Plan, loaded: LoadedRecipe, draft: Draft | None) -> None:
    """Refuse a local checkpoint that the engine step could not convert; one on a hub is judged once it is here.

    Raises:
        CompatibilityError: the conversion's own sentence.
    """
    engine = plan.step("engine").parameters
    if engine["runtime"] != "trtllm-engine":
        return
    from trtbuild.convert.run import refuse_source

    spec = engine["spec"]
    sizes = {"tp_size": spec["tp_size"], "pp_size": spec["pp_size"]}
    if plan.source.repo_id is None and "heads" not in engine:
        refuse_source(Path(plan.source.path), **sizes)
    tokenizer = _tokenizer(plan, loaded)
    if "tokenizer_info" in engine and tokenizer is not None:
        trtllm_tokenizer.tokenizer_info(tokenizer)
    if draft is None or draft.facts is None:
        return
    directory = local_path(loaded, loaded.recipe.speculative.draft or "", at="speculative.draft")
    refuse_source(directory, **sizes)
    problem = None if tokenizer is None else other_tokens(tokenizer, directory)
    if problem is not None:
        raise CompatibilityError(str(problem))


def _tokenizer(plan: Plan, loaded: LoadedRecipe) -> Path | None:
    """The directory with the tokenizer, or None while it is on a hub: the engine step looks again."""
    named = plan.value("model.tokenizer")
    if named is not None:
        return local_path(loaded, named, at="model.tokenizer")
    return Path(plan.source.path) if plan.source.repo_id is None else None


def _check_adapters(loaded: LoadedRecipe, plan: Plan) -> list[Problem]:
    """What is wrong with the LoRA adapters of a recipe, before anything is compressed."""
    engine = plan.step("engine")
    adapters = {role: path for role, path in engine.files.items() if role not in (DRAFT_ROLE, HEADS_ROLE)}
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


def build(prepared: Prepared, out: Path, reporter: Reporter, *, last: str | None = None) -> Built:
    """Execute a plan: reuse what the store has, build the rest, gate, and put the package at `out`.

    Args:
        prepared: what `prepare` returned.
        out: the package's directory.
        reporter: is told what happens.
        last: stop after this kind of step, without a package.

    Raises:
        GateError: a measured number misses its threshold; the evidence stays in the store.
        HostError: a tool is not installed, or the disk is full.
    """
    if last is not None and last not in STEP_KINDS:
        raise RecipeError([Problem("--until", f"{last!r} is no step; steps are {', '.join(STEP_KINDS)}")])
    if last is None:
        package.refuse_foreign(out)
    try:
        return _build(prepared, out, reporter, last)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        where = error.filename2 or error.filename or prepared.store  # a copy names its source first
        raise HostError(
            f"no space left on the device of {where}", "free some and start the build again: it resumes"
        ) from error


def _build(prepared: Prepared, out: Path, reporter: Reporter, last: str | None) -> Built:
    store = Store(prepared.store)
    store.sweep()
    started = time.monotonic()
    fetched = fetch(prepared.plan, store.root / "downloads", store.digests, reporter)
    reporter.finished("fetch", "checked", time.monotonic() - started)
    run = _Run(prepared, store, reporter, fetched)
    for step in until(prepared.plan.steps, last):
        if step.kind != "fetch":
            run.artifacts[step.kind] = _have(run, step)
    if "evaluate" in run.artifacts:
        _gate(run)
    if last is not None:
        stopped = fetched.directory if last == "fetch" else run.artifacts[last].content
        return Built(stopped, None)
    check_repository(run.artifacts["repository"].content, run.artifacts["engine"].content)
    digest = _package(run, out)
    _say_what_is_left(run, out)
    return Built(out, digest)


def _have(run: _Run, step: Step) -> Artifact:
    """The artifact of one step: from the store, or built now."""
    files = {
        role: local_path(run.prepared.loaded, path, at=recipe_path(step.kind, role))
        for role, path in step.files.items()
    }
    inputs = {kind: artifact.digest for kind, artifact in run.artifacts.items()}
    inputs["fetch"] = digest_entries(run.fetched.files)
    file_digests = digest_paths(step.kind, files, run.store.digests)
    run.files[step.kind] = {role: {"path": str(path), "digest": file_digests[role]} for role, path in files.items()}
    key = step_key(step, inputs, file_digests)
    started = time.monotonic()

    def waiting() -> None:
        run.reporter.note(f"another process is building {step.kind}; waiting for it")

    with run.store.lock(step.kind, key, waiting=waiting):
        artifact = run.store.find(step.kind, key)
        status = "reused"
        if artifact is None:
            require(step.kind, step.tools)
            run.reporter.started(step.kind)
            artifact = _execute(run, step, key, files)
            status = "built"
    run.reporter.finished(step.kind, status, time.monotonic() - started)
    return artifact


def _execute(run: _Run, step: Step, key: str, files: Mapping[str, Path]) -> Artifact:
    staging = run.store.stage(step.kind, key)
    work = Work(
        plan=run.prepared.plan,
        step=step,
        source=run.fetched.directory,
        inputs=dict(run.artifacts),
        files=files,
        staging=staging,
        reporter=run.reporter,
    )
    try:
        record = run_step(work)
    except BaseException:
        # The log stays for the message that names it; half a checkpoint must not keep a full disk full.
        remove_tree(staging.content)
        raise
    for note in record.get("result", {}).get("notes", ()):
        run.reporter.note(f"{step.kind}: {note}")
    return run.store.publish(staging, step.kind, key, record)


def _gate(run: _Run) -> None:
    artifact = run.artifacts["evaluate"]
    results = check_gates(artifact.record["result"], run.prepared.plan.gates)
    for result in results:
        run.reporter.note(str(result))
    failed = [result for result in results if not result.passed]
    if failed:
        message = "the quality gate stops this build:\n" + "\n".join(f"  {result}" for result in failed)
        raise GateError(
            message, f"the evidence is {artifact.content}; change the format, or the threshold if you accept this"
        )


def _package(run: _Run, out: Path) -> str:
    loaded, plan = run.prepared.loaded, run.prepared.plan
    trees = {"engine": "engine", "model_repository": "repository", "deploy": "deploy"}
    texts = {
        package.RECIPE: loaded.effective_text(),
        package.LOCK: canonical_json(_lock(run)),
        "evidence/quality.json": canonical_json(evidence.quality(run.artifacts["evaluate"].record, plan.gates)),
        "evidence/build.json": canonical_json(evidence.build(run.artifacts, plan)),
    }
    parts = package.Parts({name: run.artifacts[kind] for name, kind in trees.items()}, texts)
    started = time.monotonic()
    target = out.resolve()  # a link to a package stays a link
    with run.store.lock("package", digest_json(str(target)), waiting=lambda: None):
        digest, status = package.assemble(target, parts, run.store.digests)
    run.reporter.finished("package", status, time.monotonic() - started)
    return digest


def _say_what_is_left(run: _Run, out: Path) -> None:
    """A TensorRT engine is built where its GPU is."""
    engine = run.prepared.plan.step("engine").parameters
    if engine["runtime"] == "trtllm-engine":
        gpus = f"{engine['world_size']} x SM{engine['spec']['gpu']}"
        run.reporter.note(f"the engine itself is built by {out}/engine/build.sh in {engine['image']}, on {gpus}")
        if "draft" in engine:
            run.reporter.note(f"the draft model's engine is built by {out}/engine/draft/build.sh, in the same way")


def _lock(run: _Run) -> dict[str, Any]:
    """Everything that two builds must share to give the same package digest."""
    return {
        "schema_version": 1,
        "trtbuild": __version__,
        "plan": run.prepared.plan.to_json(),
        "source": entries_json(run.fetched.files),
        "files": run.files,
        "artifacts": {kind: {"key": item.key, "digest": item.digest} for kind, item in sorted(run.artifacts.items())},
    }
