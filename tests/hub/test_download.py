"""Downloads: complete, resumed, checked, and never with the token where it does not belong."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_hub import COMMIT, REPO, FakeHub

from trtbuild.adapters import hub_download
from trtbuild.adapters.hub import fetch
from trtbuild.errors import ArtifactError, HostError, RecipeError, TrtbuildError

ROOT = Path(__file__).resolve().parents[2]
WANTED = {"config.json", "tokenizer.json", "model.safetensors", "sub dir/extra.json", "empty.txt"}
TOKEN = "hf_plantedSecretToken0123456789"


def quiet(done: int, total: int, what: str) -> None:
    assert 0 <= done <= total
    assert what == "bytes fetched"


def tree(directory: Path) -> dict[str, bytes]:
    """Every file but the lock that serializes two processes."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != ".model.lock")
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_download, "_FIRST_WAIT_S", 0.01)


def test_checkpoint_arrives_whole_without_other_weights(hub: FakeHub, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    fetch(REPO, COMMIT, tmp_path / "model", progress=lambda done, total, what: seen.append((done, total)))
    assert tree(tmp_path) == {f"model/{name}": hub.files[name] for name in WANTED}
    total = sum(len(hub.files[name]) for name in WANTED)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_named_files_only(hub: FakeHub, tmp_path: Path) -> None:
    fetch(REPO, COMMIT, tmp_path / "model", progress=quiet, names=["config.json", "pytorch_model.bin"])
    assert set(tree(tmp_path / "model")) == {"config.json", "pytorch_model.bin"}
    with pytest.raises(ArtifactError, match=r"has no file gone\.json; make the plan again"):
        fetch(REPO, COMMIT, tmp_path / "model", progress=quiet, names=["gone.json"])


def test_complete_download_moves_no_byte_again(hub: FakeHub, tmp_path: Path) -> None:
    fetch(REPO, COMMIT, tmp_path / "model", progress=quiet)
    sent = hub.sent
    fetch(REPO, COMMIT, tmp_path / "model", progress=quiet)
    assert hub.sent == sent


def test_transfer_that_breaks_off_goes_on_where_it_was(hub: FakeHub, tmp_path: Path) -> None:
    hub.break_after = [120_000, 50_000, 0]
    fetch(REPO, COMMIT, tmp_path / "model", progress=quiet, names=["model.safetensors"])
    assert tree(tmp_path / "model") == {"model.safetensors": hub.files["model.safetensors"]}
    assert hub.sent == len(hub.files["model.safetensors"])
    ranges = [headers.get("range") for headers in hub.asked("/storage/")]
    assert ranges == [None, "bytes=120000-", "bytes=170000-", "bytes=170000-"]


def test_next_call_resumes_what_a_failed_one_left(hub: FakeHub, tmp_path: Path) -> None:
    hub.break_after = [200_000, *[0] * 10]
    with pytest.raises(
        HostError, match=r"model\.safetensors of org/model@\w+ broke off at 200,000 of 300,\d+ bytes: "
    ) as error:
        fetch(REPO, COMMIT, tmp_path / "model", progress=quiet, names=["model.safetensors"])
    assert "start again: the download goes on from there" in str(error.value)
    assert not (tmp_path / "model" / "model.safetensors").exists()
    hub.break_after = []
    fetch(REPO, COMMIT, tmp_path / "model", progress=quiet, names=["model.safetensors"])
    assert tree(tmp_path) == {"model/model.safetensors": hub.files["model.safetensors"]}
    assert hub.sent == len(hub.files["model.safetensors"])


_CHILD = """
import sys
from trtbuild.adapters.hub import fetch
fetch(sys.argv[1], sys.argv[2], sys.argv[3], progress=lambda done, total, what: None)
"""


def test_killed_download_is_resumed_with_equal_bytes(hub: FakeHub, tmp_path: Path) -> None:
    # The server sends 3,000,000 bytes and then waits, so that the kill hits the middle of a transfer.
    hub.files["model.safetensors"] = os.urandom(8_000_000)
    hub.stall_after = 3_000_000
    environment = os.environ | {"PYTHONPATH": str(ROOT / "builder"), "HF_HUB_OFFLINE": "0"}
    child = subprocess.Popen([sys.executable, "-c", _CHILD, REPO, COMMIT, str(tmp_path / "model")], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size > 2_000_000 for path in (tmp_path / ".model.partial").glob("*")):
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (tmp_path / "model" / "model.safetensors").exists()
    hub.stall_after = None
    before = hub.sent
    fetch(REPO, COMMIT, tmp_path / "model", progress=quiet)
    assert tree(tmp_path) == {f"model/{name}": hub.files[name] for name in WANTED}
    assert hub.sent - before < 6_500_000


def test_server_without_ranges_starts_the_file_over(hub: FakeHub, tmp_path: Path) -> None:
    hub.ignore_ranges = True
    hub.break_after = [120_000]
    fetch(REPO, COMMIT, tmp_path / "model", progress=quiet, names=["model.safetensors"])
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_damaged_partial_file_is_noticed_and_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.break_after = [200_000, *[0] * 10]
    with pytest.raises(HostError):
        fetch(REPO, COMMIT, tmp_path / "model", progress=quiet, names=["model.safetensors"])
    hub.break_after = []
    (partial,) = (tmp_path / ".model.partial").iterdir()
    for damage in (bytes(100_000), bytes(400_000)):  # wrong bytes; longer than the file
        partial.write_bytes(damage)
        fetch(REPO, COMMIT, tmp_path / "model", progress=quiet, names=["model.safetensors"])
        assert (tmp_path / "model" / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
        (tmp_path / "model" / "model.safetensors").unlink()
        partial.parent.mkdir()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_wrong_bytes_are_refused(hub: FakeHub, tmp_path: Path, name: str) -> None:
    hub.corrupt[name] = bytes(len(hub.files[name]))
    with pytest.raises(ArtifactError, match=f"{name} of org/model@.* does not have the digest that the hub lists"):
        fetch(REPO, COMMIT, tmp_path / "model", progress=quiet, names=[name])
    assert tree(tmp_path / "model") == {}


@pytest.mark.parametrize("answer", [(429, {"Retry-After": "0"}), (503, {}), (416, {})])
def test_passing_trouble_is_waited_out(hub: FakeHub, tmp_path: Path, answer: tuple[int, dict[str, str]]) -> None:
    hub.statuses = [answer, answer]
    fetch(REPO, COMMIT, tmp_path / "model", progress=quiet)
    assert set(tree(tmp_path / "model")) == WANTED


def test_lasting_limit_is_a_host_error(hub: FakeHub, tmp_path: Path) -> None:
    hub.statuses = [(429, {"Retry-After": "0"})] * 10
    with pytest.raises(HostError, match="the server answered 429"):
        fetch(REPO, COMMIT, tmp_path / "model", progress=quiet)


def test_refused_file_is_not_tried_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.statuses = [(403, {})]
    with pytest.raises(RecipeError, match="access to org/model is restricted"):
        fetch(REPO, COMMIT, tmp_path / "model", progress=quiet)
    assert hub.statuses == []


def test_full_disk_is_said_before_the_download(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(HostError, match=r"needs 301,\d+ more bytes and its disk has 5,000 free; free some space"):
        fetch(REPO, COMMIT, tmp_path / "model", progress=quiet)
    assert hub.sent == 0


def test_disk_that_fills_up_on_the_way(hub: FakeHub, tmp_path: Path) -> None:
    # RLIMIT_FSIZE cuts the file short in a child, as a full disk does: the write fails in the middle.
    code = f"""
import errno, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
import trtbuild.adapters.hub_download as d
d.errno.ENOSPC = errno.EFBIG
from trtbuild.adapters.hub import fetch
from trtbuild.errors import HostError
try:
    fetch({REPO!r}, {COMMIT!r}, sys.argv[1], progress=lambda *_: None)
except HostError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "builder"), "HF_HUB_OFFLINE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == (
        f"the disk of {tmp_path / 'model'} is full; free some space, or move the store to a larger disk, "
        "and start again: what is here is kept\n"
    )


def test_token_reaches_the_hub_and_nothing_else(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.token = TOKEN
    caplog.set_level(logging.DEBUG)
    hub.break_after = [10**6, 120_000]  # the second file that is asked for is the large one
    fetch(REPO, COMMIT, tmp_path / "model", progress=quiet)
    hub_requests = [headers for server, _, headers in hub.requests if server == "hub"]
    assert all(headers["authorization"] == f"Bearer {TOKEN}" for headers in hub_requests)
    storage = [headers for server, _, headers in hub.requests if server == "storage"]
    assert len(storage) == 2
    assert not any("authorization" in headers for headers in storage)
    messages = []
    hub.statuses = [(503, {})] * 10
    (tmp_path / "model" / "config.json").unlink()
    for failure in ({}, {"api_status": 403}, {"api_status": 500}, {"not_a_hub": True}):
        for name, value in failure.items():
            setattr(hub, name, value)
        with pytest.raises(TrtbuildError) as caught:
            fetch(REPO, COMMIT, tmp_path / "model", progress=quiet)
        messages.append(repr(caught.value) + str(caught.value) + repr(caught.value.__cause__))
    assert TOKEN not in "".join(messages)
    assert TOKEN not in caplog.text
    assert caplog.text
    assert not any(TOKEN.encode() in content for content in tree(tmp_path).values())


def test_token_of_the_users_login_is_not_used(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    fetch(REPO, COMMIT, tmp_path / "model", progress=quiet)
    assert not any("authorization" in headers for _, _, headers in hub.requests)


def test_two_processes_fetch_the_same_model_once(hub: FakeHub, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "builder"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", _CHILD, REPO, COMMIT, str(tmp_path / "model")]
    children = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [child.wait(timeout=60) for child in children] == [0, 0]
    assert tree(tmp_path / "model") == {name: hub.files[name] for name in WANTED}
    assert hub.sent == sum(len(hub.files[name]) for name in WANTED)
