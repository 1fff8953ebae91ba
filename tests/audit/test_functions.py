"""The functions that an audit reads are those that the model computes, in every kind of grove; taking them away leaves no trace."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kan_train.audit.functions import functions_of, zeroed
from kan_train.config import ConfigError
from kan_train.model.dispatch import rows_of_sizes
from kan_train.model.edge import activate

from .conftest import KINDS, close, make_model

GATED = [(kind, function) for kind in ("gated", "reuse") for function in ("bspline", "piecewise_poly", "rational", "chebyshev")]
EDGE = [("edge", function) for function in ("bspline", "piecewise_poly", "chebyshev")]


@pytest.mark.parametrize(("kind", "function"), GATED)
@torch.no_grad()
def test_grouped_functions_are_the_models(kind, function):
    functions = functions_of(make_model(kind, function, grove={"shared_width": 8}))
    assert [(each.layer, each.shared, each.shape) for each in functions] == [
        (0, False, (6, 2, 1)), (0, True, (1, 2, 1)), (1, False, (6, 2, 1)), (1, True, (1, 2, 1))
    ]  # fmt: skip
    x = torch.linspace(-5, 5, 40, dtype=torch.float64)
    for each in functions[:2]:
        groves = each.shape[0]
        h_RM = x[:, None].expand(-1, 8).repeat(groves, 1)
        out = activate(h_RM, each.module(), rows_of_sizes([len(x)] * groves, x.device), each.config, "torch").detach().view(groves, len(x), 2, 4)
        for grove in range(groves):
            ours = each.silu_weights(grove)[..., None] * F.silu(x).numpy() + each.learned(grove, x.numpy())
            for unit in range(4):
                assert close(ours[:, 0], out[grove, :, :, unit].T)


@pytest.mark.parametrize(("kind", "function"), EDGE)
def test_edge_functions_add_up_to_the_layer(kind, function):
    (each, _) = functions_of(make_model(kind, function))
    assert each.shape == (6, 6, 8)
    u = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.5
    out = each.module(u, rows_of_sizes([5] * 6, u.device)).detach()
    for row in range(30):
        grove = row // 5
        ours = each.silu_weights(grove)[..., None] * F.silu(u[row]).numpy() + each.learned(grove, u[row].numpy())
        assert close(np.einsum("ioi->o", ours), out[row])


@pytest.mark.parametrize("kind", KINDS)
def test_zeroed_functions_come_back_bit_for_bit(kind):
    model = make_model(kind, grove={"shared_width": 8} if kind != "edge" else {})
    functions = functions_of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = [np.random.default_rng(0).random(each.shape) < 0.5 for each in functions]
    x = np.linspace(-2, 2, 7)
    with zeroed(functions, masks):
        for each, mask in zip(functions, masks, strict=True):
            for grove in range(each.shape[0]):
                assert (np.abs(each.learned(grove, x)).max(-1) == 0).tolist() == mask[grove].tolist()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_dense_model_is_refused_by_its_name():
    model = make_model(name="dense_something", ffn="swiglu")
    with pytest.raises(ConfigError, match=r"dense_something is a dense model .*use a run with model\.ffn=kalmagrove"):
        functions_of(model)


def test_plain_silu_has_no_functions():
    assert functions_of(make_model("gated", "silu")) == []
