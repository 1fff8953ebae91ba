"""What is saved comes back bit for bit, whatever the split; what cannot be loaded is refused by name before anything is filled."""

import hashlib
import json
import pickle
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kan_train.checkpoint import CheckpointError, Fragment, load, load_rank_tensors, load_tensors, newest, newest_valid, read_manifest, save
from kan_train.config import ConfigError

splits = st.tuples(st.lists(st.integers(0, 12), max_size=4), st.integers(0, 2), st.sampled_from([1, 2, 3]))


def test_a_state_comes_back_bit_for_bit(kit, saved):
    path, state = saved
    target = kit.zeros(state)
    assert load(path, kit.whole(target)) == {"step": 7}
    assert kit.equal(target, state)


@given(splits, splits)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_split_loads_what_any_other_saved(kit, tmp_path, saved_split, loaded_split):
    """Shards along any axis, cut flat anywhere: the elements stay where they were."""
    state = {name: t for name, t in kit.make_state(3).items() if t.dim() in (0, 3)}

    def fragments(split, tensors):
        cuts, axis, parts = split
        return [f for name, t in tensors.items() for f in kit.cut(name, t, cuts, axis, parts)]

    path = save(tmp_path, step=1, fragments=fragments(saved_split, state), state={})
    expected, target = fragments(loaded_split, state), fragments(loaded_split, kit.zeros(state))
    load(path, target)
    assert all(kit.same_bits(a.flat, b.flat) for a, b in zip(target, expected, strict=True))


def test_replicas_are_filled_and_not_written(kit, tmp_path):
    """Two fragments over the same elements: one writes; both are filled by a load."""
    weight = torch.randn(6, 4)
    path = save(tmp_path, step=1, fragments=[Fragment.whole("w", weight), Fragment.whole("w", weight.clone(), write=False)], state={})
    a, b = torch.zeros(6, 4), torch.zeros(6, 4)
    load(path, [Fragment.whole("w", a), Fragment.whole("w", b, write=False)])
    assert torch.equal(a, weight)
    assert torch.equal(b, weight)


def test_fragments_are_filled_in_place_where_gradients_are_on(tmp_path):
    """A fragment that is a view of a parameter changes the parameter."""
    parameter = torch.nn.Parameter(torch.randn(5, 3))
    path = save(tmp_path, step=1, fragments=[Fragment.whole("w", parameter)], state={})
    other = torch.nn.Parameter(torch.zeros(5, 3))
    load(path, [Fragment(name="w", global_shape=(5, 3), local_offset=(0, 0), local_shape=(5, 3), start=0, flat=other.view(-1))])
    assert torch.equal(other, parameter)


def test_global_tensors_are_put_together_for_one_process(kit, tmp_path):
    """Whole tensors by prefix, from shards cut along two axes and flat."""
    state = kit.make_state()
    fragments = [f for name, t in state.items() for f in kit.cut(name, t, [5, 7], axis=1, parts=2)]
    path = save(tmp_path, step=1, fragments=fragments, state={}, max_file_bytes=500)
    for prefix in ("param/", "buffer/", "nothing/"):
        expected = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        assert kit.equal(load_tensors(path, prefix), expected)


def test_rank_tensors_continue_the_random_sequence(tmp_path):
    torch.manual_seed(11)
    torch.rand(5)
    path = save(tmp_path, step=1, fragments=[], state={}, rank_tensors={"rng/torch": torch.get_rng_state()})
    expected = torch.rand(8)
    torch.manual_seed(0)
    torch.set_rng_state(load_rank_tensors(path, 0)["rng/torch"])
    assert torch.equal(torch.rand(8), expected)
    assert load_rank_tensors(path, 1) == {}
    assert load(path, []) == {}


def test_the_manifest_says_what_the_checkpoint_is(tmp_path):
    state = {"loader": {"epoch": 1, "cursor": 123456789012345678}, "rate": 0.1 + 0.2, "names": ["ä", None, True]}
    path = save(tmp_path, step=12, fragments=[Fragment.whole("w", torch.ones(3))], state=state, config="model:\n  width: 64\n")
    manifest = read_manifest(path)
    assert path == tmp_path / "step-00000012"
    assert (manifest.step, manifest.world_size, manifest.config, manifest.state) == (12, 1, "model:\n  width: 64\n", state)
    assert manifest.code_version.startswith("0.")
    assert manifest.torch_version == torch.__version__
    assert {path.name for path in path.iterdir()} == {"manifest.json", *manifest.files}
    assert load(path, [Fragment.whole("w", torch.zeros(3))]) == state


