"""The draft of a package for TensorRT-LLM's LLM API: checked, and put below the engine directory as ``draft``.

Decoder layers of EAGLE-3 drafts get the names that every release knows (`midlayer`): ModelOpt exports `layers.0`, which
TensorRT-LLM renames itself only since the 1.3 release candidates (`eagle3_draft` has the sources).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trtbuild.adapters import trtllm_checkpoint
from trtbuild.adapters.trtllm_checkpoint import CheckpointCheck, Layout
from trtbuild.checkpoint_files import LocalFiles
from trtbuild.draft import other_tokens
from trtbuild.eagle3_draft import OTHER_LAYER, few, loaded_name, misfits, read_eagle3
from trtbuild.errors import CompatibilityError
from trtbuild.linking import place_file
from trtbuild.llm_speculation import number_captured
from trtbuild.manifest import write_atomic
from trtbuild.model import INDEX, ModelFacts, read_facts, read_tensors
from trtbuild.safetensors_header import LENGTH_BYTES, read_header

_BESIDE = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".vocab", ".py")
_READABLE = 0o644
_ALIGNED = 8


def check(
    draft: Path | None, model: Path, speculation: Mapping[str, Any], version: str, layout: Layout
) -> list[CheckpointCheck]:
    """Whether TensorRT-LLM `version` would take the draft beside the model; every rule reports.

    Args:
        draft: directory of the draft; None for methods without one.
        model: directory of the model's checkpoint.
        speculation: `method` and `config` of the engine step.
        version: of TensorRT-LLM.
        layout: how the model is divided, and the GPU.

    Raises:
        ArtifactError, CompatibilityError: a file is missing, damaged or a pickle.
    """
    if draft is None:
        return [_mtp(LocalFiles(model))] if speculation["method"] == "mtp" else []
    facts, files = read_facts(LocalFiles(model)), LocalFiles(draft)
    problem = other_tokens(model, draft)
    found = [CheckpointCheck("draft: tokenizer", () if problem is None else (problem.message,))]
    if speculation["method"] == "eagle3":
        return [*found, _eagle3(files, facts, number_captured(speculation["config"]))]
    rules = trtllm_checkpoint.check(files, version, layout)
    return found + [CheckpointCheck(f"draft: {rule.name}", rule.problems, rule.detail) for rule in rules]


def _mtp(files: LocalFiles) -> CheckpointCheck:
    """Layers that predict further tokens follow the decoder's (deepseek-ai/DeepSeek-V3, README_WEIGHTS.md)."""
    facts = read_facts(files)
    prefix = f"model.layers.{facts.num_layers}."
    count = sum(tensor.name.startswith(prefix) for tensor in read_tensors(files))
    problem = f"config.json names {facts.mtp_layers} layers that predict further tokens, and no tensor is in {prefix}"
    return CheckpointCheck("draft: MTP layers", () if count else (problem,), f"{count} tensors in {prefix[:-1]}")


def refuse(draft: Path | None, checks: Sequence[CheckpointCheck], version: str) -> None:
    """Refuse a draft that some rule speaks against.

    Raises:
        CompatibilityError: naming every problem.
    """
    wrong = [problem for check in checks for problem in check.problems]
    if wrong:
        raise CompatibilityError(
            f"speculative: TensorRT-LLM {version} would not draft with {draft or 'the checkpoint'}:\n"
            + "\n".join(wrong),
            "use a draft that was made for this model, or another speculative.method",
        )


def _eagle3(files: LocalFiles, model: ModelFacts, captured: int) -> CheckpointCheck:
    draft = read_eagle3(files)
    detail = f"{len(draft.shapes)} tensors, {draft.draft_vocab_size} tokens, reads {captured} layers"
    return CheckpointCheck("draft: EAGLE-3", tuple(few(misfits(draft, model, captured))), detail)


def place(source: Path, target: Path, method: str) -> None:
    """Reproduce the draft's checkpoint files from `source` under `target`: its weights, configs and tokenizer."""
    files = LocalFiles(source)
    tensors = read_tensors(files)
    layers = read_eagle3(files).num_layers if method == "eagle3" else 0
    other = {tensor.shard for tensor in tensors if layers and OTHER_LAYER.match(tensor.name)}
    for shard in sorted({tensor.shard for tensor in tensors}):
        if shard in other:
            _rename(files, shard, target / shard, layers)
        else:
            place_file(source / shard, target / shard)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _BESIDE:
            place_file(path, target / path.name)
    index = target / INDEX
    if other and index.is_file():
        document = json.loads(index.read_text(encoding="utf-8"))
        document["weight_map"] = {loaded_name(name, layers): file for name, file in document["weight_map"].items()}
        write_atomic(index, json.dumps(document, indent=2, sort_keys=True) + "\n")


def _rename(files: LocalFiles, shard: str, target: Path, layers: int) -> None:
    """A shard with other names in its header and the same data behind it."""
    raw, _ = read_header(files, shard)
    header = {
        name if name == "__metadata__" else loaded_name(name, layers): entry for name, entry in json.loads(raw).items()
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    target.parent.mkdir(parents=True, exist_ok=True)
    with (files.directory / shard).open("rb") as old, target.open("wb") as new:
        new.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        old.seek(LENGTH_BYTES + len(raw))
        shutil.copyfileobj(old, new, 1 << 20)
    target.chmod(_READABLE)
