"""Hold built engines against the `engine.json` beside each; launch.sh runs this before it starts a server.

Arguments: the GPUs that the ranks run on, with commas, then the directories of the engines. Prints a sentence for
everything that is wrong and ends with exit code 6; what cannot be looked at here is said too.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

_CAPABILITY = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]


def main() -> int:
    """Check every engine and the host; returns the exit code."""
    gpus, engines = sys.argv[1], [Path(name) for name in sys.argv[2:]]
    plans = [json.loads((built.parent / "engine.json").read_text()) for built in engines]
    problems = [problem for built, plan in zip(engines, plans) for problem in _engine(built, plan)]  # noqa: B905
    problems += [*_gpus(gpus, {plan["gpu"] for plan in plans}), *_library({plan["version"] for plan in plans})]
    for problem in problems:
        _say(problem)
    return 6 if problems else 0


def _engine(built: Path, plan: dict[str, Any]) -> Iterator[str]:
    again = f"move {built} away and build it with {built.parent}/build.sh"
    config, name = json.loads((built / "config.json").read_text()), built / "trtbuild.json"
    if config["version"] != plan["version"]:
        yield (
            f"{built} is an engine of TensorRT-LLM {config['version']}, and this package is for {plan['version']}; "
            f"{again}"
        )
    if not name.is_file():
        yield f"{name} is missing, and nothing else says for which GPU the engine was built; {again}"
        return
    record = json.loads(name.read_text())
    if record.get("compute_capability") != plan["gpu"]:
        yield (
            f"{built} was built for compute capability {record.get('compute_capability')}, and this package is for "
            f"{plan['gpu']}; {again}, on that kind of GPU"
        )
    if record.get("key") != plan["key"]:
        yield f"{built} was built from another checkpoint or with other arguments than this package's; {again}"
    for rank, size in record.get("bytes", {}).items():
        found = (built / rank).stat().st_size if (built / rank).is_file() else 0
        if found != size:
            yield f"{built / rank} has {found} bytes, and {size} were written; {again}"


def _gpus(gpus: str, wanted: set[str]) -> Iterator[str]:
    done = subprocess.run([*_CAPABILITY, f"--id={gpus}"], capture_output=True, text=True, check=False)
    kinds = {line.strip() for line in done.stdout.splitlines() if line.strip()}
    if done.returncode or not kinds:
        _say("note: nvidia-smi does not say the GPUs' compute capability; it was not checked")
    elif kinds != wanted:
        yield (
            f"GPUs {gpus} have compute capability {' and '.join(sorted(kinds))}, and the engine is for "
            f"{' and '.join(sorted(wanted))}; start this on such GPUs, or build the package again for this host's "
            "target.gpu"
        )


def _library(wanted: set[str]) -> Iterator[str]:
    try:
        found = metadata.version("tensorrt_llm").partition("+")[0]
    except metadata.PackageNotFoundError:
        _say("note: no TensorRT-LLM of Python is installed here, so that its version was not checked")
        return
    if {found} != wanted:
        yield (
            f"TensorRT-LLM {found} is installed here, and the engine is of {' and '.join(sorted(wanted))}; start this "
            "in the package's container"
        )


def _say(sentence: str) -> None:
    print(f"launch.sh: {sentence}", file=sys.stderr)


try:
    sys.exit(main())
except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    _say(f"the engine cannot be held against its engine.json: {error!r}; build the package again")
    sys.exit(6)
