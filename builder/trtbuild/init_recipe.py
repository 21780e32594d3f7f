"""`trtbuild init`: a commented recipe that fits one model and one runtime, and builds as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trtbuild.checkpoint_files import open_directory
from trtbuild.compress_settings import GROUP_SIZES, fitting_group_sizes
from trtbuild.errors import CompatibilityError, Problem, RecipeError
from trtbuild.gates import default_max_perplexity_ratio
from trtbuild.manifest import write_atomic
from trtbuild.migrate.target import choose_target
from trtbuild.model import ModelFacts, read_facts
from trtbuild.plan import Source
from trtbuild.planner import make_plan
from trtbuild.recipe import Recipe
from trtbuild.recipe_fields import Format, RuntimeKind
from trtbuild.recipe_file import parse_recipe
from trtbuild.refusals import model_refusals
from trtbuild.releases import Release
from trtbuild.render import render
from trtbuild.support import QUANT_ALGO, group_sizes
from trtbuild.toolchain import tool_versions
from trtbuild.weight_formats import needs_text, takes_group

# Enough for FP8 scales and an AWQ search, and a few minutes of calibration on a CPU for a model of 1B parameters.
_COUNT, _LENGTH = 32, 512
_MAX_SEQ_LEN = 2048


@dataclass(frozen=True, slots=True)
class Choices:
    """What the command line chooses: the weights' format, the runtime, its version, and the GPU that will serve."""

    weight_format: Format = "fp8"
    runtime: RuntimeKind = "embedded"
    version: str | None = None
    gpu: str | None = None


def write_recipe(model: Path, out: Path, choices: Choices) -> None:
    """Write a recipe for the checkpoint in `model` to `out`.

    Raises:
        RecipeError: `out` exists, or a choice does not fit the model or another choice.
        CompatibilityError: the model cannot be compressed or served so.
    """
    if not out.absolute().parent.is_dir():
        raise RecipeError([Problem("-o", f"{out.parent} is no directory", "make it first, or name another file")])
    if out.exists():
        raise RecipeError([Problem("-o", f"{out} exists", "name another file, or remove it")])
    facts = read_facts(open_directory(model, at="MODEL_DIR"))
    minimal = {"schema_version": 1, "model": {"path": str(model)}, "runtime": {"kind": choices.runtime}}
    refused = model_refusals(facts, Recipe.model_validate(minimal))
    if refused:
        raise CompatibilityError("\n".join(str(problem) for problem in refused))
    text = _text(model, out, facts, choices)
    # What does not fit is said here, not by the next command.
    make_plan(parse_recipe(text, out), facts, Source(str(model.resolve())), tool_versions())
    write_atomic(out, text)


def _text(model: Path, out: Path, facts: ModelFacts, choices: Choices) -> str:
    release = _release(choices)
    weight_format = choices.weight_format
    context = {
        "architecture": facts.architecture,
        "parameters": human_count(facts.parameters),
        "context_length": facts.context_length,
        "file_name": out.name,
        "path": model.resolve(),
        "format": weight_format,
        "group_size": _group_size(facts, choices) if takes_group(weight_format) else None,
        "input_sizes": ", ".join(str(size) for size in facts.linear_input_sizes),
        "calibrated": needs_text(weight_format, "none"),
        "count": _COUNT,
        "length": min(_LENGTH, facts.context_length),
        "runtime": choices.runtime,
        # A tag stays a tag: it pins the container, not only the version.
        "version": None if release is None else choices.version or release.version,
        "container": None if release is None or release.container is None else release.container.tag,
        "gpu": choices.gpu,
        "max_seq_len": min(_MAX_SEQ_LEN, facts.context_length),
        "max_perplexity_ratio": default_max_perplexity_ratio(weight_format, "none"),
    }
    return render("recipe/recipe.yaml.j2", context)


def _release(choices: Choices) -> Release | None:
    """The release of TensorRT-LLM that the recipe will name, None for the embedded engine.

    Raises:
        RecipeError: a choice is missing, or belongs to another runtime.
        CompatibilityError: that version does not have this runtime.
    """
    if choices.runtime == "trtllm-engine" and choices.gpu is None:
        message = "is missing, and an engine is built for one GPU architecture"
        raise RecipeError([Problem("--gpu", message, "name the GPU that will serve, such as H100")])
    return choose_target(choices.runtime, choices.version, choices.gpu, option="--runtime").release


def _group_size(facts: ModelFacts, choices: Choices) -> int:
    name = choices.weight_format
    taken = GROUP_SIZES if choices.runtime == "embedded" else group_sizes(QUANT_ALGO[name] or "")
    fitting = [size for size in fitting_group_sizes(facts) if size in taken]
    if fitting:
        return fitting[0]
    sizes = ", ".join(str(size) for size in facts.linear_input_sizes)
    message = f"{name}: no group of {', '.join(map(str, taken))} divides every input size ({sizes})"
    raise RecipeError([Problem("--format", message, "use fp8")])


def human_count(number: int) -> str:
    """A count with three digits and a letter: 134515008 is 135M."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= 0.9995 * unit:  # what rounds to 1000 of the smaller unit is one of the larger
            return f"{number / unit:.3g}{letter}"
    return str(number)


def human_bytes(number: float) -> str:
    """A size with three digits and a unit; four from 1000 on, where the next unit is not reached."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number >= unit:
            size = number / unit
            return f"{size:.0f} {name}" if size >= 100 else f"{size:.3g} {name}"
    return f"{number:.0f} B"
