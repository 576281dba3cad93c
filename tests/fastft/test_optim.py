"""AdamW against torch's, its fp32 masters, and what a replicated step adds: clipping, skipping, fp16's loss scale."""

import copy

import pytest
import torch

from fastft.optim import AdamW, ReplicatedAdamW, buckets, parameter_groups

SHAPES = [(7, 5), (13,), (1,), (0,), (3, 2, 2)]


def tensors(dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in SHAPES]


def feed(params, step, scale=1.0):
    g = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=g) * scale).to(p.dtype)


def test_fp32_is_as_exact_as_torchs_adamw(no_worse):
    """After 20 steps the distance to float64 is that of torch's fused kernel, at most."""
    kwargs = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    ours, theirs = tensors(torch.float32), tensors(torch.float32)
    exact = [p.detach().double().requires_grad_() for p in ours]
    optimizers = (
        AdamW(ours, **kwargs),
        torch.optim.AdamW(theirs, **kwargs, fused=True),
        torch.optim.AdamW(exact, **kwargs),
    )
    for step in range(20):
        feed(ours, step), feed(theirs, step)
        for p, q in zip(ours, exact, strict=True):
            q.grad = p.grad.double()
        for optimizer in optimizers:
            optimizer.step()
    for x, y, z in zip(ours, theirs, exact, strict=True):
        no_worse("weight", x, y, z, steps=20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_follows_an_fp32_master(dtype):
    """1000 updates of 1e-4 each vanish in bf16 one by one; the master sums them, and the weight is its rounded copy."""
    low, full = tensors(dtype), [p.detach().float().requires_grad_() for p in tensors(dtype)]
    a, b = AdamW(low, lr=1e-4), torch.optim.AdamW(full, lr=1e-4, weight_decay=0.0, fused=True)
    for _ in range(1000):
        for p, q in zip(low, full, strict=True):
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        a.step(), b.step()
    for p, q in zip(low, full, strict=True):
        assert torch.equal(p, q.to(dtype))
        assert a.state[p]["exp_avg"].dtype == a.state[p]["master"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact(dtype):
    def run(steps, params, optimizer):
        for step in steps:
            feed(params, step)
            optimizer.step()

    whole = tensors(dtype)
    run(range(12), whole, AdamW(whole, lr=1e-2))
    first = tensors(dtype)
    optimizer = AdamW(first, lr=1e-2)
    run(range(6), first, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    second = [p.detach().clone().requires_grad_() for p in first]
    resumed = AdamW(second, lr=1e-2)
    resumed.load_state_dict(saved)
    run(range(6, 12), second, resumed)
    for x, y in zip(whole, second, strict=True):
        assert torch.equal(x, y)


def test_a_parameter_without_gradient_is_left_alone():
    params = tensors(torch.float32)
    before = [p.detach().clone() for p in params]
    optimizer = AdamW(params, lr=1.0, weight_decay=0.5)
    feed(params[:1], 0)
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert all(torch.equal(p, b) for p, b in zip(params[1:], before[1:], strict=True))


def test_clipping_equals_torchs():
    ours, theirs = tensors(torch.float32), tensors(torch.float32)
    a = ReplicatedAdamW(ours, lr=1e-2, max_grad_norm=0.5)
    b = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.0, fused=True)
    for step in range(5):
        feed(ours, step, scale=3.0), feed(theirs, step, scale=3.0)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        a.step(), b.step()
        assert a._global_grad_norm == pytest.approx(norm.item(), rel=1e-6)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_touches_nothing(bad):
    params = tensors(torch.float32)
    optimizer = ReplicatedAdamW(params, lr=1e-2, max_grad_norm=1.0)
    feed(params, 0)
    optimizer.step()
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    feed(params, 1)
    params[0].grad[0, 0] = bad
    optimizer.step()
    assert optimizer.overflow
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    for i, saved in state["state"].items():
        after = optimizer.state_dict()["state"][i]
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(after[k])) for k, v in saved.items())
    feed(params, 2)
    optimizer.step()
    assert not optimizer.overflow


def test_micro_batches_add_up_in_fp32():
    """512 gradients of 1: a bf16 sum stalls at 256, where 1 is half a unit in the last place."""
    p = torch.zeros(4, dtype=torch.bfloat16, requires_grad=True)
    optimizer = ReplicatedAdamW([p], lr=0.0, accumulate=True)
    for _ in range(512):
        p.sum().backward()
    assert p.grad is None and torch.equal(optimizer._sums[p], torch.full((4,), 512.0))
    optimizer.step()
    assert optimizer._global_grad_norm == pytest.approx(1024.0)


def test_loss_scale_halves_on_overflow_and_comes_back(monkeypatch):
    monkeypatch.setattr(ReplicatedAdamW, "growth_interval", 2)
    p = torch.ones(3, dtype=torch.float16, requires_grad=True)
    optimizer = ReplicatedAdamW([p], lr=1e-3, loss_scale=1024.0)
    p.grad = torch.full_like(p, 2048.0)
    optimizer.step()
    assert optimizer._global_grad_norm == pytest.approx(2 * 3**0.5)  # of the unscaled gradient
    p.grad = torch.full_like(p, float("inf"))
    optimizer.step()
    assert (optimizer.loss_scale, optimizer.overflow) == (512.0, True)
    for _ in range(2):
        p.grad = torch.full_like(p, 512.0)
        optimizer.step()
    assert optimizer.loss_scale == 1024.0
    other = ReplicatedAdamW([torch.ones(3, dtype=torch.float16, requires_grad=True)], lr=1e-3, loss_scale=2.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.loss_scale == 1024.0


def test_a_replicated_optimizer_goes_on_from_the_plain_ones_state():
    params, others = tensors(torch.float32), tensors(torch.float32)
    plain, replicated = AdamW(params, lr=1e-2), ReplicatedAdamW(others, lr=1e-2, loss_scale=8.0)
    with pytest.raises(ValueError, match="ReplicatedAdamW: state_dict is None"):
        replicated.load_state_dict(None)
    feed(params, 0)
    plain.step()
    replicated.load_state_dict(plain.state_dict())
    assert replicated.loss_scale == 8.0 and replicated.state[others[0]]["step"] == 1


def test_buckets_keep_order_and_limit():
    sizes = [3, 4, 10, 1, 1, 1]
    groups = [[t.numel() for t in bucket] for bucket in buckets([torch.empty(n) for n in sizes], size=7)]
    assert groups == [[3, 4], [10], [1, 1, 1]]


def test_biases_and_norms_are_not_decayed():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    model[0].weight.requires_grad_(True)
    decayed, plain = parameter_groups(model, 0.1)
    assert decayed["params"] == [model[0].weight] and decayed["weight_decay"] == 0.1
    assert len(plain["params"]) == 3 and plain["weight_decay"] == 0.0


@pytest.mark.parametrize("bad", [{"lr": -1}, {"eps": float("nan")}, {"betas": (1.0, 0.9)}])
def test_bad_hyper_parameters(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdamW(tensors(torch.float32), **bad)
