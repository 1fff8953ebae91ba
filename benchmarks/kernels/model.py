"""Cases of whole models for benchmarks/gpu.py: kan_1b beside its dense twin of equal total parameters, in training and in decoding, bf16.

Training is forward and backward of about 32k tokens, in the largest micro-batches that fit; both models see as many tokens a call. A decode step reads
one token of each sequence after a context: of ADA a state of constant size, of the twin a cache of keys and values, both filled with random numbers.
The twin writes its cache in place here, where `model.step` would copy it. Neither training nor decoding has packed documents.

MFU is tokens a second times the training FLOPs a token of kan_train.accounting.flops over the product rate that this run measured, in both of its
countings. Goals go by the counting "full", which is the stricter one for kan_1b: FlashAttention leaves out the masked half that it counts.

B batch, T time, D width, V vocabulary, H heads, d head width, S context, N groves.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from model_checks import checks as checks
from torch import Tensor
from whole_models import KAN, TWIN, config_of, model_of, random_caches, random_states, random_tokens, step_in_place, without_last

from kan_train.accounting.flops import COUNTINGS, flops_per_token
from kan_train.model.ada import AdaState
from kan_train.model.cache import KeyValueCache
from kan_train.model.lm import LanguageModel

PLAIN = f"{KAN} in plain torch"
MFU_SHARE, SPEED_UP, DECODE_SPEED_UP, BYTE_SHARE = 0.7, 6.2, 2.86, 0.7  # the goals
_BESIDE_A_CACHE = 10 * 10**9  # bytes: three models, what is written over the caches of the device, and what torch itself takes


def cases(device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """Training at 4k, 2k and 16k tokens, decode steps by batch and context, and training with an optimizer step; what matters most comes first."""
    middle, *lengths = (32, 16, 64) if dry else (4096, 2048, 16384)
    context, *contexts = (16, 8) if dry else (4096, 1024, 16384, 65536)
    batches = (3,) if dry else (4, 16, 64)
    return [
        _training(middle, device, dry),
        _decoding(1, context, device, dry),
        *(_training(time, device, dry) for time in lengths),
        *(_decoding(1, other, device, dry) for other in contexts),
        *(_decoding(batch, other, device, dry) for other in (context, *contexts) for batch in batches),
        _training(middle, device, dry, with_optimizer=True),
    ]


# --- training -------------------------------------------------------------------------------------------------------------------------------------------------


def _training(time: int, device: torch.device, dry: bool, *, with_optimizer: bool = False) -> dict[str, Any]:
    tokens = 64 if dry else 32768
    trainers = {
        KAN: Trainer(lambda: model_of(KAN, "auto", device, dry), with_optimizer=with_optimizer),
        TWIN: Trainer(lambda: model_of(TWIN, "auto", device, dry), with_optimizer=with_optimizer),
    }
    if not with_optimizer:
        trainers[PLAIN] = Trainer(lambda: model_of(KAN, "torch", device, dry))
    flops = {name: _training_flops(KAN if name == PLAIN else name, time, dry) for name in trainers}

    def make(seed: int) -> tuple[Tensor]:
        return (random_tokens(seed, (tokens // time, time + 1), config_of(KAN, dry).vocab_size, device),)

    def conclude(row: dict[str, Any], _: tuple, ceilings: dict[str, float]) -> dict[str, Any]:
        models = []
        for name, trainer in trainers.items():
            measured = row if name == KAN else row["rivals"][name]
            if "median_ms" in measured:
                speed = 1e3 * tokens / measured["median_ms"]
                models.append({"name": name, "tokens_per_second": speed, "how": trainer.how(), **_mfu(speed, flops[name], ceilings)})
        return {"models": models, **training_verdict(row["rivals"][TWIN].get("ratio"), flops[KAN], flops[TWIN])}

    return {
        "name": f"training, forward + backward{' + AdamW step (moments in bf16)' if with_optimizer else ''}, B {tokens // time} T {time} {KAN} bf16",
        "make": make,
        "kernel": trainers[KAN],
        "reference": None,
        "rivals": {name: trainer for name, trainer in trainers.items() if name != KAN},
        "flops": flops[KAN]["causal"] * tokens,
        "tokens": tokens,
        "conclude": conclude,
    }


class Trainer:
    """A call is the forward and backward pass of all tokens [B, T+1], and an optimizer step if that is wanted. The first call finds out what fits."""

    def __init__(self, build: Callable[[], Any], *, with_optimizer: bool = False) -> None:
        self.build, self.with_optimizer = build, with_optimizer
        self.way: tuple[int, bool] | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.tokens_shape, self.peak_bytes = torch.Size(), 0

    def __call__(self, tokens_BT: Tensor) -> None:
        model = self.build()
        if self.with_optimizer and self.optimizer is None:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=tokens_BT.is_cuda)
        if self.way is None:
            self.way = self._first_that_fits(model, tokens_BT)
        else:
            self._run(model, tokens_BT, *self.way)

    def how(self) -> str:
        """What of the tokens was in memory together, and whether the backward pass recomputed."""
        assert self.way is not None
        micro, recompute = self.way
        sequences, length = self.tokens_shape
        text = f"micro-batches of {micro} x {length - 1} tokens ({-(-sequences // micro)} a call) {'with' if recompute else 'without'} activation checkpointing"
        return text + (f", {self.peak_bytes / 1e9:.1f} GB at the peak" if self.peak_bytes else "")

    def _first_that_fits(self, model: Any, tokens_BT: Tensor) -> tuple[int, bool]:
        self.tokens_shape = tokens_BT.shape
        for way in _ways(len(tokens_BT)):
            if tokens_BT.is_cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            if self._fits(model, tokens_BT, way):
                self.peak_bytes = torch.cuda.max_memory_allocated() if tokens_BT.is_cuda else 0
                return way
        raise MemoryError(f"one sequence of {tokens_BT.shape[1] - 1} tokens does not fit, even with activation checkpointing")

    def _fits(self, model: Any, tokens_BT: Tensor, way: tuple[int, bool]) -> bool:
        try:
            self._run(model, tokens_BT, *way)
        except torch.cuda.OutOfMemoryError:
            fits = False  # and nothing else here: until its end the error keeps what was computed alive
        else:
            fits = True
        model.zero_grad(set_to_none=True)
        return fits

    def _run(self, model: Any, tokens_BT: Tensor, micro: int, recompute: bool) -> None:
        model.train()
        model.activation_checkpointing = recompute
        for part_BT in tokens_BT.split(micro):
            loss, _ = model(part_BT[:, :-1], part_BT[:, 1:])
            (loss * (len(part_BT) / len(tokens_BT))).backward()
        if self.optimizer is not None:
            self.optimizer.step()
        model.zero_grad(set_to_none=True)
        model.discard_statistics()


def _ways(sequences: int) -> Iterator[tuple[int, bool]]:
    """Sequences in memory together, and whether activations are recomputed: recomputation costs more than a smaller micro-batch."""
    halves = [sequences]
    while halves[-1] > 1:
        halves.append(halves[-1] // 2)
    for recompute in (False, True):
        for micro in halves:
            yield micro, recompute


def _training_flops(name: str, time: int, dry: bool) -> dict[str, float]:
    config = dataclasses.replace(config_of(name, dry), sequence_length=time)
    return {counting: flops_per_token(config, counting=counting).training for counting in COUNTINGS}


def _mfu(tokens_per_second: float, flops: dict[str, float], ceilings: dict[str, float]) -> dict[str, Any]:
    if not ceilings:
        return {}
    return {"mfu": {counting: tokens_per_second * count / ceilings["matmul_flops"] for counting, count in flops.items()}, "peak": "the measured matmul_flops"}


def training_verdict(achieved: float | None, kan_flops: dict[str, float], twin_flops: dict[str, float]) -> dict[str, Any]:
    """The ratio of tokens a second (None where the twin did not run) beside the ideal one, that of the FLOPs, and the goals."""
    ideal = {counting: twin_flops[counting] / kan_flops[counting] for counting in COUNTINGS}
    verdict: dict[str, Any] = {"ideal_flop_ratio": ideal, "achieved_ratio": achieved, "goals": {}}
    if achieved is not None:
        verdict["goals"]["MFU over the twin's"] = _goal(achieved / ideal["full"], MFU_SHARE)
        if min(ideal.values()) >= SPEED_UP:
            verdict["goals"]["tokens a second over the twin's"] = _goal(achieved, SPEED_UP)
    return verdict


def _goal(value: float, at_least: float) -> dict[str, Any]:
    return {"value": value, "goal": at_least, "reached": value >= at_least}


# --- decoding -------------------------------------------------------------------------------------------------------------------------------------------------


def _decoding(batch: int, context: int, device: torch.device, dry: bool) -> dict[str, Any]:
    twin_config = config_of(TWIN, dry)
    cache_bytes = 2 * 2 * twin_config.num_layers * batch * (context + 1) * twin_config.width  # as many heads for keys as for queries
    twin_fits = has_room(cache_bytes, device)

    def make(seed: int) -> tuple[Tensor, list[AdaState], list[KeyValueCache]]:
        tokens_B = random_tokens(seed, (batch,), twin_config.vocab_size, device)
        kan, twin = model_of(KAN, "auto", device, dry).eval(), model_of(TWIN, "auto", device, dry).eval()
        return tokens_B, random_states(kan, batch, seed), random_caches(twin, batch, context, seed) if twin_fits else []

    @torch.no_grad()
    def kernel(tokens_B: Tensor, states: list[AdaState], _: list[KeyValueCache]) -> tuple[Tensor, list[AdaState]]:
        return model_of(KAN, "auto", device, dry).step(tokens_B, states)

    def in_place(tokens_B: Tensor, _: list[AdaState], caches: list[KeyValueCache]) -> Tensor:
        if not twin_fits:
            raise MemoryError(f"a cache of {cache_bytes / 1e9:.0f} GB does not fit")
        return step_in_place(model_of(TWIN, "auto", device, dry), tokens_B, caches)

    @torch.no_grad()
    def copying(tokens_B: Tensor, _: list[AdaState], caches: list[KeyValueCache]) -> Tensor:
        return model_of(TWIN, "auto", device, dry).step(tokens_B, without_last(caches))[0]

    def conclude(row: dict[str, Any], inputs: tuple, ceilings: dict[str, float]) -> dict[str, Any]:
        tokens_B, states, caches = inputs
        kan, twin = model_of(KAN, "auto", device, dry), model_of(TWIN, "auto", device, dry)
        moved = {KAN: weight_bytes(kan, batch, groves_run(kan, tokens_B, states)) + 2 * state_bytes(states)}
        if twin_fits:
            moved[TWIN] = weight_bytes(twin, batch) + state_bytes(caches)
        models = [_decoder(name, row if name == KAN else row["rivals"][name], batch, moved[name], ceilings) for name in moved]
        return decoding_verdict(batch, [model for model in models if model])

    return {
        "name": f"decode step, B {batch} context {context} {KAN} bf16",
        "make": make,
        "copies": 1,  # of the largest caches there is no room for two; weights and states are larger than what a device caches
        "graph": True,
        "kernel": kernel,
        "reference": None,
        "rivals": {TWIN: in_place} | ({f"{TWIN}, model.step (copies its cache)": copying} if batch == 1 else {}),
        "tokens": batch,
        "conclude": conclude,
    }


def has_room(cache_bytes: int, device: torch.device) -> bool:
    """Whether the device's memory holds a cache beside everything else."""
    return device.type != "cuda" or cache_bytes + _BESIDE_A_CACHE <= torch.cuda.get_device_properties(device).total_memory


