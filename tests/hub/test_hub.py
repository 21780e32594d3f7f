"""Resolve, list and read; and the sentence for every way in which a hub refuses."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
from fake_hub import COMMIT, REPO, FakeHub

from trtbuild.adapters.hub import HubFiles, resolve
from trtbuild.errors import ArtifactError, HostError, RecipeError, ToolError


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT])
def test_revision_becomes_a_commit(hub: FakeHub, revision: str | None) -> None:
    assert resolve(REPO, revision) == COMMIT


def test_listing_asks_once_and_gives_every_size(hub: FakeHub) -> None:
    files = HubFiles(REPO, COMMIT)
    assert files.where == "org/model@0123456789ab"
    expected = {name: len(content) for name, content in hub.files.items()}
    assert files.names_and_sizes() == expected == files.names_and_sizes()
    assert len(hub.requests) == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "sub dir/extra.json"])
@pytest.mark.parametrize("ignore_ranges", [False, True])
def test_pieces_of_a_file(hub: FakeHub, name: str, ignore_ranges: bool) -> None:
    hub.ignore_ranges = ignore_ranges
    files, content = HubFiles(REPO, COMMIT), hub.files[name]
    assert files.read(name) == content
    assert files.read(name, 0, 8) == content[:8]
    assert files.read(name, 5, 17) == content[5:22]
    assert files.read(name, len(content) - 3) == content[-3:]
    assert files.read(name, len(content) - 3, 99) == content[-3:]
    assert files.read(name, len(content)) == b""


def test_header_of_a_large_file_moves_few_bytes(hub: FakeHub) -> None:
    HubFiles(REPO, COMMIT).read("model.safetensors", 0, 8)
    assert hub.sent == 8


def test_small_pieces_are_asked_for_once(hub: FakeHub) -> None:
    files = HubFiles(REPO, COMMIT)
    assert files.read("config.json") == files.read("config.json")
    assert len(hub.asked("/resolve/")) == 1


def test_model_facts_come_through_the_hub(hub: FakeHub, tiny_llama: Any) -> None:
    from trtbuild.checkpoint_files import open_directory
    from trtbuild.model import read_facts

    hub.files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    assert read_facts(HubFiles(REPO, COMMIT)) == read_facts(open_directory(tiny_llama))


def test_broken_transfer_of_a_piece_is_a_host_error(hub: FakeHub) -> None:
    hub.break_after = [10]
    with pytest.raises(HostError, match="cannot be reached: peer closed connection"):
        HubFiles(REPO, COMMIT).read("tokenizer.json")


def _forbid(**changes: Any) -> Callable[[FakeHub], None]:
    def change(hub: FakeHub) -> None:
        for name, value in changes.items():
            setattr(hub, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "kind", "sentence"),
    [
        (
            _forbid(token="hf_x"),
            RecipeError,
            r"model\.path: .* shows no repository org/model \(HF_TOKEN is not set\); ",
        ),
        (
            _forbid(gated=True),
            RecipeError,
            r"model\.path: access to org/model is restricted \(HF_TOKEN is not set\); ask",
        ),
        (_forbid(api_status=401), RecipeError, r"model\.path: .* shows no repository org/model"),
        (_forbid(api_status=403), RecipeError, r"model\.path: access to org/model is restricted"),
        (_forbid(api_status=429), HostError, "limits the number of requests; try again later, or set HF_TOKEN"),
        (_forbid(api_status=503), ToolError, "answered 503 for org/model; try again later"),
        (_forbid(not_a_hub=True), ToolError, "does not answer like a hub: .*; check HF_ENDPOINT"),
    ],
)
def test_refusals(hub: FakeHub, change: Callable[[FakeHub], None], kind: type[Exception], sentence: str) -> None:
    change(hub)
    for call in (lambda: resolve(REPO), lambda: HubFiles(REPO, COMMIT).names_and_sizes()):
        with pytest.raises(kind, match=sentence):
            call()


def test_wrong_token_is_said(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_right"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(RecipeError, match="HF_TOKEN is set") as caught:
        resolve(REPO)
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert resolve(REPO) == COMMIT


def test_unknown_names(hub: FakeHub) -> None:
    with pytest.raises(RecipeError, match="shows no repository org/other"):
        resolve("org/other")
    with pytest.raises(RecipeError, match=r"model\.revision: org/model has no revision 'v9'; give a branch, a tag"):
        resolve(REPO, "v9")
    with pytest.raises(RecipeError, match="is no repository name"):
        resolve("a/b/c")
    with pytest.raises(ArtifactError, match=r"org/model@0123456789ab has no file none\.json"):
        HubFiles(REPO, COMMIT).read("none.json")


@pytest.mark.parametrize("name", ["../outside.json", "/etc/passwd", "a/../../b", "a\\..\\b"])
def test_names_that_leave_the_directory_are_refused(hub: FakeHub, name: str) -> None:
    hub.files[name] = b"x"
    with pytest.raises(ArtifactError, match="unsafe name"):
        HubFiles(REPO, COMMIT).names_and_sizes()


def test_no_hub_there(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(HostError, match=f"http://127.0.0.1:{port} cannot be reached: .*; check the network"):
        resolve(REPO)


def test_offline_mode_is_respected(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HostError, match="HF_HUB_OFFLINE forbids"):
        resolve(REPO)
    assert hub.requests == []
