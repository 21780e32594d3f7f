"""Text for calibration and for evaluation: the shipped English text or the user's own, cut into windows of tokens.

`packing` makes the windows. Evaluation never sees calibration text: `heldout_windows` compares the two files before it
answers.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.errors import ArtifactError, Problem, RecipeError
from trtbuild.recipe_fields import MIN_CALIBRATION_LENGTH, MIN_EVALUATION_TOKENS

from .coverage import Coverage, coverage_of
from .packing import Pool, lay_out, pack, passages
from .textfiles import TextFile, read_rows

CALIBRATION_TEXT = Path(__file__).resolve().parent.parent / "_text" / "calibration.jsonl"
HELDOUT_TEXT = CALIBRATION_TEXT.with_name("heldout.jsonl")

# Of the long lines: leaves room for shared headings and licence notes.
_MAX_SHARED = 0.05
_COUNT_FIELD = "compress.calibration.count"


@dataclass(frozen=True, slots=True)
class CalibrationSpec:
    """The recipe's ``compress.calibration``; `data` None means the shipped text, `length` is in tokens.

    `packing` is packed or padded; `split` of a data set on disk.
    """

    data: Path | None
    column: str | None
    count: int
    length: int
    seed: int
    split: str | None = None
    packing: str = "packed"


@dataclass(frozen=True, slots=True)
class HeldoutSpec:
    """Text for evaluation: at least `tokens` predicted tokens, `length` in a window; `data` None: the shipped text.

    `calibration` is the file that the model was calibrated with (None: the shipped calibration text).
    """

    data: Path | None
    tokens: int
    length: int
    calibration: Path | None = None
    calibration_column: str | None = None
    calibration_split: str | None = None


@dataclass(frozen=True, slots=True)
class Samples:
    """Windows of token ids, all of the same length unless each is a document, and where they come from.

    `tokens` counts all ids in all windows, `documents` the documents read to make them, `digest` is the SHA-256 of the
    ids as little-endian 32-bit numbers (of the lengths too, where they differ), `prefix` the ids that the tokenizer
    puts before every text. `coverage` is of calibration text alone.
    """

    input_ids: tuple[tuple[int, ...], ...]
    tokens: int
    documents: int
    digest: str
    source: str
    prefix: tuple[int, ...]
    coverage: Coverage | None = None


def load_samples(spec: CalibrationSpec, tokenizer_dir: Path, *, trust_remote_code: bool = False) -> Samples:
    """The `spec.count` windows of at most `spec.length` tokens that calibrate a model; the same for the same input.

    Raises:
        RecipeError: the file or its column is wrong, or there is too little text.
        ArtifactError: the directory has no tokenizer that Transformers can load.
        HostError: a Parquet or Arrow file, and pyarrow cannot be imported.
    """
    tokenizer = load_tokenizer(tokenizer_dir, trust_remote_code=trust_remote_code)
    file = TextFile(spec.data, spec.column, spec.split) if spec.data else TextFile(CALIBRATION_TEXT)
    gather = lay_out if spec.packing == "padded" else pack
    pool = gather(file, tokenizer, spec.length, needed=spec.count)
    if len(pool.windows) < spec.count:
        raise _too_few_documents(spec, pool, file) if spec.packing == "padded" else _too_few_samples(spec, pool, file)
    return draw(pool, spec, tokenizer, _source(spec.data, "shipped calibration text"))


def draw(pool: Pool, spec: CalibrationSpec, tokenizer: Any, source: str) -> Samples:
    """`spec.count` windows of the pool as the seed chooses them, in the pool's order, and what they cover."""
    chosen = sorted(random.Random(spec.seed).sample(range(len(pool.windows)), spec.count))  # noqa: S311 -- not a secret
    windows = [pool.windows[index] for index in chosen]
    texts = [tokenizer.decode(window, skip_special_tokens=True) for window in windows]
    return _samples(windows, pool, source, coverage_of(windows, pool.documents_in(chosen), texts))


