"""Embedding tables with gradients by rows: the same weights as with dense gradients."""

import copy

import pytest
import torch
from torch import nn

import fastft
from fastft.optim import (
    AdamW8bit,
    ReplicatedAdamW,
    ReplicatedAdamW8bit,
    ReplicatedLion8bit,
    row_gradients,
    use_row_gradients,
)

IDS = [[5, 0, 5, 39, 5, 12], [1, 1, 1, 1], [38, 39], list(range(40)), [7]]  # the first, the last, neighbours, all, one


def pair(optimizer, dtype=torch.float32, group=None, **kwargs):
    """Two of the same table and optimizer; the first gives its gradients by rows."""
    table = nn.Embedding(40, 24).to(dtype)
    tables = table, copy.deepcopy(table)
    tables[0].sparse = True
    hyper = {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 1.0, **kwargs}
    return tables, [optimizer([{"params": t.parameters(), **(group or {})}], **hyper) for t in tables]


def feed(table, ids, seed, scale=3.0):
    y = table(torch.tensor(ids))
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    (y.float() * weight * scale).sum().backward()


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("optimizer", [ReplicatedAdamW, ReplicatedAdamW8bit, ReplicatedLion8bit])
def test_the_weights_are_those_of_dense_gradients(optimizer, kernels):
    """Rows without a gradient decay and move too; clipping sees the same norm."""
    tables, optimizers = pair(optimizer)
    with fastft.backend(kernels):
        for step, ids in enumerate(IDS):
            for table, one in zip(tables, optimizers, strict=True):
                feed(table, ids, step)
                assert table.weight.grad.is_sparse == table.sparse
                one.step(), one.zero_grad()
            by_rows, dense = (one._global_grad_norm for one in optimizers)
            assert by_rows == pytest.approx(dense, rel=1e-12)
            torch.testing.assert_close(tables[0].weight, tables[1].weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_read_often_is_summed_in_float32(dtype):
    """1000 gradients of 1 and a large one: in bf16 the small ones would vanish."""
    table = nn.Embedding(3, 2, sparse=True).to(dtype)
    y = table(torch.ones(1001, dtype=torch.int64))
    (y * torch.cat([torch.full((1, 1), 1024.0), torch.ones(1000, 1)]).to(dtype)).sum().backward()
    grad = row_gradients.summed(table.weight.grad)
    assert grad.indices().tolist() == [[1]] and grad.values().tolist() == [[2024.0, 2024.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [False, True])
def test_micro_batches_add_up(dtype, accumulate):
    tables, optimizers = pair(ReplicatedAdamW, dtype, accumulate=accumulate)
    for step in range(3):
        for table, one in zip(tables, optimizers, strict=True):
            for micro, ids in enumerate(IDS[:2]):
                feed(table, ids, 10 * step + micro)
            one.step(), one.zero_grad()
    rounding = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(tables[0].weight, tables[1].weight, rtol=rounding, atol=rounding)


def test_micro_batches_do_not_pile_up():
    """Each row is held once, however many micro-batches have read it; a dense gradient among them is added."""
    tables, optimizers = pair(ReplicatedAdamW, accumulate=True)
    for table, one in zip(tables, optimizers, strict=True):
        for micro in range(9):
            feed(table, IDS[0], micro)
        if table.sparse:
            assert one._sums[table.weight]._nnz() == len(set(IDS[0])) and table.weight.grad is None
        table.weight.square().sum().backward()
        one.step(), one.zero_grad()
    torch.testing.assert_close(tables[0].weight, tables[1].weight, rtol=1e-6, atol=1e-7)


def test_groups_that_keep_float32_moments():
    tables, optimizers = pair(ReplicatedAdamW8bit, group={"state_bits": 32})
    for step, ids in enumerate(IDS):
        for table, one in zip(tables, optimizers, strict=True):
            feed(table, ids, step)
            one.step(), one.zero_grad()
    torch.testing.assert_close(tables[0].weight, tables[1].weight, rtol=1e-6, atol=1e-7)


def test_bad_rows_touch_nothing():
    tables, (optimizer, _) = pair(ReplicatedAdamW)
    feed(tables[0], [1, 2], 0, scale=float("nan"))
    optimizer.step()
    assert optimizer.overflow and torch.equal(tables[0].weight, tables[1].weight)


def test_only_large_tables_of_one_reader(monkeypatch):
    monkeypatch.setattr(row_gradients, "MIN_ELEMENTS", 100)
    model = nn.ModuleDict({"words": nn.Embedding(20, 5), "types": nn.Embedding(2, 5), "tied": nn.Embedding(20, 5)})
    model["scaled"] = nn.Embedding(20, 5, scale_grad_by_freq=True)
    model["frozen"] = nn.Embedding(20, 5).requires_grad_(False)
    model["head"] = nn.Linear(5, 20)
    model["head"].weight = model["tied"].weight
    use_row_gradients(model)
    assert [name for name, module in model.items() if getattr(module, "sparse", False)] == ["words"]


def test_a_table_that_is_read_by_hand_too():
    """No module shares it, but a product reads it: torch adds rows and matrix, and the gradient is dense."""
    tables, optimizers = pair(ReplicatedAdamW)
    for table, one in zip(tables, optimizers, strict=True):
        (table(torch.tensor([1, 2])) @ table.weight.T).square().sum().backward()
        assert not table.weight.grad.is_sparse
        one.step()
    torch.testing.assert_close(tables[0].weight, tables[1].weight, rtol=1e-6, atol=1e-7)


def test_padding_has_no_gradient():
    table = nn.Embedding(40, 24, padding_idx=3, sparse=True)
    optimizer = ReplicatedAdamW(table.parameters(), lr=0.1)
    feed(table, [3, 3], 0)
    optimizer.step()
    assert optimizer._global_grad_norm == 0 and not table.weight[3].any()


def test_an_ordinary_optimizer_takes_them_too():
    table = nn.Embedding(300, 8, sparse=True)
    before = table.weight.detach().clone()
    feed(table, [3], 0)
    AdamW8bit(table.parameters(), lr=0.1).step()
    assert (table.weight != before).any(1).nonzero().flatten().tolist() == [3]
