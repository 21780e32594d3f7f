"""Calibration text that the model itself writes: no data is needed, and its languages are the model's own.

A plain document begins with one token drawn from the vocabulary; the two to four next are the likeliest, so that it
finds into something sensible, and all others are sampled at temperature 1 (Liu et al., LLM-QAT, arXiv 2305.17888,
section 3.1; facebookresearch/LLM-QAT, generate_data.py @607944f). Every second document of a model with a chat template
is a conversation: the model writes the user's turn behind the template's opening, then its own answer (Xu et al.,
Magpie, arXiv 2406.08464). A document ends where the model ends it.

Documents are written in groups by the embedded engine, and a finished group is kept in a journal, so that a killed run
goes on behind it. Each document has a seed of its own, and equal groups make equal steps: on one kind of host equal
inputs give equal text.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trtbuild.compress.chat import Chat, render_chat
from trtbuild.compress.journal import Journal
from trtbuild.compress.packing import Pool, begun, full_windows, sample_length, text_prefix
from trtbuild.compress.request import Request
from trtbuild.compress.source import pick_device
from trtbuild.compress.textdata import CalibrationSpec, Samples, draw, load_tokenizer
from trtbuild.compress_memory import SELF_GROUP, sampling_bytes, show_bytes
from trtbuild.errors import CompatibilityError, HostError, Problem, RecipeError
from trtbuild.model import ModelFacts
from trtbuild.recipe_fields import MIN_CALIBRATION_LENGTH
from trtbuild.runtime import Engine, EngineConfig, KvCacheConfig, SamplingParams
from trtbuild.worker import Progress

_DATA = "compress.calibration.data"
_GIVE_TEXT = "give text in compress.calibration.data, or leave it out for the shipped text"
_BLOCK_TOKENS = 32
_MARK = "\u2402user\u2403"  # stands for a turn while the template is taken apart
_TRIES = 1000


@dataclass(frozen=True, slots=True)
class _Writer:
    """What one document is made with.

    `prefix` begins every text, `opening` and `closing` stand around a user's turn (empty: no conversations).
    """

    engine: Engine
    tokenizer: Any
    prefix: tuple[int, ...]
    opening: tuple[int, ...]
    closing: tuple[int, ...]
    length: int
    seed: int


def self_samples(
    request: Request, facts: ModelFacts, spec: CalibrationSpec, work: Path, key: str, progress: Progress
) -> Samples:
    """The samples of `spec`, sampled from the model at the request's source.

    Args:
        request: Says where the model and its tokenizer lie, and on which device it runs.
        facts: Of the model.
        spec: How many samples, how long, the seed, packed or padded.
        work: Where finished groups are kept.
        key: Of everything that decides the text.
        progress: Told after each group.

    Raises:
        RecipeError: The whole model does not fit into compress.max_memory.
        HostError: It does not fit into the memory that is free; a GPU is wanted and there is none.
        CompatibilityError: The embedded engine does not run this model.
    """
    device = pick_device(request.device).type
    _refuse_too_large(request, facts, spec, device)
    tokenizer = load_tokenizer(request.tokenizer, trust_remote_code=request.trust_remote_code)
    work.mkdir(parents=True, exist_ok=True)
    journal = Journal(work, key)
    prefix = text_prefix(tokenizer)
    needed = spec.count if spec.packing == "padded" else spec.count * (spec.length - len(prefix))

    def have() -> int:
        documents = [document for part in journal.parts for document in part["documents"]]
        return len(documents) if spec.packing == "padded" else sum(len(ids) - len(prefix) for ids in documents)

    if have() < needed:
        progress(0, needed, "load the model to sample calibration text")
        with _engine(request, spec, device) as engine:
            opening, closing = _turns(tokenizer, spec.length)
            writer = _Writer(engine, tokenizer, prefix, opening, closing, spec.length, spec.seed)
            while have() < needed:
                journal.finish({"documents": _group(writer, len(journal.parts) * SELF_GROUP)})
                progress(min(have(), needed), needed, "sample calibration text from the model")
            del writer
        del engine
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    documents = [tuple(ids) for part in journal.parts for ids in part["documents"]]
    pool = _pool(documents, prefix, spec)
    return draw(pool, spec, tokenizer, f"sampled from the model, seed {spec.seed}")


def _refuse_too_large(request: Request, facts: ModelFacts, spec: CalibrationSpec, device: str) -> None:
    needed = sampling_bytes(facts.parameters, facts.kv_elements_per_token, spec.length)
    if device == "cpu" and request.max_memory is not None and needed > request.max_memory:
        what = f"self needs the whole model in memory, about {show_bytes(needed)}, above compress.max_memory"
        raise RecipeError([Problem(_DATA, what, f"raise that to {show_bytes(needed)}, or {_GIVE_TEXT}")])
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else _free_memory()
    needed = needed // 2 if device == "cuda" else needed  # bf16 instead of float32
    if free is not None and needed > free:
        raise HostError(
            f"{_DATA}: self needs the whole model in memory, about {show_bytes(needed)}; {show_bytes(free)} are free",
            f"use a larger host, or {_GIVE_TEXT}",
        )


def _free_memory() -> int | None:
    """Memory that can be had without swapping, in bytes; None where the kernel does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _engine(request: Request, spec: CalibrationSpec, device: str) -> Engine:
    blocks = SELF_GROUP * (-(-spec.length // _BLOCK_TOKENS) + 1)
    config = EngineConfig(
        max_batch_size=SELF_GROUP,
        max_num_tokens=max(SELF_GROUP * MIN_CALIBRATION_LENGTH, 512),
        max_seq_len=spec.length,
        # Without reuse a group does not depend on whether earlier ones were written by this process.
        kv_cache=KvCacheConfig(
            tokens_per_block=_BLOCK_TOKENS, max_tokens=blocks * _BLOCK_TOKENS, enable_block_reuse=False
        ),
        device=device,
        trust_remote_code=request.trust_remote_code,
    )
    try:
        return Engine.load(request.source, config=config)
    except CompatibilityError as error:
        raise CompatibilityError(f"{_DATA}: self: {error.message}", _GIVE_TEXT) from error


def _turns(tokenizer: Any, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What stands before a user's first turn, and between it and the answer; empty without room or template."""
    try:
        text = render_chat(Chat(({"role": "user", "content": _MARK},)), tokenizer, add_generation_prompt=True)
    except ValueError:
        return (), ()
    before, found, after = text.partition(_MARK)
    if not found or _MARK in after:
        return (), ()
    opening, closing = (
        tuple(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]) for part in (before, after)
    )
    return (opening, closing) if opening and len(opening) + len(closing) <= length // 2 else ((), ())


def _group(writer: _Writer, first: int) -> list[list[int]]:
    """The documents with the numbers from `first` on, each with the tokens that begin every text."""
    draws = [random.Random(f"{writer.seed} {first + offset}") for offset in range(SELF_GROUP)]  # noqa: S311
    talks = [offset for offset in range(SELF_GROUP) if offset % 2 and writer.opening]
    plain = [offset for offset in range(SELF_GROUP) if offset not in talks]
    texts: dict[int, list[int]] = {offset: list(writer.opening) for offset in talks}
    starts = {offset: [*writer.prefix, _first_token(writer, draws[offset])] for offset in plain}
    greedy = [SamplingParams(max_tokens=2 + offset % 3, ignore_eos=True) for offset in plain]
    texts |= dict(zip(plain, _continue(writer, list(starts.values()), greedy), strict=True))
    order = [*plain, *talks]
    limits = {offset: writer.length - len(texts[offset]) for offset in plain}
    limits |= {offset: (writer.length - len(writer.opening) - len(writer.closing)) // 2 for offset in talks}
    params = [_sampling(draws[offset], limits[offset]) for offset in order]
    texts |= dict(zip(order, _continue(writer, [texts[offset] for offset in order], params), strict=True))
    asked = [[*_without_end(writer, texts[offset]), *writer.closing] for offset in talks]
    params = [_sampling(draws[offset], writer.length - len(text)) for offset, text in zip(talks, asked, strict=True)]
    texts |= dict(zip(talks, _continue(writer, asked, params), strict=True))
    return [list(begun(writer.prefix, texts[offset])[: writer.length]) for offset in range(SELF_GROUP)]


def _sampling(draw_from: random.Random, room: int) -> SamplingParams:
    least = min(MIN_CALIBRATION_LENGTH, room)
    return SamplingParams(max_tokens=room, min_tokens=least, temperature=1.0, seed=draw_from.getrandbits(63))


def _continue(writer: _Writer, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
    """The prompts with what the model writes behind them, the token that ends a text included."""
    ends = writer.engine.facts.eos_token_ids
    texts = []
    for prompt, completion in zip(prompts, writer.engine.generate(prompts, params), strict=True):
        text = [*prompt, *completion.token_ids]
        ended = completion.finish_reason == "stop" and ends and text[-1] not in ends
        texts.append([*text, ends[0]] if ended and len(text) < writer.length else text)
    return texts


def _without_end(writer: _Writer, text: Sequence[int]) -> Sequence[int]:
    """A user's turn less the token that ends it: the template writes it again."""
    return text[:-1] if text[-1] in writer.engine.facts.eos_token_ids else text


def _first_token(writer: _Writer, draw_from: random.Random) -> int:
    """A token of the vocabulary that holds letters and is whole characters, not one that steers the model."""
    tokenizer = writer.tokenizer
    special = set(tokenizer.all_special_ids)
    size = min(len(tokenizer), writer.engine.facts.vocab_size)
    for _ in range(_TRIES):
        token = draw_from.randrange(size)
        text = "" if token in special else tokenizer.decode([token])
        if "\ufffd" not in text and any(letter.isalpha() for letter in text):
            return token
    return draw_from.randrange(size)


def _pool(documents: Sequence[tuple[int, ...]], prefix: tuple[int, ...], spec: CalibrationSpec) -> Pool:
    tokens = sum(map(len, documents))
    if spec.packing == "padded":
        windows = [document[: sample_length(len(document), spec.length)] for document in documents]
        return Pool(windows, tokens, len(documents), prefix, frozenset())
    body = spec.length - len(prefix)
    ids: list[int] = []
    starts = []
    for document in documents:
        starts.append(len(ids))
        ids += document[len(prefix) :]
    windows = full_windows(ids, prefix, body)[: spec.count]
    return Pool(windows, tokens, len(documents), prefix, frozenset(), starts)
