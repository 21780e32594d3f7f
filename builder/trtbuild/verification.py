"""`trtbuild verify`: is this package what its lock says, and would it load?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trtbuild.adapters import triton
from trtbuild.checkpoint_files import LocalFiles
from trtbuild.errors import TrtbuildError
from trtbuild.manifest import DigestCache, read_json
from trtbuild.model import read_facts
from trtbuild.package import LOCK, damage, read_manifest

REPOSITORY = "model_repository"
ENGINE = "engine"


@dataclass(frozen=True, slots=True)
class Check:
    """One check of a package: what was looked at, and every problem found."""

    name: str
    problems: tuple[str, ...]
    detail: str = ""

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
    artifacts = sorted(lock.get("artifacts", {}))
    missing = [kind for kind in ("compress", "engine", "repository", "deploy") if kind not in artifacts]
    return [f"{LOCK} names no artifact for {kind}" for kind in missing], f"plan {lock['plan']['digest'][:16]}"


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
