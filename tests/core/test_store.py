"""The store: written once, verified before reuse, safe under interruption and concurrency."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtbuild.errors import ArtifactError, HostError
from trtbuild.linking import place_tree
from trtbuild.manifest import DigestCache, canonical_json, compare_tree, digest_json, list_tree
from trtbuild.store import Artifact, Store

ROOT = Path(__file__).parents[2]


def silent() -> None:
    """Nobody is told that we wait."""


def put(store: Store, key: str, **files: bytes) -> Artifact:
    with store.lock("kind", key, waiting=silent):
        staging = store.stage("kind", key)
        for name, data in files.items():
            (staging.content / name).write_bytes(data)
        return store.publish(staging, "kind", key, {"n": 1})


def test_published_artifact_is_found_and_read_only(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    assert store.find("kind", "k") is None
    made = put(store, "k", a=b"x" * 10, b=b"y")
    found = store.find("kind", "k")
    assert found == made
    assert found is not None
    assert [entry.path for entry in found.files] == ["a", "b"]
    assert not (found.content / "a").stat().st_mode & 0o222
    assert not list((tmp_path / "s" / "staging").iterdir())


def test_equal_bytes_have_equal_digests(tmp_path: Path) -> None:
    first, second = put(Store(tmp_path / "s"), "k", a=b"x"), put(Store(tmp_path / "t"), "other", a=b"x")
    assert first.digest == second.digest
    assert put(Store(tmp_path / "u"), "k", a=b"z").digest != first.digest


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "add", "manifest", "no manifest"])
def test_damaged_artifact_is_set_aside_and_never_reused(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path / "s")
    artifact = put(store, "k", a=b"x" * 100)
    file = artifact.content / "a"
    file.chmod(0o644)
    if damage == "flip":
        file.write_bytes(b"x" * 99 + b"y")
    elif damage == "truncate":
        file.write_bytes(b"x" * 99)
    elif damage == "remove":
        file.unlink()
    elif damage == "add":
        (artifact.content / "b").write_bytes(b"")
    elif damage == "no manifest":
        (artifact.path / "manifest.json").unlink()
    else:
        (artifact.path / "manifest.json").write_text("{")
    assert store.find("kind", "k") is None
    assert len(list((tmp_path / "s" / "damaged").iterdir())) == 1
    assert put(store, "k", a=b"x" * 100).digest == artifact.digest


def test_a_flipped_byte_with_the_old_time_stamp_is_seen(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    artifact = put(store, "k", a=b"x" * 100)
    file = artifact.content / "a"
    stat = file.stat()
    time.sleep(0.02)
    file.chmod(0o644)
    file.write_bytes(b"x" * 99 + b"y")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert store.find("kind", "k") is None


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    staging = store.stage("kind", "k")
    (staging.content / "half").write_bytes(b"x")
    assert store.find("kind", "k") is None
    assert list(store.stage("kind", "k").content.iterdir()) == []


def test_sweep_removes_leftovers_but_not_what_is_being_built(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    store.stage("kind", "dead")
    with store.lock("kind", "alive", waiting=silent):
        store.stage("kind", "alive")
        Store(tmp_path / "s").sweep()
        assert [path.name for path in (tmp_path / "s" / "staging").iterdir()] == ["kind-alive"]


def test_unfinished_files_stay_until_published_or_abandoned(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    kept, abandoned = (store.stage("kind", name) for name in ("kept", "abandoned"))
    for staging in (kept, abandoned):
        staging.unfinished.mkdir()
        (staging.unfinished / "half").write_bytes(b"x")
    long_ago = time.time() - 15 * 24 * 3600
    os.utime(abandoned.unfinished, (long_ago, long_ago))
    store.sweep()
    assert [path.name for path in (tmp_path / "s" / "unfinished").iterdir()] == ["kind-kept"]
    assert (store.stage("kind", "kept").unfinished / "half").read_bytes() == b"x"
    store.publish(store.stage("kind", "kept"), "kind", "kept", {})
    assert list((tmp_path / "s" / "unfinished").iterdir()) == []


def test_unwritable_store_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match=r"the store .* cannot be written .*; set `store:` to a writable directory"):
        Store(tmp_path / "file" / "s")


def test_second_process_waits_and_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    program = """
        import sys, time
        from pathlib import Path
        from trtbuild.store import Store
        with Store(Path(sys.argv[1])).lock("kind", "k", waiting=lambda: None):
            print("held", flush=True)
            time.sleep(60)
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "s")],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(ROOT / "builder")},
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        waited = []

        def waiting() -> None:
            waited.append(True)
            holder.kill()

        with Store(tmp_path / "s").lock("kind", "k", waiting=waiting):
            assert waited == [True]
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_symbolic_links_are_no_part_of_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(ArtifactError, match="link is neither a file nor a directory"):
        list_tree(tmp_path, DigestCache(None))


def test_large_files_are_linked_small_ones_copied(tmp_path: Path) -> None:
    source = tmp_path / "source" / "deep"
    source.mkdir(parents=True)
    (source / "large").write_bytes(os.urandom(1 << 20))
    (source / "small").write_bytes(b"x")
    place_tree(tmp_path / "source", tmp_path / "target")
    for name in ("large", "small"):
        assert (tmp_path / "target" / "deep" / name).read_bytes() == (source / name).read_bytes()
        assert not (tmp_path / "target" / "deep" / name).is_symlink()
    assert (tmp_path / "target" / "deep" / "small").stat().st_ino != (source / "small").stat().st_ino


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(JSON)
def test_canonical_json_ends_with_one_newline_and_sorts(value: object) -> None:
    text = canonical_json(value)
    assert text.endswith("\n")
    assert canonical_json(value) == text
    assert len(digest_json(value)) == 64


@given(data=st.binary(min_size=1, max_size=50), index=st.integers(0, 49), flip=st.integers(1, 255))
def test_one_flipped_byte_fails_verification(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, index: int, flip: int
) -> None:
    root = tmp_path_factory.mktemp("tree")
    (root / "file").write_bytes(data)
    entries = list_tree(root, DigestCache(None))
    assert compare_tree(root, entries, DigestCache(None)) == []
    changed = bytearray(data)
    changed[index % len(data)] ^= flip
    (root / "file").write_bytes(changed)
    assert compare_tree(root, entries, DigestCache(None)) == ["file has other bytes than were recorded"]
