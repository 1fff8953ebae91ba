import pytest
import torch

from kan_train.engine.norm import clip_gradients, gradient_norm


def parameters(*sizes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for parameter in made:
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
    return made


def test_norm_is_exact_for_large_tensors_too():
    """PyTorch's own fp32 norm is off by 1e-4 on the largest of these."""
    made = parameters((3_000_001,), (512, 513), (7,), (4096,))
    expected = sum(p.grad.double().square().sum() for p in made).sqrt()
    assert gradient_norm(made).item() == pytest.approx(expected.item(), rel=3e-8)


def test_parameters_without_a_gradient_count_nothing():
    made = parameters((5,), (6,))
    made[0].grad = None
    assert gradient_norm(made).item() == pytest.approx(made[1].grad.double().norm().item(), rel=1e-7)
    assert gradient_norm(made[:1]).item() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 5000, 8199])
def test_norm_of_a_gradient_with_one_bad_element_is_not_finite(bad, position):
    made = parameters((8200,), (3,))
    made[0].grad[position] = bad
    assert not gradient_norm(made).isfinite()


@pytest.mark.parametrize(("clip", "changes"), [(0.0, False), (1e-3, True), (10.0, False)])
def test_clipping_is_that_of_pytorch(clip, changes):
    ours, theirs, before = parameters((40, 30), (9,)), parameters((40, 30), (9,)), parameters((40, 30), (9,))
    clip_gradients(ours, gradient_norm(ours).item(), clip)
    torch.nn.utils.clip_grad_norm_(theirs, clip or float("inf"))
    for mine, other, old in zip(ours, theirs, before, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=0)
        assert torch.equal(mine.grad, old.grad) != changes