def test_the_manifest_says_what_the_run_had_done_and_spent(tmp_path):
    about = {"tokens": 123456789012, "layout": {"data": 2, "tensor": 4, "stages": [3, 5]}, "data_index": "ab" * 32, "ledger": {"joules": 0.1 + 0.2}}
    manifest = read_manifest(save(tmp_path, step=1, fragments=[], state={}, **about))
    assert {name: getattr(manifest, name) for name in about} == about


@pytest.mark.parametrize(
    ("about", "words"), [({"layout": {"rank": torch.ones(1)}}, "layout.rank is a Tensor"), ({"ledger": {"joules": float("inf")}}, "ledger.joules=inf")]
)
def test_what_the_manifest_cannot_say_is_refused_by_name(tmp_path, about, words):
    with pytest.raises(CheckpointError, match=words):
        save(tmp_path, step=1, fragments=[], state={}, **about)
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_of_the_first_format_is_read(kit, saved):
    """It had no tokens, layout, data_index and ledger: they are taken as not known."""
    path, state = saved
    body = json.loads((path / "manifest.json").read_text())
    for name in ("tokens", "layout", "data_index", "ledger", "sha256"):
        del body[name]
    body["format_version"] = 1
    digest = hashlib.sha256(json.dumps(body, indent=1).encode() + b"\n").hexdigest()
    (path / "manifest.json").write_text(json.dumps({**body, "sha256": digest}, indent=1) + "\n")
    manifest = read_manifest(path)
    assert (manifest.format_version, manifest.tokens, manifest.layout, manifest.data_index, manifest.ledger) == (1, 0, {}, "", {})
    target = kit.zeros(state)
    assert load(path, kit.whole(target)) == {"step": 7}
    assert kit.equal(target, state)
    assert newest_valid(path.parent) == path


def test_the_warnings_of_other_threads_are_left_alone(tmp_path):
    """A filter that another thread sets while a save runs is still set after it, and one that it took back stays away."""
    filters: list[list] = []

    def fragments():
        warnings.filterwarnings("error", message="set by another thread")
        filters.append(list(warnings.filters))
        yield Fragment.whole("w", torch.ones(3))

    with warnings.catch_warnings():
        save(tmp_path, step=1, fragments=fragments(), state={})
        with pytest.raises(UserWarning, match="set by another thread"):
            warnings.warn("set by another thread", stacklevel=1)
        assert [entry for entry in warnings.filters if entry in filters[0]] == filters[0]


