"""What a model is. Letters of docs/model.md: D width, H heads, d head width, N groves, K active groves, M grove width, r scoring rank."""

from dataclasses import dataclass, field

from kan_train.config.errors import ConfigError, require_at_least, require_between, require_choice

EDGE_KINDS = ("bspline", "piecewise_poly", "rational", "chebyshev", "silu")
EDGE_SHARINGS = ("grouped", "per_edge")
GROVE_KINDS = ("gated", "reuse", "edge")
GATES = ("softmax", "sigmoid", "literal")
SCORES = ("norm", "linear")
DECAYS = ("learned", "none", "data")
FEATURE_MAPS = ("silu", "identity")
FFN_KINDS = ("kalmagrove", "swiglu")
KERNELS = ("auto", "triton", "torch")


@dataclass(kw_only=True)
class EdgeConfig:
    """Learnable univariate functions (docs/model.md, section 1)."""

    kind: str = "bspline"
    """bspline, piecewise_poly, rational, chebyshev, or silu (no coefficients: the function a plain network uses)."""
    order: int = 3
    """Spline order k, or polynomial degree p of piecewise_poly: 1, 2 or 3. Degree of chebyshev."""
    grid: int = 5
    """Uniform grid intervals G."""
    low: float = -3.0
    """Lower end of the grid; functions continue linearly below it."""
    high: float = 3.0
    """Upper end of the grid; functions continue linearly above it."""
    sharing: str = "grouped"
    """grouped: the edges of a group of outputs share one function; per_edge: one function on every edge (edge groves always)."""
    group_size: int = 16
    """Hidden units that share one function under grouped sharing."""
    spline_share: float = 0.1
    """Share of the output variance that the spline part has at step 0 (eps^2) in per_edge layers; grouped layers start at exactly silu."""

    @property
    def step(self) -> float:
        """Width of a grid interval."""
        return (self.high - self.low) / self.grid

    def validate(self) -> None:
        require_choice("model.grove.edge.kind", self.kind, EDGE_KINDS)
        require_choice("model.grove.edge.sharing", self.sharing, EDGE_SHARINGS)
        if self.kind in ("bspline", "piecewise_poly"):
            require_between("model.grove.edge.order", self.order, 1, 3)
        else:
            require_between("model.grove.edge.order", self.order, 1, 8)
        require_at_least("model.grove.edge.grid", self.grid, 1)
        require_at_least("model.grove.edge.group_size", self.group_size, 1)
        require_between("model.grove.edge.spline_share", self.spline_share, 0.0, 1.0)
        if self.high <= self.low:
            raise ConfigError(
                f"model.grove.edge.high={self.high} must be above model.grove.edge.low={self.low}; "
                "use model.grove.edge.low=-3 model.grove.edge.high=3"
            )


