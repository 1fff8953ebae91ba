"""How fast the arms of benchmarks/claims.py train at growing contexts, how many groves a gradient reaches, and how long initial weights take.

All arms of a context step in turns in one process. Where contexts are compared, documents are not kept apart, in any arm: which keys a softmax layer may
see would otherwise depend on where documents begin.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from claims_arms import Scale, arms_of, composed
from contestant import Contestant

from kan_train.accounting.flops import flops_per_token
from kan_train.accounting.peaks import known_peak_flops
from kan_train.config import Config
from kan_train.data import open_training_data
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel, count_parameters

TIMED = ("no_ada", "literal_ada")
"""Ablations that are timed too: what ADA alone changes."""


def speed_rows(scale: Scale, *, corpora: Path, rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row for each context and arm: training tokens a second, FLOPs, MFU, and the ratio of each to the dense model of equal total parameters."""
    arms = {name: arm for name, arm in arms_of(scale).items() if arm.main or name in TIMED}
    rows = []
    for context in scale.contexts:
        sequences = max(1, scale.speed_tokens // context)
        batch = [f"train.global_batch_size={sequences}", f"train.micro_batch_size={max(1, scale.micro_batch_tokens // context)}"]
        shape = [f"model.sequence_length={context}", *batch, "data.reset_at_documents=false", *_machine(corpora, threads)]
        contestants = _timed({name: composed(scale, arm.settings, shape) for name, arm in arms.items()}, rounds, batches=1)
        peak = _peak(contestants["kan"].config)
        for name, contestant in contestants.items():
            row = contestant.row() | {"part": "training", "arm": name, "context": context, "threads": threads, "peak_tflops": peak / 1e12}
            row["name"], row["tokens_a_step"] = f"{name}, context {context}", contestant.tokens_a_step
            causal = _causal_flops(contestant.config)
            row["mfu"] = contestant.tokens_per_second() * contestant.flops / peak
            row["mfu_causal"] = contestant.tokens_per_second() * causal / peak
            row["speed_against_dense_total"] = contestant.tokens_per_second() / contestants["dense_total"].tokens_per_second()
            row["ideal_against_dense_total"] = _causal_flops(contestants["dense_total"].config) / causal
            told = f"{row['tokens_per_second']:,.0f} tokens/s, MFU {row['mfu_causal']:.2f}, {row['speed_against_dense_total']:.2f} of dense_total"
            print(f"{row['name']}: {told} (FLOPs: {row['ideal_against_dense_total']:.2f})", flush=True)
            rows.append(row)
    return rows


def workload_rows(scale: Scale, *, corpora: Path, rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row for each main arm: tokens a second with the batch and the documents that the runs of the part `learning` have: what equal dollars buy."""
    configs = {name: composed(scale, arm.settings, _machine(corpora, threads)) for name, arm in arms_of(scale).items() if arm.main}
    contestants = _timed(configs, rounds, batches=4)
    rows = [contestant.row() | {"part": "workload", "arm": name, "threads": threads} for name, contestant in contestants.items()]
    for row in rows:
        print(f"{row['arm']}, as it learns: {row['tokens_per_second']:,.0f} tokens/s", flush=True)
    return rows


def _machine(corpora: Path, threads: int) -> list[str]:
    return [f"data.root={corpora}", "data.verify=false", f"run.threads={threads}"]


def _timed(configs: dict[str, Config], rounds: int, *, batches: int) -> dict[str, Contestant]:
    contestants = {name: Contestant(name, config, batches=batches) for name, config in configs.items()}
    for _ in range(rounds + 1):
        for contestant in contestants.values():
            contestant.run(batches)
    return contestants


def _causal_flops(config: Config) -> float:
    """Training FLOPs a token, of softmax attention only those that a causal mask leaves: what these arms compute."""
    return flops_per_token(config.model, counting="causal").training


def _peak(config: Config) -> float:
    """FLOP/s: the device's published peak, or where none is known what a large product of matrices reaches here and now."""
    cuda = torch.cuda.is_available()
    known = known_peak_flops(torch.cuda.get_device_name(0) if cuda else "CPU", config.train.precision)
    if known is not None:
        return known
    device, size = "cuda" if cuda else "cpu", 1536
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:])


def gradient_rows(scale: Scale, *, corpora: Path) -> list[dict[str, Any]]:
    """A row for each size of a micro-batch: the share of groves whose weights have a gradient other than 0, at step 0, on the corpus's tokens."""
    config = composed(scale, arms_of(scale)["kan"].settings, [f"data.root={corpora}", "data.verify=false"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = materialise(LanguageModel(config.model), seed=scale.seeds[0], device=device)
    data = open_training_data(config.data, sequence_length=config.model.sequence_length, seed=scale.seeds[0], vocab_size=config.model.vocab_size)
    loader = data.loader(config.train.global_batch_size, 1, 0, 1)
    tokens = torch.cat([batch.tokens.flatten() for batch in loader.next_step()]).to(device)
    loader.close()
    grove, rows, count = config.model.grove, [], 1
    while count <= min(scale.sequence_length, len(tokens) - 1):
        loss, _ = model(tokens[None, :count], tokens[None, 1 : count + 1])
        model.discard_statistics()
        # What the chosen groves alone use: the routing's own tables are read by every token.
        weights = [weight for name, weight in model.named_parameters() if ".ffn.groves." in name]
        gradients = torch.autograd.grad(loss, weights)
        reached = torch.stack([gradient.flatten(1).ne(0).any(1) for gradient in gradients]).float().mean().item()
        uniform = 1 - (1 - grove.active_groves / grove.num_groves) ** count
        rows.append({"part": "gradients", "name": f"{count} tokens", "tokens": count, "share": reached, "share_if_uniform": uniform})
        count *= 4
    return rows


def initialisation_rows(scale: Scale, *, rounds: int) -> list[dict[str, Any]]:
    """A row for each main arm: seconds to build the model and fill its weights, on the device of the run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {name: composed(scale, arm.settings).model for name, arm in arms_of(scale).items() if arm.main}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            materialise(LanguageModel(model), seed=0, device=device)
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, model in models.items():
        total, median = count_parameters(model)[0], statistics.median(seconds[name])
        told = {"seconds": median, "all_seconds": seconds[name], "parameters_total": total, "parameters_a_second": total / median}
        rows.append({"part": "initialisation", "name": name, "arm": name, **told})
    return rows


def training_speeds(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Tokens a second by arm as the arms learn."""
    return {row["arm"]: row["tokens_per_second"] for row in rows if row["part"] == "workload"}
