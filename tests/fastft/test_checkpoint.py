import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastft.checkpoint import TrainState, find_checkpoint, folders, identity, manifest, streams
from fastft.durable import file_sha256, together, write_json

CHECKS = [
    *(f"stage {stage}{kind}" for stage in range(4) for kind in ("", ", LoRA")),
    *(f"resume without {part}" for part in ("random streams", "optimizer", "schedule")),
    *(f"other stage, {kind}" for kind in ("fp32", "bf16", "fp32, LoRA")),
    *("NaN, stage 0, bf16, adamw_8bit", "NaN, stage 1, bf16, adamw_torch", "NaN, stage 2, fp32, adamw_torch"),
    *("NaN, stage 3, bf16, adamw_8bit", "NaN, stage 0, fp32, adamw_torch", "NaN, stage 3, fp32, adamw_torch"),
    *("refusals", "another base model", "rotation"),
    *("disk full on rank 0", "disk full on rank 1", "disk full during export"),
    *("separate disks, stage 0", "separate disks, stage 3"),
    *("reading once, stage 2", "reading once, stage 3"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What checkpoint_checks.py found on two ranks: {check: None or an error}."""
    out = tmp_path_factory.mktemp("checks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("checkpoint_checks.py")), str(out)]
    processes = []
    try:
        for rank in range(2):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(out / f"rank-{rank}.log", "w") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "\n".join((out / f"rank-{rank}.log").read_text()[-3000:] for rank in range(2))
    return json.loads((out / "outcomes.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(outcomes, check):
    assert outcomes.keys() == set(CHECKS)
    assert outcomes[check] is None, outcomes[check]


def finished(folder, serial):
    folder.mkdir(parents=True)
    (folder / ".disk").write_text("0")
    manifest.write_manifest(folder, {}, {"world_size": 1}, serial)
    return folder


def test_auto_finds_the_checkpoint_written_last_among_complete_ones(tmp_path):
    assert find_checkpoint(tmp_path / "absent", "auto") is None
    assert find_checkpoint(tmp_path, "auto") is None
    finished(tmp_path / "step-000020", serial=1)
    last = finished(tmp_path / "step-000010", serial=2)
    finished(tmp_path / ".step-000030.0123abcd", serial=3)
    (tmp_path / "step-000040").mkdir()
    assert find_checkpoint(tmp_path, "auto") == last


def test_a_checkpoint_asked_for_must_be_complete(tmp_path):
    assert find_checkpoint(tmp_path, None) is None
    assert find_checkpoint("elsewhere", str(finished(tmp_path / "mine", serial=1))) == tmp_path / "mine"
    (tmp_path / "step-000040").mkdir()
    with pytest.raises(ValueError, match="--resume_from_checkpoint .*step-000040: no complete checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path / "step-000040"))
    with pytest.raises(ValueError, match="--resume_from_checkpoint .*step-000050: no such folder"):
        find_checkpoint(tmp_path, str(tmp_path / "step-000050"))


FACTS = {"dtype": "float32", "optimizer": "AdamW"}


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"optimizer": "SGD"}, "optimizer SGD there, AdamW in this run; resume with the same --optim"),
        ({"parameters": {"a": "[2]"}}, "of another model: a is [2] there and [2, 3] in this run"),
        ({"parameters": {"a": "[2, 3] frozen"}}, "of another model: a is [2, 3] frozen there and [2, 3] in this run"),
        ({"parameters": {"a": "[2, 3]", "b": "[1]"}}, "of another model: b is [1] there and absent in this run"),
    ],
)
def test_refusals_say_what_differs(change, sentence):
    run = {**FACTS, "parameters": {"a": "[2, 3]"}}
    identity.check_same("here", run, run)
    with pytest.raises(ValueError) as error:
        identity.check_same("here", {**run, **change}, run)
    assert str(error.value) == f"checkpoint here: {sentence}"


def test_random_streams_continue_exactly(tmp_path):
    """Also in the middle of a pair: both generators of normal numbers keep the second one for the next call."""
    draw = lambda: [random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand(), *torch.randn(3).tolist()]
    random.gauss(0, 1), np.random.randn(), torch.randn(1)
    state = streams.rank_state(None)
    (tmp_path / "rank-00000.safetensors").write_bytes(state)
    expected = draw()
    saved, _ = streams.load_rank(tmp_path, 0, 1)
    draw()
    streams.restore_streams(saved)
    assert draw() == expected


def test_the_frozen_checksum_notices_one_bit_and_ignores_trained_weights():
    layer = torch.nn.Linear(3, 5).bfloat16()
    layer.weight.requires_grad_(False)
    before = identity.frozen_checksum(layer)
    with torch.no_grad():
        layer.bias += 1
        assert identity.frozen_checksum(layer) == before
        layer.weight.view(torch.int16)[4, 2] ^= 1
    assert identity.frozen_checksum(layer) != before


def test_state_survives_json():
    state = TrainState(step=3, best_metric=0.1, best_step=2, seconds=1 / 3, recent_loss=[0.2, 1])
    assert TrainState(**json.loads(json.dumps(vars(state)))) == state


def test_json_is_whole_or_as_before(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_errors_name_what_failed():
    with pytest.raises(OSError, match="^saving: rank 0: .*No space left"), together("saving"):
        raise OSError(28, "No space left on device")
    with pytest.raises(RuntimeError, match="^saving: rank 0: KeyError: 'x'$"), together("saving"):
        {}["x"]
    with pytest.raises(ValueError, match="^what a user reads$"), together("saving"):
        raise ValueError("what a user reads")


# Damage: every file of a checkpoint, in every way, is refused by name, and the checkpoint before it is used


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory, tiny_llama, sums_file):
    from fastft.arguments import Arguments
    from fastft.train import train

    out = tmp_path_factory.mktemp("damage")
    files = {"model_name_or_path": tiny_llama, "train_file": sums_file, "output_dir": str(out), "report_to": ["none"]}
    train(Arguments(**files, max_steps=2, save_steps=1, zero_stage=2, bf16=True))
    return out / "checkpoints"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink], ids=lambda f: f.__name__)
def test_damage_is_named_and_the_checkpoint_before_is_used(two_checkpoints, tmp_path, capsys, damage):
    good, last = two_checkpoints / "step-000001", two_checkpoints / "step-000002"
    names = sorted(path.relative_to(last) for path in last.rglob("*") if path.is_file())
    assert len(names) == 5, names
    for name in names:
        copy = tmp_path / name.name
        shutil.copytree(two_checkpoints, copy)
        assert find_checkpoint(copy, "auto", verify="full") == copy / last.name
        damage(copy / last.name / name)
        assert find_checkpoint(copy, "auto", verify="full") == copy / good.name
        assert f"{copy / last.name} cannot be used and is skipped: " in (told := capsys.readouterr().err)
        assert str(name) in told
        with pytest.raises(ValueError, match=rf"^--resume_from_checkpoint .*: .*{name.name}"):
            find_checkpoint(copy, str(copy / last.name), verify="full")
        if damage is not flip or (last / name).stat().st_size <= manifest.SMALL:
            assert find_checkpoint(copy, "auto") == copy / good.name
        capsys.readouterr()


def test_rotation_spares_the_last_good_one_and_the_best(two_checkpoints, tmp_path):
    copy = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, copy)
    for step in (3, 4):
        shutil.copytree(copy / "step-000002", copy / f"step-00000{step}")
        empty(copy / f"step-00000{step}" / "state.json")
    folders.rotate(copy / "step-000002", 1, best_step=1)
    assert sorted(path.name for path in copy.iterdir()) == ["latest", "step-000001", "step-000002"]


def test_all_broken_starts_anew_and_says_so(two_checkpoints, tmp_path, capsys):
    copy = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, copy)
    for path in copy.glob("step-*/manifest.json"):
        empty(path)
    assert find_checkpoint(copy, "auto") is None
    assert "the run starts from the beginning" in capsys.readouterr().err


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb-went-off",)


def test_no_pickle_of_a_checkpoint_is_executed(two_checkpoints, tmp_path, monkeypatch, tiny_llama, sums_file):
    """Even where the attacker wrote a manifest that fits."""
    from fastft.arguments import Arguments
    from fastft.train import train

    monkeypatch.chdir(tmp_path)
    shutil.copytree(two_checkpoints.parent, tmp_path / "out")
    step = tmp_path / "out" / "checkpoints" / "step-000002"
    shard = next(step.rglob("*optim_states.pt"))
    torch.save({"optimizer_state_dict": Bomb()}, shard)
    content = json.loads((step / "manifest.json").read_text())
    del content["sha256"]
    name = shard.relative_to(step).as_posix()
    content["files"][name] = {"bytes": shard.stat().st_size, "sha256": file_sha256(shard)}
    write_json(step / "manifest.json", {**content, "sha256": manifest.digest(content)})
    files = {"model_name_or_path": tiny_llama, "train_file": sums_file, "output_dir": "out", "report_to": ["none"]}
    with pytest.raises(ValueError, match="holds what is no training state"):
        train(Arguments(**files, max_steps=2, zero_stage=2, bf16=True, resume_from_checkpoint="auto"))
    assert not (tmp_path / "bomb-went-off").exists()
    torch.load(shard, weights_only=False)
    assert (tmp_path / "bomb-went-off").exists(), "the bomb is a dud"
