"""Calibration as a whole: samples of several lengths, text that the model writes, and what the evidence says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_requests import CALIBRATION, make_request, silent
from test_stream_equality import check_equal
from test_stream_resume import digests, killed

from tiny import save_checkpoint
from trtbuild.compress import selftext
from trtbuild.compress.request import parse_request
from trtbuild.compress.run import run
from trtbuild.compress.source import load_source
from trtbuild.compress.textdata import CalibrationSpec, load_samples
from trtbuild.errors import HostError, RecipeError, ToolError

PADDED = {**CALIBRATION, "packing": "padded"}
SELF = {**CALIBRATION, "data": "self", "count": 6, "length": 48}


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    texts = ["the quick brown fox " * repeat for repeat in (2, 3, 12, 20, 5)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma3", {"format": "fp8", "kv_cache": "fp8"}),
        ("qwen3_moe", {"format": "int4_awq", "group_size": 32}),
    ],
    ids=["fp8", "int4"],
)
def test_documents_of_several_lengths(
    name: str, changes: dict[str, Any], sources: Any, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as ModelOpt in memory gives on the documents one by one: nothing of a padding is seen."""
    import modelopt.torch.quantization as mtq
    import test_stream_equality as equality
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.export import unified_export_hf as exporter

    calibration = PADDED | {"data": str(documents), "count": 5, "length": 64}
    spec = CalibrationSpec(**(calibration | {"data": documents}))  # type: ignore[arg-type]
    samples = load_samples(spec, sources(name)).input_ids
    assert len(set(map(len, samples))) >= 3
    result = run(make_request(sources(name), tmp_path / "out", calibration=calibration, **changes), silent)
    assert result["calibration"]["tokens"] == sum(map(len, samples))
    coverage = result["calibration"]["coverage"]
    assert (coverage["shortest"], coverage["longest"]) == (min(map(len, samples)), max(map(len, samples)))
    monkeypatch.setattr(exporter, "sync_moe_gate_up_amax", lambda model: 0)
    monkeypatch.setattr(exporter, "get_experts_list", lambda block, kind: [
        [getattr(expert, leaf) for expert in block.experts] for leaf in ("gate_proj", "down_proj", "up_proj")
    ])  # fmt: skip
    model = load_source(parse_request(make_request(sources(name), tmp_path / "memory")), torch.device("cpu"))

    def loop(module: Any) -> None:
        with torch.no_grad():
            for sample in samples:
                module(input_ids=torch.tensor([list(sample)]), use_cache=False)

    mtq.quantize(model, equality.modelopt_config(changes), loop)
    export_hf_checkpoint(model, dtype=torch.float32, export_dir=tmp_path / "memory")
    check_equal(tmp_path / "out", tmp_path / "memory")


def test_documents_of_several_lengths_go_on_after_a_kill(sources: Any, documents: Path, tmp_path: Path) -> None:
    calibration = PADDED | {"data": str(documents), "count": 5, "length": 64}
    request = make_request(sources("llama-tied"), tmp_path / "out", format="fp8", calibration=calibration)
    run(request | {"output": str(tmp_path / "expected")}, silent)
    killed(request, ["layer 2 of 3 is done", None], tmp_path)
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")


def written(source: Path, output: Path, **changes: Any) -> dict[str, Any]:
    result = run(make_request(source, output, format="fp8", calibration=SELF | changes), silent)
    return dict(result["calibration"])


def test_text_that_the_model_writes(sources: Any, tmp_path: Path) -> None:
    source = sources("llama-tied")
    first, again = (written(source, tmp_path / name) for name in ("first", "again"))
    assert first == again
    assert digests(tmp_path / "first") == digests(tmp_path / "again")
    assert (first["tokens"], first["samples"], first["source"]) == (6 * 48, 6, "sampled from the model, seed 1")
    assert written(source, tmp_path / "other", seed=2)["digest"] != first["digest"]
    padded = written(source, tmp_path / "padded", packing="padded")
    assert padded["coverage"]["documents"] == 6
    assert 16 <= padded["coverage"]["shortest"] <= padded["coverage"]["longest"] <= 48
    assert [path.name for path in tmp_path.iterdir() if "unfinished" in path.name] == []


def test_written_groups_are_kept(sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed behind the first group writes the others only, and has the same text."""
    settings = {"count": 30, "packing": "padded"}
    expected = written(sources("llama-tied"), tmp_path / "expected", **settings)
    request = make_request(sources("llama-tied"), tmp_path / "out", format="fp8", calibration=SELF | settings)

    def stop(done: int, total: int, what: str) -> None:
        if what.startswith("sample calibration text") and done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(request, stop)
    firsts: list[int] = []
    group = selftext._group

    def counted(writer: Any, first: int) -> list[list[int]]:
        firsts.append(first)
        return group(writer, first)

    monkeypatch.setattr(selftext, "_group", counted)
    assert run(request, silent)["calibration"] == expected
    assert firsts == [16]
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")


def test_documents_begin_with_a_word_or_as_conversations(sources: Any, tmp_path: Path) -> None:
    request = parse_request(make_request(sources("llama-tied"), tmp_path / "out", format="fp8"))
    spec = CalibrationSpec(None, None, 4, 64, 0, packing="padded")
    tokenizer = selftext.load_tokenizer(request.tokenizer)
    with selftext._engine(request, spec, "cpu") as engine:
        opening, closing = selftext._turns(tokenizer, spec.length)
        assert tokenizer.decode(opening) == "<|im_start|>user\n"
        assert tokenizer.decode(closing) == "<|im_end|>\n<|im_start|>assistant\n"
        writer = selftext._Writer(engine, tokenizer, (), opening, closing, spec.length, 0)
        texts = selftext._group(writer, 0)
        other = selftext._group(writer, 16)
    assert all(16 <= len(text) <= 64 for text in texts)
    assert all(tuple(text[: len(opening)]) == opening for text in texts[1::2])
    assert all("<|im_start|>assistant\n" in tokenizer.decode(text) for text in texts[1::2])
    assert not {text[0] for text in texts[::2]} & set(tokenizer.all_special_ids)
    assert len({tuple(text) for text in texts + other}) == 32


def test_no_room_for_the_whole_model(sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_request(sources("llama-tied"), tmp_path / "out", format="fp8", calibration=SELF)
    with pytest.raises(
        RecipeError, match=r"self needs the whole model in memory, about \d+MiB, above compress.max_memory"
    ):
        run(request | {"max_memory": 600 << 20}, silent)
    monkeypatch.setattr(selftext, "_free_memory", lambda: 600 << 20)
    with pytest.raises(
        HostError, match="600MiB are free; use a larger host, or give text in compress.calibration.data"
    ):
        run(request, silent)
    assert not list((tmp_path / "out").glob("*"))


def test_an_overflow_in_a_model_that_is_held_as_a_whole(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = save_checkpoint(tmp_path / "source", "llama")
    path = source / "model.safetensors"
    tensors = load_file(path)
    for leaf in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{leaf}.weight"].fill_(1e37)
    save_file(tensors, path, metadata={"format": "pt"})
    from trtbuild.compress import skeleton

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skeleton, "layer_list", lambda model: None)  # a class without a list of decoder layers
        message = "calibration sample 1: the input of model.layers.1.mlp.down_proj is not finite in torch.float32"
        with pytest.raises(ToolError, match=message):
            run(make_request(source, tmp_path / "out", format="fp8"), silent)
    assert not list((tmp_path / "out").glob("*"))