def _decoder(name: str, measured: dict[str, Any], batch: int, moved: float, ceilings: dict[str, float]) -> dict[str, Any] | None:
    """One model's part of the row: by its graph's time where there is one, else by the host's."""
    if "median_ms" not in measured:
        return None
    graph = "median_ms" in measured.get("graph", {})
    median_ms = (measured["graph"] if graph else measured)["median_ms"]
    fields = {"name": name, "tokens_per_second": 1e3 * batch / median_ms, "median_ms": median_ms, "bytes": moved}
    fields["how"] = "as a CUDA graph" if graph else "launched by the host"
    if ceilings:
        floor_ms = 1e3 * moved / ceilings["copy_bytes_per_second"]
        fields |= {"floor_ms": floor_ms, "share": floor_ms / median_ms}
    return fields


def decoding_verdict(batch: int, models: list[dict[str, Any]]) -> dict[str, Any]:
    """What the row says of kan_1b (the first model) and the goals: against the twin at batch 1, against the byte roofline elsewhere."""
    kan = models[0]
    verdict: dict[str, Any] = {"models": models, "goals": {}, "tokens_per_second": kan["tokens_per_second"], "bytes": kan["bytes"]}
    if "share" in kan:
        verdict |= {"floor_ms": kan["floor_ms"], "bound": "memory", "share": kan["share"]}
        if batch > 1:
            verdict["goals"]["share of the byte roofline"] = _goal(kan["share"], BYTE_SHARE)
    if len(models) > 1:
        verdict["ideal_byte_ratio"] = models[1]["bytes"] / kan["bytes"]
        verdict["achieved_ratio"] = kan["tokens_per_second"] / models[1]["tokens_per_second"]
        if batch == 1:
            verdict["goals"]["tokens a second over the twin's"] = _goal(verdict["achieved_ratio"], DECODE_SPEED_UP)
    return verdict


