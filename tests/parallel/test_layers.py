"""The head's cross-entropy never holds all logits; it must be the one that would."""

import pytest
import torch
import torch.nn.functional as F

from kan_train.model.init import materialise
from kan_train.parallel.layers import VocabEmbedding, VocabHead, head_rows

WIDTH, VOCAB = 24, 256


def head_and_input(dtype: torch.dtype, rows: int) -> tuple[VocabHead, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(-1, VOCAB, (2, rows), generator=generator)  # some do not count
    return materialise(VocabHead(WIDTH, VOCAB), seed=1, dtype=dtype), x, targets


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("rows", [1, 256, 700], ids=lambda rows: f"{rows} rows")
def test_loss_and_gradients_equal_those_of_all_logits_at_once(dtype: torch.dtype, bound: float, rows: int):
    """700 rows a sequence make slices of uneven length; the incoming gradient is not one."""
    head, x, targets = head_and_input(dtype, rows)
    loss = head(x, targets)
    (2.5 * loss).backward()
    weight, inputs = head.weight.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    expected = F.cross_entropy((inputs @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=-1)
    (2.5 * expected).backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=bound)
    for seen, reference in ((x.grad, inputs.grad), (head.weight.grad, weight.grad)):
        assert seen.dtype == dtype
        assert (seen.double() - reference).abs().max() <= bound * reference.abs().max()


def test_targets_that_do_not_count_leave_no_gradient():
    head, x, targets = head_and_input(torch.float64, 5)
    targets[:, 2] = -1
    head(x, targets).backward()
    assert x.grad[:, 2].abs().max() == 0
    assert x.grad[:, 1].abs().max() > 0


def test_embedding_looks_rows_up():
    embedding = materialise(VocabEmbedding(VOCAB, WIDTH, std=0.5), seed=2)
    tokens = torch.tensor([[3, 3, 200]])
    assert torch.equal(embedding(tokens)[0], embedding.weight[[3, 3, 200]])


def test_a_gpu_holds_as_many_logits_as_memory_allows():
    """Few large slices: 2^28 logits of a vocabulary of 50,304, in whole multiples of 128 tokens; never fewer tokens than a CPU holds."""
    assert head_rows(50304, "cpu") == 512
    assert head_rows(50304, "cuda") == 5248
    assert head_rows(1 << 24, "cuda") == 512
