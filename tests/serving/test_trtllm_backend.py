"""The LLM API's backend against the fake of 1.2 and of the newest TensorRT-LLM, held against the embedded engine."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import types
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from model_repo.llm import backend_trtllm, trtllm_process
from model_repo.llm.backend import Gauges
from model_repo.llm.backend_trtllm import TrtllmBackend, WorkerRank
from model_repo.llm.contract import Guide, Lora, Sampling
from model_repo.llm.trtllm_output import Reader
from model_repo.llm.trtllm_process import SetupError, gpu_groups, place, read_args, read_model
from model_repo.llm.trtllm_sampling import Model
from model_repo.llm.wire import BadRequestError
from trtllm_helpers import FLAVOURS, Collector, events, fake_in_process, make_engine, run

PROMPT = [5, 6, 7, 40, 41]


@pytest.fixture(scope="module")
def engine_dir(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine(package / "engine", tmp_path_factory.mktemp("trtllm") / "engine")


@pytest.fixture(scope="module")
def engine(package: Path) -> Iterator[Any]:
    """The embedded engine over the same checkpoint."""
    from trtbuild.runtime import Engine

    with Engine.load(package / "engine") as loaded:
        yield loaded


@contextmanager
def loaded(engine_dir: Path, flavour: str, log: Path) -> Iterator[TrtllmBackend]:
    with fake_in_process(flavour, log):
        backend = backend_trtllm.load(engine_dir, gpus=None, adapters={"formal": "adapters/formal"})
        assert isinstance(backend, TrtllmBackend)
        try:
            yield backend
        finally:
            backend.close()


@pytest.fixture(scope="module", params=FLAVOURS)
def llm(
    request: pytest.FixtureRequest, engine_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TrtllmBackend, Path]]:
    log = tmp_path_factory.mktemp("log") / "events"
    with loaded(engine_dir, request.param, log) as backend:
        yield backend, log


def test_tokens_are_the_embedded_engine_s(llm: tuple[TrtllmBackend, Path], engine: Any) -> None:
    from trtbuild.runtime import SamplingParams

    expected = engine.submit(PROMPT, SamplingParams(max_tokens=12)).result()
    streamed, whole = (run(llm[0], PROMPT, max_tokens=12, every_output=every) for every in (True, False))
    assert streamed.ids == whole.ids == expected.token_ids
    assert len(streamed.outputs) > len(whole.outputs) == 1
    assert whole.wait().finish_reason == streamed.wait().finish_reason == expected.finish_reason
    shown = events(llm[1], "generate")[-1]["params"]
    assert (shown["n"], shown["detokenize"], shown["include_stop_str_in_output"]) == (1, False, True)


def test_every_way_to_end(llm: tuple[TrtllmBackend, Path]) -> None:
    whole = run(llm[0], PROMPT, ignore_eos=True)
    assert whole.wait().finish_reason == "length"
    third = whole.ids[2]
    for most in (8, whole.ids.index(third) + 1):  # also where the limit and the stop token fall together
        stopped = run(llm[0], PROMPT, stop_token_ids=(third,), max_tokens=most, ignore_eos=True)
        assert stopped.ids == whole.ids[: whole.ids.index(third) + 1], "the stop token is reported"
        assert (stopped.wait().finish_reason, stopped.wait().stop_reason) == ("stop", third)
    guided = run(llm[0], PROMPT, guide=Guide("regex", "fox"))
    assert (guided.wait().finish_reason, guided.wait().stop_reason, guided.ids[-1]) == ("stop", None, 2)


def test_cancelling_aborts_and_ends_the_request(llm: tuple[TrtllmBackend, Path]) -> None:
    collector = Collector()
    handle = llm[0].submit([17, 17, 17, 5], Sampling(max_tokens=200, ignore_eos=True), [], collector)
    while not collector.outputs:
        time.sleep(0.01)
    assert llm[0].gauges().running == 1
    handle.cancel()
    handle.cancel()
    assert collector.wait().finish_reason == "cancelled"
    assert events(llm[1], "abort")[-1]["prompt"] == [17, 17, 17]
    assert llm[0].gauges().running == 0
    handle.cancel()  # too late, and harmless


def test_an_error_ends_the_request_alone(llm: tuple[TrtllmBackend, Path]) -> None:
    last = run(llm[0], [13, 13, 13, 5], max_tokens=8).wait()
    assert last.finish_reason == "error"
    assert "the device is lost" in str(last.error)
    assert run(llm[0], PROMPT).wait().error is None


@pytest.mark.parametrize("top", [0, 2])
def test_logprobs_are_the_embedded_engine_s(llm: tuple[TrtllmBackend, Path], engine: Any, top: int) -> None:
    from trtbuild.runtime import SamplingParams

    expected = engine.submit(PROMPT, SamplingParams(max_tokens=6, logprobs=top, prompt_logprobs=top)).result()
    found = run(llm[0], PROMPT, max_tokens=6, logprobs=top, prompt_logprobs=top)
    prompts = [output.prompt_logprobs for output in found.outputs if output.prompt_logprobs is not None]
    assert len(prompts) == 1, "told once"
    for ours, theirs in ((found.logprobs, expected.logprobs), (prompts[0], expected.prompt_logprobs)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            if other is None:
                assert one is None
                continue
            assert (one.token_id, one.rank, len(one.top)) == (other.token_id, other.rank, top)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_a_prompt_that_is_cached_is_measured_again(llm: tuple[TrtllmBackend, Path], engine: Any) -> None:
    from trtbuild.runtime import SamplingParams

    prompt = [*PROMPT * 15, 9]
    expected = engine.submit(prompt, SamplingParams(max_tokens=1, prompt_logprobs=0)).result().prompt_logprobs
    run(llm[0], prompt, max_tokens=1)
    for _ in range(2):
        (found,) = (out.prompt_logprobs for out in run(llm[0], prompt, max_tokens=1, prompt_logprobs=0).outputs)
        assert found is not None
        assert [entry.logprob for entry in found[1:]] == pytest.approx([one.logprob for one in expected[1:]], abs=1e-4)


def test_metrics_and_gauges(llm: tuple[TrtllmBackend, Path]) -> None:
    metrics = run(llm[0], PROMPT, perf_metrics=True).wait().metrics
    assert metrics is not None
    times = [metrics.arrival_time_ns, metrics.first_scheduled_time_ns, metrics.first_token_time_ns]
    assert times == sorted(times)
    assert metrics.last_token_time_ns > metrics.first_token_time_ns > 0
    assert (metrics.kv_cache_alloc_total_blocks, metrics.acceptance_rate) == (1, None)
    assert run(llm[0], PROMPT).wait().metrics is None
    collector = Collector()
    handle = llm[0].submit([17, 17, 17, 6], Sampling(max_tokens=200, ignore_eos=True), [], collector)
    deadline = time.monotonic() + 10
    while llm[0].gauges().used_blocks in (None, 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert llm[0].gauges() == Gauges(max_blocks=64, used_blocks=1, free_blocks=63, running=1, waiting=0)
    handle.cancel()
    collector.wait()
    assert llm[0].gauges() == Gauges(max_blocks=64, used_blocks=0, free_blocks=64, running=0, waiting=0)


def test_adapters_by_name_and_by_path(llm: tuple[TrtllmBackend, Path], engine_dir: Path, tmp_path: Path) -> None:
    plain, formal = run(llm[0], PROMPT), run(llm[0], PROMPT, lora=Lora("formal"))
    assert formal.ids != plain.ids
    assert events(llm[1], "generate")[-1]["lora"] == ["formal", 1, str(engine_dir / "adapters/formal"), "hf"]
    run(llm[0], PROMPT, lora=Lora("mine", 7, str(tmp_path), "nemo"))
    assert events(llm[1], "generate")[-1]["lora"] == ["mine", 7, str(tmp_path), "nemo"]
    for lora, sentence in (
        (Lora("casual"), "lora_name: 'casual' is no adapter of this package, which has: formal"),
        (Lora("mine", 1, str(tmp_path)), "lora_id: 1 is an adapter of this package"),
        (Lora("formal", 7, str(tmp_path)), "lora_name: 'formal' is an adapter of this package"),
        (Lora("mine", 7, "/nowhere"), "does not exist"),
    ):
        with pytest.raises(BadRequestError) as caught:
            run(llm[0], PROMPT, lora=lora)
        assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("guide", "text"),
    [
        (Guide("json"), '{"a": 1}'),
        (Guide("json_schema", '{"type": "object"}'), '{"b": 2}'),
        (Guide("regex", "f.x"), "fox"),
        (Guide("ebnf_grammar", "root ::= x"), "dog"),
        (Guide("structural_tag", "{}"), "lazy"),
    ],
)
def test_guides_reach_their_field(llm: tuple[TrtllmBackend, Path], tokenizer: Any, guide: Guide, text: str) -> None:
    found = run(llm[0], PROMPT, guide=guide, max_tokens=30)
    assert tokenizer.decode(found.ids, skip_special_tokens=True) == text


IGNORED: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.5},
    "presence_penalty": {"presence_penalty": 0.5},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "min_p": {"min_p": 0.1},
    "seed": {"seed": 3, "temperature": 1.0},
    "min_tokens": {"min_tokens": 2},
    "bad": {"bad": ("fox",)},
}


@pytest.mark.parametrize("name", IGNORED)
def test_what_1_2_would_ignore_is_refused_and_newer_versions_take_it(
    llm: tuple[TrtllmBackend, Path], name: str, request: pytest.FixtureRequest
) -> None:
    bad = [[9, 10]] if name == "bad" else []
    if "newest" in request.node.name:
        assert run(llm[0], PROMPT, banned=bad, **IGNORED[name]).wait().error is None
        shown = events(llm[1], "generate")[-1]["params"]
        wanted = IGNORED[name] if name != "bad" else {"bad": ["fox"], "_bad_word_ids": [[9, 10]]}
        assert {key: shown[key] for key in wanted} == wanted
        return
    with pytest.raises(BadRequestError) as caught:
        run(llm[0], PROMPT, banned=bad, **IGNORED[name])
    assert f"sampling_param_{name}: the sampler of TensorRT-LLM 1.2.0rc2 would ignore it" in str(caught.value)


def test_neutral_values_and_greedy_seeds_are_never_refused(llm: tuple[TrtllmBackend, Path]) -> None:
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0, "seed": 5}
    assert run(llm[0], PROMPT, temperature=0.0, **neutral).ids == run(llm[0], PROMPT).ids


def test_penalties_count_what_was_generated(llm: tuple[TrtllmBackend, Path], request: pytest.FixtureRequest) -> None:
    if "newest" not in request.node.name:
        with pytest.raises(BadRequestError):
            run(llm[0], PROMPT, presence_penalty=0.5)
        return
    run(llm[0], PROMPT, presence_penalty=0.5)
    assert events(llm[1], "generate")[-1]["params"]["prompt_ignore_length"] == len(PROMPT)


def test_the_newest_bans_a_word(engine_dir: Path, tmp_path: Path) -> None:
    with loaded(engine_dir, "newest", tmp_path / "log") as backend:
        first = run(backend, PROMPT).ids[0]
        assert run(backend, PROMPT, banned=[[first]], ignore_eos=True).ids[0] != first
        with pytest.raises(BadRequestError, match="min_tokens: TensorRT-LLM holds back one end-of-text token only"):
            run(backend, PROMPT, min_tokens=2, stop_token_ids=(9,))
        seed = [run(backend, PROMPT, temperature=2.0, seed=2**64 - 1).ids for _ in range(2)]
        assert seed[0] == seed[1]


def test_sampled_logprobs_need_a_version_that_reports_them(engine_dir: Path, tmp_path: Path) -> None:
    with loaded(engine_dir, "newest", tmp_path / "log") as backend:
        found = run(backend, PROMPT, logprobs=1, temperature=3.0, seed=1, max_tokens=12, ignore_eos=True)
    assert [entry.token_id for entry in found.logprobs] == list(found.ids)
    assert any(entry.rank > 1 for entry in found.logprobs)
    sentence = "logprobs: TensorRT-LLM 1.2.0rc2 reports the likeliest tokens only"
    with loaded(engine_dir, "v1_2", tmp_path / "log") as backend, pytest.raises(BadRequestError, match=sentence):
        run(backend, PROMPT, logprobs=1, temperature=1.0)


def test_the_c_plus_plus_sampler_does_what_the_other_ignores(engine_dir: Path, tmp_path: Path) -> None:
    args = read_args(engine_dir) | {"sampler_type": "TRTLLMSampler"}
    with fake_in_process("v1_2", tmp_path / "log"):
        backend = TrtllmBackend(trtllm_process.start_llm(args | {"model": engine_dir}), args, Model(320, (2,)), {})
        try:
            assert run(backend, PROMPT, repetition_penalty=1.5, banned=[[9]]).wait().error is None
        finally:
            backend.close()


@pytest.mark.parametrize(
    ("sampling", "sentence"),
    [
        ({"temperature": -0.5}, "sampling_param_temperature: -0.5 is out of range; send a number of at least 0"),
        ({"temperature": float("nan")}, "sampling_param_temperature: nan is out of range"),
        ({"top_p": 1.5}, "sampling_param_top_p: 1.5 is out of range; send a number from 0 to 1"),
        ({"min_p": 2.0}, "sampling_param_min_p: 2.0 is out of range"),
        ({"top_k": -1}, "sampling_param_top_k: -1 is out of range; send a whole number of at least 0"),
        ({"repetition_penalty": 0.0}, "sampling_param_repetition_penalty: 0 is out of range; it is above 0"),
        ({"presence_penalty": float("inf")}, "sampling_param_presence_penalty: inf is out of range"),
        (
            {"min_tokens": 50, "max_tokens": 4},
            "sampling_param_min_tokens: 50 is out of range; send a whole number from 0",
        ),
        ({"logprobs": -1}, "sampling_param_logprobs: -1 is out of range"),
        ({"prompt_logprobs": 321}, "sampling_param_prompt_logprobs: 321 is out of range"),
        (
            {"stop_token_ids": (320,)},
            "sampling_param_stop_token_ids[0]: 320 is no token of this model; send numbers from",
        ),
        ({"prompt": [1, -1]}, "input_ids[1]: -1 is no token of this model"),
    ],
)
def test_values_out_of_range(llm: tuple[TrtllmBackend, Path], sampling: dict[str, Any], sentence: str) -> None:
    prompt = sampling.get("prompt", PROMPT)
    sampling = {name: value for name, value in sampling.items() if name != "prompt"}
    with pytest.raises(BadRequestError) as caught:
        run(llm[0], prompt, **sampling)
    assert sentence in str(caught.value)


def test_what_the_package_lacks_is_refused_by_name(engine_dir: Path, tmp_path: Path) -> None:
    args = {"max_seq_len": 512}
    with fake_in_process("newest", tmp_path / "log"):
        backend = TrtllmBackend(trtllm_process.start_llm(args | {"model": engine_dir}), args, Model(320, (2,)), {})
        backend.close()
    for name in ("lora_id", "lora_name", "guided_decoding_guide", "guided_decoding_guide_type", "image_url"):
        assert name in backend.refused
    assert events(tmp_path / "log", "shutdown")


def test_closing_aborts_what_runs(engine_dir: Path, tmp_path: Path) -> None:
    collector = Collector()
    with loaded(engine_dir, "newest", tmp_path / "log") as backend:
        handle = backend.submit([17, 17, 17, 5], Sampling(max_tokens=300, ignore_eos=True), [], collector)
    assert collector.wait().finish_reason == "cancelled"
    assert [len(events(tmp_path / "log", kind)) for kind in ("abort", "shutdown")] == [1, 1]
    handle.cancel()  # the loop has ended


class Silent:
    """An LLM that starts requests and never says a word."""

    def __init__(self) -> None:
        self.finished, self.aborted = False, threading.Event()

    def generate_async(self, **_: Any) -> Silent:
        return self

    def abort(self) -> None:
        self.aborted.set()

    def shutdown(self) -> None: ...

    def __aiter__(self) -> Silent:
        return self

    async def __anext__(self) -> Silent:
        await asyncio.Event().wait()
        raise StopAsyncIteration


def test_an_abort_without_an_answer_still_ends_the_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backend_trtllm, "_ABORT_TIMEOUT_S", 0.1)
    collector, silent = Collector(), Silent()
    with fake_in_process("newest", tmp_path / "log"):
        backend = TrtllmBackend(silent, {}, Model(320, (2,)), {})
        backend.submit(PROMPT, Sampling(max_tokens=4), [], collector).cancel()
        assert collector.wait().finish_reason == "cancelled"
        assert silent.aborted.is_set()
        backend.close()


class SlowStats(Silent):
    """Its statistics take a moment to be given up, as those of a queue that is awaited with a limit."""

    given_up = False

    async def get_stats_async(self, timeout: float) -> AsyncIterator[dict[str, Any]]:  # noqa: ASYNC109 - upstream's name
        try:
            await asyncio.sleep(60 * timeout)
            yield {}
        finally:
            await asyncio.sleep(0.2)
            self.given_up = True


def test_nothing_is_pending_once_the_backend_is_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backend_trtllm, "_ABORT_TIMEOUT_S", 0.1)
    collector, slow = Collector(), SlowStats()
    with fake_in_process("newest", tmp_path / "log"):
        backend = TrtllmBackend(slow, {"enable_iter_perf_stats": True}, Model(320, (2,)), {})
        handle = backend.submit(PROMPT, Sampling(max_tokens=4), [], collector)
        loop = backend._loop
        backend.close()
    assert slow.given_up
    assert collector.wait().finish_reason == "cancelled"
    assert not asyncio.all_tasks(loop)
    assert loop.is_closed()
    handle.cancel()  # of a request that has ended with everything


def result(*ids: int, reason: str | None = None, **more: Any) -> Any:
    base = {"token_ids": list(ids), "logprobs": [], "prompt_logprobs": [], "finish_reason": reason}
    fields = {"finished": reason is not None, "context_logits": None, "outputs": [SimpleNamespace(**base)]}
    return SimpleNamespace(**fields | more)


def test_a_version_that_leaves_the_end_token_out() -> None:
    for ids in ((9, 8), (9, 8, 2)):
        reader = Reader([1], Sampling(), (2,))
        assert reader.read(result(9)).token_ids == (9,)
        last = reader.read(result(*ids, reason="stop"))
        assert (last.token_ids, last.finish_reason, last.stop_reason) == ((8, 2), "stop", None)


def test_strange_results_become_errors() -> None:
    reader = Reader([1, 2], Sampling(prompt_logprobs=0, logprobs=0), (2,))
    with pytest.raises(RuntimeError, match="ended the request with the reason 'timeout'"):
        reader.read(result(9, reason="timeout"))
    with pytest.raises(RuntimeError, match="gave 0 log-probabilities for 1 tokens"):
        reader.read(result(9))
    reused = Reader([1, 2], Sampling(prompt_logprobs=0), (2,))
    with pytest.raises(RuntimeError, match="gave 1 log-probabilities for a prompt of 2 tokens: blocks that are reused"):
        reused.read(result(9, context_logits=np.zeros((1, 1, 8), dtype=np.float32)))
    with pytest.raises(RuntimeError, match="gave no log-probabilities of the prompt"):
        Reader([1, 2], Sampling(prompt_logprobs=0), (2,)).read(result(9, reason="length"))


def test_drafts_and_large_times_arrive_as_numbers() -> None:
    days = timedelta(days=40_000, microseconds=7)  # beyond the exactness of a float
    times = dict.fromkeys(("arrival_time", "first_scheduled_time", "first_token_time", "last_token_time"), days)
    blocks = ("num_reused_blocks", "num_missed_blocks", "num_new_allocated_blocks", "num_total_allocated_blocks")
    found = SimpleNamespace(
        timing_metrics=SimpleNamespace(**times),
        kv_cache_metrics=SimpleNamespace(**dict.fromkeys(blocks, 3), kv_cache_hit_rate=0.5),
        speculative_decoding=SimpleNamespace(acceptance_rate=0.25, total_accepted_draft_tokens=2, total_draft_tokens=8),
    )
    answer = result(9, reason="length")
    answer.outputs[0].request_perf_metrics = found
    metrics = Reader([1], Sampling(), (2,)).read(answer).metrics
    assert metrics is not None
    assert metrics.last_token_time_ns == 40_000 * 86_400 * 10**9 + 7000
    drafts = (metrics.acceptance_rate, metrics.total_accepted_draft_tokens, metrics.total_draft_tokens)
    assert drafts == (0.25, 2, 8)


def test_instances_get_their_gpus() -> None:
    assert gpu_groups("0,1;2, 3") == [(0, 1), (2, 3)]
    environment = {"CUDA_VISIBLE_DEVICES": "7"}
    assert place({"gpu_device_ids": "0,1;2,3"}, "tensorrt_llm_0_1", 2, environment) == 2
    assert environment == {"CUDA_VISIBLE_DEVICES": "2,3", "TRTLLM_VISIBLE_DEVICES": "2,3"}
    assert place({"gpu_device_ids": "5"}, "tensorrt_llm_0_0", 1, environment) == 1
    assert environment["CUDA_VISIBLE_DEVICES"] == "5"
    assert place({}, "tensorrt_llm_0_0", 1, environment) is None
    for text, count, sentence in (("0;1", 1, "1 instances"), ("", 2, "0 groups"), ("a;b", 2, "write GPU numbers")):
        with pytest.raises(SetupError, match=sentence):
            place({"gpu_device_ids": text}, "m_0_0", count, environment)


def test_the_mpi_job_of_the_server_is_left_behind() -> None:
    job = {
        "OMPI_COMM_WORLD_SIZE": "1",
        "PMIX_RANK": "0",
        "PMI_FD": "5",
        "ORTE_X": "1",
        "OMPI_MCA_orte_precondition": "1",
    }
    kept = {"OMPI_MCA_btl": "self", "PMIX_MCA_gds": "hash", "PATH": "/bin"}
    environment = job | kept
    place({}, "m_0_0", 1, environment)
    assert environment == kept
    ranks = kept | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    environment = dict(ranks)
    place({}, "m_0_0", 1, environment)
    assert environment == ranks, "a rank of several stays one"
    place({"gpu_device_ids": "0"}, "m_0_0", 1, environment)
    assert not {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"} & set(environment), (
        "an instance with its own GPUs is none"
    )


class Pool:
    """`mpi4py.futures.MPICommExecutor`: an executor on the leader, work until the end elsewhere."""

    served: ClassVar[list[Any]] = []

    def __init__(self, comm: Any) -> None:
        self._comm = comm

    def __enter__(self) -> Any:
        self.served.append(self._comm)
        return None if self._comm.Get_rank() else self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def mpi(monkeypatch: pytest.MonkeyPatch) -> Any:
    comm = SimpleNamespace(rank=1, Get_rank=lambda: comm.rank, Get_size=lambda: 2)
    for name, content in (
        ("mpi4py", {}),
        ("mpi4py.MPI", {"COMM_WORLD": comm}),
        ("mpi4py.futures", {"MPICommExecutor": Pool}),
    ):
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("FAKE_MPI_SIZE", "2")
    return comm


def test_only_rank_0_builds_the_llm(
    mpi: Any, engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MPI_RANK", "1")
    log = tmp_path / "log"
    with fake_in_process("v1_2", log):
        worker = backend_trtllm.load(engine_dir, gpus=None, adapters={})
        assert isinstance(worker, WorkerRank)
        assert Pool.served == [mpi]
        assert not events(log, "start")
        with pytest.raises(BadRequestError, match="send requests to the server of rank 0"):
            run(worker, PROMPT)
        assert worker.gauges() == Gauges()
        worker.close()
        mpi.rank = 0
        with pytest.raises(SetupError, match="only rank 0 may be"):
            backend_trtllm.load(engine_dir, gpus=None, adapters={})


def test_the_leader_brings_its_ranks(mpi: Any, engine_dir: Path, tmp_path: Path) -> None:
    with fake_in_process("v1_2", tmp_path / "log"):
        args = read_args(engine_dir) | {"model": str(engine_dir)}
        llm = trtllm_process.start_llm(args)
        llm.shutdown()
        session = llm.args["_mpi_session"]
        assert (session.comm, session.n_workers) == (mpi, 2)


def test_an_incomplete_engine_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="llm_args.yaml: cannot be read"):
        read_args(tmp_path)
    (tmp_path / "llm_args.yaml").write_text("- a list\n")
    with pytest.raises(SetupError, match="holds no mapping of LLM arguments"):
        read_args(tmp_path)
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 9, "eos_token_id": [3, 2]}}')
    assert read_model(tmp_path) == Model(9, (2, 3))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert read_model(tmp_path) == Model(9, (1,))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SetupError, match="names no vocab_size"):
        read_model(tmp_path)
