"""`trtbuild verify`: is this package what its lock says, and would it load?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trtbuild.adapters import (
    container_checks,
    triton,
    trtllm,
    trtllm_checkpoint,
    trtllm_draft,
    trtllm_engine_checks,
)
from trtbuild.checkpoint_files import LocalFiles
from trtbuild.errors import HostError, TrtbuildError
from trtbuild.llm_speculation import SECTION
from trtbuild.manifest import DigestCache, digest_entries, read_json
from trtbuild.model import read_facts
from trtbuild.package import LOCK, PLACES, damage, entries_below, is_for_engines, read_manifest, refuse_to_serve_here
from trtbuild.plan import Step, plan_digest
from trtbuild.process import OnProgress
from trtbuild.serving.verify import ServedReport, verify_served
from trtbuild.steps import deploy_spec, launch_ranks

REPOSITORY = "model_repository"
ENGINE = "engine"
QUALITY = "evidence/quality.json"
_GPU = "target.gpu"
_DIRECTORIES = {ENGINE: "engine", REPOSITORY: "repository", "deploy": "deploy"}


@dataclass(frozen=True, slots=True)
class Check:
    """One check of a package: what was looked at, and every problem found.

    A gate compares with the recipe; `ran` is False where there was nothing to look at, and `detail` says why.
    """

    name: str
    problems: tuple[str, ...]
    detail: str = ""
    gate: bool = False
    ran: bool = True

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.problems


def verify_files(package: Path) -> list[Check]:
    """Every check that needs no server: bytes, lock, checkpoint headers, model repository.

    Raises:
        RecipeError: there is no such directory.
        ArtifactError: `package` is no package.
    """
    manifest = read_manifest(package)
    count = f"{len(manifest['files'])} files, package digest {manifest['digest'][:16]}"
    return [
        # Every byte is read again: a remembered digest would not see a disk that lost a bit.
        Check("bytes", tuple(damage(package, DigestCache(None))), count),
        _check("lock", lambda: _lock(package)),
        *_engines(package),
        _check("model repository", lambda: _repository(package)),
        _check("deployment files", lambda: _deployment(package)),
    ]


def _engines(package: Path) -> list[Check]:
    """The checks of the engine directory, which differ between runtimes."""
    if is_for_engines(package / ENGINE):
        return verify_trtllm_engine(package)
    return [_check("engine", lambda: _engine(package)), *verify_trtllm(package)]


def verify_trtllm_engine(package: Path) -> list[Check]:
    """Of a package for TensorRT engines: the converted checkpoint, and the engine where it was built."""
    try:
        found = trtllm_engine_checks.check(package / ENGINE, _planned(package, ENGINE))
    except TrtbuildError as error:
        return [Check("TensorRT-LLM engine", (str(error),))]
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        return [Check("TensorRT-LLM engine", (f"cannot be read: {type(error).__name__}: {error}",))]
    return [Check(check.name, check.problems, check.detail, ran=check.ran) for check in found]


def verify_trtllm(package: Path) -> list[Check]:
    """Of a package for TensorRT-LLM's LLM API: its arguments, and the rules by which it takes a checkpoint."""
    directory = package / ENGINE
    try:
        engine = read_json(directory / "engine.json")
        if engine["runtime"] != "trtllm":
            return []
        gpu = next((row["value"] for row in read_json(package / LOCK)["plan"]["values"] if row["path"] == _GPU), None)
        arguments = trtllm.read_arguments(directory)
        layout = trtllm_checkpoint.Layout(
            tensor_parallel_size=arguments.get("tensor_parallel_size", 1),
            attention_dp=arguments.get("enable_attention_dp", False),
            gpu=gpu,
        )
        wanted = trtllm.engine_json(_planned(package, ENGINE))
        others = tuple(
            f"{name} is {engine.get(name)!r}, the plan says {wanted.get(name)!r}; build the package again"
            for name in sorted({*engine, *wanted})
            if engine.get(name) != wanted.get(name)
        )
        rules = trtllm_checkpoint.check(LocalFiles(directory), engine["version"], layout)
        found = trtllm.check_engine(directory, engine, arguments)
        drafted = _draft(directory, engine, arguments, layout) if not found else []
    except TrtbuildError as error:
        return [Check("TensorRT-LLM", (str(error),))]
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        return [Check("TensorRT-LLM", (f"cannot be read: {type(error).__name__}: {error}",))]
    schema = f"{len(arguments)} arguments, TensorRT-LLM {engine['version']}, schema {engine['llm_args']['name']}"
    container = f"container {engine['container']}" if engine["container"] else "no container"
    described = f"TensorRT-LLM {engine['version']}, {container}, world size {engine['world_size']}"
    checks = [Check("engine.json", others, described), Check("LLM arguments", tuple(map(str, found)), schema)]
    checks += [Check(f"checkpoint: {rule.name}", rule.problems, rule.detail) for rule in rules]
    return checks + [Check(rule.name, rule.problems, rule.detail) for rule in drafted]


