"""`trtbuild speculate`: what speculation brings on the user's prompts, and the setting that it is worth."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.errors import Problem, RecipeError, ToolError
from trtbuild.manifest import write_atomic
from trtbuild.pipeline import build, prepare_loaded
from trtbuild.process import run_worker
from trtbuild.recipe_edit import with_section
from trtbuild.recipe_file import LoadedRecipe, load_recipe, parse_recipe
from trtbuild.report import Reporter
from trtbuild.speculate.prompts import refuse_file
from trtbuild.speculation_advice import Advice, Candidate, Measured, advise, requests
from trtbuild.speculation_candidates import Possible, batches, find_possible, refuse_nothing_to_draft
from trtbuild.speculation_picture import draw

STEP = "speculate"
_ROUNDS = 3
_LOUD = 0.2  # runs that differ by more hide what speculation brings
_NUMERICS = ("device", "compute_dtype", "weights")
_LIMITS = ("max_num_tokens", "max_seq_len", "enable_chunked_prefill", "capacity_scheduler_policy")
ELSEWHERE = (
    "acceptance and tokens a step hold for greedy answers of {kind} too; seconds do not, they were not measured there"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the command line asks for: at most `count` prompts, `time_limit` seconds for all runs together."""

    recipe: Path
    prompts: Path
    overrides: Sequence[str] = ()
    draft: Path | None = None
    count: int = 64
    time_limit: int = 600
    output: Path | None = None
    write: bool = False

    @property
    def picture(self) -> Path:
        """Where the picture is put."""
        return self.output or self.recipe.with_name(f"{self.recipe.stem}-speculation.svg")


@dataclass(frozen=True, slots=True)
class Study:
    """What was measured; `advice` is None where the engine's seconds say nothing of the recipe's runtime."""

    kind: str
    candidates: tuple[Candidate, ...]
    measured: Mapping[str, Any]
    advice: Advice | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        rows = []
        for row in self.measured["rows"]:
            candidate = self.candidates[row["candidate"]]
            rows.append(dict(candidate.section) | {"max_draft_len": candidate.length} | _kept(row, self.advice))
        return {
            "runtime": self.kind,
            "measured_on": {name: self.measured[name] for name in ("device", "compute_dtype", "path")},
            "prompts": dict(self.measured["prompts"]),
            "without_drafts": list(self.measured["plain"]) if self.advice else [],
            "rows": rows,
            "advice": None if self.advice is None else self.advice.to_json(),
            "notes": list(self.notes),
        }


def study(asked: Asked, reporter: Reporter) -> Study:
    """Measure, advise, draw the picture, and write the recipe where that is asked for.

    Raises:
        RecipeError: the recipe, the prompts or an option is wrong.
        CompatibilityError: no method is possible, or the model does not run on the embedded engine.
        ToolError, HostError, ArtifactError: as `build` and the measurement raise them.
    """
    loaded = load_recipe(asked.recipe, asked.overrides)
    kind = loaded.recipe.runtime.kind
    _refuse(asked, kind)
    possible = find_possible(loaded, _draft(loaded, asked, reporter))
    for sentence in possible.refused:
        reporter.note(sentence)
    model = build(possible.plain, Path(asked.recipe.stem), reporter, last="compress").path
    taken, beyond = batches(possible.plain.plan.value("runtime.max_batch_size"))
    request = _request(possible, asked, model, taken if kind == "embedded" else taken[:1], timed=kind == "embedded")
    reporter.started(STEP)
    measured = _measure(request, reporter)
    advice = _advice(possible.candidates, measured) if kind == "embedded" else None
    notes = _notes(kind, measured, beyond if kind == "embedded" else None)
    found = Study(kind, possible.candidates, measured, advice, (*possible.refused, *notes))
    write_atomic(asked.picture, draw(found.to_json()))
    if asked.write and advice is not None:
        reporter.note(write_advice(loaded, asked, advice))
    return found


def _draft(loaded: LoadedRecipe, asked: Asked, reporter: Reporter) -> Path | None:
    """The draft that is named, or that the recipe trains; None: what the recipe names, if anything."""
    if asked.draft is not None:
        return asked.draft.absolute()
    if loaded.recipe.speculative.train is None:
        return None
    return build(prepare_loaded(loaded), Path(asked.recipe.stem), reporter, last="draft").path


def _refuse(asked: Asked, kind: str) -> None:
    refuse_file(asked.prompts)
    refuse_nothing_to_draft(asked.draft)
    if not asked.picture.absolute().parent.is_dir():
        problem = Problem("-o", f"{asked.picture.parent} is no directory", "make it first, or name another file")
        raise RecipeError([problem])
    if asked.write and kind != "embedded":
        message = f"the best setting is a matter of seconds, and those of {kind} cannot be measured here"
        raise RecipeError([Problem("--write", message, "leave it out: acceptance and tokens a step are shown")])


