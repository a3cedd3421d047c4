"""Files that machines share, in a real S3 server and on a file system."""

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallelism import places
from parallelism.objects import ObjectTree, StoreAwayError
from tests.object_store import ObjectStore, forgetful_store, object_store

WRITERS, NUMBERS = 4, 12


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    """One for all tests of this file; those that kill it bring it up again."""
    with object_store() as found:
        yield found


@pytest.fixture
def tree(store: ObjectStore, tmp_path: Path) -> ObjectTree:
    """A folder of its own for each test."""
    return ObjectTree(store.url(tmp_path.name))


@pytest.fixture(params=["a file system", "an object store"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that machines share, either way."""
    folder = tmp_path / "machine"
    if request.param == "an object store":
        places.mirror(folder, request.getfixturevalue("tree"))
    else:
        folder.mkdir()
    return folder


def test_what_is_asked_of_a_place_is_the_same_everywhere(root: Path) -> None:
    places.write_text(root / "a" / "one.json", "1")
    places.write_text(root / "a" / "deep" / "two.json", "22")
    assert places.sizes(root / "a") == {"deep/two.json": 2, "one.json": 1}
    assert places.size(root / "a" / "one.json") == 1
    assert places.folders(root) == [root / "a"]
    assert places.folders(root / "nowhere") == []
    assert places.sizes(root / "nowhere") == {}
    assert places.exists(root / "a")
    assert places.exists(root / "a" / "one.json")
    assert not places.exists(root / "b")
    assert places.read_bytes(root / "a" / "one.json") == b"1"
    assert places.modified(root / "a" / "one.json") > 1.7e9
    assert places.modified(root / "b") == 0.0
    places.copy(root / "a" / "one.json", root / "c" / "again.json")
    places.write_text(root / "a" / "one.json", "replaced")
    assert places.read_bytes(root / "c" / "again.json") == b"1"
    places.remove(root / "a")
    places.remove(root / "never")
    assert places.sizes(root) == {"c/again.json": 1}
    for missing in (places.read_bytes, places.size):
        with pytest.raises(FileNotFoundError):
            missing(root / "a" / "one.json")


def test_one_machine_sees_what_another_has_shared(tree: ObjectTree, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    places.mirror(here, tree)
    places.mirror(there, tree)
    for name, text in (("part.bin", "tensors"), ("manifest.json", "{}")):
        (here / "shard").mkdir(parents=True, exist_ok=True)
        (here / "shard" / name).write_text(text, encoding="ascii")
    places.share(here / "shard", keep=False)
    assert list((here / "shard").iterdir()) == []
    places.need(there / "shard")
    assert (there / "shard" / "part.bin").read_text(encoding="ascii") == "tensors"
    (there / "shard" / "part.bin").write_text("damaged", encoding="ascii")
    os.utime(there / "shard" / "part.bin", (1, 1))
    assert places.need(there / "shard" / "part.bin").read_text(encoding="ascii") == "tensors"
    assert places.need(there / "none") == there / "none"
    places.leave(there)
    assert not there.exists()
    assert places.sizes(there / "shard") == {"manifest.json": 2, "part.bin": 7}


def test_a_path_travels_to_another_process(tree: ObjectTree, tmp_path: Path) -> None:
    places.mirror(tmp_path / "home", tree)
    places.write_text(tmp_path / "home" / "job" / "stop", "now")
    address = places.address(tmp_path / "home" / "job" / "stop")
    assert address == f"{tree.url}/job/stop#{tmp_path}/home/job/stop"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read, (address,)) == b"now"
    assert places.address(tmp_path / "elsewhere") == places.url(tmp_path / "elsewhere") == str(tmp_path / "elsewhere")


def _read(address: str) -> bytes:
    return places.read_bytes(places.at(address))


def test_of_many_who_create_an_object_one_does(tree: ObjectTree) -> None:
    with multiprocessing.get_context("spawn").Pool(WRITERS) as pool:
        won = pool.starmap(_create, [(tree.url, writer) for writer in range(WRITERS)])
    assert sorted(number for numbers in won for number in numbers) == list(range(NUMBERS))
    for writer, numbers in enumerate(won):
        assert all(tree.get(f"events/{number}") == f"by {writer}".encode() for number in numbers)


def _create(url: str, writer: int) -> list[int]:
    tree = ObjectTree(url)
    return [number for number in range(NUMBERS) if tree.create(f"events/{number}", f"by {writer}".encode())]


def test_a_creation_whose_answer_was_lost_counts_as_ours(tree: ObjectTree) -> None:
    assert tree.create("event", b"mine, with a time in it")
    assert tree.create("event", b"mine, with a time in it")
    assert not tree.create("event", b"somebody else's")


def test_a_store_that_is_away_is_waited_for(store: ObjectStore, tree: ObjectTree) -> None:
    tree.put("kept", b"content")
    store.kill()
    impatient = ObjectTree(tree.url, patience_seconds=0.5)
    with pytest.raises(StoreAwayError, match="does not answer"):
        impatient.get("kept")
    with pytest.raises(StoreAwayError, match="does not answer"):
        impatient.check()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        waiting = pool.apply_async(_get, (tree.url,))
        store.start()
        assert waiting.get(timeout=120) == b"content"


def _get(url: str) -> bytes | None:
    return ObjectTree(url).get("kept")


def test_a_store_has_to_honour_exclusive_creation(tree: ObjectTree) -> None:
    tree.check()
    assert tree.below("") == {}
    with pytest.raises(ValueError, match="ignores If-None-Match"):
        ObjectTree(forgetful_store()).check()


def test_no_credentials_are_told_at_once(store: ObjectStore, tree: ObjectTree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        told = pool.apply(_complaint, (tree.url,))
    assert "cannot be written to: PermissionError" in told


def _complaint(url: str) -> str:
    try:
        ObjectTree(url).check()
    except ValueError as error:
        return str(error)
    return ""


def test_files_that_go_while_a_folder_is_looked_at_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers delete hidden states and drafts beside those that look for theirs."""
    for name in ("going", "kept"):
        (tmp_path / name).write_text(name, encoding="ascii")
    walk = os.walk

    def racing(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        for row in walk(folder):
            (tmp_path / "going").unlink(missing_ok=True)
            yield row

    monkeypatch.setattr(os, "walk", racing)
    assert places.sizes(tmp_path) == {"kept": 4}