def _draft(
    directory: Path, engine: Mapping[str, Any], arguments: Mapping[str, Any], layout: trtllm_checkpoint.Layout
) -> list[trtllm_checkpoint.CheckpointCheck]:
    """The rules by which TensorRT-LLM takes the package's draft model, if it has one."""
    speculation = engine.get("speculation")
    if speculation is None:
        return []
    draft = directory / speculation["draft"] if speculation["draft"] else None
    asked = {"method": speculation["method"], "config": arguments[SECTION]}
    return trtllm_draft.check(draft, directory, asked, engine["version"], layout)


def _check(name: str, look: Callable[[], tuple[list[str], str]]) -> Check:
    try:
        problems, detail = look()
    except TrtbuildError as error:
        return Check(name, (str(error),))
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        return Check(name, (f"cannot be read: {type(error).__name__}: {error}",))
    return Check(name, tuple(problems), detail)


def _lock(package: Path) -> tuple[list[str], str]:
    """Whether the lock belongs to these files: every artifact's digest, and the plan's own."""
    lock, manifest = read_json(package / LOCK), read_manifest(package)
    plan, artifacts = lock["plan"], lock["artifacts"]
    recomputed = plan_digest(plan["source"]["files"], plan["steps"], plan["gates"])
    problems = [f"{LOCK}: the plan's digest is not that of its steps"] if recomputed != plan["digest"] else []
    for directory, kind in _DIRECTORIES.items():
        entries = entries_below(manifest, directory)
        if directory == ENGINE:  # a built engine is no part of the lock
            places = tuple(f"{place.removeprefix('engine/')}/" for place in PLACES)
            entries = [entry for entry in entries if not entry.path.startswith(places)]
        if digest_entries(entries) != artifacts[kind]["digest"]:
            problems.append(f"{directory}/ is not the {kind} artifact that {LOCK} names")
    return problems, f"plan {plan['digest'][:16]}"


def _engine(package: Path) -> tuple[list[str], str]:
    facts = read_facts(LocalFiles(package / ENGINE))
    limits = read_json(package / ENGINE / "engine.json")
    problems = []
    if limits["max_seq_len"] > facts.context_length:
        problems.append(f"engine.json: max_seq_len {limits['max_seq_len']} exceeds the model's {facts.context_length}")
    method = facts.quantization.parameters.get("quant_algo") if facts.quantization else "none"
    return problems, f"{facts.architecture}, quantization {method}, {facts.weight_bytes} bytes of weights"


def _repository(package: Path) -> tuple[list[str], str]:
    problems = [str(one) for one in triton.check_repository(package / REPOSITORY, engine=package / ENGINE)]
    models = sorted(path.name for path in (package / REPOSITORY).iterdir() if path.is_dir())
    planned = _planned(package, "repository")
    wanted = sorted(triton.model_names(planned["layout"], planned["model_name"], drafts="draft" in planned))
    if models != wanted:
        problems.append(f"{REPOSITORY}/ has {', '.join(models)}, and the plan says {', '.join(wanted)}; build it again")
    return problems, ", ".join(models)


