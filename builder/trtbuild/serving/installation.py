"""Find the Triton server of the nvidia-pytriton wheel and prepare what it needs to run outside a container.

The wheel carries `tritonserver`, its Python backend and one stub per Python version, but leaves the stub out of the
backend's directory (nvidia-pytriton 0.7.0: ``pytriton/tritonserver``). We put both together in the user's cache, so
that site-packages stays untouched.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trtbuild.errors import HostError
from trtbuild.paths import cache_dir

_INSTALL = "pip install 'trtbuild[serve]'"
_STUB = "triton_python_backend_stub"
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True, slots=True)
class TritonInstallation:
    """A Triton server that can be started on this host with the running Python."""

    version: str
    binary: Path
    backends: Path
    caches: Path
    libraries: Path

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """The environment in which the server and its Python models run: this Python, its packages, no secrets."""
        variables = {key: value for key, value in base.items() if key not in _SECRETS}
        variables["LD_LIBRARY_PATH"] = _joined([_python_library_dir(), self.libraries], base.get("LD_LIBRARY_PATH", ""))
        # The stub takes the environment of the first `python3` on PATH.
        variables["PATH"] = _joined([Path(sys.executable).parent], base.get("PATH", os.defpath))
        variables.pop("PYTHONHOME", None)
        # Idle OpenMP threads that spin would take the cores from the server beside them.
        variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        variables.setdefault("TOKENIZERS_PARALLELISM", "false")
        # Everything a model needs lies in its package: a missing file is an error, never a download.
        variables["HF_HUB_OFFLINE"] = variables["TRANSFORMERS_OFFLINE"] = "1"
        return variables


def find_triton() -> TritonInstallation:
    """The Triton server of the installed nvidia-pytriton wheel, checked for what it needs from this host.

    Raises:
        HostError: the wheel, its stub for this Python, libpython or a usable NumPy is missing.
    """
    root = _pytriton_root()
    _check_numpy()
    installation = TritonInstallation(
        version=importlib.metadata.version("nvidia-pytriton"),
        binary=root / "tritonserver" / "bin" / "tritonserver",
        backends=_backend_directory(root / "tritonserver"),
        caches=root / "tritonserver" / "caches",
        libraries=root.parent / "nvidia_pytriton.libs",
    )
    if not os.access(installation.binary, os.X_OK):
        raise HostError(f"{installation.binary} is missing or not executable", f"install the wheel again: {_INSTALL}")
    _check_loader(installation)
    return installation


def python_version() -> str:
    """The running Python as Triton's stubs name it, such as ``3.11``."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _pytriton_root() -> Path:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise HostError(
            "nvidia-pytriton, which carries the Triton server, is not installed in this environment",
            f"{_INSTALL}; or serve the package from its container (deploy/)",
        )
    return Path(spec.origin).parent


def _check_numpy() -> None:
    version = importlib.metadata.version("numpy")
    if int(version.split(".", 1)[0]) >= 2:
        raise HostError(
            f"numpy {version} is installed, and this Triton's Python stub dies at the first string tensor with "
            "numpy 2 or newer",
            "pip install 'numpy<2' in this environment",
        )


def _backend_directory(triton: Path) -> Path:
    """A directory of our own with the Python backend and the stub of the running Python, made once per wheel."""
    python_backend = triton / "backends" / "python"
    stub = triton / "python_backend_stubs" / python_version() / _STUB
    if not stub.is_file():
        there = sorted(path.name for path in (triton / "python_backend_stubs").glob("*"))
        raise HostError(
            f"nvidia-pytriton has no stub for Python {python_version()} (it has: {', '.join(there) or 'none'})",
            "use one of those Python versions",
        )
    sources = [python_backend / "libtriton_python.so", python_backend / "triton_python_backend_utils.py", stub]
    package = Path(__file__).resolve().parents[1]
    key = hashlib.sha256(f"{package}\0".encode())
    for source in sources:
        status = source.stat()
        key.update(f"{source}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    target = cache_dir() / "triton" / f"{python_version()}-{key.hexdigest()[:16]}"
    if not target.is_dir():
        _assemble(sources, target, package)
    return target


def _assemble(sources: list[Path], target: Path, package: Path) -> None:
    """Copy the files beside `target` and rename them into place: two processes at once do no harm."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        backend = staging / "python"
        backend.mkdir()
        for source in sources:
            shutil.copy2(source, backend / source.name)
        (backend / _STUB).chmod(0o755)
        # The stub ignores PYTHONPATH but has this directory last on its path: so a mere checkout can serve too.
        (backend / package.name).symlink_to(package)
        staging.chmod(0o755)
        staging.rename(target)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        if not target.is_dir():  # else another process was first, with the same bytes
            raise HostError(
                f"{target}: cannot be written ({error})", "free some space or set XDG_CACHE_HOME to a writable place"
            ) from error


def _check_loader(installation: TritonInstallation) -> None:
    """Ask the dynamic loader what the stub would not find: a sentence now beats a dead model later."""
    environment = installation.environment(os.environ) | {"LD_TRACE_LOADED_OBJECTS": "1"}
    for binary in (installation.backends / "python" / _STUB, installation.binary):
        try:
            done = subprocess.run([binary], env=environment, capture_output=True, text=True, check=False, timeout=30)
        except PermissionError as error:
            raise HostError(
                f"{binary} may not be executed: its file system is mounted noexec, or its mode forbids it",
                "mount it with exec, or set XDG_CACHE_HOME to another place",
            ) from error
        for line in (done.stdout + done.stderr).splitlines():
            if "not found" in line:
                raise _missing_library(line.strip(), binary)


def _missing_library(line: str, binary: Path) -> HostError:
    name = line.split(" ", 1)[0]
    if name.startswith("libpython"):
        return HostError(
            f"{name}, which Triton's Python backend loads, is not on this host",
            f"apt-get install libpython{python_version()} (Debian, Ubuntu), dnf install python{python_version()}-libs "
            "(Fedora), or use a Python that was built with --enable-shared",
        )
    return HostError(
        f"{binary.name} cannot be loaded: {line}", "glibc 2.35 or newer is needed (Debian 12, Ubuntu 22.04)"
    )


def _python_library_dir() -> Path | None:
    """Where the running Python's own shared library lies, if it has one: it must win over the distribution's."""
    directory, name = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME")
    if not directory or not name or not (Path(directory) / name).is_file():
        return None
    return Path(directory)


def _joined(first: list[Path | None], rest: str) -> str:
    return os.pathsep.join([*(str(path) for path in first if path is not None), *([rest] if rest else [])])
