"""The deployment files of a package: Dockerfile, compose file, launch script and notes on the image.

Packages of the embedded engine go on the serve image of docker/serve.Dockerfile. Those of TensorRT-LLM go on its Triton
container, and are started there by the launch script, which the caller gives.

The files decide everything at build time except what belongs to a host (addresses, published ports); nothing is read
from the environment. Whatever a user may choose is checked against the grammar of the place where it is written, or
quoted there.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtbuild import __version__
from trtbuild.errors import CompatibilityError, Problem, RecipeError
from trtbuild.render import render

# Ports inside the container: Triton's own defaults, which docker/serve.Dockerfile exposes and checks.
HTTP_PORT, GRPC_PORT, METRICS_PORT = 8000, 8001, 8002

# http.client, unlike urllib, never asks a proxy for 127.0.0.1; the base image has no curl.
_ASK_READY = f"""\
import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', {HTTP_PORT}, timeout=4); \
c.request('GET', '/v2/health/ready'); sys.exit(c.getresponse().status != 200)"""
HEALTHCHECK = ("CMD", "python3", "-c", _ASK_READY)

# Where the container has its own files of the llmapi model; see the README.md in such a repository.
_STOCK_FILES = tuple(f"/app/all_models/llmapi/tensorrt_llm/1/{name}.py" for name in ("model", "helpers"))

# Labels under this prefix are written by us: what an image says of its origin must not be overridden by a recipe.
LABEL_PREFIX = "io.trtbuild."

# The reference grammar of the OCI distribution specification 1.1 ("Pulling manifests") with an optional host and port
# as distribution/reference has it: [host[:port]/]path[:tag][@digest].
_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*(?::[0-9]+)?"
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?:{_HOST}/)?{_PART}(?:/{_PART})*(?::[A-Za-z0-9_][A-Za-z0-9._-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?"
)
# Narrower than what engines accept: reverse-DNS keys as the OCI image specification recommends for annotations.
_LABEL_KEY = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]*[A-Za-z0-9])?")
# Unicode's general categories: control characters, lone surrogates, line and paragraph separators.
_UNWRITABLE = {"Cc", "Cs", "Zl", "Zp"}


@dataclass(frozen=True, slots=True)
class DeploySpec:
    """Everything that decides the bytes of the deployment files.

    Args:
        model_name: the Triton model's name.
        runtime: what executes the engine; ``embedded`` is the one that the serve image carries, the others have a
            container of their own, which `serve_image` names.
        image: name of the image that is built from the package, ``[host[:port]/]path[:tag]``.
        engine_digest: digest of the engine that the package holds.
        labels: the user's labels, by key; a value is any text on one line.
        files: which files to write: ``dockerfile`` (with the notes on the image), ``compose``, ``launch``.
        serve_image: the image to start from; empty for the one that docker/serve.Dockerfile of this version makes.
        gpus: how many NVIDIA GPUs the compose file reserves.
        shm_size: size of /dev/shm in the notation of Docker.
        launch: text of the launch script; empty for the embedded engine's.
        engine_files: for TensorRT engines, the files that a server needs of ``engine/`` itself.
        engine_trees: and the directories below it: the built engines, adapters.
        stock_model: the served model's files are the container's own.
    """

    model_name: str
    runtime: str
    image: str
    engine_digest: str
    labels: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[str] = ("dockerfile", "compose", "launch")
    trtbuild_version: str = __version__
    serve_image: str = ""
    gpus: int = 0
    shm_size: str = "1gb"
    launch: str = ""
    engine_files: Sequence[str] = ()
    engine_trees: Sequence[str] = ()
    stock_model: bool = False


def check_deploy(spec: DeploySpec) -> list[Problem]:
    """Every value of `spec` that cannot be written, by its place in the recipe; empty when `write_deploy` will work."""
    images = {"deploy.image": spec.image, "serve_image": spec.serve_image or default_serve_image(spec)}
    problems = [_bad_image(where, image) for where, image in images.items() if not _IMAGE.fullmatch(image)]
    if not _is_one_line(spec.model_name):
        problems.append(_bad_text("serving.model_name"))
    for key, value in spec.labels.items():
        problems.extend(_label_problems(key, value))
    unknown = sorted(set(spec.files) - set(_WRITERS))
    if unknown:
        problems.append(Problem("deploy.files", f"{unknown[0]!r} is not known; allowed are {', '.join(_WRITERS)}"))
    return problems


def write_deploy(spec: DeploySpec, out: Path) -> None:
    """Write the chosen deployment files into `out`, the future ``deploy`` directory of a package.

    Raises:
        CompatibilityError: a runtime with a container of its own, without that.
        RecipeError: the image's name or a label cannot be written into the files; all problems at once.
    """
    if spec.runtime != "embedded" and spec.files and not (spec.serve_image and spec.launch):
        raise CompatibilityError(
            f"deploy: the runtime {spec.runtime!r} needs a container and a script that starts it there",
            "use a release with a container, or leave the deployment files out with deploy.files: []",
        )
    problems = check_deploy(spec)
    if problems:
        raise RecipeError(problems)
    out.mkdir(parents=True, exist_ok=True)
    context = _context(spec)
    for name in spec.files:
        _WRITERS[name](context, out)


