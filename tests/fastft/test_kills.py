"""Kill it at any instant, start it again, and get the run you would have had: the same losses bit for bit, the same weights.

A case kills one of two ranks at a point of the save protocol, in a micro-batch, in an evaluation or while loading, and
starts the run again with `--resume_from_checkpoint auto`. `make test` runs a cover of 21 cases, `make reliability`
(FASTFT_MATRIX=full) all 294 of points, ranks, layouts and optimizers. Every launch comes from one process, see
kill_cases.py.
"""

import hashlib
import itertools
import json
import os

import pytest

pytestmark = pytest.mark.distributed
FULL = os.environ.get("FASTFT_MATRIX") == "full"
OPTIMIZERS = ("adamw_torch", "adamw_8bit")
LAYOUTS = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (1, "cpu"), (2, "cpu"), (3, "cpu")]
KINDS = ("fp32", "bf16", "lora")  # LoRA with dropout, whose masks come from the random streams
SAVING = ("before_shard", "mid_shard", "after_shard", "before_manifest", "before_rename", "before_latest")
POINTS = (*SAVING, "during_rotation", "during_load", "micro-batch", "accumulation", "evaluation")
RANKS = (0, 1)


def pairwise(*axes, allowed=lambda *_: True):
    """Few combinations in which any two values of different axes meet, chosen greedily and always the same."""
    everything = [c for c in itertools.product(*axes) if allowed(*c)]
    pairs = lambda c: {(i, c[i], j, c[j]) for i, j in itertools.combinations(range(len(c)), 2)}
    missing, chosen = set().union(*map(pairs, everything)), []
    while missing:
        best = max(everything, key=lambda c: len(pairs(c) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def allowed(point, rank, layout, kind, optimizer):
    return point != "during_rotation" or rank == 0  # one rank of each disk removes


if FULL:  # every point with every rank, layout and optimizer; the kinds go round
    CASES = [
        (point, rank, layout, KINDS[i % len(KINDS)], optimizer)
        for i, (point, rank, layout, optimizer) in enumerate(itertools.product(POINTS, RANKS, LAYOUTS, OPTIMIZERS))
        if allowed(point, rank, layout, None, optimizer)
    ]
else:  # every point meets every rank, every layout each kind of weights and each rank; not every point every layout
    CASES = pairwise(POINTS, RANKS, allowed=lambda point, rank: allowed(point, rank, *[None] * 3))
    AROUND = pairwise(LAYOUTS, KINDS[1:], OPTIMIZERS)
    CASES = [(*case, *AROUND[(3 * i) % len(AROUND)]) for i, case in enumerate(CASES)]
RUNS = sorted({(layout, kind, optimizer) for _, _, layout, kind, optimizer in CASES})
SHARED = next(run for run in RUNS if run[1:] == ("lora", "adamw_8bit") and run[0][0] > 0)  # has all that can be dropped
DROPPED = ("random streams", "schedule", "optimizer", "data position", "scales")


def name_of(case):
    return "-".join("".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in case)


def killed(point, rank, layout):
    """The launches (without arguments) of which the last one finishes."""
    hooks = {
        "micro-batch": {"hook": ["kill_in_backward", rank, 10]},  # the second of step 5, after a save
        "accumulation": {"hook": ["kill_in_backward", rank, 11]},  # the first of two in step 6
        "evaluation": {"hook": ["kill_in_evaluation", rank, 2]},  # after step 6, in the middle of an epoch
    }
    if point in hooks:
        return [hooks[point], {}]
    fault = {"environment": {"FASTFT_FAULT_POINT": f"{point}:rank{rank}"}}
    if point == "during_load":
        return [hooks["accumulation"], fault, {}]
    if point == "during_rotation":
        return [fault, {}]
    files = 1  # in the second save, whatever the point; a rank passes mid_shard once in each file
    if point == "mid_shard":
        files = {0: (3, 1), 1: (4, 2), 2: (4, 2), 3: (4, 3)}[layout[0]][rank]  # rank 0's state.json is one
    fault["environment"]["FASTFT_FAULT_POINT"] += f":{files + 1}"
    return [fault, {}]


@pytest.fixture(scope="module")
def outcomes(run_killed, run_arguments, tmp_path_factory):
    """{case: [outcome of each launch]} with the folder of each run."""
    out = tmp_path_factory.mktemp("kills")
    cases = {}
    for run in RUNS:
        folder = out / f"whole-{name_of(run)}"
        cases[f"whole-{name_of(run)}"] = [{"arguments": run_arguments(folder, *run)}]
    for case in CASES:
        point, rank, *run = case
        folder = out / name_of(case)
        cases[name_of(case)] = [
            {"arguments": run_arguments(folder, *run), **launch} for launch in killed(point, rank, run[0])
        ]
    for what in DROPPED:
        launches = [{"hook": ["kill_in_backward", 0, 10]}, {"hook": ["drop", what]}]
        cases[f"drop-{what}"] = [{"arguments": run_arguments(out / f"drop-{what}", *SHARED), **la} for la in launches]
    twice = [{"hook": ["kill_in_backward", 1, 9]}, {"hook": ["kill_in_backward", 0, 5]}, {}]
    cases["twice"] = [{"arguments": run_arguments(out / "twice", *SHARED), **launch} for launch in twice]
    return run_killed(cases, out)


def history(outcome):
    """Everything that a run's metrics.jsonl says, but for the time it took."""
    last = outcome["launches"][-1]
    assert set(last["codes"]) == {0}, last["output"]
    timed = ("seconds", "tokens_per_second", "samples_per_second", "peak_memory_bytes")
    lines = (outcome["folder"] / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def weights(outcome):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in outcome["folder"].glob("*.safetensors")}


# 8 steps of 4 an epoch, a checkpoint every other step, of which two stay, so the third save rotates
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_killed_run_is_the_run_it_would_have_been(outcomes, case):
    point, rank, *run = case
    outcome, whole = outcomes[name_of(case)], outcomes[f"whole-{name_of(run)}"]
    first, last = outcome["launches"][0], outcome["launches"][-1]
    assert first["codes"][rank] == -9, f"nothing was killed: {first}"
    assert first["codes"][1 - rank] not in (0, -9), f"the other rank was still there 20 s later, or went on: {first}"
    assert "resumed    after step" in last["output"], last["output"]
    assert history(outcome) == history(whole)
    assert weights(outcome) == weights(whole)
    kept = sorted(path.name for path in (outcome["folder"] / "checkpoints").iterdir())
    assert kept == ["latest", "step-000006", "step-000008"]


def test_killed_twice(outcomes):
    first, second, _ = outcomes["twice"]["launches"]
    assert (first["codes"][1], second["codes"][0]) == (-9, -9)
    assert history(outcomes["twice"]) == history(outcomes[f"whole-{name_of(SHARED)}"])


@pytest.mark.parametrize("what", DROPPED)
def test_a_restore_that_drops_a_part_is_noticed(outcomes, what):
    """Otherwise the equalities above would prove nothing."""
    outcome = outcomes[f"drop-{what}"]
    assert outcome["launches"][0]["codes"][0] == -9
    assert len(history(outcome)) == len(history(outcomes[f"whole-{name_of(SHARED)}"]))
    assert history(outcome) != history(outcomes[f"whole-{name_of(SHARED)}"]), (
        f"nobody noticed that {what} was not restored"
    )


def test_the_cover_is_pairwise():
    cover = pairwise("abc", "xy", "12", allowed=lambda a, b, c: (a, b) != ("a", "x"))
    for left, right in itertools.combinations(zip(("abc", "xy", "12"), range(3), strict=True), 2):
        met = {(c[left[1]], c[right[1]]) for c in cover}
        assert met == set(itertools.product(left[0], right[0])) - {("a", "x")}