@dataclass(kw_only=True)
class GroveConfig:
    """A KalmaGrove layer (docs/model.md, section 2)."""

    num_groves: int = 64
    """Subnets in a layer (N); 0: the shared grove alone, which is a dense layer with learnable activations."""
    active_groves: int = 4
    """Subnets run for each token (K). 1 - K/N is the nominal sparsity. 0 where num_groves is."""
    width: int = 64
    """Hidden width of a grove (M)."""
    score_rank: int = 8
    """Rows of a grove's scoring projection E_i (r)."""
    kind: str = "gated"
    """gated: a gated unit with a learnable spline activation; reuse: the same on the score's projection; edge: a full per-edge layer."""
    gate: str = "softmax"
    """softmax over the selected (default), sigmoid (times the relative score), or literal (the paper's formula as it stands)."""
    score: str = "norm"
    """norm: ||E_i x|| (the paper); linear: w_i . x, a plain linear router (a baseline)."""
    score_momentum: float = 0.95
    """Momentum of the running mean and deviation that standardise the scores."""
    route_scale: float = 1.0
    """Factor on the routed sum; the softmax gate already carries K."""
    shared_width: int = 0
    """Hidden width of the always-active shared grove; 0 for none."""
    balance_rate: float = 1e-2
    """Step of the selection bias against the load, in units of the score's deviation, at the start of the run; 0 turns balancing off."""
    balance_rate_final: float = 1e-3
    """The same at the end of the run; it moves between the two linearly with the steps."""
    auxiliary_loss: float = 0.0
    """Weight of the sequence-level load-balancing loss; 0 for none."""
    capacity_factor: float = 0.0
    """0: dropless. Otherwise a grove takes at most capacity_factor * tokens * K / N tokens a micro-batch,
    and drops the rest (lowest gate first)."""
    edge: EdgeConfig = field(default_factory=EdgeConfig)
    """The learnable functions inside the groves."""

    def validate(self) -> None:
        require_at_least("model.grove.num_groves", self.num_groves, 0)
        require_at_least("model.grove.shared_width", self.shared_width, 0)
        if self.num_groves == 0:
            return self._validate_without_groves()
        if not 1 <= self.active_groves <= self.num_groves:
            raise ConfigError(
                f"model.grove.active_groves={self.active_groves} must lie between 1 and model.grove.num_groves={self.num_groves}; "
                f"for 94% sparsity use model.grove.active_groves={max(1, round(0.06 * self.num_groves))}"
            )
        require_choice("model.grove.kind", self.kind, GROVE_KINDS)
        require_choice("model.grove.gate", self.gate, GATES)
        require_choice("model.grove.score", self.score, SCORES)
        require_at_least("model.grove.width", self.width, 1)
        require_at_least("model.grove.score_rank", self.score_rank, 1)
        require_between("model.grove.score_momentum", self.score_momentum, 0.0, 0.9999)
        require_at_least("model.grove.balance_rate", self.balance_rate, 0.0)
        require_at_least("model.grove.balance_rate_final", self.balance_rate_final, 0.0)
        require_at_least("model.grove.auxiliary_loss", self.auxiliary_loss, 0.0)
        require_at_least("model.grove.capacity_factor", self.capacity_factor, 0.0)
        self.edge.validate()
        if self.gate == "sigmoid" and self.active_groves < 2:
            raise ConfigError(
                "model.grove.gate=sigmoid divides by the mean score of the selected groves, which cancels the score when only one is "
                "selected; use model.grove.active_groves=2 or more, or model.grove.gate=softmax"
            )
        if self.score == "linear" and self.kind in ("reuse", "edge"):
            raise ConfigError(
                f"model.grove.kind={self.kind} works on the score's projection E_i x, which model.grove.score=linear does not have; "
                "use model.grove.score=norm, or model.grove.kind=gated"
            )
        if self.score == "linear" and self.gate != "softmax":
            raise ConfigError(f"model.grove.gate={self.gate} needs the norm score; use model.grove.gate=softmax or model.grove.score=norm")
        if self.kind in ("gated", "reuse"):
            if self.edge.sharing != "grouped":
                raise ConfigError(
                    f"model.grove.kind={self.kind} has a grouped activation; use model.grove.edge.sharing=grouped, or model.grove.kind=edge"
                )
            group = min(self.edge.group_size, self.width)
            if self.width % group:
                raise ConfigError(
                    f"model.grove.edge.group_size={self.edge.group_size} must divide model.grove.width={self.width}; "
                    f"use model.grove.edge.group_size={largest_divisor(self.width, group)}"
                )
        elif self.edge.sharing != "per_edge":
            raise ConfigError("model.grove.kind=edge has one function on every edge; use model.grove.edge.sharing=per_edge")
        elif self.edge.kind == "silu":
            raise ConfigError("model.grove.kind=edge needs learnable functions; use model.grove.edge.kind=bspline")
        elif self.edge.kind == "rational":
            raise ConfigError(
                "model.grove.edge.kind=rational is not a sum over a basis that the edges of an input could share; "
                "use model.grove.edge.kind=bspline, or model.grove.kind=gated"
            )

    def _validate_without_groves(self) -> None:
        self.edge.validate()
        if self.active_groves:
            raise ConfigError(f"model.grove.active_groves={self.active_groves}, but model.grove.num_groves=0; use model.grove.active_groves=0")
        if not self.shared_width:
            raise ConfigError(
                "model.grove.num_groves=0 leaves the shared grove alone, and model.grove.shared_width=0 is none; use model.grove.shared_width=512"
            )


