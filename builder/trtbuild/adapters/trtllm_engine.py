"""The engine directory of a package for TensorRT engines, the script that builds the engine, and the check of it.

The directory holds ``checkpoint/`` (TensorRT-LLM's own format), the tokenizer, ``engine.json`` (what this is, for
people and checks) and ``build.sh``, which makes ``built/``, the engine that a server loads.

Sources of the script's command lines: docker run and docker info (docker/cli docs/reference/commandline @0638fe26);
``--device nvidia.com/gpu=all`` and ``--security-opt label=disable`` (NVIDIA Container Toolkit, cdi-support);
``--ulimit host`` (podman-run(1)); enroot import, create, start and remove (NVIDIA/enroot doc/cmd @2c410f2a, the fields
of a mount in doc/image-format.md); pyxis' options of srun (NVIDIA/pyxis README.md @046f4149); srun itself
(SchedMD/slurm doc/man/man1/srun.1 @000729e6).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trtbuild.draft import HEADS, rank_files, read_draft
from trtbuild.errors import ArtifactError, Problem
from trtbuild.manifest import canonical_json, digest_json, write_atomic
from trtbuild.render import data_dir, render
from trtbuild.trtllm_build import BUILT, EngineSpec, arguments, built_limits, choose, spec_from_json

CHECKPOINT, ENGINE_FILE, SCRIPT = "checkpoint", "engine.json", "build.sh"
# Of the compressed checkpoint: what the conversion has replaced.
_CONVERTED = ("*.safetensors", "*.safetensors.index.json", "hf_quant_config.json")
# What the script leaves in the engine directory, last: TensorRT-LLM's config names neither GPU nor checkpoint.
RECORD = "trtbuild.json"


def build_key(parameters: Mapping[str, Any], checkpoint: str, revision: str) -> str:
    """What one built engine is known by: everything that decides it, and nothing of where or when it is built.

    Args:
        parameters: of the planned step.
        checkpoint: the digest of the compressed checkpoint.
        revision: of the conversion.
    """
    return digest_json({"parameters": dict(parameters), "checkpoint": checkpoint, "convert": revision})


def copy_checkpoint(parameters: Mapping[str, Any], source: Path, out: Path) -> dict[str, Any]:
    """Take a checkpoint that TensorRT-LLM's own scripts converted, a model with heads, as ``checkpoint/``.

    Raises:
        ArtifactError: it changed since the plan was made.
    """
    target = out / CHECKPOINT
    target.mkdir(parents=True)
    for name in ("config.json", *rank_files(parameters["world_size"])):
        shutil.copyfile(source / name, target / name)
    heads = read_draft(target, _method(parameters)).heads
    if heads is None or asdict(heads) != parameters["heads"]:
        raise ArtifactError(f"{source} changed while it was being built from", "start the build again")
    return {"result": {"architecture": parameters["heads"]["architecture"], "notes": []}}


def _method(parameters: Mapping[str, Any]) -> str:
    architecture = parameters["heads"]["architecture"]
    return next(method for method, classes in HEADS.items() if architecture in classes)


def write_engine(parameters: Mapping[str, Any], source: Path | None, out: Path, key: str) -> None:
    """Write what stands beside ``checkpoint/`` in an engine directory.

    Args:
        parameters: of the planned step.
        source: the compressed checkpoint, for its tokenizer and config; None for a draft model, which needs none.
        out: the engine directory, whose ``checkpoint/`` is finished.
        key: of the engine that is built from it, see `build_key`.
    """
    for path in sorted(source.iterdir()) if source else ():
        if path.is_file() and not any(path.match(pattern) for pattern in _CONVERTED):
            shutil.copyfile(path, out / path.name)
    write_atomic(out / ENGINE_FILE, canonical_json(engine_json(parameters, key)))
    write_atomic(out / SCRIPT, planned_script(parameters, key))
    (out / SCRIPT).chmod(0o755)


def engine_json(parameters: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The contents of ``engine.json``; `gpu` is the compute capability, the limits are those of the finished engine."""
    spec = spec_from_json(parameters["spec"])
    names = ("runtime", "version", "container", "image", "world_size", "dtype", "trust_remote_code")
    return {
        "schema_version": 1,
        **{name: parameters[name] for name in names},
        "gpu": f"{spec.gpu // 10}.{spec.gpu % 10}",
        "limits": built_limits(spec),
        "spec": parameters["spec"],
        "checkpoint": CHECKPOINT,
        "built": BUILT,
        "key": key,
        # The number that a client sends as lora_task_id, and whose adapter it is.
        **({"adapters": parameters["lora"]["adapters"]} if "lora" in parameters else {}),
    }


