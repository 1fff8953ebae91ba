"""The arms of benchmarks/claims.py: what is compared, as settings of `kan train`, at a size for a CPU and at two for a GPU.

The four main arms share layers, width, heads and vocabulary: KAN, dense of equal total parameters, dense of equal active parameters, and a mixture of
SwiGLU experts with a linear router and softmax attention, of the KAN's N, K and M. An ablation is the KAN with one thing taken out, or with its groves
cut otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kan_train.config import Config
from kan_train.config.compose import compose_train


@dataclass(frozen=True)
class Scale:
    """A size at which the claims are tested; the sweep and the seeds are fixed here, before a study's runs, and are the same for every arm."""

    name: str
    sequence_length: int
    sequences: int
    """Sequences a step."""
    steps: int
    """Steps of the KAN, and of every arm where tokens are equal."""
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    contexts: tuple[int, ...]
    """Sequence lengths at which training speed is measured."""
    speed_tokens: int
    """Tokens a step there, at every context: the optimizer costs a token less the more of them there are."""
    micro_batch_tokens: int
    """Tokens of a micro-batch there, or one sequence where that is longer: groves gain from more, large dense layers on a CPU lose."""
    settings: tuple[str, ...] = ()

    @property
    def tokens_a_step(self) -> int:
        return self.sequences * self.sequence_length


SCALES = {
    scale.name: scale
    for scale in (
        Scale("tiny", 256, 8, 48, (3e-3, 6e-3, 1.2e-2, 2.4e-2), (11, 22, 33), (256, 1024, 4096, 16384), 16384, 4096),
        Scale("125m", 1024, 64, 2000, (6e-4, 1.2e-3, 2.4e-3), (11, 22, 33), (1024, 4096, 16384, 65536), 65536, 65536, ("train.precision=bf16",)),
        Scale("1b", 2048, 128, 4000, (3e-4, 6e-4, 1.2e-3), (11, 22, 33), (2048, 8192, 32768, 65536), 65536, 65536, ("train.precision=bf16",)),
    )
}


@dataclass(frozen=True)
class Arm:
    """One model of the comparison."""

    name: str
    title: str
    settings: tuple[str, ...]
    main: bool = False
    """Trained with equal FLOPs and equal dollars too, and timed."""


def arms_of(scale: Scale) -> dict[str, Arm]:
    """Every arm by its name, the KAN first."""
    kan = f"model=kan_{scale.name}"
    grove = composed(scale, [kan]).model.grove
    # The softmax layers of an arm that replaces ADA have the heads of the dense twins.
    attention = composed(scale, [f"model=dense_{scale.name}_total"]).model.attention
    softmax = ("model.attention_pattern=1", f"model.attention.num_heads={attention.num_heads}", f"model.attention.num_kv_heads={attention.num_kv_heads}")
    literal_ada = ("model.ada.feature_map=identity", "model.ada.decay=none", "model.ada.output_norm=false", "model.ada.output_gate=false")
    linear, silu = "model.grove.score=linear", "model.grove.edge.kind=silu"

    # Equal parameters, total and active, in the groves and in their scoring.
    counts = {"num_groves": grove.num_groves * 4, "active_groves": grove.active_groves * 4, "width": grove.width // 4, "score_rank": grove.score_rank // 4}
    finer = tuple(f"model.grove.{name}={value}" for name, value in counts.items())
    found = [
        Arm("kan", "KAN", (kan,), main=True),
        Arm("dense_total", "dense, equal total parameters", (f"model=dense_{scale.name}_total",), main=True),
        Arm("dense_active", "dense, equal active parameters", (f"model=dense_{scale.name}_active",), main=True),
        Arm("moe", "mixture of SwiGLU experts, linear router, softmax attention", (kan, *softmax, linear, silu), main=True),
        Arm("no_edges", "KAN with silu in the place of edge activations", (kan, silu)),
        Arm("no_norm_routing", "KAN with a linear router in the place of norm routing", (kan, linear)),
        Arm("no_ada", "KAN with softmax attention in the place of ADA", (kan, *softmax)),
        Arm("literal_ada", "KAN with the paper's literal ADA: no feature map, decay, norm or gate", (kan, *literal_ada)),
        Arm("finer", "KAN with four times as many groves, a quarter as wide, scored by a quarter of the rank", (kan, *finer)),
    ]
    return {arm.name: arm for arm in found}


def composed(scale: Scale, settings: Sequence[str], more: Sequence[str] = ()) -> Config:
    """The whole configuration of an arm at this scale, `more` going before both; ConfigError where settings do not go together."""
    common = (f"model.sequence_length={scale.sequence_length}", f"train.global_batch_size={scale.sequences}", "run.name=claims")
    return compose_train([*settings, *common, *scale.settings, *more], [])
