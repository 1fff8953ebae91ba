"""What a KAN model is, as config.json says it: the settings of kan-train's `model` section under their names there."""

from typing import Any

from transformers import PretrainedConfig

ADA = {"num_heads": 4, "conv_width": 4, "feature_map": "silu", "decay": "learned", "chunk": 64, "output_norm": True, "output_gate": True, "mixture": 0}
ATTENTION = {"num_heads": 4, "num_kv_heads": 4, "head_width": None, "rope_theta": 10000.0}
EDGE = {"kind": "bspline", "order": 3, "grid": 5, "low": -3.0, "high": 3.0, "group_size": 16}
GROVE = {
    "num_groves": 64, "active_groves": 4, "width": 64, "score_rank": 8, "kind": "gated", "gate": "softmax", "score": "norm", "route_scale": 1.0,
    "shared_width": 0, "capacity_factor": 0.0,
}  # fmt: skip


class KanConfig(PretrainedConfig):
    """`ada`, `attention` and `grove` are dictionaries; what one lacks has the value above."""

    model_type = "kan"
    attribute_map = {"hidden_size": "width", "num_hidden_layers": "num_layers", "max_position_embeddings": "sequence_length"}  # noqa: RUF012
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        num_layers: int = 4,
        width: int = 128,
        vocab_size: int = 4096,
        sequence_length: int = 512,
        norm_eps: float = 1e-6,
        attention_pattern: int = 0,
        ffn: str = "kalmagrove",
        ffn_width: int = 512,
        ada: dict[str, Any] | None = None,
        attention: dict[str, Any] | None = None,
        grove: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_layers, self.width, self.vocab_size, self.sequence_length = num_layers, width, vocab_size, sequence_length
        self.norm_eps, self.attention_pattern, self.ffn, self.ffn_width = norm_eps, attention_pattern, ffn, ffn_width
        self.ada, self.attention, self.grove = {**ADA, **(ada or {})}, {**ATTENTION, **(attention or {})}, {**GROVE, **(grove or {})}
        self.grove["edge"] = {**EDGE, **self.grove.get("edge", {})}
        softmax = attention_pattern > 0
        self.num_attention_heads = self.attention["num_heads"] if softmax else self.ada["num_heads"]
        super().__init__(**{"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, **kwargs})
