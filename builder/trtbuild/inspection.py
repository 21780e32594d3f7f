"""`trtbuild inspect`: what a directory is (checkpoint, engine or package) and what its own files say."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from trtbuild.checkpoint_files import LocalFiles, open_directory
from trtbuild.manifest import MANIFEST, read_json
from trtbuild.model import read_facts
from trtbuild.package import LOCK, is_for_engines, read_manifest
from trtbuild.steps import ENGINE_FILE
from trtbuild.weight_formats import KV_CACHE_BITS


def inspect_directory(directory: Path) -> dict[str, Any]:
    """Facts about a checkpoint, an engine or a package, as JSON.

    Raises:
        RecipeError, ArtifactError: the directory is missing, empty or damaged.
    """
    open_directory(directory, at="DIR")
    manifest = directory / MANIFEST
    if manifest.is_file() and read_json(manifest).get("kind") == "package":
        return _package(directory)
    if (directory / ENGINE_FILE).is_file():
        if is_for_engines(directory):
            return {"kind": "engine"} | _converted(directory)
        return {"kind": "engine"} | _loadable(directory)
    return {"kind": "checkpoint", "checkpoint": _checkpoint(directory)}


def _package(directory: Path) -> dict[str, Any]:
    manifest = read_manifest(directory)
    lock = read_json(directory / LOCK)
    engine = directory / "engine"
    return {
        "kind": "package",
        "digest": manifest["digest"],
        "trtbuild": manifest["trtbuild"],
        "files": len(manifest["files"]),
        "bytes": sum(entry["size"] for entry in manifest["files"]),
        "plan": lock["plan"]["digest"],
        "source": {name: lock["plan"]["source"][name] for name in ("path", "repo_id", "commit")},
        **(_converted(engine) if is_for_engines(engine) else _loadable(engine)),
        "quality": read_json(directory / "evidence" / "quality.json"),
    }


def _converted(engine: Path) -> dict[str, Any]:
    described = read_json(engine / ENGINE_FILE)
    built = (engine / described["built"]).is_dir()
    config = read_json(engine / described["checkpoint"] / "config.json")
    return {"engine": described, "built": built, "checkpoint": config}


def _loadable(engine: Path) -> dict[str, Any]:
    return {"engine": read_json(engine / ENGINE_FILE), "checkpoint": _checkpoint(engine)}


def _checkpoint(directory: Path) -> dict[str, Any]:
    facts = read_facts(LocalFiles(directory))
    described = asdict(facts)
    described["files"] = len(facts.files)
    # The other sizes are terms of compression's memory.
    described["largest_layer"] = {"parameters": facts.largest_layer.parameters}
    whole = facts.kv_bytes_per_token(1)
    described["kv_bytes_per_token"] = {"bf16": 2 * whole} | {
        name: int(whole * bits / 8) for name, bits in KV_CACHE_BITS.items()
    }
    described["dtype"] = facts.dtype
    described["bytes_per_parameter"] = round(facts.weight_bytes / max(facts.parameters, 1), 3)
    return described


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as dotted rows, for a table."""
    if isinstance(value, dict):
        return [row for key, item in value.items() for row in flatten(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, (list, tuple)):
        return [(prefix, ", ".join(str(item) for item in value) or "-")]
    return [(prefix, "-" if value is None else str(value))]