@torch.no_grad()
def groves_run(kan: LanguageModel, tokens_B: Tensor, states: list[AdaState]) -> list[int]:
    """How many groves of each layer a step of these tokens runs: the weights of the others are not read."""
    counts: list[int] = []

    def count(_: Tensor, index_TK: Tensor) -> Tensor:
        counts.append(len(index_TK.unique()))
        return index_TK

    for groves in kan.grove_layers():
        groves.router.selector = count
    kan.step(tokens_B, states)
    for groves in kan.grove_layers():
        groves.router.selector = None
    return counts


def weight_bytes(model: LanguageModel, batch: int, groves: list[int] | None = None) -> float:
    """What a step of `batch` tokens reads: a row each of the embedding, the given number of groves of each layer, and all other weights."""
    embedding = model.embedding.weight
    total = float(sum(weight.nbytes for weight in model.parameters()) - embedding.nbytes + batch * embedding[0].nbytes)
    for layer, run in zip(model.grove_layers(), groves or [], strict=True):
        idle = 1 - run / layer.config.num_groves
        total -= idle * sum(weight.nbytes for weight in layer.parameters() if weight.spec.grove)  # type: ignore[attr-defined]
    return total


def state_bytes(states: list[Any]) -> int:
    """Bytes of the states of all layers."""
    values = (getattr(state, field.name) for state in states for field in dataclasses.fields(state))
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