def image_labels(spec: DeploySpec) -> dict[str, str]:
    """The labels of the package's image, sorted by key; the user's win over the standard ones, never over ours."""
    standard = {
        "org.opencontainers.image.title": spec.model_name,
        "org.opencontainers.image.description": f"Triton Inference Server with the model {spec.model_name}",
        "org.opencontainers.image.base.name": spec.serve_image or default_serve_image(spec),
    }
    ours = {
        f"{LABEL_PREFIX}version": spec.trtbuild_version,
        f"{LABEL_PREFIX}engine.digest": spec.engine_digest,
        f"{LABEL_PREFIX}runtime": spec.runtime,
        f"{LABEL_PREFIX}model": spec.model_name,
    }
    return dict(sorted((standard | dict(spec.labels) | ours).items()))


def default_serve_image(spec: DeploySpec) -> str:
    """The name under which the README builds docker/serve.Dockerfile."""
    return f"localhost/trtbuild-serve:{spec.trtbuild_version}"


def _context(spec: DeploySpec) -> dict[str, Any]:
    labels = image_labels(spec)
    return {
        "image": spec.image,
        "serve_image": spec.serve_image or default_serve_image(spec),
        "model_name": spec.model_name,
        "runtime": spec.runtime,
        "launch": spec.launch,
        "engine_files": list(spec.engine_files),
        "engine_trees": list(spec.engine_trees),
        "stock_model": spec.stock_model,
        "stock_copy": json.dumps(["cp", *_STOCK_FILES, f"/package/model_repository/{spec.model_name}/1/"]),
        "trtbuild_version": spec.trtbuild_version,
        "labels": list(labels.items()),
        "labels_json": json.dumps(labels, indent=2),
        "project": _project(spec.model_name),
        "http_port": HTTP_PORT,
        "grpc_port": GRPC_PORT,
        "metrics_port": METRICS_PORT,
        "healthcheck": HEALTHCHECK,
        "healthcheck_json": json.dumps(HEALTHCHECK[1:]),
        "engine_copy": json.dumps([*(f"engine/{name}" for name in spec.engine_files), "/package/engine/"]),
        "gpus": spec.gpus,
        "shm_size": spec.shm_size,
    }


def _write_dockerfile(context: Mapping[str, Any], out: Path) -> None:
    template = "Dockerfile" if context["runtime"] == "embedded" else "Dockerfile-trtllm"
    _write(out / "Dockerfile", render(f"deploy/{template}.j2", context))
    _write(out / "OCI.md", render("deploy/OCI.md.j2", context))


def _write_compose(context: Mapping[str, Any], out: Path) -> None:
    _write(out / "compose.yaml", render("deploy/compose.yaml.j2", context))


def _write_launch(context: Mapping[str, Any], out: Path) -> None:
    _write(out / "launch.sh", context["launch"] or render("deploy/launch.sh.j2", context))
    (out / "launch.sh").chmod(0o755)


_WRITERS: Mapping[str, Callable[[Mapping[str, Any], Path], None]] = {
    "dockerfile": _write_dockerfile,
    "compose": _write_compose,
    "launch": _write_launch,
}


def _write(path: Path, text: str) -> None:
    # Not the platform's line ends: the bytes are digested.
    path.write_text(text, encoding="utf-8", newline="\n")


def _project(model_name: str) -> str:
    """A compose project name (lower-case letters, digits, dash and underscore, the first no dash) like the model's."""
    return re.sub(r"[^a-z0-9_-]", "-", model_name.lower()).lstrip("-_") or "triton"


def _bad_image(where: str, image: str) -> Problem:
    return Problem(
        where,
        f"{image!r} is no image name; allowed is [host[:port]/]path[:tag] with a path of lower-case letters, digits "
        "and single separators",
        "for example registry.example.com/team/model:1.0",
    )


def _label_problems(key: str, value: str) -> list[Problem]:
    where = f"deploy.labels.{key}"
    if not _LABEL_KEY.fullmatch(key):
        allowed = "letters, digits, dots, dashes, underscores and slashes, first and last a letter or digit"
        return [Problem("deploy.labels", f"{key!r} is no label name; allowed are {allowed}", "rename the label")]
    if key.startswith(LABEL_PREFIX):
        return [Problem(where, f"labels under {LABEL_PREFIX} are written by trtbuild", "choose another name")]
    return [] if _is_one_line(value) else [_bad_text(where)]


def _bad_text(where: str) -> Problem:
    return Problem(where, "a line end or control character stands in the value; allowed is one line of text")


def _is_one_line(text: str) -> bool:
    """Whether a Dockerfile can hold `text`: it has no notation for a line end inside a label's value."""
    return not any(unicodedata.category(char) in _UNWRITABLE for char in text)
