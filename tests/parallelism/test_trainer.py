"""The training loop around a tiny real engine: budget, schedule, evaluation, stops, faults, restarts."""

import itertools
import math
import os
import random
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallelism import checkpoints as checkpoints_module
from parallelism.budget import Budget
from parallelism.checkpoint_store import CheckpointStore
from parallelism.feed import Feed
from parallelism.layout import Layout
from parallelism.result import STALLED_EXIT_CODE, DivergedError, LastCheckpointError
from parallelism.schedule import learning_rate
from parallelism.training import CheckpointPolicy
from tests.parallelism.toy_training import (
    COST,
    GLOBAL_BATCH,
    LENGTH,
    STEP_TOKENS,
    MadeRows,
    Toy,
    ToyEngine,
    ToySaver,
    after_step,
    collate,
    slow,
    toy_task,
)
from tests.ranks import Died, run_ranks


@pytest.fixture(autouse=True)
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.set_num_threads(1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def quick_tries(monkeypatch):
    """Failed writes are tried again at once."""
    monkeypatch.setattr(checkpoints_module, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(checkpoints_module, "LAST_TRY_SECONDS", 0.0)


def resumed(task, path):
    return task.model_copy(update={"resume_from": str(path), "epoch": task.epoch + 1})


def assert_same_state(left, right):
    for one, other in zip(left.model.parameters(), right.model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(left.adam.state[one]["exp_avg"], right.adam.state[other]["exp_avg"])
        assert torch.equal(left.adam.state[one]["exp_avg_sq"], right.adam.state[other]["exp_avg_sq"])
        assert left.adam.state[one]["step"] == right.adam.state[other]["step"]


# Budget and data


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        (Budget(tokens=STEP_TOKENS), 1),
        (Budget(tokens=7 * STEP_TOKENS), 7),
        (Budget(tokens=8 * STEP_TOKENS - 1), 7),
        (Budget(flops=3 * COST.flops), 3),
        (Budget(flops=3.99 * COST.flops), 3),
    ],
)
def test_flops_and_tokens_are_never_exceeded(tmp_path, budget, steps):
    toy = Toy(toy_task(tmp_path, budget=budget))
    result = toy.train()
    assert (result.reason, result.progress.step) == ("budget", steps)
    assert result.progress.tokens == steps * STEP_TOKENS
    assert result.progress.flops == steps * COST.flops
    assert toy.engine.steps == steps
    spent = result.progress.flops if budget.flops else result.progress.tokens
    assert 0 <= budget.limit - spent < (COST.flops if budget.flops else COST.tokens)
    assert toy.of("finished")[0]["step"] == steps


def test_every_step_takes_the_next_positions(tmp_path):
    toy = Toy(toy_task(tmp_path))
    toy.train()
    assert toy.rows.asked == list(range(20 * GLOBAL_BATCH))


@pytest.mark.parametrize("data", [1, 2, 4])
def test_data_ranks_share_a_step_without_changing_its_micro_batches(data):
    cut = {}
    for rank in range(data):
        rows = MadeRows()
        batches = Feed(rows, collate, 3, data, rank).micro_batches(first=5, count=24)
        assert len(batches) == 8 // data
        for place in range(len(batches)):
            cut[place * data + rank] = rows.asked[3 * place : 3 * place + 3]
    assert [cut[index] for index in range(8)] == [[5 + 3 * index + k for k in range(3)] for index in range(8)]


def test_a_held_out_set_smaller_than_asked_is_used_once():
    feed = Feed(MadeRows(samples_per_epoch=11), collate, 2, 2, 0)
    assert feed.up_to(6, multiple=4) == 4
    assert feed.up_to(1000, multiple=4) == 8
    assert Feed(MadeRows(samples_per_epoch=3), collate, 2, 2, 0).up_to(1000, multiple=4) == 4


def test_a_long_evaluation_is_the_mean_over_its_portions_and_shows_life(tmp_path):
    toy = Toy(toy_task(tmp_path, evaluations=1, evaluation_tokens=21 * LENGTH, stall_seconds=2.0))
    portions = []
    evaluate = toy.engine.evaluate

    def slow_evaluate(batches):
        time.sleep(0.6)
        portions.append((len(batches), evaluate(batches)))
        return portions[-1][1]

    toy.engine.evaluate = slow_evaluate
    result = toy.train()
    assert [count for count, _ in portions] == [4, 4, 2]
    assert result.validation_loss == pytest.approx(sum(count * loss for count, loss in portions) / 10, rel=1e-12)
    whole = toy.engine.__class__.evaluate(toy.engine, Feed(MadeRows(), collate, 2, 1, 0).micro_batches(0, 20))
    assert result.validation_loss == pytest.approx(whole, rel=1e-6)
    assert [fields["done"] for fields in toy.of("evaluating")] == [8, 16]


def test_a_clock_budget_is_passed_by_at_most_one_step(tmp_path):
    task = toy_task(tmp_path, budget=Budget(wall_clock=1.2), checkpoint=CheckpointPolicy(steps=10_000))
    toy = Toy(task, engine=ToyEngine(task, slow(0.05)))
    result = toy.train()
    steps = toy.of("step")
    assert result.reason == "budget"
    assert steps[-2]["device_seconds"] < 1.2 <= steps[-1]["device_seconds"]
    assert steps[-1]["fraction"] == 1.0


def test_what_earlier_attempts_burnt_counts_against_a_clock_budget(tmp_path):
    budget = Budget(device_hours=1.0)
    task = toy_task(tmp_path, budget=budget, burnt_device_seconds=3599.2, burnt_wall_seconds=1800.0)
    toy = Toy(task, engine=ToyEngine(task, slow(0.02)))
    result = toy.train()
    assert 3600 <= result.burnt.device_seconds < 3660
    assert toy.of("step")[0]["fraction"] > 0.999
    spent = Toy(toy_task(tmp_path / "more", budget=budget, burnt_device_seconds=3600.5)).train()
    assert (spent.progress.step, spent.train_loss, spent.reason) == (0, None, "budget")
    assert CheckpointStore(tmp_path / "more").newest().step == 0


# Schedule and evaluation


def test_the_learning_rate_follows_the_fraction_of_the_budget(tmp_path):
    toy = Toy(toy_task(tmp_path))
    toy.train()
    limit = 20 * STEP_TOKENS + 13
    expected = [learning_rate(toy.task.training, (step + 0.5) * STEP_TOKENS / limit) for step in range(20)]
    assert toy.engine.rates == expected
    assert [fields["learning_rate"] for fields in toy.of("step")] == expected
    assert toy.engine.rates[0] > 0


@pytest.mark.parametrize(
    ("count", "steps"), [(0, []), (1, [20]), (4, [6, 11, 16, 20]), (3, [7, 14, 20]), (40, list(range(1, 21)))]
)
def test_evaluations_are_spread_over_the_budget_and_the_last_is_at_its_end(tmp_path, count, steps):
    toy = Toy(toy_task(tmp_path, evaluations=count))
    result = toy.train()
    assert [fields["step"] for fields in toy.of("evaluation")] == steps
    assert (result.validation_loss is None) == (not steps)
    assert set(toy.held_out.asked) == (set(range(4)) if steps else set())
    if steps:
        assert result.validation_loss == toy.of("evaluation")[-1]["validation_loss"]


def test_an_evaluation_that_a_pause_has_cut_off_is_made_up_for(tmp_path):
    task = toy_task(tmp_path, evaluations=4)
    first = Toy(task)
    first.on_event = after_step(6, lambda: first.stop.request("pause"))
    paused = first.train()
    assert first.of("evaluation") == []
    second = Toy(resumed(task, paused.checkpoint))
    result = second.train()
    assert [fields["step"] for fields in second.of("evaluation")] == [6, 11, 16, 20]
    undisturbed = Toy(toy_task(tmp_path / "undisturbed", evaluations=4))
    assert undisturbed.train().validation_loss == result.validation_loss
    assert undisturbed.of("evaluation") == second.of("evaluation")


def test_evaluation_leaves_the_training_as_it_was(tmp_path):
    with_them = Toy(toy_task(tmp_path / "a", evaluations=20))
    with_them.train()
    without = Toy(toy_task(tmp_path / "b"))
    without.train()
    assert_same_state(with_them.engine, without.engine)


# Stop and resume


@pytest.mark.parametrize("reason", ["pause", "cancel", "signal"])
def test_a_request_to_stop_ends_in_a_checkpoint_of_that_step(tmp_path, reason):
    toy = Toy(toy_task(tmp_path))
    toy.on_event = after_step(8, lambda: toy.stop.request(reason))
    result = toy.train()
    assert (result.reason, result.progress.step) == (reason, 8)
    newest = CheckpointStore(tmp_path).newest()
    assert (str(newest.path), newest.progress) == (result.checkpoint, result.progress)
    assert newest.metrics.train_loss == toy.of("step")[-1]["loss"]
    assert toy.of("finished")[0]["reason"] == reason


def test_the_strongest_of_several_requests_counts_and_a_spent_budget_beats_them(tmp_path):
    toy = Toy(toy_task(tmp_path / "a"))
    for reason in ("cancel", "signal", "pause"):
        toy.stop.request(reason)
    assert toy.train().reason == "cancel"
    toy = Toy(toy_task(tmp_path / "b"))
    toy.on_event = after_step(20, lambda: toy.stop.request("cancel"))
    assert toy.train().reason == "budget"


def test_a_request_from_another_thread_is_heard(tmp_path):
    task = toy_task(tmp_path, budget=Budget(tokens=1e9))
    toy = Toy(task, engine=ToyEngine(task, slow(0.01)))
    threading.Timer(0.5, toy.stop.request, ["pause"]).start()
    assert toy.train().reason == "pause"


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_stopped_anywhere_and_resumed_the_run_ends_with_the_same_bits(tmp_path, seed, asynchronous):
    policy = CheckpointPolicy(steps=3, asynchronous=asynchronous)
    undisturbed = Toy(toy_task(tmp_path / "undisturbed", checkpoint=policy))
    undisturbed.train()
    task, losses = toy_task(tmp_path / "disturbed", checkpoint=policy), {}
    for stop_at in [*sorted(random.Random(seed).sample(range(1, 20), 3)), None]:
        toy = Toy(task)
        toy.on_event = after_step(stop_at, lambda toy=toy: toy.stop.request("pause"))
        result = toy.train()
        losses |= {fields["step"]: (fields["loss"], fields["learning_rate"]) for fields in toy.of("step")}
        task = resumed(task, result.checkpoint)
    assert result.reason == "budget"
    assert_same_state(toy.engine, undisturbed.engine)
    assert losses == {fields["step"]: (fields["loss"], fields["learning_rate"]) for fields in undisturbed.of("step")}


def test_a_run_that_died_after_a_checkpoint_repeats_the_lost_steps_with_the_same_bits(tmp_path):
    undisturbed = Toy(toy_task(tmp_path / "undisturbed"))
    undisturbed.train()
    task = toy_task(tmp_path / "died")

    class PowerCut(BaseException):
        pass

    def cut(step):
        if step == 14:
            raise PowerCut

    with pytest.raises(PowerCut):
        Toy(task, engine=ToyEngine(task, cut)).train()
    newest = CheckpointStore(tmp_path / "died").newest()
    assert newest.step == 10
    again = Toy(resumed(task, newest.path))
    again.train()
    assert [fields["step"] for fields in again.of("step")] == list(range(11, 21))
    assert_same_state(again.engine, undisturbed.engine)


def test_resuming_a_finished_run_trains_no_further(tmp_path):
    task = toy_task(tmp_path, evaluations=2)
    first = Toy(task).train()
    again = Toy(resumed(task, first.checkpoint))
    result = again.train()
    assert again.of("step") == []
    assert (result.reason, result.progress, result.checkpoint) == ("budget", first.progress, first.checkpoint)
    assert (result.train_loss, result.validation_loss) == (first.train_loss, first.validation_loss)


# Checkpoints


def test_periodic_checkpoints_are_kept_up_to_a_number(tmp_path):
    toy = Toy(toy_task(tmp_path, checkpoint=CheckpointPolicy(steps=4, keep=3, asynchronous=False)))
    toy.train()
    assert toy.saver.wrote == [4, 8, 12, 16, 20]
    assert [info.step for info in CheckpointStore(tmp_path).complete()] == [12, 16, 20]
    assert [fields["asynchronous"] for fields in toy.of("checkpoint")] == [False] * 5


def test_in_the_background_the_manifest_comes_when_the_data_is_complete(tmp_path):
    toy = Toy(toy_task(tmp_path, checkpoint=CheckpointPolicy(steps=6, keep=9)), saver=ToySaver(polls=4))
    store, seen = CheckpointStore(tmp_path), {}
    toy.on_event = lambda kind, fields: seen.setdefault(
        (kind, fields["step"]), [info.step for info in store.complete()]
    )
    toy.train()
    assert seen["step", 10] == []
    assert seen["step", 11] == [6]
    assert [(fields["step"], fields["asynchronous"]) for fields in toy.of("checkpoint")] == [
        (6, True),
        (12, True),
        (18, True),
        (20, False),
    ]


def test_a_slow_background_write_delays_the_next_but_none_is_left_out(tmp_path):
    toy = Toy(toy_task(tmp_path, checkpoint=CheckpointPolicy(steps=2, keep=99)), saver=ToySaver(polls=1000))
    toy.train()
    assert toy.saver.wrote == list(range(2, 21, 2))


def test_checkpoints_by_the_clock(tmp_path):
    task = toy_task(tmp_path, checkpoint=CheckpointPolicy(seconds=0.2, asynchronous=False, keep=99))
    toy, times = Toy(task, engine=ToyEngine(task, slow(0.05))), {}
    toy.on_event = lambda kind, fields: times.setdefault(fields["step"], time.monotonic()) if kind == "step" else None
    toy.train()
    *periodic, last = toy.saver.wrote
    assert last == 20
    assert len(periodic) >= 3
    assert min(times[later] - times[earlier] for earlier, later in itertools.pairwise(periodic)) > 0.19


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_write_is_reported_and_tried_again_and_changes_nothing(tmp_path, asynchronous):
    undisturbed = Toy(toy_task(tmp_path / "undisturbed"))
    undisturbed.train()
    policy = CheckpointPolicy(steps=5, asynchronous=asynchronous, keep=99)
    toy = Toy(toy_task(tmp_path / "faulty", checkpoint=policy), saver=ToySaver(faults=2, polls=1))
    result = toy.train()
    failed = toy.of("checkpoint_failed")
    assert [(fields["step"], fields["attempt"]) for fields in failed] == [(5, 1), (6, 2)]
    assert all("no space left" in fields["error"] for fields in failed)
    assert toy.saver.wrote[:2] == [7, 10]
    assert [info.step for info in CheckpointStore(tmp_path / "faulty").complete()] == toy.saver.wrote
    assert sorted(path.name for path in (tmp_path / "faulty").iterdir() if not (path / "manifest.json").exists()) == []
    assert result.progress.step == 20
    assert_same_state(toy.engine, undisturbed.engine)


def test_failed_writes_in_a_row_are_tried_at_growing_intervals(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints_module, "RETRY_SECONDS", 0.1)
    task = toy_task(
        tmp_path, checkpoint=CheckpointPolicy(steps=100, asynchronous=False), budget=Budget(tokens=200 * STEP_TOKENS)
    )
    toy, times = Toy(task, ToySaver(faults=3), ToyEngine(task, slow(0.01))), []
    toy.on_event = lambda kind, fields: times.append(time.monotonic()) if "checkpoint" in kind else None
    toy.train()
    waits = [later - earlier for earlier, later in itertools.pairwise(times[:4])]
    # A step lies between a wait's end and the next try, and this machine may be busy.
    assert [wait >= least for wait, least in zip(waits, (0.1, 0.2, 0.4), strict=True)] == [True] * 3
    assert waits[0] < 0.2 + 0.4


def test_a_checkpoint_directory_that_cannot_be_made_is_a_failed_write(tmp_path):
    root = tmp_path / "root"
    root.write_text("a file where the directory should be", encoding="utf-8")
    toy = Toy(toy_task(root))
    toy.on_event = lambda kind, fields: (
        root.unlink() if kind == "checkpoint_failed" and fields["attempt"] == 2 else None
    )
    result = toy.train()
    assert [fields["step"] for fields in toy.of("checkpoint_failed")] == [5, 6]
    assert "root" in toy.of("checkpoint_failed")[0]["error"]
    assert toy.saver.wrote == [7, 10, 15, 20]
    assert Path(result.checkpoint).is_dir()


def test_the_last_checkpoint_is_insisted_on(tmp_path):
    policy = CheckpointPolicy(steps=1000, asynchronous=False)
    toy = Toy(toy_task(tmp_path / "a", checkpoint=policy), saver=ToySaver(faults=3))
    assert toy.train().checkpoint == str(CheckpointStore(tmp_path / "a").newest().path)
    assert [fields["attempt"] for fields in toy.of("checkpoint_failed")] == [1, 2, 3]
    toy = Toy(toy_task(tmp_path / "b", checkpoint=policy), saver=ToySaver(faults=99))
    with pytest.raises(LastCheckpointError, match=r"step 20 could not be written to .*no earlier one.*Make room"):
        toy.train()


# Divergence and stalls


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_ends_the_run_and_leaves_the_last_good_checkpoint(tmp_path, value, asynchronous):
    task = toy_task(tmp_path, checkpoint=CheckpointPolicy(steps=1, keep=99, asynchronous=asynchronous))
    engine = ToyEngine(task, lambda step: setattr(engine, "loss_factor", value if step == 7 else 1.0))
    toy = Toy(task, engine=engine)
    with pytest.raises(DivergedError, match=r"diverged at step 7.*Lower training\.learning_rate") as caught:
        toy.train()
    newest = CheckpointStore(tmp_path).newest()
    assert newest.step == 6
    assert caught.value.checkpoint == str(newest.path)
    assert str(newest.path) in str(caught.value)
    state = torch.load(newest.path / "rank0.pt")
    assert all(bool(torch.isfinite(weight).all()) for weight in state["model"].values())


def test_a_gradient_that_is_no_number_counts_as_divergence(tmp_path):
    task = toy_task(tmp_path)

    class Spoilt(ToyEngine):
        def train_step(self, micro_batches, learning_rate):
            result = super().train_step(micro_batches, learning_rate)
            return result if self.steps < 3 else type(result)(result.loss, math.inf)

    with pytest.raises(DivergedError, match=r"step 3: loss 0.*gradient norm inf; no checkpoint was written before"):
        Toy(task, engine=Spoilt(task)).train()


def _train_and_hang(root, hanging_rank):
    task = toy_task(root, layout=Layout(data=2), stall_seconds=1.0)
    here = dist.get_rank() == hanging_rank
    toy = Toy(task, engine=ToyEngine(task, lambda step: time.sleep(60) if here and step == 4 else None))
    toy.on_event = lambda kind, fields: (
        (Path(root) / f"stalled{dist.get_rank()}").write_text(str(fields)) if kind == "stalled" else None
    )
    toy.train()


def test_ranks_that_hang_end_themselves_with_a_stated_code(tmp_path):
    """One rank sleeps, the other waits for it in a collective: both notice."""
    started = time.monotonic()
    results = run_ranks(_train_and_hang, 2, str(tmp_path), 1, deaths=True, timeout=60)
    assert time.monotonic() - started < 40
    assert any(result == Died(STALLED_EXIT_CODE) for result in results)
    assert set(results) <= {Died(STALLED_EXIT_CODE), Died(-9)}
    reports = list(tmp_path.glob("stalled*"))
    assert reports
    assert all("'step': 3" in report.read_text(encoding="utf-8") for report in reports)


# Two ranks


def _two_ranks(root, stop_rank, faults):
    task = toy_task(root, layout=Layout(data=2), evaluations=4)
    toy = Toy(task, saver=ToySaver(faults=faults if dist.get_rank() == 0 else 0))
    if stop_rank is not None:
        act = lambda step: toy.stop.request("signal") if dist.get_rank() == stop_rank and step == 9 else None  # noqa: E731
        toy.engine.before_step = act
    result = toy.train()
    return result, toy.rows.asked, toy.events, os.getpid()


def test_two_ranks_share_the_work_agree_on_the_end_and_one_reports(tmp_path):
    (first, rows_first, events, _), (second, rows_second, silent, _) = run_ranks(_two_ranks, 2, str(tmp_path), None, 0)
    assert sorted(rows_first + rows_second) == list(range(20 * GLOBAL_BATCH))
    assert set(rows_first).isdisjoint(rows_second)
    assert (first.progress, first.reason, first.checkpoint) == (second.progress, "budget", second.checkpoint)
    assert first.validation_loss == second.validation_loss
    assert silent == []
    assert [fields["step"] for kind, fields in events if kind == "step"] == list(range(1, 21))


@pytest.mark.parametrize("stop_rank", [0, 1])
def test_a_signal_to_any_rank_stops_all_of_them_at_the_same_step(tmp_path, stop_rank):
    results = run_ranks(_two_ranks, 2, str(tmp_path), stop_rank, 0)
    assert [(result.reason, result.progress.step) for result, *_ in results] == [("signal", 9)] * 2


def test_a_write_that_fails_on_one_rank_only_fails_on_all(tmp_path):
    (first, _, events, _), (second, *_) = run_ranks(_two_ranks, 2, str(tmp_path), None, 1)
    assert [fields["step"] for kind, fields in events if kind == "checkpoint_failed"] == [5]
    assert first.progress == second.progress
    assert CheckpointStore(tmp_path).newest().step == 20