def _request(possible: Possible, asked: Asked, model: Path, taken: Sequence[int], *, timed: bool) -> dict[str, Any]:
    plan = possible.embedded.plan
    engine = {name: plan.value(f"runtime.{name}") for name in (*_NUMERICS, *_LIMITS)}
    cache = plan.value("compress.kv_cache")
    return {
        "model": str(model),
        "prompts": str(asked.prompts.absolute()),
        "count": asked.count,
        "batches": list(taken),
        "candidates": [dict(section) for section in possible.sections],
        "limit_s": asked.time_limit,
        "rounds": _ROUNDS if timed else 1,
        "engine": engine | {"trust_remote_code": plan.value("model.trust_remote_code")},
        "kv_cache": {
            "dtype": "auto" if cache == "none" else cache,
            "tokens_per_block": plan.value("runtime.kv_cache.tokens_per_block"),
            "max_tokens": plan.value("runtime.kv_cache.max_tokens"),
        },
    }


def _measure(request: Mapping[str, Any], reporter: Reporter) -> Mapping[str, Any]:
    """The child's table; its log stays where a tool has failed, whose error names it."""
    descriptor, name = tempfile.mkstemp(prefix="trtbuild-speculate-", suffix=".log")
    os.close(descriptor)
    log = Path(name)
    try:
        done = run_worker("trtbuild.speculate", request, log=log, on_progress=reporter.progress)
    except ToolError as error:
        if str(log) in error.hint:
            raise
        raise ToolError(error.message, f"the whole log is {log}") from error
    except BaseException:
        log.unlink()
        raise
    log.unlink()
    reporter.finished(STEP, "measured", done.seconds)
    return done.result


def _advice(candidates: Sequence[Candidate], measured: Mapping[str, Any]) -> Advice:
    rows = [
        Measured(candidates[row["candidate"]], row["batch"], row["speed_up"], tuple(row["speed_ups"]))
        for row in measured["rows"]
    ]
    rows.sort(key=lambda row: candidates.index(row.candidate))
    return advise(rows, {plain["batch"]: plain["noise"] for plain in measured["plain"]})


def _notes(kind: str, measured: Mapping[str, Any], beyond: str | None) -> list[str]:
    """What the figures do not say themselves."""
    prompts = measured["prompts"]
    notes = [] if beyond is None else [beyond]
    notes += measured["left_out"]
    if prompts["too_long"]:
        notes.append(f"{prompts['too_long']} prompts of more than {prompts['longest_taken']} tokens were passed over")
    largest = max((plain["batch"] for plain in measured["plain"]), default=1)
    if largest > prompts["used"]:
        notes.append(f"{prompts['used']} prompts were repeated to make {largest} requests at once")
    for plain in measured["plain"]:
        if (plain["noise"] or 0.0) > _LOUD:
            where = requests(plain["batch"])
            notes.append(f"{where}: equal runs differ by {plain['noise']:.0%}; measure again on a quieter machine")
        if plain["missed"]:
            where = requests(plain["batch"])
            notes.append(f"{where}: no time was left for {plain['missed']} settings; --time-limit gives more")
    if any(row["same_answers"] < 1 for row in measured["rows"]):
        notes.append("some answers differ from those without drafts, where two tokens are equally likely")
    if kind != "embedded":
        notes.append(ELSEWHERE.format(kind=kind))
    return notes


def write_advice(loaded: LoadedRecipe, asked: Asked, advice: Advice) -> str:
    """Write the advice into the recipe, method none where nothing helps; returns what was done, as a sentence.

    Raises:
        RecipeError, CompatibilityError: the new recipe would not plan; it is not written.
    """
    section, train = advice.section, (loaded.document.get("speculative") or {}).get("train")
    if section is not None and train is not None and asked.draft is None and "draft" in section:
        section = {name: value for name, value in section.items() if name != "draft"} | {"train": train}
    if section is None and loaded.recipe.speculative.method == "none":
        return f"{asked.recipe} is left as it is: it drafts nothing"
    written = section or {"method": "none"}
    text = with_section(loaded.text, "speculative", written)
    prepare_loaded(parse_recipe(text, loaded.path, asked.overrides))
    write_atomic(asked.recipe.resolve(), text)
    gone = sorted(set(loaded.document.get("speculative") or {}) - set(written))
    lost = f"; removed: {', '.join(f'speculative.{name}' for name in gone)}" if gone else ""
    return f"{asked.recipe}: speculative is written{lost}"


def _kept(row: Mapping[str, Any], advice: Advice | None) -> dict[str, Any]:
    """A row without its number, and without seconds that say nothing."""
    seconds = () if advice is not None else ("speed_up", "speed_ups", "tokens_per_second")
    return {name: value for name, value in row.items() if name not in ("candidate", *seconds)}
