"""A KAN language model for transformers, in plain torch: pre-norm blocks of a token mixer and a feed-forward layer.  B batch, T time, D width, V vocabulary."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_kan import KanConfig
from .groves_kan import KalmaGrove, SwiGLU
from .mixers_kan import Ada, RMSNorm, SoftmaxAttention, linear

# What `generate` calls the cache: newer versions have renamed it.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
_BEHIND = (
    "attention_mask is 0 behind the tokens of a row, where a cache cannot go on; pad on the left (tokenizer.padding_side='left'), or call the model with "
    "use_cache=False, not generate"
)


class KanCache:
    """What the model remembers of the tokens read so far: for ADA layers as much after any number of them. `forward` moves it on."""

    is_compileable = is_croppable = False
    is_linear = (False,)  # to `generate`: of a text that begins with the tokens read, pass on those behind them

    def __init__(self) -> None:
        self.states: list[tuple[Tensor, ...]] = []
        """One a layer; empty before the first token."""
        self.length = 0
        """Tokens read, padding included."""
        self.pads_B: Tensor | None = None
        """Tokens of padding before each row; None where there are none."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def pad(self, pads_B: Tensor) -> None:
        """Take pads_B [B] tokens of padding before each row: as many as before, or more where all that was read of a row is padding. Else ValueError."""
        read = pads_B.new_zeros(len(pads_B)) if self.pads_B is None else self.pads_B
        if (pads_B.clamp(max=self.length) != read.clamp(max=self.length)).any():
            raise ValueError("attention_mask has other padding than the tokens of the cache were read with; pass that mask, with a 1 for each token since")
        self.pads_B = pads_B if pads_B.any() else None

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
        ValueError for another mask, for inputs_embeds, and for position_ids that are not those of the tokens.
        """
        if kwargs.pop("inputs_embeds", None) is not None:
            raise ValueError("inputs_embeds are not read by this model; pass input_ids")
        known = _own(cache, past_key_values)
        after = known if known is not None else KanCache()
        place, behind = torch.arange(after.length, after.length + input_ids.shape[1], device=input_ids.device), False
        if attention_mask is not None:
            pads_B, behind = _padding(attention_mask, len(input_ids), after.length + len(place))
            if behind and (known is not None or use_cache):
                raise ValueError(_BEHIND)
            after.pad(pads_B)
        # Not among the named arguments: `generate` would make them for every call.
        if (positions := kwargs.pop("position_ids", None)) is not None:
            counted = place[None] if after.pads_B is None else place - after.pads_B[:, None]
            read = counted >= 0 if attention_mask is None else attention_mask[:, after.length :] != 0
            if positions.shape[-1] != len(place) or ((positions != counted) & read).any():
                raise ValueError("position_ids must count each row's tokens from 0, without a gap or a second document in the row; leave them out")
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
        use_cache = not (self.training or behind) if use_cache is None else use_cache
        kept: dict[str, Any] = {_CACHE: after if use_cache else None}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=(*hidden, x) if output_hidden_states else None, **kept)

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> dict:
        """Of all tokens so far those that the cache has not read: the last `next_sequence_length`, or all of input_ids where it is None."""
        known, use_cache = _own(kwargs.get("cache"), kwargs.get("past_key_values")), kwargs.get("use_cache", True)
        if attention_mask is not None and _padding(attention_mask, *attention_mask.shape)[1]:
            raise ValueError(_BEHIND)
        if known is not None:
            if not use_cache:
                raise ValueError("use_cache=False, and a cache to go on from; leave one of them out")
            tokens = input_ids.shape[1]
            # Without that keyword, older versions pass the whole text, and newer ones a piece of a prompt that they read in pieces.
            count = kwargs.get("next_sequence_length", tokens if _CACHE == "cache" else tokens - known.length)
            if count is not None and not 0 < count <= tokens:
                raise ValueError(
                    f"input_ids have {tokens} tokens and the cache has read {known.length}; pass the whole text, of more tokens, or the new ones with an "
                    f"attention_mask of {known.length} columns more"
                )
            input_ids = input_ids if count is None else input_ids[:, -count:]
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, _CACHE: known, "use_cache": use_cache}
        if (positions := kwargs.get("position_ids")) is not None:
            inputs["position_ids"] = positions[..., -input_ids.shape[1] :]
        return inputs | {"logits_to_keep": kwargs.get("logits_to_keep") or 0}


def _padding(attention_mask: Tensor, rows: int, tokens: int) -> tuple[Tensor, bool]:
    """Tokens of padding before each row [B], and whether a row has some behind its tokens."""
    if attention_mask.shape != (rows, tokens):
        raise ValueError(
            f"attention_mask must be [batch, tokens of the cache and of input_ids] = {[rows, tokens]}, 0 at padding, and not {list(attention_mask.shape)}"
        )
    real = attention_mask != 0
    begun = real.cumsum(1) > 0
    if (begun[:, :-1] & ~real[:, :-1] & real[:, 1:]).any():
        raise ValueError("attention_mask is 0 between tokens of a row, which this model cannot leave out; take them out of input_ids, and pad on the left")
    return (~begun).sum(1), bool((begun[:, -1] & ~real[:, -1]).any())


def _own(*caches: Any) -> KanCache | None:
    """The KanCache among them: `generate` may bring an empty cache of another kind, which is left aside."""
    for cache in caches:
        if isinstance(cache, KanCache):
            return cache
        if cache is not None and cache.get_seq_length():
            raise ValueError(f"{type(cache).__name__} cannot hold the states of this model; pass the KanCache of an earlier output")
    return None
