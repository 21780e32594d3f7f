"""Does a served package answer what its engine answers? Greedy tokens, streaming and perplexity, over the wire."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.adapters import triton_config
from trtbuild.errors import ArtifactError, HostError, ToolError
from trtbuild.process import run_worker
from trtbuild.serving.client import DEFAULT_MODEL, Answer, ask
from trtbuild.serving.contract import ENGINE, ENSEMBLE, LLM
from trtbuild.serving.server import TritonServer

DEFAULT_TEXTS = (
    "The capital of France is",
    "Once upon a time there was a small server that",
    "1 + 1 = 2, 2 + 2 = 4, 3 + 3 =",
    "Grüße aus Köln, 東京 and القاهرة 👩‍🚀:",
)
# The same numbers cross the wire as JSON; only another grouping of the sums may differ.
_PERPLEXITY_TOLERANCE = 1e-3
# src/pb_tensor.cc of triton-inference-server/python_backend before b771f4f (11 December 2024).
BLS_DEFECT = (
    "Triton before 25.01 makes the arrays of a model's own requests without holding Python's lock, so that "
    "tensorrt_llm_bls crashes now and then"
)
_WINDOW = 512
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class ServedReport:
    """What was measured over the wire, and every sentence about something that is wrong.

    `greedy_agreement` is the share of the engine's tokens that the server gave at the same place; times in seconds.
    """

    prompts: int
    tokens_compared: int
    greedy_agreement: float
    streaming_equal: bool
    perplexity: float | None
    engine_perplexity: float | None
    perplexity_tokens: int
    seconds_to_first_token: float
    tokens_per_second: float
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems


def verify_served(
    package: Path,
    *,
    log: Path,
    texts: Sequence[str] = DEFAULT_TEXTS,
    max_tokens: int = 32,
    perplexity_tokens: int = 0,
    data: Path | None = None,
    startup_timeout_s: float = 180.0,
    on_progress: OnProgress = lambda done, total, what: None,  # noqa: ARG005 - the protocol's names
) -> ServedReport:
    """Serve `package` on free loopback ports and hold every answer against the engine's own.

    Args:
        package: a package directory with ``engine/`` and ``model_repository/``.
        log: the server's log; the engine's own is put beside it.
        texts: prompts for the greedy comparison.
        max_tokens: answer length of the comparison.
        perplexity_tokens: how many held-out tokens to measure perplexity on; 0 leaves it out.
        data: held-out text; by default the text that trtbuild ships.
        startup_timeout_s: limit for the server's start.
        on_progress: called with (done, total, what).

    Raises:
        ArtifactError: the package has no model of a known layout, or its engine cannot be loaded.
        HostError: the host lacks something, or the package is for another runtime.
        ToolError: the server does not start, or fails.
    """
    model = _served_model(package / "model_repository")
    _refuse_other_runtimes(package, model)
    ensemble = model.parameter("layout") == ENSEMBLE
    trust = _trust_remote_code(package / "model_repository", model)
    request: dict[str, Any] = {
        "engine": str(package / "engine"),
        "texts": list(texts),
        "max_tokens": min(max_tokens, _limit(model, "max_output_tokens")),
        "trust_remote_code": trust,
    }
    if perplexity_tokens and not ensemble:  # that layout's contract has no prompt log-probabilities
        length = min(_WINDOW, _limit(model, "max_input_tokens") - 1, _limit(model, "max_seq_len") - 2)
        request["held_out"] = {
            "tokens": perplexity_tokens,
            "length": length,
            "data": None if data is None else str(data),
        }
    # First the engine alone, then the server: two copies of a model may not fit into memory.
    reference_log = log.with_name(f"{log.stem}-engine{log.suffix}")
    worker = run_worker("trtbuild.serving.reference", request, log=reference_log, on_progress=on_progress)
    with TritonServer.start(package / "model_repository", log=log, startup_timeout_s=startup_timeout_s) as server:
        compare = compare_ensemble if ensemble else compare_with_reference
        try:
            return compare(server, worker.result, model=model.name, on_progress=on_progress)
        except (HostError, ToolError) as error:
            lost = server.lost_stub()
            if lost is None:
                raise
            remedy = f"verify it again; the log is {log}" + (f". {BLS_DEFECT}" if "tensorrt_llm_bls" in lost else "")
            raise ToolError(f"Triton failed while it was asked: {lost}", remedy) from error


def compare_with_reference(
    server: TritonServer, reference: Mapping[str, Any], *, model: str, on_progress: OnProgress
) -> ServedReport:
    """Ask a running server what the engine was asked (`trtbuild.serving.reference`) and compare."""
    prompts, expected = reference["prompts"], reference["answers"]
    problems: list[str] = []
    equal = compared = 0
    streaming_equal = True
    timed: list[Answer] = []
    for done, (prompt, tokens) in enumerate(zip(prompts, expected, strict=True)):
        answers = _every_way(server, model, prompt, len(tokens), reference.get("max_tokens"))
        first = answers["HTTP generate"]
        timed.append(answers["gRPC stream"])
        equal += sum(a == b for a, b in zip(first.output_ids, tokens, strict=False))
        compared += len(tokens)
        if list(first.output_ids) != list(tokens):
            problems.append(_difference(done, tokens, first.output_ids))
        for how, answer in answers.items():
            if (answer.text, answer.output_ids) != (first.text, first.output_ids):
                streaming_equal = False
                problems.append(f"prompt {done}: {how} gives {answer.text!r}, HTTP generate gives {first.text!r}")
        on_progress(done + 1, len(prompts), "answers of the server")
    perplexity, count = None, 0
    if reference["windows"]:
        perplexity, count = served_perplexity(server.http_url, reference["windows"], model=model)
        problems += _perplexity_problems(perplexity, reference["perplexity"])
    return ServedReport(
        prompts=len(prompts),
        tokens_compared=compared,
        greedy_agreement=equal / compared if compared else 0.0,
        streaming_equal=streaming_equal,
        perplexity=perplexity,
        engine_perplexity=reference["perplexity"],
        perplexity_tokens=count,
        seconds_to_first_token=min((answer.seconds_to_first_token for answer in timed), default=0.0),
        tokens_per_second=max((answer.tokens_per_second for answer in timed), default=0.0),
        problems=tuple(problems),
    )


def compare_ensemble(
    server: TritonServer, reference: Mapping[str, Any], *, model: str, on_progress: OnProgress
) -> ServedReport:
    """As `compare_with_reference`, for layout ensemble: the engine model's tokens, and the texts that clients get."""
    problems: list[str] = []
    equal = compared = 0
    streaming_equal = True
    timed: list[Answer] = []
    limit = reference["max_tokens"]
    columns = ("prompts", "texts", "answers", "finish_reasons", "answer_texts")
    rows = list(zip(*(reference[name] for name in columns), strict=True))
    for done, (prompt, text, tokens, reason, expected) in enumerate(rows):
        # The token that ended the answer is no part of it in this layout.
        wanted = tokens[:-1] if reason == "stop" else tokens
        found = ask(server.http_url, model=model, layout=ENGINE, streaming=False, input_ids=prompt, max_tokens=limit)
        equal += sum(a == b for a, b in zip(found.output_ids, wanted, strict=False))
        compared += len(wanted)
        if list(found.output_ids) != list(wanted):
            problems.append(_difference(done, wanted, found.output_ids))
        answers = _ensemble_ways(server, text, limit)
        timed.append(answers["tensorrt_llm_bls, gRPC stream"])
        for how, answer in answers.items():
            if answer.text != expected:
                streaming_equal = False
                problems.append(f"prompt {done}: {how} gives {answer.text!r}, the engine's tokens are {expected!r}")
        on_progress(done + 1, len(rows), "answers of the server")
    return ServedReport(
        prompts=len(rows),
        tokens_compared=compared,
        greedy_agreement=equal / compared if compared else 0.0,
        streaming_equal=streaming_equal,
        perplexity=None,
        engine_perplexity=None,
        perplexity_tokens=0,
        seconds_to_first_token=min((answer.seconds_to_first_token for answer in timed), default=0.0),
        tokens_per_second=max((answer.tokens_per_second for answer in timed), default=0.0),
        problems=tuple(problems),
    )


