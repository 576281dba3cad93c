"""AdamW8bit and Lion8bit as optimizers: state, groups, resuming, refusals; under DeepSpeed; in other people's loops."""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from fastft.arguments import Arguments
from fastft.engine import choose_optimizer, deepspeed_config
from fastft.optim import AdamW, AdamW8bit, Lion8bit, ReplicatedAdamW8bit, parameter_groups

SHAPES = [(7, 50), (300,), (1,), (0,), (16, 32)]


def tensors(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in SHAPES]


def run(optimizer, params, steps):
    for step in steps:
        g = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("make", [AdamW8bit, Lion8bit, ReplicatedAdamW8bit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("code", ["companded", "dynamic"])
def test_resume_is_bit_exact(make, dtype, code):
    whole = tensors(dtype)
    optimizer = make(groups(whole), lr=1e-2, code=code)
    run(optimizer, whole, range(6))
    saved = copy.deepcopy(optimizer.state_dict())
    second = [p.detach().clone().requires_grad_() for p in whole]
    resumed = make(groups(second), lr=1e-2, code=code)
    resumed.load_state_dict(saved)
    run(optimizer, whole, range(6, 12)), run(resumed, second, range(6, 12))
    assert all(torch.equal(x, y) for x, y in zip(whole, second, strict=True))
    for p in second:
        kinds = {k: v.dtype for k, v in resumed.state[p].items() if torch.is_tensor(v)}
        assert all(kind == (torch.uint8 if k.endswith("codes") else torch.float32) for k, kind in kinds.items())


def groups(params):
    return [{"params": params[:3]}, {"params": params[3:], "state_bits": 32, "weight_decay": 0.1}]


def test_state_is_small():
    p = torch.zeros(1024, 256, requires_grad=True)
    for make, allowed in ((AdamW8bit, 2.1), (Lion8bit, 1.05)):
        optimizer = make([p])
        run(optimizer, [p], range(1))
        held = sum(v.numel() * v.element_size() for v in optimizer.state[p].values() if torch.is_tensor(v))
        assert held / p.numel() <= allowed


def test_a_float32_group_is_adamw_exactly():
    ours, theirs = tensors(), tensors()
    a, b = AdamW8bit([{"params": ours, "state_bits": 32}], lr=1e-2), AdamW(theirs, lr=1e-2)
    run(a, ours, range(4)), run(b, theirs, range(4))
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_moments_of_a_universal_checkpoint_become_the_same_codes():
    """The loader writes float32 moments into the state; the next step goes on as if they had never been widened."""
    from fastft.optim.universal import widen_state

    ours = tensors()
    optimizer = AdamW8bit(ours, lr=1e-2)
    run(optimizer, ours, range(5))
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    other = AdamW8bit(theirs, lr=1e-2)
    for p, q in zip(ours, theirs, strict=True):
        other.state[q] = widen_state(copy.deepcopy(optimizer.state[p]), p.numel(), "companded")
        assert set(other.state[q]) == {"step", "exp_avg", "exp_avg_sq"}
    run(optimizer, ours, range(5, 8)), run(other, theirs, range(5, 8))
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_groups_get_their_settings_back():
    """DeepSpeed's universal loader for ZeRO-3 copies the first group's settings into every group."""
    optimizer = AdamW8bit(groups(tensors()))
    before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    for group in optimizer.param_groups:
        group.update(before[0])
    optimizer.restore_groups()
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["param_groups"][0].update(block_size=128), "block_size=128; this one has 256"),
        (lambda s: s["param_groups"][0].update(code="dynamic"), "code=dynamic; this one has companded"),
        (lambda s: s["param_groups"][0].update(format=9), "format=9"),
        (lambda s: s["param_groups"][1].update(state_bits=8), "state_bits=8; this one has 32"),
        (lambda s: s["state"][0].update(exp_avg_codes=s["state"][0]["exp_avg_codes"].float()), "of torch.uint8"),
        (lambda s: s["state"][0].update(exp_avg_codes=s["state"][0]["exp_avg_codes"][:1]), r"must be \[2, 256\]"),
        (lambda s: s["state"][0].update(exp_avg_sq_codes=s["state"][0]["exp_avg_sq_codes"][:1]), r"must be \[2, 256\]"),
        (lambda s: s["state"][0].update(exp_avg_sq_absmax=torch.ones(1)), r"exp_avg_sq_absmax \[1\] of torch.float32"),
        (lambda s: s["state"][4].update(exp_avg=torch.ones(16, 32).bfloat16()), "exp_avg .*bfloat16"),
        (lambda s: s["state"][4].update(exp_avg_sq=torch.ones(31)), r"must be \[16, 32\]"),
        (lambda s: s["state"][0].update(master=torch.ones(7, 50)), "has master, which .* not hold for torch.float32"),
        (lambda s: s["state"][0].pop("step"), "has no step"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_is_written(change, words):
    params = tensors()
    optimizer = AdamW8bit(groups(params), lr=1e-2)
    run(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(v, after["state"][0][k]) for k, v in before["state"][0].items() if torch.is_tensor(v))


@pytest.mark.parametrize("make", [AdamW, AdamW8bit, Lion8bit])
def test_the_state_of_another_optimizer_is_refused(make):
    """bf16 weights without a float32 master, among others: taken as they are, kernels would read beyond them."""
    for other in (torch.optim.AdamW, AdamW, AdamW8bit, Lion8bit):
        params, theirs = tensors(torch.bfloat16), tensors(torch.bfloat16)
        one = other(theirs)
        run(one, theirs, range(1))
        if other is not make:
            with pytest.raises(ValueError, match=f"{make.__name__}: the (saved )?state"):
                make(params).load_state_dict(one.state_dict())


@pytest.mark.parametrize("make", [AdamW, AdamW8bit, Lion8bit])
def test_a_copy_goes_on_alike(make):
    params = tensors()
    optimizer = make(params, weight_decay=0.1)
    run(optimizer, params, range(2))
    other = copy.deepcopy(optimizer)
    copies = other.param_groups[0]["params"]
    run(optimizer, params, range(2, 4)), run(other, copies, range(2, 4))
    assert all(torch.equal(x, y) for x, y in zip(params, copies, strict=True))
    other.param_groups[0]["weight_decay"] = 0.0
    other.restore_groups()
    assert other.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -1},
        {"eps": float("nan")},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9,)},
        {"weight_decay": -1},
        {"code": "int4"},
    ],
)
def test_bad_hyper_parameters(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdamW8bit(tensors(), **bad)


@pytest.mark.parametrize("bad", [{"state_bits": 4}, {"block_size": 64}, {"code": "x"}, {"lr": -1.0}])
def test_bad_groups(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdamW8bit([{"params": tensors(), **bad}])


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_does_not_stop_lion(bits, bad):
    """That step changes nothing of the element; the next ones move it again."""
    p = torch.ones(300, requires_grad=True)
    optimizer = Lion8bit([{"params": [p], "state_bits": bits}], lr=0.1)
    p.grad = torch.ones(300).index_fill(0, torch.tensor([7]), bad)
    optimizer.step()
    assert p[7] == 1 and (p[torch.arange(300) != 7] < 1).all()
    p.grad = torch.ones(300)
    optimizer.step()
    assert p[7].item() == pytest.approx(0.9)


def test_bad_tensors():
    p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="float64; it must be float32, bfloat16 or float16"):
        AdamW8bit([p]).step()
    p = torch.zeros(4, 3, requires_grad=True)
    p.grad = torch.eye(4, 3).to_sparse()
    with pytest.raises(ValueError, match="of rows.* has 2 sparse dimensions"):
        AdamW8bit([p]).step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(dtype):
    """Transposed and sliced parameters, and gradients of another layout."""
    w, g = torch.randn(40, 30).to(dtype), torch.randn(40, 30).to(dtype)
    results = []
    for layout in (lambda t: t.clone(), lambda t: t.t().contiguous().t(), lambda t: torch.cat([t, t], 1)[:, :30]):
        p = layout(w).requires_grad_()
        optimizer = AdamW8bit([p], lr=1e-2)
        p.grad = layout(g)
        optimizer.step()
        results.append(p.detach().contiguous())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_norms_biases_and_embeddings_keep_float32_moments():
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 5), torch.nn.LayerNorm(5))
    made = parameter_groups(model, 0.1, state_bits=8)
    described = [(g["state_bits"], g["weight_decay"], len(g["params"])) for g in made]
    assert described == [(8, 0.1, 1), (32, 0.1, 1), (32, 0.0, 3)]
    assert made[0]["params"] == [model[1].weight]


