import pytest
import torch

from kan_train.engine.muon import MuonAdamW, orthogonalise


def run(optimizers, parameters, steps: int = 4) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_a_matrix_moves_as_under_torch_muon(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    group = {"params": [ours], "muon": True, "momentum": 0.9, "weight_decay": 0.1, "lr": 0.02}
    run([MuonAdamW([group], lr=1.0)], [ours])
    run([torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=True)], [theirs])
    assert not torch.allclose(ours, start, atol=1e-2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_every_matrix_of_a_stack_moves_by_itself():
    """A stack [N, inputs, outputs] is N transposed weights [outputs, inputs]."""
    start = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    stack = torch.nn.Parameter(start.clone())
    singles = [torch.nn.Parameter(matrix.T.contiguous()) for matrix in start]
    gradients = torch.randn(5, 3, 16, 40, generator=torch.Generator().manual_seed(2))
    ours = MuonAdamW([{"params": [stack], "muon": True, "momentum": 0.95, "weight_decay": 0.1, "lr": 0.02}], lr=1.0)
    theirs = torch.optim.Muon(singles, lr=0.02, weight_decay=0.1, momentum=0.95)
    for gradient in gradients:
        stack.grad = gradient.clone()
        for single, matrix in zip(singles, gradient, strict=True):
            single.grad = matrix.T.contiguous()
        ours.step()
        theirs.step()
    # Products of a transposed matrix round otherwise in bfloat16: an update of 0.02 agrees to its eight bits.
    torch.testing.assert_close(stack, torch.stack([single.T for single in singles]), rtol=0, atol=1.5e-3)


def test_orthogonalised_matrices_keep_their_singular_vectors_and_lose_their_singular_values():
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(2, 32, 20, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(2, 20, 20, generator=generator))
    values = torch.linspace(0.2, 5.0, 20)
    found = orthogonalise((u * values) @ v.mT).float()
    inner = u.mT @ found @ v
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.5
    assert diagonal.max() < 1.35
    assert (inner - torch.diag_embed(diagonal)).abs().max() < 0.05


def test_groups_without_the_mark_are_stepped_by_adamw():
    start = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    ours, theirs, matrix = (torch.nn.Parameter(start.clone()) for _ in range(3))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    groups = [{"params": [matrix], "muon": True, "momentum": 0.9, "weight_decay": 0.0}, {"params": [ours], "weight_decay": 0.1}]
    optimizer = MuonAdamW(groups, **settings)
    expected = torch.optim.AdamW([theirs], weight_decay=0.1, **settings)
    for step in range(5):
        gradient = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad, matrix.grad = gradient, gradient.clone(), gradient.clone()
        optimizer.step()
        expected.step()
    assert torch.equal(ours, theirs)
    assert set(optimizer.state[matrix]) == {"momentum"}
    assert len(optimizer.param_groups) == 2
