"""A compression that is killed goes on behind its last finished layer and ends with the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_requests import CALIBRATION, make_request, silent
from safetensors.torch import load_file

from tiny import save_checkpoint
from trtbuild.compress import by_layer
from trtbuild.compress.journal import Journal
from trtbuild.compress.run import run
from trtbuild.compress.shards import ShardWriter, reserved_bytes
from trtbuild.compress.states_between import StatesBetween

# Kills a run of its own at each moment in turn: when the progress begins with a text, or at the n-th tensor written.
KILLER = """
    import json, os, signal, sys
    from trtbuild.compress import shards
    from trtbuild.compress.run import run

    request, moments = json.loads(sys.argv[1]), json.loads(sys.argv[2])

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def killed_at(moment):
        write, count = shards._write, [0]

        def torn(descriptor, block, offset):
            count[0] += 1
            if count[0] == moment:
                write(descriptor, block[: max(block.numel() // 2, 1)], offset)
                die()
            return write(descriptor, block, offset)

        def progress(done, total, what):
            if isinstance(moment, str) and what.startswith(moment):
                die()

        shards._write = torn
        return run(request, progress)

    for moment in moments:
        pid = os.fork()  # before torch has started a thread
        if pid == 0:
            result = killed_at(moment)
            print(json.dumps(result), flush=True)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) == (moment is not None), (moment, status)
"""
MOMENTS: list[str | int | None] = [
    "write the checkpoint: embeddings",
    3,  # inside the outer tensors or the first layer
    "layer 1 of 3 is done",
    7,  # inside the tensors of the second layer
    "calibrate: layer 2 of 3, sample 3",
    "write the checkpoint: layer 2",
    "layer 3 of 3 is done",
    None,
]


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def killed(request: dict[str, Any], moments: list[str | int | None], tmp_path: Path) -> str:
    """What the last run printed, after runs that were killed at `moments` (None: not killed)."""
    script = tmp_path / "killer.py"
    script.write_text(textwrap.dedent(KILLER))
    environment = os.environ | {"PYTHONPATH": "builder", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(request), json.dumps(moments)],
        capture_output=True, text=True, check=False, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "changes",
    [{"format": "fp8", "kv_cache": "fp8", "sparsity": "2:4"}, {"format": "int4_awq", "group_size": 32}],
    ids=["fp8", "int4"],
)
def test_killed_runs_go_on(changes: dict[str, Any], sources: Any, compress: Any, tmp_path: Path) -> None:
    expected, undisturbed = compress("mixtral", **changes)
    request = make_request(sources("mixtral"), tmp_path / "out", **changes)
    moments = [*MOMENTS]
    if changes["format"] == "int4_awq":
        moments[4] = "search AWQ scales: layer 2 of 3, sample 3"
    result = json.loads(killed(request, moments, tmp_path).strip().splitlines()[-1])
    assert digests(tmp_path / "out") == digests(expected)
    assert result["notes"] == ["an earlier run had finished 3 of 3 layers"]
    assert {**result, "notes": [], "seconds": None} == {**undisturbed, "notes": [], "seconds": None}
    assert [path.name for path in tmp_path.iterdir() if "unfinished" in path.name] == []


def test_killed_solvers_go_on(sources: Any, compress: Any, tmp_path: Path) -> None:
    changes = {"format": "int4_gptq", "group_size": 32, "kv_cache": "fp8", "sparsity": "2:4"}
    expected, undisturbed = compress("mixtral", **changes)
    request = make_request(sources("mixtral"), tmp_path / "out", **changes)
    moments: list[str | int | None] = [
        "measure activations for GPTQ: layer 2 of 3, sample 3", "run the changed layer: layer 2", None,
    ]  # fmt: skip
    result = json.loads(killed(request, moments, tmp_path).strip().splitlines()[-1])
    assert digests(tmp_path / "out") == digests(expected)
    assert result["output_error"] == undisturbed["output_error"]


def test_another_request_starts_over(sources: Any, compress: Any, tmp_path: Path) -> None:
    expected, _ = compress("mixtral", format="fp8", exclude=["model.layers.1.*"])
    request = make_request(sources("mixtral"), tmp_path / "out", format="fp8")
    killed(request, ["layer 2 of 3 is done"], tmp_path)
    assert (tmp_path / "out.unfinished" / "journal.jsonl").exists()
    result = run(request | {"exclude": ["model.layers.1.*"]}, silent)
    assert result["notes"] == []
    assert digests(tmp_path / "out") == digests(expected)


def test_a_journal_counts_up_to_its_first_damaged_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "a key")
    for number in range(3):
        journal.finish({"number": number})
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    assert Journal(tmp_path, "a key").parts == [{"number": 0}, {"number": 1}, {"number": 2}]
    path.write_bytes(whole[:-1])
    assert Journal(tmp_path, "a key").parts == [{"number": 0}, {"number": 1}]
    damaged = bytearray(whole)
    damaged[whole.index(b'"number":1') + 9] = ord("7")
    path.write_bytes(bytes(damaged))
    assert Journal(tmp_path, "a key").parts == [{"number": 0}]
    assert Journal(tmp_path, "another key").parts == []


def test_a_tensor_out_of_step_begins_a_file(tmp_path: Path) -> None:
    """PyTorch can only look at data as a type where they begin at a multiple of that type's size."""
    tensors = {
        "odd": torch.arange(7, dtype=torch.uint8), "wide": torch.arange(3, dtype=torch.float32),
        "half": torch.arange(5, dtype=torch.bfloat16), "one": torch.tensor(2.5),
    }  # fmt: skip
    with ShardWriter(tmp_path, reserved_bytes(tensors)) as writer:
        for name in ("odd", "wide"):
            writer.append_all({name: tensors[name]})
        writer.append_all({name: tensors[name] for name in ("half", "one")})
        files = [path for path, _ in writer.seal()]
    assert [sorted(load_file(path)) for path in files] == [["odd"], ["half", "one", "wide"]]
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_states_that_are_in_no_file_are_computed_again(
    sources: Any, compress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where states stay on the device."""
    expected, _ = compress("gemma3", format="fp8", kv_cache="fp8")
    request = make_request(sources("gemma3"), tmp_path / "out", format="fp8", kv_cache="fp8")
    monkeypatch.setattr(StatesBetween, "recomputed", property(lambda self: True))

    def stop(done: int, total: int, what: str) -> None:
        if what.startswith("calibrate: layer 3 of 4, sample 2 "):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(request, stop)
    assert sorted(path.name for path in (tmp_path / "out.unfinished").iterdir()) == ["journal.jsonl", "shard-00000"]
    assert run(request, silent)["notes"] == ["an earlier run had finished 2 of 4 layers"]
    assert digests(tmp_path / "out") == digests(expected)


def test_samples_in_batches(sources: Any, compress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four samples, three at once and then one: the same ranges, less what sums in another order make of them."""
    expected, _ = compress("qwen3", format="fp8")
    monkeypatch.setattr(by_layer, "batch_tokens", lambda device: 3 * CALIBRATION["length"])
    seen: list[str] = []
    run(make_request(sources("qwen3"), tmp_path / "out", format="fp8"), lambda done, total, what: seen.append(what))
    assert [what for what in seen if what.startswith("calibrate: layer 2")] == [
        f"calibrate: layer 2 of 3, sample {number} of 4" for number in (3, 4)
    ]
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "out", expected))
    for name in theirs:
        close = torch.allclose(ours[name].float(), theirs[name].float(), rtol=1e-4)
        assert close, name


def test_a_killed_copy_goes_on(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "mixtral", max_shard_size="90KB")
    request = make_request(source, tmp_path / "out")
    run(request | {"output": str(tmp_path / "expected")}, silent)
    moments: list[str | int | None] = ["copy: file 1 of", "copy: file 3 of", None]
    result = json.loads(killed(request, moments, tmp_path).strip().splitlines()[-1])
    assert result["notes"] == ["files that an earlier run had copied: 3"]
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    assert not (tmp_path / "out.unfinished").exists()