@pytest.mark.parametrize("optim", ["adamw_8bit", "lion_8bit"])
@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"offload_optimizer": {"device": "nvme"}}, "NVMe"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.3}}, "ratio 0.3"),
        ({"offload_optimizer": {"device": "cpu", "super_offload": True}}, "super_offload"),
        ({"zenflow": {"topk_ratio": 0.1}}, "zenflow"),
        ({"elastic_checkpoint": True}, "elastic_checkpoint"),
    ],
)
def test_what_deepspeed_could_not_run_is_refused(optim, zero, words):
    args = Arguments(optim=optim, zero_stage=3)
    config = deepspeed_config(args, torch.bfloat16, 2)
    config["zero_optimization"].update(zero)
    with pytest.raises(ValueError, match=f"--optim {optim}.*{words}"):
        choose_optimizer(args, config, torch.bfloat16)


def test_bitsandbytes_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    args = Arguments(optim="adamw_bnb_8bit", zero_stage=2)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        choose_optimizer(args, deepspeed_config(args, torch.bfloat16, 2), torch.bfloat16)
    args = Arguments(optim="adamw_bnb_8bit")
    with pytest.raises(ValueError, match="16-bit weights"):
        choose_optimizer(args, deepspeed_config(args, torch.bfloat16, 2), torch.bfloat16)