def _deployment(package: Path) -> tuple[list[str], str]:
    """The deployment files against the plan: image, labels, GPUs, and the ranks against those of the engine."""
    lock = read_json(package / LOCK)
    planned = {step["kind"]: step for step in lock["plan"]["steps"]}
    deploy = Step(**planned["deploy"] | {"inputs": tuple(planned["deploy"]["inputs"])})
    version = str(planned["deploy"]["tools"]["trtbuild"])
    spec = replace(deploy_spec(deploy, lock["artifacts"]["engine"]["digest"]), trtbuild_version=version)
    ranks = launch_ranks(deploy)
    problems, detail = container_checks.check(package / "deploy", spec, ranks)
    engine = planned["engine"]["parameters"]
    if ranks is not None and ranks.world_size != engine["world_size"]:
        problems.append(f"the launch script is for {ranks.world_size} ranks, the engine for {engine['world_size']}")
    return problems, detail


def _planned(package: Path, kind: str) -> dict[str, Any]:
    """The parameters of one step, as the package's lock has them."""
    steps = read_json(package / LOCK)["plan"]["steps"]
    return next(dict(step["parameters"]) for step in steps if step["kind"] == kind)


def verify_answers(package: Path, *, log: Path, on_progress: OnProgress) -> list[Check]:
    """Serve the package and check its answers: greedy tokens, streaming, and the gates on the served endpoint.

    Raises:
        HostError, ToolError: the server cannot be started here.
    """
    refuse_to_serve_here(package)
    lock = read_json(package / LOCK)
    evidence = read_json(package / QUALITY)
    data = _held_out(lock)
    report = verify_served(
        package,
        log=log,
        perplexity_tokens=evidence["tokens"],
        data=data,
        on_progress=on_progress,
    )
    agreement = f"{report.greedy_agreement:.4f} of {report.tokens_compared} tokens over {report.prompts} prompts"
    streaming = () if report.streaming_equal else ("streamed and whole answers differ",)
    speed = f"{report.tokens_per_second:.1f} tok/s, first token after {report.seconds_to_first_token:.3f} s"
    return [
        Check("served greedy tokens equal the engine's", report.problems, agreement),
        Check("streaming equals not streaming", streaming, speed),
        _served_gate(report, evidence, lock["plan"]["gates"]["max_perplexity_ratio"]),
    ]


def _held_out(lock: Mapping[str, Any]) -> Path | None:
    """The held-out text that the build measured on; None for the one that trtbuild ships.

    Raises:
        HostError: the user's file is not here, or has other bytes than it had then.
    """
    recorded = lock["files"]["evaluate"].get("data")
    if recorded is None:
        return None
    path = Path(recorded["path"])
    if not path.is_file() or f"{DigestCache(None).sha256(path)}{path.suffix}" != recorded["digest"]:
        raise HostError(f"the held-out text {path} is not here as it was at the build", "put the same file there")
    return path


def _served_gate(report: ServedReport, evidence: Mapping[str, Any], threshold: float | None) -> Check:
    if threshold is None:
        return Check("served perplexity", (), "no gate in the recipe", ran=False)
    if report.perplexity is None:
        why = "not measured: layout ensemble reports no prompt log-probabilities; evidence/ has the engine's"
        return Check("served perplexity", (), why, ran=False)
    ratio = report.perplexity / evidence["perplexity"]["reference"]
    detail = f"{report.perplexity:.4f} over {report.perplexity_tokens} tokens, ratio {ratio:.4f}"
    over = f"the ratio exceeds quality.max_perplexity_ratio {threshold:.4g} by {ratio - threshold:.4g}"
    return Check("served perplexity", () if ratio <= threshold else (over,), detail, gate=True)


def checks_text(checks: Sequence[Check]) -> str:
    """The checks for people: one line each, every problem below its check."""
    lines = []
    for check in checks:
        result = "FAILED " if not check.passed else "passed " if check.ran else "not run"
        lines.append(f"{result} {check.name}: {check.detail}".rstrip(": "))
        lines += [f"        {problem}" for problem in check.problems]
    return "\n".join(lines)


def checks_json(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """The checks for programs."""
    return [asdict(check) | {"passed": check.passed} for check in checks]