@dataclass(kw_only=True)
class AdaConfig:
    """Arnold diffusion attention (docs/model.md, section 3)."""

    num_heads: int = 4
    """Heads (H); the head width d is model.width / H."""
    conv_width: int = 4
    """Taps w of the causal convolution over keys; 1 turns it off."""
    feature_map: str = "silu"
    """silu: phi(q) = silu(q), phi(k) = l2norm(silu(k)); identity: the paper's literal form."""
    decay: str = "learned"
    """learned: a learnable log rate a head; data: the rate also depends on the token; none: no decay (literal)."""
    half_life_min: float = 1.0
    """Shortest half-life at step 0, in tokens."""
    half_life_middle: float = 16.0
    """At least half of the heads start at or below this half-life."""
    half_life_max: float | None = None
    """Longest half-life at step 0; unset: half of model.sequence_length."""
    chunk: int = 64
    """Tokens a chunk of the chunkwise training form."""
    output_norm: bool = True
    """RMSNorm over each head's output; off: the literal form, where 1/sqrt(d) matters."""
    output_gate: bool = True
    """Multiply the normalised output by silu(W_gate x)."""
    mixture: int = 0
    """One-sided exponentials mixed into the diffusion kernel on K, besides the convolution; 0 for none."""

    def validate(self) -> None:
        require_at_least("model.ada.num_heads", self.num_heads, 1)
        require_at_least("model.ada.conv_width", self.conv_width, 1)
        require_choice("model.ada.feature_map", self.feature_map, FEATURE_MAPS)
        require_choice("model.ada.decay", self.decay, DECAYS)
        require_at_least("model.ada.chunk", self.chunk, 1)
        require_at_least("model.ada.mixture", self.mixture, 0)
        if self.half_life_min <= 0:
            raise ConfigError(f"model.ada.half_life_min={self.half_life_min} must be positive; use model.ada.half_life_min=1")
        if self.half_life_middle < self.half_life_min:
            raise ConfigError(
                f"model.ada.half_life_middle={self.half_life_middle} is below model.ada.half_life_min={self.half_life_min}; "
                f"use model.ada.half_life_middle={max(16.0, self.half_life_min)}"
            )
        if self.half_life_max is not None and self.half_life_max < self.half_life_middle:
            raise ConfigError(
                f"model.ada.half_life_max={self.half_life_max} is below model.ada.half_life_middle={self.half_life_middle}; "
                f"use model.ada.half_life_max={4 * self.half_life_middle:g}"
            )


@dataclass(kw_only=True)
class AttentionConfig:
    """Softmax attention: hybrid layers and the dense baseline."""

    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 4
    """Key and value heads (grouped-query attention)."""
    head_width: int | None = None
    """Width of a head; unset: model.width / num_heads."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths."""

    def validate(self) -> None:
        require_at_least("model.attention.num_heads", self.num_heads, 1)
        require_at_least("model.attention.num_kv_heads", self.num_kv_heads, 1)
        if self.head_width is not None and (self.head_width < 2 or self.head_width % 2):
            raise ConfigError(
                f"rotary embeddings need an even head width; use model.attention.head_width={max(2, self.head_width + 1)} "
                f"in the place of {self.head_width}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.attention.num_kv_heads={self.num_kv_heads} must divide model.attention.num_heads={self.num_heads}; "
                f"use model.attention.num_kv_heads={largest_divisor(self.num_heads, self.num_kv_heads)}"
            )


