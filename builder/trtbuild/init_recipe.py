"""`trtbuild init`: a commented recipe that fits one model and builds as it is."""

from __future__ import annotations

from pathlib import Path

from trtbuild.checkpoint_files import open_directory
from trtbuild.errors import CompatibilityError, Problem, RecipeError
from trtbuild.gates import default_max_perplexity_ratio
from trtbuild.manifest import write_atomic
from trtbuild.model import ModelFacts, read_facts
from trtbuild.recipe import Recipe
from trtbuild.refusals import model_refusals
from trtbuild.render import render
from trtbuild.settings import GROUP_SIZES, fitting_group_sizes

# Enough for FP8 scales and an AWQ search, and a few minutes of calibration on a CPU for a model of 1B parameters.
_COUNT, _LENGTH = 32, 512
_MAX_SEQ_LEN = 2048


def write_recipe(model: Path, out: Path, weight_format: str) -> None:
    """Write a recipe for the checkpoint in `model` to `out`.

    Raises:
        RecipeError: `out` exists, or the format does not fit the model.
        CompatibilityError: the model cannot be compressed or served.
    """
    if not out.absolute().parent.is_dir():
        raise RecipeError([Problem("-o", f"{out.parent} is no directory", "make it first, or name another file")])
    if out.exists():
        raise RecipeError([Problem("-o", f"{out} exists", "name another file, or remove it")])
    facts = read_facts(open_directory(model, at="MODEL_DIR"))
    minimal = {"schema_version": 1, "model": {"path": str(model)}, "runtime": {"kind": "embedded"}}
    refused = model_refusals(facts, Recipe.model_validate(minimal))
    if refused:
        raise CompatibilityError("\n".join(str(problem) for problem in refused))
    write_atomic(out, _text(model, out, facts, weight_format))


def _text(model: Path, out: Path, facts: ModelFacts, weight_format: str) -> str:
    group_size = _group_size(facts) if weight_format == "int4_awq" else None
    context = {
        "architecture": facts.architecture,
        "parameters": human_count(facts.parameters),
        "context_length": facts.context_length,
        "file_name": out.name,
        "path": model.resolve(),
        "format": weight_format,
        "group_size": group_size,
        "input_sizes": ", ".join(str(size) for size in facts.linear_input_sizes),
        "calibrated": weight_format != "none",
        "count": _COUNT,
        "length": min(_LENGTH, facts.context_length),
        "max_seq_len": min(_MAX_SEQ_LEN, facts.context_length),
        "max_perplexity_ratio": default_max_perplexity_ratio(weight_format, "none"),
    }
    return render("recipe/recipe.yaml.j2", context)


def _group_size(facts: ModelFacts) -> int:
    fitting = fitting_group_sizes(facts)
    if fitting:
        return fitting[0]
    sizes = ", ".join(str(size) for size in facts.linear_input_sizes)
    message = f"int4_awq: no group of {GROUP_SIZES} divides every input size ({sizes})"
    raise RecipeError([Problem("--format", message, "use fp8")])


def human_count(number: int) -> str:
    """A count with three digits and a letter: 134515008 is 135M."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return str(number)


def human_bytes(number: float) -> str:
    """A size with three digits and a unit."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f} B"
