"""Container images without a registry and without a daemon: debootstrap makes a base, buildah builds on it.

Everything lies in a storage of its own below trtbuild's cache, so that a second run finds the base image and the layers
of the first, and nobody else's images are touched. What belongs to this host (package mirror, pip's configuration) is
asked of the host and reaches a build through mounts alone.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from filelock import FileLock

from trtbuild.paths import cache_dir

REPOSITORY = Path(__file__).resolve().parents[2]
# The release whose Python is 3.11; a new name here makes a new base image.
SUITE = "bookworm"
BASE_IMAGE = f"localhost/trtbuild-test-base:{SUITE}"
SERVE_IMAGE = "localhost/trtbuild-test-serve"
PACKAGE_IMAGE = "localhost/trtbuild-test-package"
# python3-distutils: debootstrap does not follow python3.11-venv's dependency on a virtual package.
_PACKAGES = ("ca-certificates", "libpython3.11", "python3", "python3-distutils", "python3-venv")


def missing_on_host() -> str:
    """What this host lacks for these tests, as a sentence; empty when it lacks nothing."""
    tools = [tool for tool in ("buildah", "debootstrap", "unshare") if shutil.which(tool, path=_path()) is None]
    if tools:
        packages = {"buildah": "buildah", "debootstrap": "debootstrap", "unshare": "util-linux"}
        names = " ".join(packages[tool] for tool in tools)
        return f"{', '.join(tools)} not installed (Debian packages: {names})"
    if os.geteuid() != 0:
        return "debootstrap and chroot isolation need root"
    return ""


@dataclass(frozen=True, slots=True)
class Lab:
    """A private container storage."""

    root: Path
    driver: str

    def command(self, *arguments: str | Path) -> list[str]:
        """A call of buildah on this storage."""
        storage = ("--root", str(self.root / "storage"), "--runroot", str(self.root / "run"))
        return ["buildah", *storage, "--storage-driver", self.driver, *map(str, arguments)]

    def buildah(self, *arguments: str | Path, log: Path | None = None) -> str:
        """What one call of buildah prints; a failed call shows its last lines."""
        done = subprocess.run(self.command(*arguments), env=_environment(), capture_output=True, text=True, check=False)
        if log is not None:
            log.write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode != 0:
            lines = (done.stdout + done.stderr).splitlines()[-25:]
            raise AssertionError(f"buildah {arguments[0]} failed with {done.returncode}:\n" + "\n".join(lines))
        return done.stdout.strip()

    def inspect(self, image: str) -> dict[str, Any]:
        """The configuration of an image in Docker format."""
        described = yaml.safe_load(self.buildah("inspect", "--type", "image", image))
        return dict(described["Docker"])

    @contextmanager
    def container(self, image: str) -> Iterator[str]:
        """A working container of `image`, removed at the end."""
        name = self.buildah("from", image)
        try:
            yield name
        finally:
            self.buildah("rm", name)

    def remove(self, image: str) -> None:
        """Forget an image of an earlier run."""
        if self.buildah("images", "--quiet", "--filter", f"reference={image}"):
            self.buildah("rmi", "--force", image)


@contextmanager
def open_lab() -> Iterator[Lab]:
    """The storage, for one process at a time, with the base image in it."""
    root = cache_dir() / "test-containers"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / "lock"):
        lab = Lab(root, _driver(root))
        try:
            _ensure_base(lab)
            yield lab
        finally:
            _unmount_below(root)


def pip_mounts(directory: Path) -> list[str]:
    """Arguments of ``buildah bud`` that give pip inside a build this host's configuration and the folders it names."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings: dict[str, str] = {}
    for line in sorted(listed.splitlines(), key=lambda text: text.startswith(":env:")):  # the environment wins
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = ast.literal_eval(value)
    config = directory / "pip.conf"
    config.touch(mode=0o600)
    # pip splits lists at any white space; a line's indentation would become part of a single value.
    lines = [f"{name} = {' '.join(value.split())}" for name, value in settings.items()]
    config.write_text("\n".join(["[global]", *lines, ""]), encoding="utf-8")
    mounts = ["--secret", f"id=pip.conf,src={config}"]
    for path in sorted({path for value in settings.values() for word in value.split() for path in _paths(word)}):
        mounts += ["--volume", f"{path}:{path}:ro"]
    return mounts


