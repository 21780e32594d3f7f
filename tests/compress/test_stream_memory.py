"""A bound on memory: kept states or not, the bytes are the same; what cannot be kept is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from compress_requests import make_request, silent
from test_stream_resume import digests

from tiny import save_checkpoint
from trtbuild.compress import states
from trtbuild.compress.run import run
from trtbuild.errors import CompatibilityError, RecipeError


def test_states_on_disk_give_the_same_bytes(
    sources: Any, compress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"format": "int4_awq", "group_size": 16, "kv_cache": "fp8", "sparsity": "2:4"}
    held: list[int] = []
    put = states.States.put

    def watched(self: Any, index: int, state: Any) -> None:
        put(self, index, state)
        held.append(len(self._held))

    monkeypatch.setattr(states.States, "put", watched)
    request = make_request(sources("gemma3"), tmp_path / "kept", **changes)
    run(request, silent)
    assert max(held) == 4
    held.clear()
    with pytest.raises(
        RecipeError, match="compress.max_memory: 1MiB: one decoder layer of this model takes"
    ) as refused:
        run(request | {"output": str(tmp_path / "none"), "max_memory": 1 << 20}, silent)
    assert held == []
    found = re.search(r"at least (\d+)MiB", str(refused.value))
    assert found is not None
    bare = {"output": str(tmp_path / "disk"), "max_memory": int(found[1]) << 20}
    states_bytes = 2 * 3 * 4 * 32 * 64 * 4
    monkeypatch.setattr("trtbuild.compress_memory.Demand.state_bytes", property(lambda self: states_bytes << 8))
    run(request | bare, silent)
    assert max(held) == 0
    assert digests(tmp_path / "disk") == digests(tmp_path / "kept")


def test_a_bound_is_refused_where_it_cannot_be_kept(
    sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtbuild.compress import skeleton

    def strange(self: Any, sample: Any) -> Any:
        raise skeleton.NotStreamableError("it is strange")

    monkeypatch.setattr(skeleton.Skeleton, "_calls", strange)
    request = make_request(sources("qwen3"), tmp_path / "out", format="fp8", max_memory=8 << 30)
    with pytest.raises(CompatibilityError, match="compress.max_memory: this model cannot be .*: it is strange; remove"):
        run(request, silent)
    assert not list(tmp_path.glob("out/*"))
    assert not (tmp_path / "out.unfinished").exists()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("changes", [{"format": "fp8"}, {"format": "w4a16_nvfp4"}], ids=["fp8", "nvfp4"])
def test_memory_does_not_grow_with_depth(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each layer is loaded the process is as large as before: neither files, codes nor states stay behind."""
    from trtbuild.compress import skeleton

    sides = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24, "head_dim": 128}
    source = save_checkpoint(tmp_path / "source", "qwen3", overrides=sides)
    codes = 4 * 512 * 512 * 3 // 4 + 3 * 512 * 2048  # bytes of one layer's weights in eight bits
    seen: list[int] = []
    frame = skeleton.Skeleton.frame

    def watched(self: Any, index: int, values: Any) -> Any:
        seen.append(resident())
        return frame(self, index, values)

    monkeypatch.setattr(skeleton.Skeleton, "frame", watched)
    run(make_request(source, tmp_path / "out", **changes), silent)
    assert len(seen) == 24
    # One layer is read ahead and one written behind, or not yet, and the allocator keeps one at times (four bytes a
    # weight): the least of several layers, with room for two, against fourteen that stay behind.
    early, late = min(seen[2:10]), min(seen[16:24])
    assert late - early < 8 * codes, [size - seen[0] for size in seen]
