"""docker, podman, enroot, srun, scancel, nvidia-smi and nvidia-ctk, as far as an engine's build calls them.

Each takes only the arguments that it is to be given, notes them in FAKE_LOG, and runs what a container would run with
``/build`` and ``/checkpoint`` where the mounts say, over the packages in ``site/``. A container of docker or podman is
no child of its client: it lives on until ``rm``, as the real ones do. FAKE_BROKEN names tools that do not work,
FAKE_IMAGE the one image that there is.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
STATE = Path(os.environ["FAKE_LOG"]).parent
IMAGE = os.environ.get("FAKE_IMAGE", "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3")
# As enroot and pyxis have it: [USER@][REGISTRY#]IMAGE[:TAG]; the first part of a name need not be a registry.
REMOTE = IMAGE.replace("/", "#", 1) if "." in IMAGE.split("/")[0] else IMAGE


def main() -> int:
    tool, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    with Path(os.environ["FAKE_LOG"]).open("a") as log:
        log.write(json.dumps([tool, *arguments]) + "\n")
    return globals()[tool.replace("-", "_")](*arguments)


def broken(tool: str) -> bool:
    return tool in os.environ.get("FAKE_BROKEN", "").split()


def refuse(sentence: str, code: int = 125) -> int:
    print(sentence, file=sys.stderr)
    return code


def nvidia_smi(*arguments: str) -> int:
    if broken("nvidia-smi"):
        return refuse("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9)
    if arguments != ("--query-gpu=compute_cap", "--format=csv,noheader"):
        return refuse(f"nvidia-smi: {arguments}")
    print("\n".join(os.environ["FAKE_GPUS"].split()))
    return 0


def nvidia_ctk(*arguments: str) -> int:
    if arguments != ("cdi", "list"):
        return refuse(f"nvidia-ctk: {arguments}")
    if not broken("cdi"):
        print("nvidia.com/gpu=0\nnvidia.com/gpu=all")
    return 0


def docker(verb: str, *arguments: str) -> int:
    if verb == "info":
        if broken("docker"):
            print('{"Runtimes":null}')
            return refuse("Cannot connect to the Docker daemon at unix:///var/run/docker.sock.", 1)
        runtimes = (
            {"runc": {"path": "runc"}} if broken("runtime") else {"nvidia": {"path": "x"}, "runc": {"path": "runc"}}
        )
        specs = None if broken("cdi") else ["/etc/cdi", "/var/run/cdi"]
        security = ["name=seccomp,profile=builtin", *(["name=rootless"] if broken("rootful") else [])]
        found = {"Runtimes": runtimes, "SecurityOptions": security, "CDISpecDirs": specs}
        print(json.dumps(found, separators=(",", ":")))
        return 0 if arguments in {(), ("--format", "{{json .}}")} else refuse(f"docker info {arguments}")
    gpus = ["--device", "nvidia.com/gpu=all"] if broken("runtime") else ["--gpus", "all"]
    user = ["--user", "0:0" if broken("rootful") else f"{os.getuid()}:{os.getgid()}"]
    options = [*gpus, "--ipc=host", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864", *user]
    return container(verb, arguments, options)


def podman(verb: str, *arguments: str) -> int:
    if verb == "info":
        return refuse("Error: cannot re-exec process", 125) if broken("podman") else 0
    options = ["--device", "nvidia.com/gpu=all", "--security-opt", "label=disable", "--ipc=host", "--ulimit", "host"]
    return container(verb, arguments, options)


def container(verb: str, arguments: tuple[str, ...], options: list[str]) -> int:
    """``run`` and ``rm`` of docker and podman."""
    if verb == "rm":
        force, name = arguments
        pid = STATE / f"{name}.pid"
        if force != "--force" or not pid.is_file():
            return refuse(f"no such container: {name}", 1)
        os.killpg(int(pid.read_text()), signal.SIGKILL)
        pid.unlink()
        return 0
    given = list(arguments)
    rm, flag, name, *given = given
    expected = [*options, "--workdir", "/build", "--volume"]
    if verb != "run" or (rm, flag) != ("--rm", "--name") or given[: len(expected)] != expected:
        return refuse(f"unknown flags: {verb} {arguments}")
    checkpoint, flag, build, image, *command = given[len(expected) :]
    if (
        flag != "--volume"
        or image != IMAGE
        or not checkpoint.endswith(":/checkpoint:ro")
        or not build.endswith(":/build")
    ):
        return refuse(f"unknown mounts or image: {arguments}")
    mounts = {"/checkpoint": checkpoint.removesuffix(":/checkpoint:ro"), "/build": build.removesuffix(":/build")}
    read, write = os.pipe()
    if os.fork():
        os.close(write)
        return int(os.read(read, 16) or b"137")
    os.setsid()
    os.close(read)
    (STATE / f"{name}.pid").write_text(str(os.getpid()))
    code = inside(command, mounts, mounts["/build"])
    (STATE / f"{name}.pid").unlink(missing_ok=True)
    os.write(write, str(code).encode())
    os._exit(0)


def inside(command: list[str], mounts: dict[str, str], directory: str) -> int:
    """What a container does with its command."""

    def seen(argument: str) -> str:
        for place, there in mounts.items():
            if argument.startswith((f"{place}/", f"HOME={place}/")) or argument == place:
                return argument.replace(place, there, 1)
        return sys.executable if argument == "python3" else argument

    environment = os.environ | {"PYTHONPATH": str(HERE / "site"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([seen(one) for one in command], cwd=directory, env=environment, check=False).returncode


def enroot(verb: str, *arguments: str) -> int:
    if verb == "import":
        flag, path, uri = arguments
        if flag != "--output" or uri != f"docker://{REMOTE}":
            return refuse(f"enroot import {arguments}")
        Path(path).write_bytes(b"sqsh")
        return 0
    if verb == "create":
        flag, name, image = arguments
        if flag != "--name" or (STATE / f"{name}.rootfs").exists() or Path(image).read_bytes() != b"sqsh":
            return refuse(f"enroot create {arguments}")
        (STATE / f"{name}.rootfs").write_text("")
        return 0
    if verb == "remove":
        flag, name = arguments
        (STATE / f"{name}.rootfs").unlink(missing_ok=True)
        return 0 if flag == "--force" else 1
    rw, mount, checkpoint, again, build, name, sh, c, text, zero, *command = arguments
    wanted = ("start", "--rw", "--mount", "--mount", "sh", "-c", 'cd /build && exec "$@"', "sh")
    if (verb, rw, mount, again, sh, c, text, zero) != wanted or not (STATE / f"{name}.rootfs").exists():
        return refuse(f"enroot {verb} {arguments}")
    source, *where = checkpoint.split(":")
    target, *there = build.split(":")
    if where != ["/checkpoint", "none", "x-create=dir,bind,ro"] or there != ["/build", "none", "x-create=dir,bind"]:
        return refuse(f"enroot: mounts {checkpoint} {build}")
    return inside(command, {"/checkpoint": source, "/build": target}, target)


def srun(*arguments: str) -> int:
    if arguments == ("--help",):
        print(
            "Usage: srun [OPTIONS(0)...]"
            + ("" if broken("pyxis") else "\n  --container-image=[USER@][REGISTRY#]IMAGE[:TAG]")
        )
        return 0
    options = list(arguments[: arguments.index("env")])
    command = list(arguments[len(options) :])
    named = dict(one.split("=", 1) if "=" in one else (one, "") for one in options)
    fixed = {
        "--nodes": "1", "--ntasks": "1", "--gpus": str(len(os.environ["FAKE_GPUS"].split())), "--mpi": "none",
        "--kill-on-bad-exit": "1", "--quit-on-interrupt": "", "--unbuffered": "",
        "--container-image": REMOTE, "--container-workdir": "/build",
        "--no-container-mount-home": "", "--no-container-remap-root": "",
    }  # fmt: skip
    free = {"--job-name", "--container-mounts"}
    if set(named) != set(fixed) | free or any(named[name] != value for name, value in fixed.items()):
        return refuse(f"srun: {options}")
    checkpoint, build = named["--container-mounts"].split(",")
    if not checkpoint.endswith(":/checkpoint:ro") or not build.endswith(":/build"):
        return refuse(f"pyxis: {checkpoint} {build}")
    mounts = {"/checkpoint": checkpoint.removesuffix(":/checkpoint:ro"), "/build": build.removesuffix(":/build")}
    os.environ.update({"SLURM_STEP_ID": "0", "PMIX_RANK": "0"})
    return inside(command, mounts, mounts["/build"])


def scancel(*arguments: str) -> int:
    return 0