@mock.patch.dict(os.environ)  # Accelerate leaves RANK behind, without an address
def test_hugging_face_trainer_uses_it(tmp_path):
    """Passed as the optimizer it is what Trainer and Accelerate run, wrapped but not replaced."""
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Linear):
        def forward(self, x, labels):
            return {"loss": (super().forward(x) - labels).square().mean()}

    model = Model(6, 300)
    optimizer = AdamW8bit(model.parameters(), lr=1e-2)
    data = [{"x": torch.randn(6), "labels": torch.randn(300)} for _ in range(8)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    assert getattr(trainer.optimizer, "optimizer", trainer.optimizer) is optimizer
    assert optimizer.state[model.weight]["step"] == 3 and "exp_avg_codes" in optimizer.state[model.weight]


UNIVERSAL = [
    *(f"universal, {optim}, stage {stage}" for optim in ("adamw_8bit", "adamw_torch") for stage in (1, 2, 3)),
    "universal, lion_8bit, stage 1",
]
CHECKS = [
    "adamw_8bit, stage 0, offload none",
    *(f"adamw_8bit, stage {stage}, offload {offload}" for stage in (1, 2, 3) for offload in ("none", "cpu")),
    *("adamw_8bit, stage 0, fp32", "adamw_8bit, stage 2, fp32", "lion_8bit, stage 0", "lion_8bit, stage 3"),
    *("stages agree", "close to float32", *UNIVERSAL, "row gradients", "another optimizer"),
]


def launch_checks(out, ranks):
    """{check: None or an error} of optim_checks.py in the folder `out`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("optim_checks.py")), str(out)]
    processes = []
    try:
        for rank in range(ranks):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(out / f"rank-{rank}.log", "w") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    tails = [(out / f"rank-{rank}.log").read_text()[-3000:] for rank in range(ranks)]
    assert codes == [0] * ranks, "\n".join(tails)
    return json.loads((out / "outcomes.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checks")


@pytest.fixture(scope="module")
def outcomes(folder):
    return launch_checks(folder, ranks=2)


@pytest.fixture(scope="module")
def reloaded(folder, outcomes):
    """One rank goes on from the universal checkpoints that two ranks left."""
    return launch_checks(folder, ranks=1)


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(outcomes, check):
    assert outcomes.keys() == set(CHECKS)
    assert outcomes[check] is None, outcomes[check]


@pytest.mark.distributed
@pytest.mark.parametrize("check", UNIVERSAL)
def test_one_rank_goes_on(reloaded, check):
    assert reloaded.keys() == set(UNIVERSAL)
    assert reloaded[check] is None, reloaded[check]