def _ensemble_ways(server: TritonServer, text: str, max_tokens: int) -> dict[str, Answer]:
    asked: dict[str, Any] = {"layout": ENSEMBLE, "max_tokens": max_tokens}
    ways = {
        "HTTP generate": (server.http_url, False),
        "HTTP generate_stream": (server.http_url, True),
        "gRPC stream": (server.grpc_url, True),
    }
    return {
        f"{model}, {how}": ask(url, text, model=model, streaming=streaming, **asked)
        for model in ("ensemble", "tensorrt_llm_bls")
        for how, (url, streaming) in ways.items()
    }


def served_perplexity(
    url: str, token_windows: Iterable[Sequence[int]], *, model: str = DEFAULT_MODEL
) -> tuple[float, int]:
    """Perplexity of the model behind `url` over windows of token ids, and how many tokens it was measured on.

    Every window is sent as a prompt with `prompt_logprobs`; its first token has nothing before it and is not counted.

    Raises:
        ToolError: the server gave no, or not finite, log-probabilities.
    """
    sums: list[float] = []
    tokens = 0
    for window in token_windows:
        answer = ask(url, model=model, streaming=False, input_ids=list(window), max_tokens=1, prompt_logprobs=0)
        scored = [entry["logprob"] for entry in answer.prompt_logprobs if entry is not None]
        if len(scored) != len(window) - 1 or any(value is None for value in scored):
            raise ToolError(f"the server gave {len(scored)} usable log-probabilities for {len(window)} tokens")
        sums.append(math.fsum(scored))
        tokens += len(scored)
    if not tokens:
        raise ToolError("there is no token to measure perplexity on", "give windows of at least two tokens")
    return math.exp(-math.fsum(sums) / tokens), tokens


