"""From tokens to rows and back: plans, gathers, sums, grouped products."""

import pytest
import torch
from torch import Tensor

from kan_train.model.dispatch import (
    Plan,
    capacity_plan,
    combine_rows,
    dropless_plan,
    gather_choices,
    gather_rows,
    gathered_linear,
    grouped_linear,
    row_blocks,
)

TOKENS, CHOICES, GROVES = 11, 3, 5


def choices(seed: int = 0) -> Tensor:
    """[T, K] distinct groves; grove 2 is never chosen."""
    scores = torch.rand(TOKENS, GROVES, generator=torch.Generator().manual_seed(seed))
    scores[:, 2] = -1
    return scores.topk(CHOICES).indices


def plan_of(kind: str) -> Plan:
    index = choices()
    if kind == "dropless":
        return dropless_plan(index, GROVES)
    return capacity_plan(index, torch.rand(index.shape, generator=torch.Generator().manual_seed(1)), GROVES, 6)


def test_dropless_rows_are_all_choices_sorted_by_grove():
    index = choices()
    plan = dropless_plan(index, GROVES)
    assert sum(plan.sizes) == TOKENS * CHOICES
    assert plan.sizes == [(index == grove).sum().item() for grove in range(GROVES)]
    grove_of_row = torch.arange(GROVES).repeat_interleave(torch.tensor(plan.sizes))
    assert torch.equal(index.flatten()[plan.choice_of_row], grove_of_row)
    assert torch.equal(plan.token_of_row, plan.choice_of_row // CHOICES)
    assert torch.equal(plan.choice_of_row[plan.row_of_choice.flatten()], torch.arange(TOKENS * CHOICES))


@pytest.mark.parametrize("capacity", [1, 3, 6, 40])
def test_capacity_keeps_the_highest_gates(capacity: int):
    index, gate = choices(), torch.rand(TOKENS, CHOICES, generator=torch.Generator().manual_seed(1))
    plan = capacity_plan(index, gate, GROVES, capacity)
    assert plan.sizes == [capacity] * GROVES
    assert len(plan.token_of_row) == GROVES * capacity
    for grove in range(GROVES):
        rows = plan.choice_of_row[grove * capacity : (grove + 1) * capacity]
        kept = set(rows[rows < TOKENS * CHOICES].tolist())
        wanting = [choice for choice in range(TOKENS * CHOICES) if index.flatten()[choice] == grove]
        best = sorted(wanting, key=lambda choice: -gate.flatten()[choice].item())[:capacity]
        assert kept == set(best)
    dropped = plan.row_of_choice == GROVES * capacity
    assert dropped.sum() == TOKENS * CHOICES - sum(min(capacity, (index == grove).sum().item()) for grove in range(GROVES))
    kept_rows = plan.row_of_choice[~dropped]
    assert torch.equal(plan.choice_of_row[kept_rows], torch.arange(TOKENS * CHOICES).view(TOKENS, CHOICES)[~dropped])


@pytest.mark.parametrize("kind", ["dropless", "capacity"])
def test_gradcheck(kind: str):
    plan = plan_of(kind)
    generator = torch.Generator().manual_seed(2)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    x, gate, weight, rows = leaf(TOKENS, 4), leaf(TOKENS, CHOICES), leaf(GROVES, 4, 3), leaf(len(plan.token_of_row), 4)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, plan), (x,))
    assert torch.autograd.gradcheck(lambda y, g: combine_rows(y, g, plan), (rows, gate))
    assert torch.autograd.gradcheck(lambda z: gather_choices(z, plan), (leaf(TOKENS, CHOICES, 2),))
    assert torch.autograd.gradcheck(lambda x, w: gathered_linear(x, w, plan), (x, weight))
    assert torch.autograd.gradcheck(lambda y, w: grouped_linear(y, w, plan.sizes), (rows, weight))


@pytest.mark.parametrize("kind", ["dropless", "capacity"])
def test_rows_are_the_choices_they_stand_for(kind: str):
    """Every grove's product, one choice at a time; the choices without a row add nothing."""
    plan, index = plan_of(kind), choices()
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(TOKENS, 4, generator=generator), torch.randn(GROVES, 4, 4, generator=generator)
    gate = torch.rand(TOKENS, CHOICES, generator=generator)
    expected = torch.zeros(TOKENS, 4)
    for token in range(TOKENS):
        for choice in range(CHOICES):
            if plan.row_of_choice[token, choice] < len(plan.token_of_row):
                expected[token] += gate[token, choice] * (x[token] @ weight[index[token, choice]])
    torch.testing.assert_close(combine_rows(grouped_linear(gather_rows(x, plan), weight, plan.sizes), gate, plan), expected)
    torch.testing.assert_close(combine_rows(gathered_linear(x, weight, plan), gate, plan), expected)
    padding = plan.token_of_row == TOKENS
    assert padding.any() == (kind == "capacity")
    assert gather_rows(x, plan)[padding].abs().sum() == 0


def test_products_read_the_chosen_groves_alone():
    plan, x = dropless_plan(choices(), GROVES), torch.randn(TOKENS, 4, requires_grad=True)
    weight = torch.randn(GROVES, 4, 3)
    weight[2] = float("nan")
    weight.requires_grad_()
    for product in (grouped_linear(gather_rows(x, plan), weight, plan.sizes), gathered_linear(x, weight, plan)):
        assert product.isfinite().all()
        grad = torch.autograd.grad(product.sum(), weight, retain_graph=True)[0]
        assert grad[2].abs().sum() == 0
        assert (grad[0] != 0).any()


@pytest.mark.parametrize("sizes", [[5, 0, 3, 7, 0, 0, 25, 1], [0, 0], [12], [4, 4, 4], [9, 1, 20]])
@pytest.mark.parametrize("at_most", [1, 4, 10, 1000])
def test_blocks_cover_the_rows_in_order(sizes: list[int], at_most: int):
    blocks = row_blocks(sizes, at_most)
    grove_of_row = [grove for grove, size in enumerate(sizes) for _ in range(size)]
    covered, position = [], 0
    for block in blocks:
        assert block.rows.start == position
        assert block.rows.stop - block.rows.start == sum(block.sizes) <= at_most
        assert 0 not in block.sizes
        assert len(set(block.groves)) == len(block.groves)
        covered += [grove for grove, size in zip(block.groves, block.sizes, strict=True) for _ in range(size)]
        position = block.rows.stop
    assert covered == grove_of_row