def build_serve(lab: Lab, wheel: Path, scratch: Path) -> str:
    """The CPU serve image from docker/serve.Dockerfile and a wheel; layers of earlier runs are reused."""
    context = scratch / "context"
    (context / "dist").mkdir(parents=True)
    shutil.copy(wheel, context / "dist")
    shutil.copy(REPOSITORY / "constraints.txt", context)
    # Docker format: an image in OCI format has no health check.
    options = ("--layers", "--isolation", "chroot", "--format", "docker", "--build-arg", f"BASE_IMAGE={BASE_IMAGE}")
    dockerfile = REPOSITORY / "docker" / "serve.Dockerfile"
    with tempfile.TemporaryDirectory() as secrets:
        arguments = (*options, *pip_mounts(Path(secrets)), "--tag", SERVE_IMAGE, "--file", dockerfile, context)
        lab.buildah("bud", *arguments, log=scratch / "serve.log")
    lab.buildah("rmi", "--prune")
    return SERVE_IMAGE


def build_package(lab: Lab, package: Path, scratch: Path) -> str:
    """The image of one package, from the Dockerfile that its build wrote."""
    options = ("--isolation", "chroot", "--format", "docker", "--build-arg", f"SERVE_IMAGE={SERVE_IMAGE}")
    dockerfile = package / "deploy" / "Dockerfile"
    lab.remove(PACKAGE_IMAGE)
    lab.buildah("bud", *options, "--tag", PACKAGE_IMAGE, "--file", dockerfile, package, log=scratch / "package.log")
    return PACKAGE_IMAGE


def _environment() -> Mapping[str, str]:
    # pip inside the build gets this host's settings through its configuration file, not twice.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return kept | {"PATH": _path()}


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _driver(root: Path) -> str:
    """Overlay where the kernel allows it; else vfs, which copies every layer (slow, three times the space)."""
    probe = Lab(root, "overlay").command("info")
    done = subprocess.run(probe, env=_environment(), capture_output=True, check=False)
    return "overlay" if done.returncode == 0 else "vfs"


def _unmount_below(root: Path) -> None:
    """Undo what buildah leaves mounted: 1.28 forgets a stage that a RUN mounted, and its storage's own bind mount."""
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    for place in reversed([place for place in mounted if Path(place).is_relative_to(root)]):
        _run(["umount", place])


def _ensure_base(lab: Lab) -> None:
    """Make the base image once: Debian's minimal system with Python and the shared libpython."""
    if lab.buildah("images", "--quiet", "--filter", f"reference={BASE_IMAGE}"):
        return
    tree = lab.root / "base"
    shutil.rmtree(tree, ignore_errors=True)
    include = f"--include={','.join(_PACKAGES)}"
    _run(["debootstrap", "--variant=minbase", include, SUITE, str(tree), *_mirror()])
    for leftover in (tree / "var/cache/apt/archives", tree / "var/lib/apt/lists"):
        shutil.rmtree(leftover)
    with lab.container("scratch") as name:
        lab.buildah("add", "--quiet", name, tree, "/")
        lab.buildah("commit", "--quiet", name, BASE_IMAGE)
    shutil.rmtree(tree)


def _mirror() -> tuple[str, ...]:
    """The mirror from which this host takes the suite; empty for the one that debootstrap knows by itself."""
    if shutil.which("apt-get") is None:
        return ()
    wanted = ("apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(COMPONENT)", "Created-By: Packages")
    for line in _run(wanted).splitlines():
        site, release, component = line.split()
        if (release, component) == (SUITE, "main"):
            return (site,)
    return ()


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(
            f"{command[0]} failed with {done.returncode}:\n" + "\n".join(done.stdout.splitlines()[-15:])
        )
    return done.stdout


def _paths(word: str) -> Iterator[Path]:
    """Where a word of pip's configuration lies on this host, if it is a path: to be mounted at the same place."""
    path = Path(urlsplit(word).path if word.startswith("file://") else word)
    if not path.is_absolute() or not path.exists():
        return
    # The pages of an index on disk link to files beside it.
    yield path.parent if path.name == "simple" else path
