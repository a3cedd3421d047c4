"""The journal: exclusive events, epochs that fence, stages that become true by an event, fast incremental reading."""

import errno
import json
import multiprocessing
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from launcher.events import EventLog, StaleEpochError
from launcher.journal import Journal, hash_inputs
from launcher.states import IllegalTransition, JobState
from launcher.storage import LocalStorage
from tests.launcher.made import new_journal


def test_a_new_job_is_written_down_whole(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    again = Journal(journal.directory)
    assert again.exists
    assert again.job_id == "job-1"
    assert again.spec() == journal.spec()
    assert again.spec().candidates[0].model["hidden"] == 16
    assert again.desired() == "run"
    assert again.state() is JobState.SUBMITTED
    assert [event["kind"] for event in again.events()] == ["submitted"]
    with pytest.raises(ValueError, match="already holds a job"):
        Journal(journal.directory).create(journal.spec())


def test_a_directory_without_a_job_says_so(tmp_path: Path) -> None:
    assert not Journal(tmp_path).exists
    with pytest.raises(ValueError, match="not a job's directory"):
        Journal(tmp_path).spec()


def test_events_are_numbered_without_gaps_and_read_incrementally(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    journal.claim_epoch()
    for index in range(5):
        journal.append("train.step", {"candidate": "small", "steps": [{"step": index, "loss": 1.0}]})
    events = list(journal.events())
    assert [event["number"] for event in events] == list(range(1, 8))
    assert [event["number"] for event in Journal(journal.directory).events(after=5)] == [6, 7]
    assert {event["epoch"] for event in events[1:]} == {1}
    assert journal.view().candidates["small"].latest == {"step": 4, "loss": 1.0}


def test_events_need_an_epoch_and_cannot_forge_their_number(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    with pytest.raises(AssertionError, match="claim an epoch"):
        journal.append("state", {"state": "running"})
    journal.claim_epoch()
    with pytest.raises(AssertionError, match="reserved"):
        journal.append("state", {"number": 1})


def test_numbers_json_cannot_hold_are_written_as_text(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    journal.claim_epoch()
    journal.append("train.step", {"candidate": "small", "steps": [{"step": 1, "loss": float("nan")}]})
    content = (journal.directory / "events" / "00000003.json").read_text()
    assert json.loads(content, parse_constant=lambda name: pytest.fail(name))["steps"][0]["loss"] == "nan"


def test_an_older_epoch_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    first = new_journal(tmp_path)
    first.claim_epoch()
    first.append("stage_started", {"stage": "train/small"})
    second = Journal(first.directory)
    assert second.claim_epoch() == 2
    with pytest.raises(StaleEpochError, match="epoch 1 has ended: epoch 2 began with event 4"):
        first.append("stage_done", {"stage": "train/small"})
    with pytest.raises(StaleEpochError):
        first.commit_stage("train/small", "hash", {"checkpoint": "late"}, 1.0)
    second.append("stage_started", {"stage": "train/small"})
    assert second.stage("train/small") is None
    assert [(event["epoch"], event["kind"]) for event in second.events(2)] == [
        (1, "stage_started"),
        (2, "attempt_started"),
        (2, "stage_started"),
    ]


def test_an_older_epoch_is_refused_however_far_the_newer_one_has_come(tmp_path: Path) -> None:
    first = new_journal(tmp_path)
    first.claim_epoch()
    second = Journal(first.directory)
    second.claim_epoch()
    for _ in range(20):
        second.append("heartbeat", {})
    before = second.last_event()
    with pytest.raises(StaleEpochError):
        first.append("heartbeat", {})
    assert second.last_event() == before


def _claim_and_write(directory: str, start: float, results: multiprocessing.Queue) -> None:
    journal = Journal(directory)
    time.sleep(max(0.0, start - time.time()))
    epoch, written = journal.claim_epoch(), 0
    try:
        for index in range(50):
            journal.append("note", {"writer": epoch, "index": index})
            written += 1
    except StaleEpochError:
        pass
    results.put((epoch, written))


def test_claimants_that_race_get_different_epochs_and_only_the_last_goes_on(tmp_path: Path) -> None:
    directory = str(new_journal(tmp_path).directory)
    context = multiprocessing.get_context("forkserver")
    results, start = context.Queue(), time.time() + 2.0
    writers = [context.Process(target=_claim_and_write, args=(directory, start, results)) for _ in range(4)]
    for writer in writers:
        writer.start()
    outcomes = dict(results.get(timeout=60) for _ in writers)
    for writer in writers:
        writer.join(30)
    assert sorted(outcomes) == [1, 2, 3, 4]
    assert outcomes[4] == 50
    events = list(Journal(directory).events())
    assert [event["number"] for event in events] == list(range(1, len(events) + 1))
    epochs = [event["epoch"] for event in events]
    assert epochs == sorted(epochs)
    for epoch, written in outcomes.items():
        indices = [event["index"] for event in events if event["kind"] == "note" and event["writer"] == epoch]
        assert indices == list(range(written))


def test_a_reader_never_sees_half_an_event(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    journal.claim_epoch()
    done = threading.Event()

    def write() -> None:
        for index in range(200):
            journal.append("note", {"text": "x" * 20_000, "index": index})
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reader, seen = Journal(journal.directory), 2
    while not done.is_set() or seen < 202:
        for event in reader.events(seen):
            assert event["number"] == seen + 1
            seen += 1
            if event["kind"] == "note":
                assert len(event["text"]) == 20_000
    writer.join()
    assert seen == 202


def test_long_logs_are_packed_and_found_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EventLog, "SEGMENT", 100)
    log = EventLog(LocalStorage(tmp_path, durable=False))
    log.claim_epoch({})
    for index in range(1049):
        log.append("note", {"index": index})
    assert len(os.listdir(tmp_path / "segments")) == 10
    for after in (0, 1, 99, 100, 101, 555, 999, 1000, 1049, 1050):
        numbers = [event["number"] for event in EventLog(LocalStorage(tmp_path)).read(after)]
        assert numbers == list(range(after + 1, 1051))
    assert EventLog(LocalStorage(tmp_path)).last_number() == 1050


def test_a_hundred_thousand_events_are_read_within_seconds(tmp_path: Path) -> None:
    segments = tmp_path / "segments"
    segments.mkdir()
    (tmp_path / "events").mkdir()
    step = {"step": 1, "loss": 2.5, "tokens": 1, "flops": 1e9, "seconds": 0.5, "mfu": 0.4, "fraction": 0.1}
    for last in range(1000, 100_001, 1000):
        rows = [
            {"number": number, "time": 0.0, "epoch": 1, "kind": "train.step", "candidate": "a", "steps": [step] * 4}
            for number in range(last - 999, last + 1)
        ]
        (segments / f"{last:08d}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "events" / "00100001.json").write_text(json.dumps(rows[-1] | {"number": 100_001}))
    log, start = EventLog(LocalStorage(tmp_path)), time.perf_counter()
    assert sum(1 for _ in log.read()) == 100_001
    assert time.perf_counter() - start < 15
    start = time.perf_counter()
    assert [event["number"] for event in EventLog(LocalStorage(tmp_path)).read(99_990)] == list(range(99_991, 100_002))
    assert time.perf_counter() - start < 0.5


def test_put_exclusive_creates_once(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    assert storage.put_exclusive("a/b.json", b"1")
    assert not storage.put_exclusive("a/b.json", b"2")
    assert storage.get("a/b.json") == b"1"
    storage.put("a/b.json", b"3")
    assert storage.get("a/b.json") == b"3"
    assert os.listdir(tmp_path / "a") == ["b.json"]
    assert os.listdir(tmp_path / LocalStorage.PARTIAL) == []
    assert storage.get("a/c.json") is None


class _FullDisk(LocalStorage):
    """Has no room for the next ``refusals`` new objects."""

    refusals = 0

    def put_exclusive(self, key: str, content: bytes) -> bool:
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().put_exclusive(key, content)


def test_an_event_waits_for_room_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = _FullDisk(new_journal(tmp_path).directory)
    journal = Journal(storage.root, storage)
    journal.claim_epoch()
    monkeypatch.setattr("launcher.journal.FULL_DISK_POLL_SECONDS", 0.01)
    storage.refusals = 3
    journal.append("heartbeat", {"candidate": None})
    assert storage.refusals == 0
    assert [event["kind"] for event in journal.events()] == ["submitted", "attempt_started", "heartbeat"]
    assert capsys.readouterr().err.count("event heartbeat waits for room") == 3
    monkeypatch.setattr("launcher.journal.FULL_DISK_SECONDS", 0.05)
    storage.refusals = 10_000
    with pytest.raises(OSError, match="No space left"):
        journal.append("heartbeat", {"candidate": None})
    assert len(list(journal.events())) == 3


def test_half_an_object_is_not_left_where_the_disk_was_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    storage = LocalStorage(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.put("a/b.json", b"1")
    assert os.listdir(tmp_path / LocalStorage.PARTIAL) == []
    assert storage.get("a/b.json") is None


def test_a_job_whose_directory_is_gone_is_not_begun_anew(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    journal.claim_epoch()
    shutil.rmtree(journal.directory)
    with pytest.raises(FileNotFoundError, match="the job's directory is gone"):
        journal.append("heartbeat", {"candidate": None})
    assert not journal.directory.exists()


def test_a_stage_is_done_only_with_the_same_inputs(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    journal.claim_epoch()
    inputs = hash_inputs("prepare", {"vocab": 256})
    journal.commit_stage("prepare", inputs, {"tokens": 12}, 0.5)
    again = Journal(journal.directory)
    record = again.stage_done("prepare", inputs)
    assert record is not None
    assert record.outputs == {"tokens": 12}
    assert again.stage_done("prepare", hash_inputs("prepare", {"vocab": 512})) is None


def test_a_manifest_is_never_replaced(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    journal.claim_epoch()
    journal.commit_stage("prepare", "abc", {"tokens": 1}, 0.1)
    with pytest.raises(StaleEpochError, match="done already in attempt 1"):
        journal.commit_stage("prepare", "abc", {"tokens": 2}, 0.1)
    record = journal.stage("prepare")
    assert record is not None
    assert record.outputs == {"tokens": 1}
    journal.claim_epoch()
    assert journal.commit_stage("prepare", "xyz", {"tokens": 3}, 0.1).outputs == {"tokens": 3}


def test_a_manifest_without_its_event_counts_for_nothing(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    journal.claim_epoch()
    journal.storage.put("stages/prepare.e0001.json", b"{}")
    assert Journal(journal.directory).stage("prepare") is None


def test_states_follow_the_table(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    journal.claim_epoch()
    journal.set_state(JobState.STARTING)
    with pytest.raises(IllegalTransition, match="starting cannot become succeeded"):
        journal.set_state(JobState.SUCCEEDED)
    journal.set_state(JobState.RUNNING)
    journal.set_state(JobState.FAILED, error="no luck")
    assert Journal(journal.directory).view().error == "no luck"


def test_the_holder_is_known_while_it_lives(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    assert journal.holder() is None
    journal.claim_epoch()
    holder = Journal(journal.directory).holder()
    assert holder is not None
    assert holder["pid"] == os.getpid()
    journal.set_state(JobState.STARTING)
    assert Journal(journal.directory).holder() is not None
    journal.set_state(JobState.INTERRUPTED)
    assert Journal(journal.directory).holder() is None


def test_the_holder_is_gone_with_its_process(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    process = multiprocessing.get_context("forkserver").Process(target=_claim, args=(str(journal.directory),))
    process.start()
    process.join(60)
    assert journal.view().epoch == 1
    assert journal.holder() is None


def _claim(directory: str) -> None:
    Journal(directory).claim_epoch()


def test_desired_state_is_one_of_three(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    journal.set_desired("pause")
    assert Journal(journal.directory).desired() == "pause"
    with pytest.raises(ValueError, match="run, pause, cancel"):
        journal.set_desired("stop")