@dataclass(kw_only=True)
class ModelConfig:
    """A decoder-only language model: pre-norm blocks of a token mixer and a feed-forward layer."""

    name: str = "custom"
    """The model's name; by convention its total parameter count."""
    num_layers: int = 4
    """Blocks (L)."""
    width: int = 128
    """Model width (D)."""
    vocab_size: int = 4096
    """Rows of the embedding and the head (V): the tokenizer's size padded to a multiple of 128."""
    sequence_length: int = 512
    """Tokens of a training sequence (T)."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    embedding_std: float = 1.0
    """Standard deviation of the token embedding at step 0."""
    attention_pattern: int = 0
    """Every n-th block mixes tokens by softmax attention, the others by ADA; 0: ADA everywhere; 1: softmax everywhere."""
    ffn: str = "kalmagrove"
    """kalmagrove: sparse groves; swiglu: the dense baseline."""
    ffn_width: int = 512
    """Hidden width of the swiglu feed-forward layer (unused by kalmagrove)."""
    kernels: str = "auto"
    """auto: Triton kernels on a GPU with triton installed, else plain torch; triton: always, or an error; torch: never."""
    ada: AdaConfig = field(default_factory=AdaConfig)
    """The ADA layers."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """The softmax layers."""
    grove: GroveConfig = field(default_factory=GroveConfig)
    """The KalmaGrove layers."""

    def is_softmax_layer(self, layer: int) -> bool:
        """Whether block `layer` (from 0) mixes tokens by softmax attention."""
        return self.attention_pattern > 0 and (layer + 1) % self.attention_pattern == 0

    @property
    def head_width(self) -> int:
        """Width d of an ADA head."""
        return self.width // self.ada.num_heads

    @property
    def attention_head_width(self) -> int:
        """Width of a head of softmax attention."""
        return self.width // self.attention.num_heads if self.attention.head_width is None else self.attention.head_width

    @property
    def has_groves(self) -> bool:
        """Whether tokens choose groves: some kalmagrove layers have none but the shared one."""
        return self.ffn == "kalmagrove" and self.grove.num_groves > 0

    @property
    def half_life_max(self) -> float:
        """Longest half-life at step 0 after overrides: model.ada.half_life_max, or half of the sequence."""
        return max(self.ada.half_life_middle, self.sequence_length / 2) if self.ada.half_life_max is None else self.ada.half_life_max

    def validate(self) -> None:
        """Raise ConfigError on any value, or combination of values, that no model can be built from."""
        for setting in ("num_layers", "width", "vocab_size", "ffn_width"):
            require_at_least(f"model.{setting}", getattr(self, setting), 1)
        require_at_least("model.sequence_length", self.sequence_length, 2)
        require_at_least("model.attention_pattern", self.attention_pattern, 0)
        require_choice("model.ffn", self.ffn, FFN_KINDS)
        require_choice("model.kernels", self.kernels, KERNELS)
        if self.vocab_size % 128:
            raise ConfigError(
                f"model.vocab_size={self.vocab_size} must be a multiple of 128, so that no layout has to pad it; "
                f"use model.vocab_size={-(-self.vocab_size // 128) * 128}"
            )
        if self.norm_eps <= 0 or self.embedding_std <= 0:
            raise ConfigError("model.norm_eps and model.embedding_std must be positive; use model.norm_eps=1e-6 model.embedding_std=1")
        self.ada.validate()
        self.attention.validate()
        if self.ffn == "kalmagrove":
            self.grove.validate()
        if self.attention_pattern != 1:
            require_divides("model.ada.num_heads", self.ada.num_heads, "model.width", self.width)
        if self.attention_pattern and self.attention.head_width is None:
            require_divides("model.attention.num_heads", self.attention.num_heads, "model.width", self.width)
            if (self.width // self.attention.num_heads) % 2:
                raise ConfigError(
                    f"rotary embeddings need an even head width, but model.width={self.width} over model.attention.num_heads="
                    f"{self.attention.num_heads} gives {self.width // self.attention.num_heads}; "
                    f"use model.attention.num_heads={largest_divisor(self.width // 2, self.attention.num_heads)}"
                )


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is not above `at_most`."""
    return next(d for d in range(min(at_most, number), 0, -1) if number % d == 0)


def require_divides(setting: str, divisor: int, of: str, number: int) -> None:
    """Raise ConfigError, with the nearest divisor that works, unless `divisor` divides `number`."""
    if number % divisor:
        raise ConfigError(f"{setting}={divisor} must divide {of}={number}; use {setting}={largest_divisor(number, divisor)}")
