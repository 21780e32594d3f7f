"""The built engine of a package for TensorRT engines: from the store, from the package itself, or built now.

The engine step leaves a converted checkpoint and a script. What the script makes is an artifact of its own, ``built``:
two builds of one engine differ in bytes (TensorRT chooses kernels by measuring them), so no other key and no package
digest may depend on it, and a build without it is complete.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.adapters.trtllm_engine import CHECKPOINT, ENGINE_FILE, SCRIPT, build_key, planned_script
from trtbuild.adapters.trtllm_engine_checks import check_built, read_record
from trtbuild.adapters.trtllm_runner import EngineRun, find_runner, run_script
from trtbuild.errors import ArtifactError, HostError
from trtbuild.linking import place_tree
from trtbuild.manifest import compare_tree, digest_json, read_json
from trtbuild.package import DRAFT_PLACE, PLACE, entries_below, read_manifest, refuse_loss
from trtbuild.plan import Plan
from trtbuild.report import Reporter
from trtbuild.store import Artifact, Store
from trtbuild.trtllm_build import BUILT, DRAFT, spec_from_json

KIND = "built"
STEPS = {PLACE: "trtllm-build", DRAFT_PLACE: "trtllm-build-draft"}  # what the reporter and the evidence call them
_AUTO, _SCRIPT_ONLY = "auto", "script"


@dataclass(frozen=True, slots=True)
class EngineJob:
    """One engine to have.

    Args:
        plan: the whole plan.
        store: where built engines are kept.
        reporter: is told what happens.
        engine: the artifact of the engine step.
        out: the package that will be replaced; None where none is written.
        place: which engine of the package: the model's, or the draft model's.
    """

    plan: Plan
    store: Store
    reporter: Reporter
    engine: Artifact
    out: Path | None
    place: str = PLACE

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Of the planned engine step, or of its part that plans the draft model's engine."""
        engine: Mapping[str, Any] = self.plan.step("engine").parameters
        return engine if self.place == PLACE else engine[DRAFT]

    @property
    def directory(self) -> Path:
        """The engine directory, which holds checkpoint and script."""
        return self.engine.content if self.place == PLACE else self.engine.content / DRAFT


def refuse_runner(plan: Plan, store: Store, out: Path | None, checkpoint: str | None) -> None:
    """Refuse a runner that the recipe names and that is of no use here, before anything is computed.

    An engine that was built before needs none, so this waits where there may be one.

    Args:
        plan: the whole plan.
        store: where built engines are kept.
        out: see `EngineJob`.
        checkpoint: the digest of the compressed checkpoint, where it is known already.

    Raises:
        HostError: see `find_runner`.
    """
    step, wanted = plan.step("engine"), plan.value("runtime.build_in")
    key = "" if checkpoint is None else build_key(step.parameters, checkpoint, str(step.tools["revision"]))
    there = None if out is None else read_record(out / PLACE)
    is_there = there is not None and (not key or there.get("key") == key)
    if wanted not in (_AUTO, _SCRIPT_ONLY) and not is_there and not is_kept(store, key):
        _find(planned_script(step.parameters, key=key), wanted)


def have_engine(job: EngineJob) -> Artifact | None:
    """The built engine of this plan; None where it is neither there nor can be built here, which is then said.

    Raises:
        ArtifactError: an engine is there, and not what the plan says.
        HostError: the recipe names a runner that is of no use here.
        ToolError: the build failed.
    """
    key = str(read_json(job.directory / ENGINE_FILE)["key"])
    started = time.monotonic()

    def waiting() -> None:
        job.reporter.note("another process is building this engine; waiting for it")

    with job.store.lock(KIND, key, waiting=waiting):
        artifact, status = job.store.find(KIND, key), "reused"
        if artifact is None:
            artifact, status = _adopt(job, key), "taken from the package"
        if artifact is None:
            artifact, status = _build(job, key), "built"
    if artifact is not None:
        job.reporter.finished(STEPS[job.place], status, time.monotonic() - started)
    return artifact


def _adopt(job: EngineJob, key: str) -> Artifact | None:
    """The engine that the script has built in the package, where it is the one of this plan."""
    record = None if job.out is None else read_record(job.out / job.place)
    if job.out is None or record is None or record.get("key") != key:
        return None
    place, remedy = job.out / job.place, f"move {job.out / job.place} away, and build again"
    recorded = entries_below(read_manifest(job.out), job.place)  # none where the script has added it
    damage = compare_tree(place, recorded, job.store.digests) if recorded else []
    if damage:
        raise ArtifactError(f"{place} is damaged: {', '.join(damage)}", remedy)
    _refuse_other(job, place, key, remedy)
    staging = job.store.stage(KIND, key)
    place_tree(place, staging.content)
    _keep_timing(job, place.with_name(f"{BUILT}.work"))
    return job.store.publish(staging, KIND, key, {"result": {"runner": SCRIPT, "record": record}})


