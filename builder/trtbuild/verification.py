"""`trtbuild verify`: is this package what its lock says, and would it load?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtbuild.adapters import triton
from trtbuild.checkpoint_files import LocalFiles
from trtbuild.errors import TrtbuildError
from trtbuild.manifest import DigestCache, read_json
from trtbuild.model import read_facts
from trtbuild.package import LOCK, damage, read_manifest
from trtbuild.process import OnProgress
from trtbuild.serving.verify import ServedReport, verify_served

REPOSITORY = "model_repository"
ENGINE = "engine"
QUALITY = "evidence/quality.json"


@dataclass(frozen=True, slots=True)
class Check:
    """One check of a package: what was looked at, and every problem found; a gate compares with the recipe."""

    name: str
    problems: tuple[str, ...]
    detail: str = ""
    gate: bool = False

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.problems


def verify_files(package: Path) -> list[Check]:
    """Every check that needs no server: bytes, lock, checkpoint headers, model repository.

    Raises:
        ArtifactError: `package` is no package.
    """
    manifest = read_manifest(package)
    count = f"{len(manifest['files'])} files, package digest {manifest['digest'][:16]}"
    return [
        # Every byte is read again: a remembered digest would not see a disk that lost a bit.
        Check("bytes", tuple(damage(package, DigestCache(None))), count),
        _check("lock", lambda: _lock(package)),
        _check("engine", lambda: _engine(package)),
        _check("model repository", lambda: _repository(package)),
    ]


def _check(name: str, look: Callable[[], tuple[list[str], str]]) -> Check:
    try:
        problems, detail = look()
    except TrtbuildError as error:
        return Check(name, (str(error),))
    return Check(name, tuple(problems), detail)


def _lock(package: Path) -> tuple[list[str], str]:
    lock = read_json(package / LOCK)
    artifacts, plan = (lock.get(name, {}) if isinstance(lock, dict) else {} for name in ("artifacts", "plan"))
    missing = [kind for kind in ("compress", "engine", "repository", "deploy") if kind not in artifacts]
    return [f"{LOCK} names no artifact for {kind}" for kind in missing], f"plan {str(plan.get('digest'))[:16]}"


def _engine(package: Path) -> tuple[list[str], str]:
    facts = read_facts(LocalFiles(package / ENGINE))
    limits = read_json(package / ENGINE / "engine.json")
    problems = []
    if limits["max_seq_len"] > facts.context_length:
        problems.append(f"engine.json: max_seq_len {limits['max_seq_len']} exceeds the model's {facts.context_length}")
    method = facts.quantization.parameters.get("quant_algo") if facts.quantization else "none"
    return problems, f"{facts.architecture}, quantization {method}, {facts.weight_bytes} bytes of weights"


def _repository(package: Path) -> tuple[list[str], str]:
    found = triton.check_repository(package / REPOSITORY, engine=package / ENGINE)
    models = sorted(path.name for path in (package / REPOSITORY).iterdir() if path.is_dir())
    return [str(problem) for problem in found], ", ".join(models)


def verify_answers(package: Path, *, log: Path, on_progress: OnProgress) -> list[Check]:
    """Serve the package and check its answers: greedy tokens, streaming, and the gates on the served endpoint.

    Raises:
        HostError, ToolError: the server cannot be started here.
    """
    lock = read_json(package / LOCK)
    evidence = read_json(package / QUALITY)
    data = next(step["files"].get("data") for step in lock["plan"]["steps"] if step["kind"] == "evaluate")
    report = verify_served(
        package,
        log=log,
        perplexity_tokens=evidence["tokens"],
        data=None if data is None else Path(data),
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


def _served_gate(report: ServedReport, evidence: Mapping[str, Any], threshold: float | None) -> Check:
    if report.perplexity is None or threshold is None:
        return Check("served perplexity", (), "no gate in the recipe")
    ratio = report.perplexity / evidence["perplexity"]["reference"]
    detail = f"{report.perplexity:.4f} over {report.perplexity_tokens} tokens, ratio {ratio:.4f}"
    over = f"the ratio exceeds quality.max_perplexity_ratio {threshold:.4g} by {ratio - threshold:.4g}"
    return Check("served perplexity", () if ratio <= threshold else (over,), detail, gate=True)


def checks_text(checks: Sequence[Check]) -> str:
    """The checks for people: one line each, every problem below its check."""
    lines = []
    for check in checks:
        lines.append(f"{'passed' if check.passed else 'FAILED'}  {check.name}: {check.detail}".rstrip(": "))
        lines += [f"        {problem}" for problem in check.problems]
    return "\n".join(lines)


def checks_json(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """The checks for programs."""
    return [asdict(check) | {"passed": check.passed} for check in checks]