def _every_way(
    server: TritonServer, model: str, prompt: Sequence[int], count: int, max_tokens: int | None
) -> dict[str, Answer]:
    asked: dict[str, Any] = {"model": model, "input_ids": list(prompt), "max_tokens": max_tokens or max(count, 1)}
    return {
        "HTTP generate": ask(server.http_url, streaming=False, **asked),
        "HTTP generate_stream": ask(server.http_url, streaming=True, **asked),
        "gRPC stream": ask(server.grpc_url, streaming=True, **asked),
    }


def _difference(prompt: int, expected: Sequence[int], found: Sequence[int]) -> str:
    pairs = zip(expected, found, strict=False)
    place = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    return (
        f"prompt {prompt}: the server's token {place} is {_at(found, place)}, the engine's is {_at(expected, place)} "
        f"({len(found)} and {len(expected)} tokens)"
    )


def _at(tokens: Sequence[int], place: int) -> str:
    return str(tokens[place]) if place < len(tokens) else "missing"


def _perplexity_problems(served: float, engine: float) -> list[str]:
    if abs(served / engine - 1) <= _PERPLEXITY_TOLERANCE:
        return []
    return [f"the served perplexity is {served:.6g}, the engine's is {engine:.6g}"]


def _served_model(repository: Path) -> triton_config.Model:
    if repository.is_dir():
        for directory in sorted(path for path in repository.iterdir() if path.is_dir()):
            model, _ = triton_config.read_model(directory)
            if model is None or model.parameter("engine_dir") is None:
                continue
            if model.parameter("layout") in (LLM, ENSEMBLE):
                return model
    raise ArtifactError(f"{repository}: there is no model of a known layout here", "build the package again")


def _refuse_other_runtimes(package: Path, model: triton_config.Model) -> None:
    runtime = model.parameter("runtime")
    if runtime != "embedded":
        raise HostError(
            f"{package}: the runtime {runtime} runs in a Triton TensorRT-LLM container, and answers are held against "
            "the embedded engine here",
            "verify it without --served, serve it in its container, and ask it with `trtbuild ask`",
        )


def _trust_remote_code(repository: Path, model: triton_config.Model) -> bool:
    """Whether the tokenizer's own code may run; in layout ensemble the model that reads text says so."""
    if model.parameter("layout") == ENSEMBLE:
        reader, _ = triton_config.read_model(repository / "preprocessing")
        model = model if reader is None else reader
    return model.parameter("trust_remote_code") == "true"


def _limit(model: triton_config.Model, name: str) -> int:
    text = model.parameter(name) or ""
    if not text.isdecimal():
        raise ArtifactError(f"{model.name}/config.pbtxt: parameter {name} is {text!r}", "build the package again")
    return int(text)