def planned_script(parameters: Mapping[str, Any], key: str) -> str:
    """The script that builds the engine of a planned step."""
    spec = spec_from_json(parameters["spec"])
    return build_script(spec, image=parameters["image"], name=spec.architecture, key=key)


def build_script(spec: EngineSpec, *, image: str | None, name: str, key: str) -> str:
    """A bash script that builds the engine in `image` with docker, podman, enroot or Slurm's srun, and resumes.

    It takes the checkpoint's and the engine's directories as arguments (by default those beside it), keeps finished
    ranks and TensorRT's timing cache beside the engine, and renames a finished engine into place, so that a second run
    after a kill goes on and a run after success does nothing. With ``--check`` it prints what would run it here, or
    ends with exit code 6 and one sentence on standard error. Without an `image` it must be told one (``--image``).
    """
    gpu = f"{spec.gpu // 10}.{spec.gpu % 10}"
    facts = {"key": key, "version": spec.version, "gpu": gpu, "ranks": spec.world_size}
    context = {
        "image": image or "", "version": spec.version, "name": name, "key": key, "gpu": gpu, "ranks": spec.world_size,
        "facts": json.dumps(facts), "record": RECORD, "built": BUILT,
        "arguments": arguments(choose(spec), "/checkpoint", "/build/engine.part"),
        "ranks_py": (data_dir("templates") / "trtllm_engine" / "ranks.py").read_text(encoding="utf-8"),
    }  # fmt: skip
    return render("trtllm_engine/build.sh.j2", context)


def check_engine(config: Mapping[str, Any], record: Mapping[str, Any] | None, spec: EngineSpec) -> tuple[Problem, ...]:
    """What an engine directory's ``config.json`` and the script's record say otherwise than the spec."""
    model, build = config.get("pretrained_config") or {}, config.get("build_config") or {}
    mapping, quantization = model.get("mapping") or {}, model.get("quantization") or {}
    found = {
        "version": config.get("version"),
        "pretrained_config.architecture": model.get("architecture"),
        "pretrained_config.mapping.world_size": mapping.get("world_size"),
        "pretrained_config.mapping.tp_size": mapping.get("tp_size"),
        "pretrained_config.mapping.pp_size": mapping.get("pp_size"),
        "pretrained_config.quantization.quant_algo": quantization.get("quant_algo"),
        "pretrained_config.quantization.kv_cache_quant_algo": quantization.get("kv_cache_quant_algo"),
    }
    wanted = dict(
        zip(
            found,
            (
                spec.version, spec.architecture, spec.world_size, spec.tp_size, spec.pp_size, spec.format, spec.kv_cache
            ),
            strict=True,
        )
    )  # fmt: skip
    plugins = build.get("plugin_config") or {}
    for field, value in built_limits(spec).items():
        found[f"build_config.{field}"] = build.get(field, plugins.get(field))
        wanted[f"build_config.{field}"] = value
    problems = [
        Problem(f"config.json: {path}", f"is {found[path]!r}, the plan says {value!r}", "build the engine again")
        for path, value in wanted.items()
        if found[path] != value
    ]
    return (*problems, *_gpu_problems(record, spec))


def _gpu_problems(record: Mapping[str, Any] | None, spec: EngineSpec) -> list[Problem]:
    if record is None:
        hint = "build it with the script, which records the GPU"
        return [Problem(RECORD, "is missing: nothing says for which GPU the engine was built", hint)]
    wanted = f"{spec.gpu // 10}.{spec.gpu % 10}"
    if record.get("compute_capability") != wanted:
        said = f"is {record.get('compute_capability')!r}, the plan says {wanted!r}"
        return [Problem(f"{RECORD}: compute_capability", said, "build the engine on the target's kind of GPU")]
    return []
