"""Whole runs with the megatron engine: from a task to a checkpoint, through stops, kills and full disks."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from parallelism.budget import Budget
from parallelism.checkpoint_store import CheckpointStore, read_info
from parallelism.layout import Layout
from parallelism.run import check_task, continued, read_task, step_cost
from parallelism.training import CheckpointPolicy
from tests.parallelism.real_runs import (
    STEP_TOKENS,
    assert_same_bits,
    losses,
    made_data,
    made_task,
    resumed,
    run_all,
    run_once,
    run_until_killed,
    run_with_a_writer_that_hangs,
)
from tests.ranks import Died, run_ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return made_data(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    """Layout → result and events of a run that nothing happens to, made once."""
    made = {}

    def run(layout):
        if layout not in made:
            task = made_task(data, tmp_path_factory.mktemp("undisturbed"), layout=layout)
            made[layout] = run_ranks(run_once, layout.world_size, task)[0]
        return made[layout]

    return run


def of(events, kind):
    return [fields for found, fields in events if found == kind]


# What a run says and leaves behind


def test_a_run_trains_reports_and_leaves_a_checkpoint(tmp_path, data):
    task = made_task(data, tmp_path / "deep" / "root", steps=40, dropout=0.0)
    ((result, events),) = run_ranks(run_once, 1, task)
    (start,) = of(events, "start")
    flops_per_token = 3 * task.model.forward_flops(32) / 32
    assert start == {
        "step": 0,
        "resumed_from": None,
        "parameters": task.model.parameter_count(),
        "flops_per_token": flops_per_token,
        "world_size": 1,
    }
    steps = of(events, "step")
    assert steps[-1]["tokens"] == 40 * STEP_TOKENS
    assert steps[-1]["flops"] == pytest.approx(40 * STEP_TOKENS * flops_per_token)
    for step in steps:
        assert step["tokens_per_second"] == pytest.approx(STEP_TOKENS / step["seconds"])
        assert 0 < step["mfu"] < 1.5
    assert steps[0]["loss"] == pytest.approx(5.55, abs=0.5)  # ln 257
    assert steps[-1]["loss"] < 0.75 * steps[0]["loss"]
    evaluations = of(events, "evaluation")
    assert [evaluation["step"] for evaluation in evaluations] == [14, 27, 40]
    assert evaluations[-1]["validation_loss"] == result.validation_loss == pytest.approx(steps[-1]["loss"], rel=0.3)
    assert of(events, "finished")[0]["checkpoint"] == result.checkpoint
    info = read_info(result.checkpoint)
    assert (info.step, info.model, info.progress) == (40, task.model, result.progress)
    assert result.peak_memory_bytes > result.baseline_memory_bytes > 50e6
    json.dumps([events, result.model_dump(mode="json")])


@pytest.mark.parametrize("steps", [1, 3.7])
def test_a_budget_in_flops_is_never_exceeded(tmp_path, data, steps):
    task = made_task(data, tmp_path)
    cost = step_cost(task)
    limited = task.model_copy(update={"budget": Budget(flops=steps * cost.flops)})
    ((result, _),) = run_ranks(run_once, 1, limited)
    assert result.progress.step == int(steps)
    assert 0 <= limited.budget.limit - result.progress.flops < cost.flops


# The same bits after every mishap; dropout makes the random states matter


@pytest.mark.parametrize(
    ("layout", "asynchronous"),
    [
        ({}, True),
        ({"tensor": 2}, True),
        ({"tensor": 2}, False),
        ({"data": 2}, True),
        ({"data": 2}, False),
        ({"pipeline": 2, "virtual_pipeline": 2}, True),
        ({"engine": "lean"}, True),
    ],
    ids=str,
)
def test_stopped_at_a_random_step_and_resumed_a_run_ends_with_the_same_bits(
    tmp_path, data, undisturbed, layout, asynchronous
):
    layout, stop_at = Layout(**layout), random.Random(f"{layout}{asynchronous}").randrange(1, 12)
    task = made_task(data, tmp_path, layout=layout, checkpoint=CheckpointPolicy(steps=3, asynchronous=asynchronous))
    expected, events = undisturbed(layout)
    paused, before = run_ranks(run_once, layout.world_size, task, stop_at)[0]
    assert (paused.reason, paused.progress.step) == ("pause", stop_at)
    result, after = run_ranks(run_once, layout.world_size, resumed(task))[0]
    assert result.progress == expected.progress
    assert_same_bits(result.checkpoint, expected.checkpoint)
    assert losses(before) | losses(after) == losses(events)
    assert result.validation_loss == expected.validation_loss
    rates = {fields["step"]: fields["learning_rate"] for fields in of(before, "step") + of(after, "step")}
    assert rates == {fields["step"]: fields["learning_rate"] for fields in of(events, "step")}


def test_evaluation_changes_nothing_in_training(tmp_path, data):
    tasks = [made_task(data, tmp_path / str(count), evaluations=count) for count in (0, 12)]
    ((without, _), (with_them, events)) = run_ranks(run_all, 1, tasks)[0]
    assert len(of(events, "evaluation")) == 11  # the budget is twelve steps and a half
    assert without.validation_loss is None
    assert_same_bits(without.checkpoint, with_them.checkpoint)


def test_killed_ranks_cost_the_work_since_the_last_checkpoint_and_no_bit(tmp_path, data, undisturbed):
    expected, _ = undisturbed(Layout(data=2))
    task, begun_at = made_task(data, tmp_path, layout=Layout(data=2)), []
    for rank, step in ((0, 5), (1, 8), (1, 12)):
        results = run_ranks(run_until_killed, 2, task, rank, step, deaths=True)
        assert results == [Died(-signal.SIGKILL)] * 2
        task = resumed(task) if CheckpointStore(tmp_path).newest() else task
        begun_at.append(read_info(task.resume_from).step if task.resume_from else 0)
    result, events = run_ranks(run_once, 2, task)[0]
    assert begun_at[0] in (0, 3)
    assert begun_at[-1] in (6, 9)
    assert of(events, "step")[0]["step"] == begun_at[-1] + 1
    assert result.progress == expected.progress
    assert_same_bits(result.checkpoint, expected.checkpoint)
    assert [path for path in tmp_path.iterdir() if not (path / "manifest.json").exists()] == []


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "blocking"])
def test_a_disk_that_is_full_for_a_while_costs_checkpoints_only(tmp_path, data, undisturbed, asynchronous):
    policy = CheckpointPolicy(steps=2, asynchronous=asynchronous)
    task = made_task(data, tmp_path, layout=Layout(data=2), checkpoint=policy)
    expected, _ = undisturbed(Layout(data=2))
    result, events = run_ranks(run_once, 2, task, None, (0, 2))[0]
    failed = of(events, "checkpoint_failed")
    assert [(fields["step"], fields["attempt"]) for fields in failed] == [(2, 1), (4, 2)]
    assert "rank 0" in failed[0]["error"]
    assert [fields["step"] for fields in of(events, "checkpoint")] == [6, 8, 10, 12]
    assert_same_bits(result.checkpoint, expected.checkpoint)


def test_a_writing_process_that_hangs_costs_one_checkpoint(tmp_path, data, undisturbed):
    task = made_task(data, tmp_path, layout=Layout(tensor=2), checkpoint=CheckpointPolicy(steps=2))
    expected, _ = undisturbed(Layout(tensor=2))
    result, events = run_ranks(run_with_a_writer_that_hangs, 2, task, 1)[0]
    (failed,) = of(events, "checkpoint_failed")
    assert failed["step"] == 2
    assert "rank 1: the writing process did nothing for 3 s and was ended" in failed["error"]
    written = [(fields["step"], fields["asynchronous"]) for fields in of(events, "checkpoint")]
    assert written == [(4, False), (6, True), (8, True), (10, True), (12, False)]
    assert_same_bits(result.checkpoint, expected.checkpoint)


def test_a_run_goes_on_at_another_layout(tmp_path, data):
    undisturbed = made_task(data, tmp_path / "undisturbed", dropout=0.0, layout=Layout(tensor=2))
    expected, events = run_ranks(run_once, 2, undisturbed)[0]
    moved = made_task(data, tmp_path / "moved", dropout=0.0, layout=Layout(tensor=2))
    run_ranks(run_once, 2, moved, 5)
    rest = {step: loss for step, loss in losses(events).items() if step > 5}
    elsewhere = {
        "one process": Layout(),
        "pipeline": Layout(pipeline=2),
        "zero-1": Layout(data=2, engine="deepspeed", zero_stage=1),
    }
    for name, layout in elsewhere.items():
        root = tmp_path / name
        shutil.copytree(tmp_path / "moved", root)
        task = resumed(moved.model_copy(update={"checkpoint_dir": str(root)})).model_copy(update={"layout": layout})
        result, after = run_ranks(run_once, layout.world_size, task)[0]
        assert result.progress == expected.progress
        assert losses(after).keys() == rest.keys()
        print(f"{name}: {max(abs(losses(after)[step] - rest[step]) for step in rest):.1e}")  # shown by pytest -rP
        assert losses(after) == pytest.approx(rest, abs=1e-4)
        assert result.validation_loss == pytest.approx(expected.validation_loss, abs=1e-4)


def _diverge(task):
    from parallelism.result import DivergedError

    try:
        run_once(task)
    except DivergedError as error:
        return error.step, error.checkpoint
    return None


def test_a_run_that_diverges_says_so_on_every_rank(tmp_path, data):
    task = made_task(data, tmp_path, layout=Layout(tensor=2), checkpoint=CheckpointPolicy(steps=1), steps=30)
    wild = task.training.model_copy(update={"learning_rate": 1e30, "warmup_fraction": 0.0, "gradient_clip": 0.0})
    first, second = run_ranks(_diverge, 2, task.model_copy(update={"training": wild}))
    assert first == second
    step, checkpoint = first
    newest = CheckpointStore(tmp_path).newest()
    assert (step - 1, checkpoint) == (newest.step, str(newest.path))


# torchrun


def _torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "parallelism.run", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_under_torchrun_sigterm_makes_a_checkpoint_and_the_run_can_be_continued(tmp_path, data):
    task = made_task(
        data, tmp_path / "root", layout=Layout(data=2), steps=120, checkpoint=CheckpointPolicy(seconds=600)
    )
    file = tmp_path / "task.json"
    file.write_text(task.model_dump_json(), encoding="utf-8")
    agent = _torchrun(str(file))
    try:
        seen = []
        for line in agent.stdout:
            seen.append(json.loads(line))
            if seen[-1]["event"] == "step" and seen[-1]["step"] == 3:
                agent.send_signal(signal.SIGTERM)
        agent.wait(timeout=300)
    finally:
        agent.kill()
    assert (seen[-1]["event"], seen[-1]["reason"]) == ("finished", "signal")
    stopped_at = seen[-1]["step"]
    assert 3 <= stopped_at < 120
    agent = _torchrun(str(file), "--continue")
    output, errors = agent.communicate(timeout=300)
    assert agent.returncode == 0, errors
    after = [json.loads(line) for line in output.splitlines()]
    assert (after[0]["event"], after[0]["step"]) == ("start", stopped_at)
    assert (after[-1]["reason"], after[-1]["step"]) == ("budget", 120)
    assert after[-1]["device_seconds"] > seen[-1]["device_seconds"] * 0.5
    expected, _ = run_ranks(run_once, 2, task.model_copy(update={"checkpoint_dir": str(tmp_path / "other")}))[0]
    assert_same_bits(after[-1]["checkpoint"], expected.checkpoint)


# Tasks that cannot run


def changed(task, **fields):
    training = {name: fields.pop(name) for name in list(fields) if name in type(task.training).model_fields}
    return task.model_copy(update={"training": task.training.model_copy(update=training), **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layout": Layout(engine="magic")}, r"layout\.engine 'magic' is unknown: available are .*megatron"),
        ({"layout": Layout(tensor=2)}, r"needs 2 ranks, but the process group has 1: change the layout"),
        ({"learning_rate": "auto"}, r"training\.learning_rate is auto: give a value"),
        ({"precision": "auto"}, r"training\.precision is auto"),
        ({"micro_batch": 3}, r"global_batch 8 is not a multiple of micro_batch 3 × layout\.data 1"),
        ({"budget": Budget(tokens=255)}, r"budget\.tokens 255 is smaller than one step, which takes 256: raise it"),
        ({"budget": Budget(flops=10)}, r"budget\.flops 10 is smaller than one step"),
        ({"budget": Budget(cost=10)}, r"budget\.cost needs price_per_device_hour"),
    ],
)
def test_a_task_that_cannot_run_is_refused_with_a_remedy(tmp_path, data, fields, message):
    task = made_task(data, tmp_path)
    check_task(task, 1)
    with pytest.raises(ValueError, match=message):
        check_task(changed(task, **fields), 1)


def test_a_task_survives_its_json(tmp_path, data):
    task = made_task(data, tmp_path / "root")
    (tmp_path / "task.json").write_text(task.model_dump_json(), encoding="utf-8")
    assert read_task(tmp_path / "task.json") == task
    assert type(read_task(tmp_path / "task.json").model) is type(task.model)
    assert continued(task) == task


@pytest.mark.parametrize("text", ["[]", "{}", '{"model": {"family": "gpt"}}', "{"])
def test_a_file_that_is_no_task_is_a_value_error(tmp_path, text):
    (tmp_path / "task.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"."):
        read_task(tmp_path / "task.json")
