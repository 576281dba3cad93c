"""What ends a run from outside: signals, a rank that fails, ranks that wait for ever, and another number of ranks next time."""

import json
import re
import signal

import pytest

from fastft.checkpoint import find_checkpoint

pytestmark = pytest.mark.distributed
TERM, INT, USR1 = int(signal.SIGTERM), int(signal.SIGINT), int(signal.SIGUSR1)


@pytest.fixture(scope="module")
def outcomes(run_killed, run_arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("interruptions")
    hook = lambda *hook: {"hook": ["in_backward", *hook]}
    two, one = {}, {"ranks": 1}
    cases = {
        "whole": [two],
        "whole, stage 2": [two],
        "SIGTERM": [hook(1, 10, "signals", TERM), two],  # to one rank only, in step 5
        "SIGINT": [hook(0, 11, "signals", INT), two],  # in step 6, after which an evaluation and a save are due
        "SIGUSR1": [hook(1, 10, "signals", USR1)],
        "twice": [hook(0, 10, "signals", TERM, TERM), two],
        "bug": [hook(1, 10, "fail")],
        "stuck": [hook(1, 10, "hang")],
        "ranks": [{"hook": ["kill_in_backward", 1, 5]}, {"hook": ["kill_in_backward", 0, 9], **one}, two],
        "stages": [{"hook": ["kill_in_backward", 1, 5]}, {"hook": ["kill_in_backward", 0, 5]}, two],
        "indivisible": [{"hook": ["kill_in_backward", 1, 5]}, one],
        "other data": [{"hook": ["kill_in_backward", 1, 5]}, two],
        "full disk": [{"hook": ["full_disk", 2]}],
    }
    more = {
        "whole, stage 2": [{"layout": (2, "none")}],
        "ranks": [{"layout": (2, "none")}] * 3,
        "stages": [{"layout": (stage, "none")} for stage in (1, 3, 2)],
        "stuck": [{"ddp_timeout": 4}],
        "indivisible": [{}, {"per_device_train_batch_size": 3}],
        "other data": [{}, {"max_train_samples": 50}],
        "full disk": [{"save_steps": 1, "save_total_limit": 8, "on_save_error": "continue", "layout": (2, "none")}],
    }
    for name, launches in cases.items():
        options = more.get(name, [{}] * len(launches))
        cases[name] = [
            {"arguments": run_arguments(out / name, **each), **launch}
            for launch, each in zip(launches, options, strict=True)
        ]
    return run_killed(cases, out)


def losses(outcome, name="loss"):
    assert set(outcome["launches"][-1]["codes"]) == {0}, outcome["launches"][-1]["output"]
    lines = map(json.loads, (outcome["folder"] / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize(("name", "step"), [("SIGTERM", 5), ("SIGINT", 6)])
def test_a_signal_to_one_rank_saves_and_stops_all(outcomes, name, step):
    stopped, resumed = outcomes[name]["launches"]
    assert stopped["codes"] == [75, 75]
    assert f"stopped: after step {step} of 8; --resume_from_checkpoint auto goes on" in stopped["output"]
    assert f"resumed    after step {step}" in resumed["output"]
    assert losses(outcomes[name]) == losses(outcomes["whole"])
    assert losses(outcomes[name], "eval_loss") == losses(outcomes["whole"], "eval_loss")


def test_a_signal_can_ask_for_a_checkpoint_only(outcomes):
    assert losses(outcomes["SIGUSR1"]) == losses(outcomes["whole"])
    kept = {path.name for path in (outcomes["SIGUSR1"]["folder"] / "checkpoints").iterdir()}
    assert kept == {"latest", "step-000006", "step-000008"}
    assert outcomes["SIGUSR1"]["launches"][0]["output"].count("checkpoint step-000005") == 1


def test_a_second_signal_ends_it_now(outcomes):
    ended, resumed = outcomes["twice"]["launches"]
    assert ended["codes"] == [128 + TERM, 1] and "again: ending now, without a checkpoint" in ended["output"]
    assert "resumed    after step 4" in resumed["output"]
    assert losses(outcomes["twice"]) == losses(outcomes["whole"])


def test_a_rank_that_fails_speaks_first_and_takes_the_others_along(outcomes):
    launch = outcomes["bug"]["launches"][0]
    assert launch["codes"] == [1, 1], "within 20 s, or rank 0 would have been killed"
    told, lost = launch["output"].index("a bug in the middle of a step"), launch["output"].index("rank 0: another rank")
    assert told < lost and "Traceback" in launch["output"][:told]


def test_ranks_that_wait_for_ever_show_where_they_stand(outcomes):
    launch = outcomes["stuck"]["launches"][0]
    assert launch["codes"] == [1, 1]
    # On a busy machine the first to give up may end before the other does, whose connection is then lost.
    assert any(f"rank {rank}: no progress for 4 s (--ddp_timeout)" in launch["output"] for rank in range(2))
    assert "in hang" in launch["output"] or "all_reduce" in launch["output"]


def test_another_number_of_ranks(outcomes):
    """2 -> 1 -> 2: the steps meet the same examples, and the losses differ by the order of sums only."""
    _, alone, back = outcomes["ranks"]["launches"]
    assert "resumed    after step 2" in alone["output"] and "resumed    after step 4" in back["output"]
    found, whole = losses(outcomes["ranks"]), losses(outcomes["whole"])
    assert found[:3] == pytest.approx(whole[:3], rel=1e-6) and found == pytest.approx(whole, rel=1e-4)


def test_another_stage(outcomes):
    found, whole = losses(outcomes["stages"]), losses(outcomes["whole"])
    assert found[:3] == pytest.approx(whole[:3], rel=1e-6) and found == pytest.approx(whole, rel=1e-4)


def test_what_would_lose_the_place_in_the_data_is_refused(outcomes):
    refused = outcomes["indivisible"]["launches"][1]
    assert refused["codes"] == [2] and "a step there has 16 examples, which 1 ranks cannot make" in refused["output"]
    refused = outcomes["other data"]["launches"][1]
    assert refused["codes"] == [2, 2]
    assert refused["output"].count("training examples 61 there, 50 in this run") == 1  # said once, not by each rank


def test_a_disk_that_is_full_at_random_points_loses_nothing(outcomes):
    """Failed saves are told and leave nothing behind; those that are there are good; training does not notice."""
    told = outcomes["full disk"]["launches"][0]["output"]
    assert losses(outcomes["full disk"]) == losses(outcomes["whole, stage 2"])
    failed = set(re.findall(r"checkpoint .*/(step-\d+) was not written \(earlier ones are kept\): rank [01]: ", told))
    checkpoints = outcomes["full disk"]["folder"] / "checkpoints"
    kept = {path.name for path in checkpoints.iterdir()} - {"latest"}
    assert failed and kept - failed, f"the draw was not fair: {told}"
    assert kept == {f"step-{step:06d}" for step in range(1, 9)} - failed
    assert all(find_checkpoint(checkpoints, str(checkpoints / name), verify="full") for name in kept)
