"""The evidence files of a package: what was measured, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from trtbuild.choice_picture import draw
from trtbuild.evidence_picture import training_picture
from trtbuild.gates import check_gates
from trtbuild.manifest import canonical_json
from trtbuild.plan import Plan
from trtbuild.store import Artifact


def quality(record: Mapping[str, Any], gates: Mapping[str, float | None]) -> dict[str, Any]:
    """``quality.json``: the evaluation's result, what it used, and every gate."""
    result = dict(record["result"])
    return result | {"usage": dict(record["usage"]), "gates": [asdict(gate) for gate in check_gates(result, gates)]}


def choice(record: Mapping[str, Any]) -> dict[str, str]:
    """The table of layers, formats and sensitivities with its picture, where formats were chosen by measurement."""
    result = record.get("result", {})
    if "choice" not in result:
        return {}
    table, bits = result["choice"], result.get("bits_per_weight")
    return {
        "evidence/sensitivity.json": canonical_json(dict(table) | {"bits_per_weight": bits}),
        "evidence/sensitivity.svg": draw(table, bits),
    }


def build(artifacts: Mapping[str, Artifact], plan: Plan) -> dict[str, Any]:
    """``build.json``: what each heavy step did, its time and its peak memory, and the sizes on disk."""
    steps = {
        kind: dict(artifact.record) for kind, artifact in artifacts.items() if artifact.record and kind != "evaluate"
    }
    engine = artifacts["engine"].content
    size = sum(path.stat().st_size for path in engine.rglob("*.safetensors"))
    return {
        "steps": steps,
        "bytes": {"source": plan.facts.weight_bytes, "engine": size},
        "estimates": dict(plan.estimates),
    }


def training(artifact: Artifact | None) -> dict[str, str]:
    """``training.json`` and its picture, where a draft was trained: loss by step, acceptance by position."""
    if artifact is None:
        return {}
    result, usage = dict(artifact.record["result"]), dict(artifact.record["usage"])
    held = result["acceptance"]["held_out"]
    title = f"{result['method']}: {held['tokens_per_step']:.2f} tokens a step on held-out prompts"
    return {
        "evidence/training.json": canonical_json(result | {"usage": usage}),
        "evidence/training.svg": training_picture(title, result["loss"], result["acceptance"]),
    }