def heldout_windows(spec: HeldoutSpec, tokenizer_dir: Path, *, trust_remote_code: bool = False) -> Samples:
    """Windows spread evenly over the held-out text, none of which is calibration text.

    A window has one id more than `spec.length`, because its last id is only predicted, never read.

    Raises:
        RecipeError: the file is wrong, too short, or shares text with the calibration file.
        ArtifactError: the directory has no tokenizer that Transformers can load.
        HostError: a Parquet file, and pyarrow cannot be imported.
    """
    file = TextFile(spec.data or HELDOUT_TEXT, field="quality.data", column_field=None)
    tokenizer = load_tokenizer(tokenizer_dir, trust_remote_code=trust_remote_code)
    needed = -(-spec.tokens // spec.length)
    pool = pack(file, tokenizer, spec.length + 1, needed=needed)
    _refuse_calibration_text(spec, file, pool.passages)
    found = len(pool.windows)
    if found < needed:
        what = f"{file.path} has {pool.tokens:,} tokens, {found} windows of {spec.length + 1}; {needed} are needed"
        hint = f"give a longer file to evaluate {spec.tokens:,} tokens"
        if spec.tokens > MIN_EVALUATION_TOKENS:
            hint += f", or lower quality.tokens, to {MIN_EVALUATION_TOKENS:,} at least"
        raise RecipeError([Problem("quality.data", what, hint)])
    chosen = [pool.windows[index * found // needed] for index in range(needed)]
    return _samples(chosen, pool, _source(spec.data, "shipped held-out text"))


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The Transformers tokenizer in `directory`; never looks anywhere else.

    Raises:
        ArtifactError: there is none, or Transformers cannot read it.
    """
    from transformers import AutoTokenizer

    if not directory.is_dir():
        raise ArtifactError(f"{directory} is not a directory", "give the directory that has tokenizer.json")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(f"no tokenizer could be loaded from {directory}: {reason}") from error


def _too_few_samples(spec: CalibrationSpec, pool: Pool, file: TextFile) -> RecipeError:
    found = len(pool.windows)
    what = (
        f"{spec.count} samples of {spec.length} tokens need {spec.count * spec.length:,} tokens, "
        f"but {'the shipped text' if spec.data is None else file.path} has {pool.tokens:,}"
    )
    more = "give a longer file" if spec.data else "give a longer text of your own in compress.calibration.data"
    if found:
        return RecipeError([Problem(_COUNT_FIELD, what, f"{more}, or set {_COUNT_FIELD} to {found} or less")])
    if pool.tokens >= MIN_CALIBRATION_LENGTH:
        more += f", or set compress.calibration.length to {pool.tokens} or less"
    return RecipeError([Problem("compress.calibration.data", what, more)])


def _too_few_documents(spec: CalibrationSpec, pool: Pool, file: TextFile) -> RecipeError:
    found = len(pool.windows)
    text = "the shipped text" if spec.data is None else str(file.path)
    least = MIN_CALIBRATION_LENGTH
    what = f"{spec.count} samples need as many documents of {least} tokens or more, but {text} has {found}"
    if pool.short:
        what += f" and {pool.short} shorter ones"
    lower = f", or set {_COUNT_FIELD} to {found} or less" if found else ""
    return RecipeError([Problem(_COUNT_FIELD, what, f"give more documents, use packing: packed{lower}")])


def _samples(windows: Sequence[tuple[int, ...]], pool: Pool, source: str, coverage: Coverage | None = None) -> Samples:
    ids = [token for window in windows for token in window]
    lengths = [len(window) for window in windows]
    told = ids + lengths if len(set(lengths)) > 1 else ids
    digest = hashlib.sha256(b"".join(number.to_bytes(4, "little") for number in told)).hexdigest()
    return Samples(tuple(windows), len(ids), pool.documents, digest, source, pool.prefix, coverage)


def _source(data: Path | None, shipped: str) -> str:
    return str(data) if data else shipped


def _refuse_calibration_text(spec: HeldoutSpec, heldout: TextFile, known: frozenset[bytes]) -> None:
    """Raise if held-out and calibration text are one file, or share more than 5 % of the held-out passages."""
    if spec.data is None and spec.calibration is None:
        return  # the two shipped files are disjoint; a test proves it
    field = "quality.data" if spec.data else "compress.calibration.data"
    hint = "give a file of its own: a model scores better on text that it was calibrated with"
    calibration = TextFile(spec.calibration or CALIBRATION_TEXT, spec.calibration_column, spec.calibration_split)
    if calibration.path.exists() and calibration.path.samefile(heldout.path):
        raise RecipeError([Problem(field, f"{heldout.path} is both calibration and held-out text", hint)])
    shared = {passage for row in read_rows(calibration) for passage in passages(row) if passage in known}
    if len(shared) > _MAX_SHARED * len(known):
        share = len(shared) / len(known)
        what = f"{share:.0%} of the passages of {heldout.path} are in the calibration text {calibration.path}"
        raise RecipeError([Problem(field, what, hint)])
