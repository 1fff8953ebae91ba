"""A KAN language model for transformers, in plain torch: pre-norm blocks of a token mixer and a feed-forward layer.  B batch, T time, D width, V vocabulary."""

from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_kan import KanConfig
from .groves_kan import KalmaGrove, SwiGLU
from .mixers_kan import Ada, RMSNorm, SoftmaxAttention, linear

# What `generate` calls the cache: newer versions have renamed it.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class KanCache:
    """What the model remembers of the tokens read so far: for ADA layers as much after any number of them. `forward` moves it on."""

    is_compileable = is_croppable = False

    def __init__(self) -> None:
        self.states: list[tuple[Tensor, ...]] = []
        """One a layer; empty before the first token."""
        self.length = 0
        """Tokens read, padding included."""
        self.pads_B: Tensor | None = None
        """Tokens of padding before each row; None where there are none."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> "KanCache":
        """Keep the rows `beam_idx`, in this order: beam search."""
        self.states = [tuple(part.index_select(0, beam_idx.to(part.device)) for part in state) for state in self.states]
        self.pads_B = None if self.pads_B is None else self.pads_B.index_select(0, beam_idx.to(self.pads_B.device))
        return self


class KanBlock(nn.Module):
    def __init__(self, config: KanConfig, layer: int) -> None:
        super().__init__()
        softmax = config.attention_pattern > 0 and (layer + 1) % config.attention_pattern == 0
        self.mixer_norm, self.ffn_norm = RMSNorm(config.width, config.norm_eps), RMSNorm(config.width, config.norm_eps)
        self.mixer = SoftmaxAttention(config) if softmax else Ada(config)
        self.ffn = KalmaGrove(config) if config.ffn == "kalmagrove" else SwiGLU(config)

    def forward(self, x: Tensor, state: tuple | None, past: int, pads_B: Tensor | None) -> tuple[Tensor, tuple]:
        mixed, state = self.mixer(self.mixer_norm(x), state, past, pads_B)
        x = x + mixed
        return x + self.ffn(self.ffn_norm(x)), state


class KanForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = KanConfig
    _no_split_modules = ["KanBlock"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["score_mean", "score_std", "balance"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # a state cannot be cut back to fewer tokens

    def __init__(self, config: KanConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(KanBlock(config, layer) for layer in range(config.num_layers))
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        self.head = linear(config.width, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The layers draw their own."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KanCache | None = None,
        past_key_values: KanCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] after each of input_ids [B, T], which follow the tokens of the cache; of the last `logits_to_keep` tokens alone where it is not 0.

        attention_mask [B, tokens of the cache + T] is 0 at padding, which may stand before and behind the tokens of a row; behind them not where a cache
        is used. cache (past_key_values is the same): a KanCache, which is moved on. labels [B, T] are input_ids, -100 where a token does not count.
        """
        known = _own(cache, past_key_values)
        after = known if known is not None else KanCache()
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be [batch, tokens], 0 at padding, and not {list(attention_mask.shape)}")
        if after.length == 0 and attention_mask is not None:
            pads_B = (attention_mask != 0).cumsum(1).eq(0).sum(1)
            after.pads_B = pads_B if pads_B.any() else None
        x, hidden, states = self.embedding(input_ids), [], []
        before_all: list[tuple | None] = [*after.states] or [None] * len(self.layers)
        for layer, before in zip(self.layers, before_all, strict=True):
            hidden.append(x)
            x, state = layer(x, before, after.length, after.pads_B)
            states.append(state)
        after.states, after.length = states, after.length + input_ids.shape[1]
        x = self.final_norm(x)
        logits = self.head(x[:, -logits_to_keep:])
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        use_cache = not self.training if use_cache is None else use_cache
        kept: dict[str, Any] = {_CACHE: after if use_cache else None}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=(*hidden, x) if output_hidden_states else None, **kept)

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> dict:
        """Of all tokens so far those that the cache has not read."""
        known = _own(kwargs.get("cache"), kwargs.get("past_key_values"))
        new = input_ids if known is None else input_ids[:, known.length :]
        inputs = {"input_ids": new, "attention_mask": attention_mask, _CACHE: known, "use_cache": kwargs.get("use_cache", True)}
        return inputs | {"logits_to_keep": kwargs.get("logits_to_keep") or 0}


def _own(*caches: Any) -> KanCache | None:
    """The KanCache among them: `generate` may bring an empty cache of another kind, which is left aside."""
    for cache in caches:
        if isinstance(cache, KanCache):
            return cache
        if cache is not None and cache.get_seq_length():
            raise ValueError(f"{type(cache).__name__} cannot hold the states of this model; pass the KanCache of an earlier output")
    return None