def _build(job: EngineJob, key: str) -> Artifact | None:
    """Build the engine now, if something here can."""
    script, wanted = job.directory / SCRIPT, job.plan.value("runtime.build_in")
    if wanted == _SCRIPT_ONLY:
        _say_script(job, "runtime.build_in is script")
        return None
    try:
        runner = _find(script.read_text(encoding="utf-8"), wanted)
    except HostError as error:
        if wanted != _AUTO:
            raise
        _say_script(job, error.message)
        return None
    if job.out is not None:  # now, and not after hours: a package with this engine will replace what is there
        refuse_loss(job.out, lambda other: other == key or is_kept(job.store, other))
    job.reporter.started(STEPS[job.place])
    # Beside the staging directory, not in it: what a killed build has finished is used by the next one.
    place = job.store.root / "building" / f"{KIND}-{key}"
    built, work = place / BUILT, place / f"{BUILT}.work"
    work.mkdir(parents=True, exist_ok=True)
    _use_timing(job, work)
    staging, started = job.store.stage(KIND, key), time.monotonic()
    run = EngineRun(script, runner, job.directory / CHECKPOINT, built, job.parameters["world_size"], staging.log)
    run_script(run, job.reporter.progress)
    _keep_timing(job, work)
    try:
        _refuse_other(job, built, key, f"the container is not what {job.parameters['image']} should be; pull it again")
    except ArtifactError:
        shutil.rmtree(built)  # or every further build would find it finished
        raise
    usage = {"seconds": round(time.monotonic() - started, 3)}
    result = {"runner": runner, "record": read_record(built)}
    staging.content.rmdir()
    built.rename(staging.content)
    artifact = job.store.publish(staging, KIND, key, {"result": result, "usage": usage})
    shutil.rmtree(place)
    return artifact


def is_kept(store: Store, key: str) -> bool:
    """Whether a store has the built engine of this key."""
    return bool(key) and (store.root / KIND / key).is_dir()


def _find(script: str, wanted: str) -> str:
    try:
        return find_runner(script, wanted)
    except HostError as error:
        hint = "mend that, or set runtime.build_in: script and run engine/build.sh where it can be built"
        raise HostError(
            f"runtime.build_in: {wanted}: {error.message}" if wanted != _AUTO else error.message, hint
        ) from None


def _say_script(job: EngineJob, why: str) -> None:
    parameters = job.parameters
    gpus = f"{parameters['world_size']} x SM{parameters['spec']['gpu']}"
    package = "the package's " if job.out is None else f"{job.out}/"
    folder = f"{package}{Path(job.place).parent}"
    whose = "the engine" if job.place == PLACE else "the draft model's engine"
    image, option = parameters["image"], ""
    if image is None:
        image, option = f"an image with TensorRT-LLM {parameters['version']}", " --image IMAGE"
    job.reporter.note(
        f"{whose} was not built here ({why}): run {folder}/{SCRIPT}{option} in reach of {image}, on {gpus}, "
        "then this build again"
    )


def _refuse_other(job: EngineJob, place: Path, key: str, remedy: str) -> None:
    problems = check_built(place, spec_from_json(job.parameters["spec"]), key=key)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ArtifactError(f"{place} is not the engine that the plan says:\n{listed}", remedy)


def _timing(job: EngineJob) -> Path:
    """Where TensorRT's timing cache for this container and GPU architecture is kept between builds."""
    name = digest_json([job.parameters["image"], job.parameters["spec"]["gpu"]])
    return job.store.root / "timing" / f"{name}.cache"


def _use_timing(job: EngineJob, work: Path) -> None:
    kept, own = _timing(job), work / "timing.cache"
    if kept.is_file() and not own.exists():
        shutil.copyfile(kept, own)


def _keep_timing(job: EngineJob, work: Path) -> None:
    kept, own = _timing(job), work / "timing.cache"
    if own.is_file():
        kept.parent.mkdir(exist_ok=True)
        new = kept.with_name(f".{kept.name}.{job.engine.key}")
        shutil.copyfile(own, new)
        new.replace(kept)
