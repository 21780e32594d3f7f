"""What the engine itself says, in a child process: the yardstick for what a server answers.

The parent runs it as ``python -m trtbuild.serving.reference REQUEST.json``; no other module of `serving` loads torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtbuild.worker import Progress, serve


def run(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Greedy tokens for every prompt, and perplexity over every window, of the engine in `request["engine"]`.

    The request holds ``engine`` (directory), ``prompts`` (lists of token ids), ``texts`` (to be tokenized as prompts),
    ``max_tokens``, and ``windows`` (lists of token ids) or ``held_out`` ({"tokens", "length", "data"}).
    """
    from trtbuild.runtime import Engine, SamplingParams

    engine_dir = Path(request["engine"])
    prompts = [list(ids) for ids in request.get("prompts", [])] + _tokenize(engine_dir, request)
    windows = _windows(engine_dir, request)
    total = len(prompts) + len(windows)
    with Engine.load(engine_dir) as engine:
        params = SamplingParams(max_tokens=request["max_tokens"])
        answers, reasons = [], []
        # One by one, as the server is asked: the composition of a batch may change the last bit.
        for done, prompt in enumerate(prompts):
            done_answer = engine.submit(prompt, params).result()
            answers.append(list(done_answer.token_ids))
            reasons.append(done_answer.finish_reason)
            progress(done + 1, total, "greedy answers of the engine")
        log_likelihood, tokens = 0.0, 0
        for done, window in enumerate(windows):
            scored = engine.submit(window, SamplingParams(max_tokens=1, prompt_logprobs=0)).result().prompt_logprobs
            values = [entry.logprob for entry in scored or () if entry is not None]
            log_likelihood, tokens = log_likelihood + math.fsum(values), tokens + len(values)
            progress(len(prompts) + done + 1, total, "perplexity of the engine")
    return {
        "max_tokens": request["max_tokens"],
        "prompts": prompts,
        "answers": answers,
        "finish_reasons": reasons,
        "texts": [*[None] * len(request.get("prompts", [])), *request.get("texts", [])],
        "answer_texts": _texts(engine_dir, request, answers),
        "windows": windows,
        "perplexity": math.exp(-log_likelihood / tokens) if tokens else None,
        "tokens": tokens,
    }


def _tokenize(engine_dir: Path, request: dict[str, Any]) -> list[list[int]]:
    texts: Sequence[str] = request.get("texts", [])
    if not texts:
        return []
    from trtbuild.compress.textdata import load_tokenizer

    tokenizer = load_tokenizer(engine_dir, trust_remote_code=bool(request.get("trust_remote_code", False)))
    return [list(tokenizer.encode(text)) for text in texts]


def _texts(engine_dir: Path, request: dict[str, Any], answers: Sequence[Sequence[int]]) -> list[str]:
    """The answers as text, without special tokens and without any tidying of spaces."""
    from trtbuild.compress.textdata import load_tokenizer

    tokenizer = load_tokenizer(engine_dir, trust_remote_code=bool(request.get("trust_remote_code", False)))
    return [str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)) for ids in answers]


def _windows(engine_dir: Path, request: dict[str, Any]) -> list[list[int]]:
    if "held_out" not in request:
        return [list(window) for window in request.get("windows", [])]
    from trtbuild.compress.textdata import HeldoutSpec, heldout_windows

    asked = request["held_out"]
    data = None if asked.get("data") is None else Path(asked["data"])
    spec = HeldoutSpec(data=data, tokens=asked["tokens"], length=asked["length"])
    trust = bool(request.get("trust_remote_code", False))
    samples = heldout_windows(spec, engine_dir, trust_remote_code=trust)
    return [[int(token) for token in window] for window in samples.input_ids]


if __name__ == "__main__":
    serve(run)
