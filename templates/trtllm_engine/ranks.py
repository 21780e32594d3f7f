"""Build the ranks of a TensorRT engine that are not finished yet; build.sh starts this in the container.

Arguments: FACTS (JSON: key, version, gpu, ranks), then those of ``trtllm-build``. A finished rank has
``rank{i}.done`` beside its engine, with the key of this build and the engine's size, and is left as it is. When all are
finished, the record that trtbuild reads back is written beside them.

How a rank is built stays TensorRT-LLM's affair: ``parallel_build`` calls ``build_and_save`` once for each rank, in this
process or in workers that it spawns (tensorrt_llm/commands/build.py @008b2b8d and @65f1d153), and here that call learns
to skip what is there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

RECORD = "trtbuild.json"
_PLACE, _KEY = "TRTBUILD_ENGINE", "TRTBUILD_KEY"  # workers know the build by these
# This is one process and no rank of an MPI job. tensorrt_llm/__init__.py refuses PMIX_RANK without mpirun, and Open MPI
# takes a process with Slurm's variables for one that srun has launched with a PMI.
_LAUNCHERS = ("SLURM_", "PMI_", "PMI2_", "PMIX_", "OMPI_COMM_WORLD_")
_OTHER, _FAILED, _HOST = 3, 4, 6  # trtbuild's exit codes


def main() -> int:
    """Build what is missing and write the record; returns the exit code."""
    facts, arguments = json.loads(sys.argv[1]), sys.argv[2:]
    place = Path(arguments[arguments.index("--output_dir") + 1])
    for name in [name for name in os.environ if name.startswith(_LAUNCHERS)]:
        del os.environ[name]
    os.environ[_PLACE], os.environ[_KEY] = str(place), facts["key"]

    import tensorrt_llm
    import torch
    from tensorrt_llm.commands import build

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    kinds = {".".join(map(str, torch.cuda.get_device_capability(index))) for index in range(len(gpus))}
    if tensorrt_llm.__version__ != facts["version"]:
        return _refuse(_OTHER, f"the container has TensorRT-LLM {tensorrt_llm.__version__}, not {facts['version']}")
    if kinds != {facts["gpu"]}:
        found = ", ".join(sorted(kinds)) or "none"
        return _refuse(_HOST, f"compute capability in the container: {found}; this engine is for {facts['gpu']}")
    if len(gpus) < facts["ranks"]:
        return _refuse(_HOST, f"{facts['ranks']} ranks need as many GPUs, the container has {len(gpus)}")

    place.mkdir(parents=True, exist_ok=True)
    if callable(getattr(build, "build_and_save", None)):
        build.trtbuild_whole, build.build_and_save = build.build_and_save, build_rank
    else:
        print("trtbuild: this TensorRT-LLM builds ranks in another way: all are built again after an interruption")
    sys.argv = ["trtllm-build", *arguments]
    build.main()

    engines = [place / f"rank{rank}.engine" for rank in range(facts["ranks"])]
    missing = [path.name for path in engines if not path.is_file()]
    if missing or not (place / "config.json").is_file():
        return _refuse(_FAILED, f"trtllm-build ended without {', '.join(missing) or 'config.json'}")
    _write_record(place, facts, gpus, engines)
    return 0


def build_rank(rank: int, *arguments: Any, **options: Any) -> bool:
    """What stands in for ``build_and_save``: nothing for a finished rank."""
    place, key = Path(os.environ[_PLACE]), os.environ[_KEY]
    engine, marker = place / f"rank{rank}.engine", place / f"rank{rank}.done"
    if _is_finished(engine, marker, key):
        print(f"trtbuild: rank {rank} is finished, from an earlier run", flush=True)
        return True
    from tensorrt_llm.commands import build

    marker.unlink(missing_ok=True)
    # A spawned worker has the module as it is; in one process it is the one that `main` has changed.
    whole = getattr(build, "trtbuild_whole", build.build_and_save)
    if not whole(rank, *arguments, **options):
        return False
    _write(marker, {"key": key, "bytes": _sync(engine)})
    fresh = place.parent / "timing.new"
    if fresh.is_file():  # whole only now: a cache that a kill has cut would be read by the next build
        fresh.replace(place.parent / "timing.cache")
    print(f"trtbuild: rank {rank} is finished", flush=True)
    return True


def _is_finished(engine: Path, marker: Path, key: str) -> bool:
    try:
        said = json.loads(marker.read_text(encoding="utf-8"))
        return bool(said == {"key": key, "bytes": engine.stat().st_size})
    except (OSError, ValueError):
        return False


def _write_record(place: Path, facts: dict[str, Any], gpus: list[str], engines: list[Path]) -> None:
    tensorrt = getattr(sys.modules.get("tensorrt"), "__version__", None)
    record = {
        "schema_version": 1,
        "key": facts["key"],
        "image": os.environ["TRTBUILD_IMAGE"],
        "tensorrt_llm": facts["version"],
        "tensorrt": tensorrt,
        "compute_capability": facts["gpu"],
        "gpus": sorted(set(gpus)),
        "bytes": {path.name: path.stat().st_size for path in engines},
    }
    _write(place / RECORD, record)


def _write(path: Path, value: dict[str, Any]) -> None:
    """Put a whole file in place at once."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(value, sort_keys=True, indent=2) + "\n", encoding="utf-8")
    _sync(new)
    new.replace(path)


def _sync(path: Path) -> int:
    """Write a file's bytes to the disk; returns how many there are."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _refuse(code: int, sentence: str) -> int:
    print(f"build.sh: {sentence}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