def test_nothing_is_pickled(kit, saved, monkeypatch):
    """Every file is JSON or safetensors to the last byte, and a load works where unpickling and torch.load are forbidden."""
    path, state = saved
    for file in path.iterdir():
        raw = file.read_bytes()
        if file.suffix == ".json":
            json.loads(raw)
            continue
        assert file.suffix == ".safetensors"
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        offsets = sorted(entry["data_offsets"] for key, entry in header.items() if key != "__metadata__")
        assert offsets[0][0] == 0
        assert all(a[1] == b[0] for a, b in pairwise(offsets))
        assert 8 + length + offsets[-1][1] == len(raw)

    def forbidden(*args, **kwargs):
        raise AssertionError("a checkpoint must not be unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, forbidden)
    target = kit.zeros(state)
    load(path, kit.whole(target))
    assert kit.equal(target, state)
    assert load_tensors(path, "param/")


def test_a_plain_reader_understands_an_unsharded_checkpoint(saved):
    """Whole tensors are stored under their own names: the safetensors package alone reads them."""
    from safetensors.torch import load_file

    path, state = saved
    found = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert {name for name, tensor in state.items() if tensor.numel()} == found.keys()
    assert torch.equal(found["buffer/counts"], state["buffer/counts"])


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    for value in (1.0, 2.0):
        path = save(tmp_path, step=5, fragments=[Fragment.whole("w", torch.full((4,), value))], state={"value": value})
    target = torch.zeros(4)
    assert load(path, [Fragment.whole("w", target)]) == {"value": 2.0}
    assert target.tolist() == [2.0] * 4
    assert {file.name for file in path.iterdir()} == {"manifest.json", *read_manifest(path).files}


REFUSED_LOADS = {
    "missing in the checkpoint": ([("param/new", torch.zeros(3))], "does not hold param/new"),
    "missing in the run": ([("param/scalar", None)], "also holds param/scalar"),
    "another shape": ([("param/half", torch.zeros(34).bfloat16())], r"param/half has the shape \[33\] in .* and \[34\]"),
    "another type": ([("param/half", torch.zeros(33))], "param/half is torch.bfloat16 in .* torch.float32 in this run; use the train.prec"),
}


@pytest.mark.parametrize("case", REFUSED_LOADS)
def test_another_models_checkpoint_is_refused_by_name(kit, saved, case):
    changes, words = REFUSED_LOADS[case]
    path, state = saved
    target = kit.zeros(state)
    for name, tensor in changes:
        target.pop(name, None)
        if tensor is not None:
            target[name] = tensor
    with pytest.raises(CheckpointError, match=words) as error:
        load(path, kit.whole(target))
    assert isinstance(error.value, ConfigError)
    assert all(not tensor.any() for tensor in target.values()), "nothing may be filled by a load that is refused"


def test_a_part_of_a_checkpoint_can_be_asked_for(saved):
    path, state = saved
    half = torch.zeros(33).bfloat16()
    load(path, [Fragment.whole("param/half", half)], strict=False)
    assert torch.equal(half, state["param/half"])


def fragment(**changes) -> Fragment:
    facts = {"name": "w", "global_shape": (4, 2), "local_offset": (0, 0), "local_shape": (4, 2), "start": 0, "flat": torch.zeros(8)}
    return Fragment(**{**facts, **changes})


REFUSED_SAVES = {
    "a gap": ([fragment(flat=torch.zeros(6))], {}, "tensor w cannot be saved: only 6 of 8 elements"),
    "an overlap": ([fragment(), fragment(start=6, flat=torch.zeros(2))], {}, "tensor w cannot be saved: box .* overlap"),
    "written by nobody": ([fragment(write=False)], {}, "tensor w cannot be saved: only 0 of 8"),
    "two shapes": ([fragment(), fragment(global_shape=(5, 2), write=False)], {}, r"\[4, 2\] in one fragment and .*\[5, 2\] in another"),
    "two types": ([fragment(), fragment(flat=torch.zeros(8).double(), write=False)], {}, "float32 .* in one fragment and torch.float64"),
    "outside its shard": ([fragment(start=1)], {}, "w: elements .* lie outside"),
    "complex": ([fragment(flat=torch.zeros(8, dtype=torch.complex64))], {}, "w is torch.complex64, .* cannot hold; use one of: float64"),
    "a kept name": ([fragment(name="rank/00000/w")], {}, "pass it in rank_tensors"),
    "a state with a tensor": ([fragment()], {"a": [1, {"b": torch.zeros(1)}]}, r"state.a\[1\].b is a Tensor, which JSON cannot hold"),
    "a state with NaN": ([fragment()], {"loss": float("nan")}, "state.loss=nan is not finite"),
    "a state with a number for a key": ([fragment()], {"a": {3: 4}}, "state.a has the key 3"),
}


@pytest.mark.parametrize("case", REFUSED_SAVES)
def test_what_cannot_be_saved_is_refused_by_name_and_leaves_nothing(tmp_path, case):
    fragments, state, words = REFUSED_SAVES[case]
    with pytest.raises(CheckpointError, match=words):
        save(tmp_path, step=1, fragments=fragments, state=state)
    assert not any(tmp_path.iterdir())


def test_an_interrupt_stays_an_interrupt(tmp_path, monkeypatch):
    """Ctrl-C in the middle of a save ends the program as Ctrl-C does, and leaves nothing."""
    from kan_train.checkpoint import storage

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, step=1, fragments=[Fragment.whole("w", torch.ones(3))], state={})
    assert newest(tmp_path) is None
    assert not any(Path(tmp_path).iterdir())
