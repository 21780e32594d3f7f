"""`prepare`: gather facts and make the plan. `build`: execute it, reuse what is there, and put the package in place."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtbuild import __version__, evidence, package
from trtbuild.adapters import container
from trtbuild.draft_checks import refuse_other_weights
from trtbuild.engine_build import KIND as BUILT
from trtbuild.engine_build import STEPS, EngineJob, have_engine, is_kept, refuse_runner
from trtbuild.errors import GateError, HostError, Problem, RecipeError
from trtbuild.foresight import adapter_problems, draft_of, refuse_unconvertible
from trtbuild.gates import check_gates
from trtbuild.manifest import canonical_json, digest_entries, digest_json, entries_json
from trtbuild.model import read_facts
from trtbuild.paths import cache_dir
from trtbuild.plan import STEP_KINDS, Plan, Step, step_key, until
from trtbuild.planned_draft import planned_draft
from trtbuild.planner import make_plan
from trtbuild.recipe_file import LoadedRecipe, load_recipe
from trtbuild.report import Reporter
from trtbuild.source import (
    Fetched,
    calibration_split,
    digest_paths,
    fetch,
    local_path,
    locate,
    missing_files,
    recipe_path,
)
from trtbuild.steps import Work, check_repository, deploy_spec, run_step
from trtbuild.store import Artifact, Store, remove_tree
from trtbuild.toolchain import require, tool_versions

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
    foresee: Callable[[str | None], None]  # told of the compressed checkpoint's digest before a step works
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    files: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    built: dict[str, Artifact] = field(default_factory=dict)  # TensorRT engines, by their place in the package


def prepare(recipe: Path, overrides: Sequence[str] = ()) -> Prepared:
    """Read the recipe and the model's facts, and plan. Touches no tensor data.

    Raises:
        RecipeError, CompatibilityError, ArtifactError: see `load_recipe`, `read_facts` and `make_plan`.
    """
    return prepare_loaded(load_recipe(recipe, overrides))


def prepare_loaded(loaded: LoadedRecipe) -> Prepared:
    """As `prepare`, for a recipe that is read already.

    Raises:
        RecipeError, CompatibilityError, ArtifactError: see `read_facts` and `make_plan`.
    """
    source, files = locate(loaded)

    def check(plan: Plan) -> list[Problem]:
        deploy = deploy_spec(plan.step("deploy"), engine_digest="")
        missing = missing_files(loaded, plan.steps)
        return [*missing, *container.check_deploy(deploy), *(() if missing else adapter_problems(loaded, plan))]

    facts = read_facts(files)
    draft = planned_draft(loaded.recipe.speculative, facts) or draft_of(loaded)
    plan = make_plan(loaded, facts, source, tool_versions(), check=check, draft=draft)
    refuse_unconvertible(plan, loaded, draft)
    configured = loaded.recipe.store
    store = local_path(loaded, configured, at="store") if configured is not None else cache_dir() / "store"
    return Prepared(loaded=loaded, plan=plan, store=store)


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
    if last is not None and last not in {step.kind for step in prepared.plan.steps}:
        raise RecipeError([Problem("--until", f"{last}: this recipe has no such step", "set speculative.train")])
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
    replaced, with_engine = out if last is None else None, _builds_engine(prepared.plan, last)

    def foresee(checkpoint: str | None) -> None:
        if with_engine:
            refuse_runner(prepared.plan, store, replaced, checkpoint)

    if not (store.root / BUILT).exists():  # else one may be there, which the checkpoint will tell
        foresee(None)
    started = time.monotonic()
    fetched = fetch(prepared.plan, store.root / "downloads", store.digests, reporter)
    reporter.finished("fetch", "checked", time.monotonic() - started)
    refuse_other_weights(prepared.plan, prepared.loaded, fetched.files)
    run = _Run(prepared, store, reporter, fetched, foresee)
    for step in until(prepared.plan.steps, last):
        if step.kind != "fetch":
            run.artifacts[step.kind] = _have(run, step)
    if "evaluate" in run.artifacts:
        _gate(run)
    if with_engine:
        run.built |= _engines(run, replaced)
    if last is not None:
        return Built(_stopped(run, last), None)
    check_repository(run.artifacts["repository"].content, run.artifacts["engine"].content)
    digest = _package(run, out)
    if run.built:  # once more, against the limits that the built engine itself has
        check_repository(out / "model_repository", out / "engine")
    return Built(out, digest)


def _engines(run: _Run, replaced: Path | None) -> dict[str, Artifact]:
    """The built engines of the model and, where there is one, of its draft model; see `have_engine`."""
    plan = run.prepared.plan
    places = package.PLACES if "draft" in plan.step("engine").parameters else (package.PLACE,)
    jobs = [EngineJob(plan, run.store, run.reporter, run.artifacts["engine"], replaced, place) for place in places]
    return {job.place: built for job in jobs if (built := have_engine(job)) is not None}


def _builds_engine(plan: Plan, last: str | None) -> bool:
    """Whether a built TensorRT engine belongs to what is asked for."""
    return plan.step("engine").parameters["runtime"] == "trtllm-engine" and last in (None, "engine")


def _stopped(run: _Run, last: str) -> Path:
    """What the last step of a build in part has left."""
    if last == "engine" and package.PLACE in run.built:
        return run.built[package.PLACE].content
    return run.fetched.directory if last == "fetch" else run.artifacts[last].content


def _have(run: _Run, step: Step) -> Artifact:
    """The artifact of one step: from the store, or built now."""
    files = {
        role: local_path(run.prepared.loaded, path, at=recipe_path(step.kind, role))
        for role, path in step.files.items()
    }
    inputs = {kind: artifact.digest for kind, artifact in run.artifacts.items()}
    inputs["fetch"] = digest_entries(run.fetched.files)
    file_digests = digest_paths(step.kind, files, run.store.digests, calibration_split(step))
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
            run.foresee(run.artifacts["compress"].digest if "compress" in run.artifacts else None)
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
        source_files=run.fetched.files,
        inputs=dict(run.artifacts),
        files=files,
        file_digests={role: described["digest"] for role, described in run.files[step.kind].items()},
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
    steps = run.artifacts | {STEPS[place]: built for place, built in run.built.items()}
    texts = {
        package.RECIPE: loaded.effective_text(),
        package.LOCK: canonical_json(_lock(run)),
        "evidence/quality.json": canonical_json(evidence.quality(run.artifacts["evaluate"].record, plan.gates)),
        "evidence/build.json": canonical_json(evidence.build(steps, plan)),
        **evidence.choice(run.artifacts["compress"].record),
        **evidence.training(run.artifacts.get("draft")),
    }
    artifacts = {name: run.artifacts[kind] for name, kind in trees.items()} | run.built
    parts = package.Parts(artifacts, texts)
    started = time.monotonic()
    target = out.resolve()  # a link to a package stays a link
    with run.store.lock("package", digest_json(str(target)), waiting=lambda: None):
        digest, status = package.assemble(target, parts, run.store.digests, lambda key: is_kept(run.store, key))
    run.reporter.finished("package", status, time.monotonic() - started)
    return digest


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
