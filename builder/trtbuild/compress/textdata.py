"""Text for calibration and for evaluation: the shipped English text or the user's own, cut into windows of tokens.

Documents are tokenized, packed one after another and cut into full windows. Where the tokenizer begins every text with
a token of its own (BOS), every window begins with it too, because such models predict badly without it.
Evaluation never sees calibration text: `heldout_windows` compares the two files before it answers.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.errors import ArtifactError, Problem, RecipeError
from trtbuild.recipe_fields import MIN_CALIBRATION_LENGTH, MIN_EVALUATION_TOKENS

from .textfiles import Message, Row, TextFile, read_rows

CALIBRATION_TEXT = Path(__file__).resolve().parent.parent / "_text" / "calibration.jsonl"
HELDOUT_TEXT = CALIBRATION_TEXT.with_name("heldout.jsonl")

# Windows are drawn from at most this many times the text needed: a file of many gigabytes is not read to its end.
_POOL_FACTOR = 8
# Lines this long are unlikely to be equal by chance; 5 % leaves room for shared headings and licence notes.
_PASSAGE_CHARS = 60
_MAX_SHARED = 0.05
_COUNT_FIELD = "compress.calibration.count"


@dataclass(frozen=True, slots=True)
class CalibrationSpec:
    """The recipe's ``compress.calibration``; `data` None means the shipped text, `length` is in tokens."""

    data: Path | None
    column: str | None
    count: int
    length: int
    seed: int


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


@dataclass(frozen=True, slots=True)
class Samples:
    """Windows of token ids, all of the same length, and where they come from.

    `tokens` counts all ids in all windows, `documents` the documents read to make them, `digest` is the SHA-256 of the
    ids as little-endian 32-bit numbers, `prefix` the ids that the tokenizer puts before every text.
    """

    input_ids: tuple[tuple[int, ...], ...]
    tokens: int
    documents: int
    digest: str
    source: str
    prefix: tuple[int, ...]


def load_samples(spec: CalibrationSpec, tokenizer_dir: Path, *, trust_remote_code: bool = False) -> Samples:
    """The `spec.count` windows of `spec.length` tokens that calibrate a model; the same for the same input.

    Raises:
        RecipeError: the file or its column is wrong, or there is too little text.
        ArtifactError: the directory has no tokenizer that Transformers can load.
        HostError: a Parquet file, and pyarrow cannot be imported.
    """
    tokenizer = load_tokenizer(tokenizer_dir, trust_remote_code=trust_remote_code)
    file = TextFile(spec.data, spec.column) if spec.data else TextFile(CALIBRATION_TEXT)
    pool = _pack(file, tokenizer, spec.length, needed=spec.count)
    if len(pool.windows) < spec.count:
        raise _too_few_samples(spec, pool, file)
    chosen = sorted(random.Random(spec.seed).sample(range(len(pool.windows)), spec.count))  # noqa: S311 -- not a secret
    return _samples([pool.windows[index] for index in chosen], pool, _source(spec.data, "shipped calibration text"))


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
    pool = _pack(file, tokenizer, spec.length + 1, needed=needed)
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


@dataclass(frozen=True, slots=True)
class _Pool:
    windows: list[tuple[int, ...]]
    tokens: int
    documents: int
    prefix: tuple[int, ...]
    passages: frozenset[bytes]


def _pack(file: TextFile, tokenizer: Any, length: int, *, needed: int) -> _Pool:
    """All full windows of the file, or of its beginning if it holds far more than needed."""
    prefix = _prefix(tokenizer)
    body = length - len(prefix)
    limit = _POOL_FACTOR * needed * body
    ids: list[int] = []
    passages: set[bytes] = set()
    documents = 0
    for row in read_rows(file):
        passages.update(_passages(row))
        ids += tokenizer(_text(row, tokenizer, file), add_special_tokens=False, verbose=False)["input_ids"]
        documents += 1
        if len(ids) >= limit:
            break
    if not ids:
        raise file.problem("holds no text", "give a file with text, or leave the field out to use the shipped text")
    windows = [prefix + tuple(ids[start : start + body]) for start in range(0, len(ids) - body + 1, body)]
    return _Pool(windows, len(ids), documents, prefix, frozenset(passages))


def _prefix(tokenizer: Any) -> tuple[int, ...]:
    """The ids that the tokenizer puts before every text, usually none or BOS."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    return ()


def _text(row: Row, tokenizer: Any, file: TextFile) -> str:
    if isinstance(row.value, str):
        # A section of a plain text file ends with its line; a document of one line is set apart by a blank one.
        return row.value if file.path.suffix.lower() in {".txt", ".md"} else row.value.rstrip("\n") + "\n\n"
    return _render_chat(row.where, row.value, tokenizer, file)


def _render_chat(where: str, messages: list[Message], tokenizer: Any, file: TextFile) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        hint = "give a column of text, or a tokenizer with a chat template"
        raise file.problem(f"holds chat messages ({where}), but the tokenizer has no chat template", hint)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise file.problem(f"has messages in {where} that the chat template refuses: {error}") from error


def _too_few_samples(spec: CalibrationSpec, pool: _Pool, file: TextFile) -> RecipeError:
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


def _samples(windows: Sequence[tuple[int, ...]], pool: _Pool, source: str) -> Samples:
    ids = [token for window in windows for token in window]
    digest = hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in ids)).hexdigest()
    return Samples(tuple(windows), len(ids), pool.documents, digest, source, pool.prefix)


def _source(data: Path | None, shipped: str) -> str:
    return str(data) if data else shipped


def _refuse_calibration_text(spec: HeldoutSpec, heldout: TextFile, passages: frozenset[bytes]) -> None:
    """Raise if held-out and calibration text are one file, or share more than 5 % of the held-out passages."""
    if spec.data is None and spec.calibration is None:
        return  # the two shipped files are disjoint; a test proves it
    field = "quality.data" if spec.data else "compress.calibration.data"
    hint = "give a file of its own: a model scores better on text that it was calibrated with"
    calibration = TextFile(spec.calibration or CALIBRATION_TEXT, spec.calibration_column)
    if calibration.path.exists() and calibration.path.samefile(heldout.path):
        raise RecipeError([Problem(field, f"{heldout.path} is both calibration and held-out text", hint)])
    shared = {passage for row in read_rows(calibration) for passage in _passages(row) if passage in passages}
    if len(shared) > _MAX_SHARED * len(passages):
        share = len(shared) / len(passages)
        what = f"{share:.0%} of the passages of {heldout.path} are in the calibration text {calibration.path}"
        raise RecipeError([Problem(field, what, hint)])


def _passages(row: Row) -> Iterator[bytes]:
    """Digests of the long lines of a document; of the whole document if it has none."""
    text = row.value if isinstance(row.value, str) else "\n".join(str(message["content"]) for message in row.value)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    long = [line for line in lines if len(line) >= _PASSAGE_CHARS] or [" ".join(lines)]
    for line in long:
        yield hashlib.blake2b(line.encode(), digest_size=16).digest()
