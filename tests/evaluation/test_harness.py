"""The real lm-evaluation-harness runs its tasks on a run, without a network, and finds what `kan evaluate` finds."""

import json
import random

import pytest
import torch
import yaml

from kan_train.commands.evaluate import run_evaluate
from kan_train.config import ConfigError, EvaluateConfig
from kan_train.evaluation.results import evaluations_of

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon"]


@pytest.fixture(scope="module")
def harness():
    """The harness and its datasets ask no network."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS"):
            patch.setenv(name, "1")
        import lm_eval

        from kan_train.evaluation import harness

        yield lm_eval, harness


@pytest.fixture
def lm(harness, run_root):
    return harness[1].HarnessModel("first", root=str(run_root), device="cpu", batch_size=7)


def instances(harness, kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=number) for number, one in enumerate(arguments)]


def plainly(lm, context, tokens):
    with torch.no_grad():
        logits = lm.model.logits(torch.tensor([[*context, *tokens]]))[0].double()
    here = logits.log_softmax(-1)[len(context) - 1 : -1]
    wanted = torch.tensor(tokens)
    return float(here.gather(-1, wanted[:, None]).sum()), bool((here.argmax(-1) == wanted).all())


def test_log_likelihoods_are_plain_forwards(harness, lm):
    chance = random.Random(0)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(0, 40))) for _ in range(12)]
    asked = [(text, f" {word}") for text in texts for word in chance.sample(WORDS, 2)]
    chance.shuffle(asked)
    # And what greedy decoding writes, which must be known as such.
    (written,) = lm.generate_until(instances(harness, "generate_until", (texts[3], {"until": [], "max_gen_toks": 5})))
    asked.append((texts[3], written))
    found = lm.loglikelihood(instances(harness, "loglikelihood", *asked))
    for (context, continuation), (log_prob, greedy) in zip(asked, found, strict=True):
        expected = plainly(lm, [1, *lm.tokenizer.encode(context)], lm.tokenizer.encode(continuation))
        assert log_prob == pytest.approx(expected[0], rel=1e-5)
        assert greedy == expected[1]
    rolled = lm.loglikelihood_rolling(instances(harness, "loglikelihood_rolling", *((text,) for text in texts)))
    assert rolled == pytest.approx([plainly(lm, [1], lm.tokenizer.encode(text))[0] if text else 0.0 for text in texts], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [({}, 0), ({"temperature": 0.7}, 0.7), ({"temperature": 0.7, "do_sample": False}, 0), ({"do_sample": True}, 1), ({"temperature": 0.0}, 0)],
)
def test_a_task_is_greedy_unless_it_samples(lm, settings, temperature):
    request = lm._request("alpha", {"until": "\n", "max_gen_toks": 3, **settings})
    assert (request.sampling.temperature, request.stop, request.max_tokens) == (temperature, ("\n",), 3)


def test_settings_that_are_not_known_are_refused(harness, lm):
    assert lm._request("alpha", {"num_beams": 1}).prompt == "alpha", "a single beam is none"
    with pytest.raises(ConfigError, match="generation_kwargs: num_beams is not known"):
        lm.generate_until(instances(harness, "generate_until", ("alpha", {"num_beams": 4})))


def task_file(folder, name, rows, **fields):
    data = folder / f"{name}_data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test", **fields}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(facts))


def test_the_harness_finds_what_kan_evaluate_finds(harness, run_root, tmp_path, monkeypatch):
    """A task of each request type, through simple_evaluate; the choices' accuracies are those of `kan evaluate` on the same rows."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    chance = random.Random(1)
    rows = [
        {
            "context": " ".join(chance.choices(WORDS, k=20)), "answer": number % 3,
            # Spaces behind a choice are its own, and count in acc_norm.
            "choices": [' '.join(chance.choices(WORDS, k=n)) + " " * chance.choice([0, 0, 2, 5]) for n in (1, 2, 4)],
        }
        for number in range(30)
    ]  # fmt: skip
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    task_file(tmp_path, "choices", rows, output_type="multiple_choice", doc_to_text="context", doc_to_choice="choices", doc_to_target="answer",
              metric_list=metrics)  # fmt: skip
    task_file(tmp_path, "rolling", rows[:5], output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{context}}",
              metric_list=[{"metric": "bits_per_byte"}])  # fmt: skip
    task_file(tmp_path, "writing", rows[:3], output_type="generate_until", doc_to_text="{{context}}", doc_to_target="x",
              generation_kwargs={"until": ["\n"], "max_gen_toks": 4}, metric_list=[{"metric": "exact_match"}])  # fmt: skip
    (tmp_path / "mine.jsonl").write_text((tmp_path / "choices_data.jsonl").read_text())
    run_evaluate(EvaluateConfig(run="first", root=str(run_root), tasks=["mine"], questions=str(tmp_path), device="cpu"))
    (ours,) = evaluations_of(run_root / "first")
    lm_eval, _ = harness
    theirs = lm_eval.simple_evaluate(
        model="kan", model_args={"run": "first", "root": str(run_root), "device": "cpu"}, tasks=["choices", "rolling", "writing"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0,
    )["results"]  # fmt: skip
    assert theirs["choices"]["acc,none"] == ours["acc"]["value"]
    assert theirs["choices"]["acc_norm,none"] == ours["acc_norm"]["value"]
    assert ours["acc"]["value"] != ours["acc_norm"]["value"]
    assert 1 < theirs["rolling"]["bits_per_byte,none"] < 20
    assert theirs["writing"]["exact_match,none"] == 0
