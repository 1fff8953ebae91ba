"""What is counted is what the functions read, and the choices those of the router."""

import numpy as np
import pytest
import torch

from kan_train.audit.functions import functions_of
from kan_train.audit.importance import importance_of, runs_of, share_that_holds
from kan_train.audit.watch import BINS, middles_of, watch

from .conftest import KINDS, close, make_model, never_choose, plant


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_counted_where_they_lie(kind, corpus):
    """By hand: every choice's input from the layer's own input, row by row."""
    model = make_model(kind, grove={"shared_width": 8})
    ffn, seen = model.layers[1].ffn, {}
    ffn.register_forward_pre_hook(lambda _, arguments: seen.setdefault("x", []).append(arguments[0].flatten(0, 1)))
    functions = functions_of(model)
    watched = watch(model, functions, corpus, 5, 2)
    x_TD, choices_TK = torch.cat(seen["x"]), watched.choices[1]
    (number,) = [number for number, each in enumerate(functions) if each.layer == 1 and not each.shared]
    groves, inputs, _ = functions[number].shape
    expected = np.zeros((groves, inputs, BINS))
    edges = [-6 + 12 * number / BINS for number in range(BINS + 1)]
    edges[0], edges[-1] = -np.inf, np.inf
    for token, chosen in enumerate(choices_TK):
        for grove in chosen:
            z = ffn.router.score[grove] @ x_TD[token]
            if kind == "edge":
                read = (z / (z.square().mean() + model.config.norm_eps).sqrt())[:, None]
            else:
                read = ((z if kind == "reuse" else x_TD[token]) @ ffn.groves.up[grove]).view(inputs, -1)
            for i, values in enumerate(read.detach().numpy()):
                expected[grove, i] += np.histogram(values, edges)[0]
    assert np.abs(watched.inputs[number] - expected).sum() <= 4, "a value on an edge may fall to either side"
    shared = watched.inputs[number + 1]
    by_hand = (x_TD @ ffn.shared.up.weight.T).view(-1, 2, 4).detach().numpy()
    assert np.abs(shared[0] - [np.histogram(by_hand[:, i], edges)[0] for i in range(2)]).sum() <= 4


def test_choices_are_the_routers_and_documents_are_told_apart(corpus):
    model, chosen = make_model(), []
    model.layers[0].ffn.router.selector = lambda _, index: chosen.append(index) or index
    watched = watch(model, functions_of(model), corpus, 5, 2)
    assert watched.layers == [0, 1]
    assert watched.tokens.shape == watched.documents.shape == (5 * 64,)
    assert np.array_equal(watched.choices[0], torch.cat(chosen).numpy())
    begins = (watched.tokens == corpus.boundary) | (np.arange(5 * 64) % 64 == 0)
    assert np.array_equal(np.flatnonzero(np.diff(watched.documents, prepend=-1)), np.flatnonzero(begins))
    assert not model.layers[0].ffn.groves._forward_pre_hooks


def test_choices_without_room_are_told(corpus):
    model = make_model(grove={"capacity_factor": 0.5})
    watched = watch(model, functions_of(model), corpus, 4, 2)
    dropped = (watched.choices[0] < 0).mean()
    assert 0.4 < dropped < 0.7, "half a grove's share of the choices has room"
    assert watched.inputs[0].sum() == 8 * (watched.choices[0] >= 0).sum()


def test_documents_that_training_did_not_reset_at_are_read_on(corpus):
    model, functions = make_model(), functions_of(make_model())
    resetting, not_so = (watch(model, functions_of(model), corpus, 5, 2, resets=resets) for resets in (True, False))
    assert np.array_equal(resetting.tokens, not_so.tokens)
    assert len(functions) == len(resetting.inputs)
    assert not np.array_equal(resetting.inputs[1], not_so.inputs[1])


def test_a_model_of_a_linear_router(corpus):
    model = make_model(grove={"score": "linear"})
    assert watch(model, functions_of(model), corpus, 2, 2).inputs[0].sum() == 2 * 64 * 2 * 8


@pytest.mark.parametrize("kind", KINDS)
def test_importance_is_the_bent_part_weighed_by_use(kind, corpus):
    """Against the inputs themselves, not their histogram; a straight line has size but no importance, an unused grove has neither."""
    model = make_model(kind)
    functions = functions_of(model)[0]
    unused, straight = 3, (1, 0, 0)
    never_choose(model, 0, unused)
    plant(functions, straight, lambda x: 2 * x + 1)
    watched = watch(model, [functions], corpus, 6, 3)
    runs = runs_of(watched.choices[0], 6)
    assert runs[unused] == 0
    assert runs.sum() == pytest.approx(2)
    importance = importance_of(functions, watched.inputs[0], runs)
    assert not importance.bent[unused].any()
    assert not importance.size[unused].any()
    assert importance.bent[straight] < 1e-6 < 1 < importance.size[straight] / np.sqrt(runs[1])
    counts, middles = watched.inputs[0][0, 1], middles_of(functions.config)
    x = np.repeat(middles, counts)
    s = functions.learned(0, x)[1, 0]
    bent = s - np.polyval(np.polyfit(x, s, 1), x)
    assert close(importance.bent[0, 1, 0], np.sqrt(runs[0] * (bent**2).mean()))
    assert close(importance.size[0, 1, 0], np.sqrt(runs[0] * (s**2).mean()))
    assert importance.outside == pytest.approx((watched.inputs[0] * (np.abs(middles) > 3)).sum() / watched.inputs[0].sum())


def test_how_many_functions_hold_most_of_the_importance():
    assert share_that_holds(np.array([3.0, 1.0, 0.0, 0.0])) == 0.25
    assert share_that_holds(np.ones(10)) == pytest.approx(0.9)
    assert share_that_holds(np.zeros(4)) == 0.0
