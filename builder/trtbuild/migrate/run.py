"""The whole migration: read, translate, write the recipe."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtbuild.checkpoint_files import open_directory
from trtbuild.errors import Problem, RecipeError, TrtbuildError
from trtbuild.manifest import write_atomic
from trtbuild.migrate.checkpoint_directory import check_original, described
from trtbuild.migrate.document import recipe_text, recipe_values
from trtbuild.migrate.drafts import FILL_IN
from trtbuild.migrate.fit import fit
from trtbuild.migrate.legacy import Clients, Legacy, Unset
from trtbuild.migrate.places import find_places
from trtbuild.migrate.source import read_source
from trtbuild.migrate.target import Target, choose_target
from trtbuild.migrate.translate import Row, translate
from trtbuild.model import ModelFacts, read_facts
from trtbuild.pipeline import prepare
from trtbuild.recipe_fields import RuntimeKind

_KINDS = ("kept", "renamed", "computed", "dropped", "not recognized")


@dataclass(frozen=True, slots=True)
class Migration:
    """What a migration gives: the recipe and what became of every setting."""

    form: str
    version: str | None
    target: Target
    document: Mapping[str, Any]
    text: str
    rows: tuple[Row, ...]
    unset: tuple[Unset, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        return {
            "source": {"form": self.form, "tensorrt_llm": self.version},
            "target": self.target.described,
            "recipe": dict(self.document),
            "rows": [asdict(row) | {"loss": row.is_loss} for row in self.rows],
            "unset": [asdict(one) for one in self.unset],
            "notes": list(self.notes),
        }

    def summary(self) -> str:
        """How many settings met which fate."""
        counts = Counter[str](row.kind for row in self.rows if row.old)
        losses = sum(row.is_loss for row in self.rows)
        kinds = ", ".join(f"{counts[kind]} {kind}" for kind in _KINDS if counts[kind])
        return f"{kinds or 'no setting'}; {losses} with a loss, {len(self.unset)} unset"


def migrate(
    source: str,
    kind: RuntimeKind = "trtllm",
    *,
    version: str | None = None,
    model: str | None = None,
    gpu: str | None = None,
) -> Migration:
    """The recipe for an older deployment.

    Args:
        source: where it is; ``-`` for standard input.
        kind: the new runtime.
        version: of TensorRT-LLM, or a container's tag; by default the newest container's.
        model: the original checkpoint, where the source does not say it.
        gpu: that will serve.

    Raises:
        RecipeError, CompatibilityError, ArtifactError: see `choose_target`, `read_source` and `read_facts`.
    """
    target = choose_target(kind, version, gpu)
    legacy = read_source(source)
    places = find_places(legacy, model)
    draft = translate(legacy, target, places)
    facts = _facts(places.model, required=model is not None)
    if legacy.original is not None and facts is not None:
        check_original(legacy.original, facts)
    fit(draft, legacy, facts)
    document = recipe_values(draft)
    return Migration(
        form=legacy.form,
        version=legacy.version,
        target=target,
        document=document,
        text=recipe_text(document, draft, legacy.form),
        rows=tuple(draft.rows),
        unset=legacy.unset,
        notes=tuple(_notes(legacy, document, target, is_open=places.is_open)),
    )


def write_recipe(migration: Migration, out: Path) -> None:
    """Write the recipe.

    Raises:
        RecipeError: `out` exists, or its directory does not.
    """
    if not out.absolute().parent.is_dir():
        raise RecipeError([Problem("-o", f"{out.parent} is no directory", "make it first, or name another file")])
    if out.exists():
        raise RecipeError([Problem("-o", f"{out} exists", "name another file, or remove it")])
    write_atomic(out, migration.text)


def remaining_problems(migration: Migration, out: Path) -> list[str]:
    """What `trtbuild check` says of the written recipe, where the model lies on this machine and nothing is open."""
    if open_fields(migration) or not Path(migration.document["model"]["path"]).expanduser().is_dir():
        return []
    try:
        prepare(out)
    except TrtbuildError as error:
        return str(error).splitlines()
    return []


def next_command(migration: Migration, out: Path) -> str:
    """What to do with the written recipe."""
    name = shlex.quote(str(out))
    todo = [f"--set {path}=..." for path in open_fields(migration)]
    package = shlex.quote(out.stem)
    return " ".join(["trtbuild build", name, "-o", package, *todo])


def open_fields(migration: Migration) -> list[str]:
    """What the recipe leaves to the user."""
    fields = []
    if str(migration.document["model"]["path"]).startswith("/FILL-IN/"):
        fields.append("model.path")
    if migration.document.get("speculative", {}).get("draft") == FILL_IN:
        fields.append("speculative.draft")
    if migration.target.kind == "trtllm-engine" and "gpu" not in migration.document.get("target", {}):
        fields.append("target.gpu")
    return fields


def _facts(model: str, *, required: bool) -> ModelFacts | None:
    """The model's facts where it lies on this machine."""
    path = Path(model).expanduser()
    if not path.is_dir():
        local = model.startswith(("/", ".", "~"))
        if required and local:
            open_directory(path, at="--model")  # says what is wrong
        return None
    return read_facts(open_directory(path, at="--model"))


def _notes(legacy: Legacy, document: Mapping[str, Any], target: Target, *, is_open: bool) -> list[str]:
    notes = []
    if is_open and legacy.original is not None:
        notes.append(
            f"the rank files cannot be turned back into a checkpoint: fill in model.path, or give --model, with the "
            f"original one, {described(legacy.original)}"
        )
    elif is_open:
        notes.append("the source names no original checkpoint on this machine: fill in model.path, or give --model")
    clients: Clients = document.get("serving", {}).get("layout", "llm")
    if legacy.clients == "ensemble" and clients == "llm":
        notes.append(
            "clients change: they ask the model tensorrt_llm instead of ensemble or tensorrt_llm_bls, with "
            "sampling_param_max_tokens instead of max_tokens, streaming instead of stream, "
            "sampling_param_stop instead of stop_words, and sampling_param_ in front of top_k, top_p and temperature"
        )
    if legacy.clients == "ensemble" and target.kind != "trtllm-engine":
        notes.append("metrics change: nv_trt_llm_* come from the C++ backend alone; nv_inference_* stay")
    return notes
