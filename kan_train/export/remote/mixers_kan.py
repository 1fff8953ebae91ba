"""The token mixers: ADA, linear attention over diffused keys with decay, and softmax attention.

    k'_t = sum_{j<w} kernel_j * K_{t-j}      S_t = a_t S_{t-1} + phi(k'_t) v_t^T      o_t = phi(q_t)^T S_t / sqrt(d)

B batch, T time, D width, H heads, d head width, w taps, P exponentials. A mixer reads T tokens after a state (None: none before) and gives the next state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wide(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is when it is wider."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def normalised(x: Tensor, weight: Tensor | None, share: float, eps: float) -> Tensor:
    """x / sqrt(share * sum(x^2) + eps) * weight over the last dimension, in the dtype of x."""
    y = wide(x)
    y = y * ((y * y).sum(-1, keepdim=True) * share + eps).rsqrt()
    return (y if weight is None else y * weight).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return normalised(x, self.weight, 1 / x.shape[-1], self.eps)


class Ada(nn.Module):
    """State: memory S [B, H, d, d], the w - 1 newest keys [B, w - 1, H, d], the exponential means [B, P, H, d]."""

    def __init__(self, config) -> None:
        super().__init__()
        ada, width, heads = config.ada, config.width, config.ada["num_heads"]
        self.ada, self.heads, self.eps, d = ada, heads, config.norm_eps, width // heads
        self.query, self.key, self.value, self.out = (linear(width, width) for _ in range(4))
        if ada["output_gate"]:
            self.gate = linear(width, width)
        if ada["output_norm"]:
            self.norm_weight = nn.Parameter(torch.ones(heads, d))
        if ada["conv_width"] > 1:
            self.kernel = nn.Parameter(F.pad(torch.ones(heads, d, 1), (0, ada["conv_width"] - 1)))
        if ada["decay"] != "none":
            self.log_rate = nn.Parameter(torch.linspace(0.0, -5.0, heads))
        if ada["decay"] == "data":
            self.rate_weight = nn.Parameter(torch.zeros(heads, width))
        if ada["mixture"]:
            self.mixture_log_rate = nn.Parameter(torch.linspace(-2.0, -5.0, ada["mixture"])[:, None, None].repeat(1, heads, d))
            self.mixture_weight = nn.Parameter(torch.zeros(ada["mixture"], heads, d))

    def forward(self, x: Tensor, state: tuple | None, past: int, pads_B: Tensor | None) -> tuple[Tensor, tuple]:
        q, keys, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.query, self.key, self.value))
        if pads_B is not None:  # keys and values of zero leave no trace
            pad = (torch.arange(past, past + x.shape[1], device=x.device) < pads_B[:, None])[..., None, None]
            keys, v = keys.masked_fill(pad, 0), v.masked_fill(pad, 0)
        if state is None:
            batch, _, heads, d = q.shape
            memory = wide(q.new_zeros(batch, heads, d, d))
            state = memory, q.new_zeros(batch, self.ada["conv_width"] - 1, heads, d), memory.new_zeros(batch, self.ada["mixture"], heads, d)
        memory, before, means = state
        k, padded = keys, torch.cat((before, keys), dim=1)
        if before.shape[1]:
            k = keys * self.kernel[..., 0].to(keys.dtype)
            for lag in range(1, before.shape[1] + 1):
                k = torch.addcmul(k, padded[:, before.shape[1] - lag : padded.shape[1] - lag], self.kernel[..., lag].to(keys.dtype))
        if self.ada["mixture"]:
            k, means = exponential_mixture(k, self.mixture_log_rate, self.mixture_weight, means)
        if self.ada["feature_map"] == "silu":
            q, k = F.silu(q), normalised(F.silu(k), None, 1.0, 1e-6)
        o, memory = scan(q, k, v, self.log_decay(x), memory, self.ada["chunk"], q.shape[-1] ** -0.5)
        if self.ada["output_norm"]:
            o = normalised(o, self.norm_weight, 1 / o.shape[-1], self.eps)
        y = o.flatten(-2)
        if self.ada["output_gate"]:
            y = y * F.silu(self.gate(x))
        return self.out(y), (memory, padded[:, keys.shape[1] :].clone(), means)

    def log_decay(self, x: Tensor) -> Tensor:
        """log a_t, [B, T, H]; data: a_t = sigmoid(-(w . x_t) - log(exp(rate) - 1))."""
        if self.ada["decay"] == "none":
            return wide(x.new_zeros(*x.shape[:2], self.heads))
        rate = wide(self.log_rate).exp()
        if self.ada["decay"] == "learned":
            return -rate.expand(*x.shape[:2], -1)
        return F.logsigmoid(-F.linear(wide(x), wide(self.rate_weight)) - rate - torch.log(-torch.expm1(-rate)))


def scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, chunk: int, scale: float) -> tuple[Tensor, Tensor]:
    """o [B, T, H, d] and the last state. With c_i the sum of log a over a chunk's tokens up to and with i, and S the state that enters it:

    o_i = scale * (sum_{j<=i} exp(c_i - c_j) (q_i . k_j) v_j + exp(c_i) S^T q_i),     S' = exp(c_C) S + sum_j exp(c_C - c_j) k_j v_j^T
    """
    outputs = []
    for q_c, k_c, v_c, decay in zip(*(x.to(state.dtype).split(chunk, dim=1) for x in (q, k, v, log_decay)), strict=True):
        c = decay.cumsum(1)
        left = (c[:, :, None] - c[:, None]).permute(0, 3, 1, 2)  # [B, H, C, C]
        future = torch.ones(left.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        products = torch.einsum("bihd,bjhd->bhij", q_c, k_c) * left.masked_fill(future, -torch.inf).exp()
        from_state = torch.einsum("bihd,bhde->bihe", q_c, state) * c.exp()[..., None]
        outputs.append((torch.einsum("bhij,bjhe->bihe", products, v_c) + from_state) * scale)
        added = torch.einsum("bjhd,bjhe->bhde", k_c, v_c * (c[:, -1:] - c).exp()[..., None])
        state = state * c[:, -1].exp()[..., None, None] + added
    return torch.cat(outputs, dim=1).to(q.dtype), state


def exponential_mixture(x: Tensor, log_rate: Tensor, weight: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """y_t = x_t + sum_p weight_p m_t^p, m_t = a m_{t-1} + (1 - a) x_t, a = exp(-exp(log_rate)); and the last m. Solved by doubling the reach of m."""
    time, reach, rate = x.shape[1], 1, log_rate.to(before.dtype).exp()[:, None]
    m = x.to(before.dtype)[:, None] * -torch.expm1(-rate)  # [B, P, T, H, d]
    while reach < time:
        m = m + F.pad(m[:, :, :-reach] * torch.exp(-reach * rate), (0, 0, 0, 0, reach, 0))
        reach *= 2
    age = torch.arange(1, time + 1, device=x.device, dtype=before.dtype)[:, None, None]
    m = m + before[:, :, None] * torch.exp(-age * rate)
    return (x + (m * weight.to(before.dtype)[:, None]).sum(1)).to(x.dtype), m[:, :, -1]


class SoftmaxAttention(nn.Module):
    """Causal, with rotary positions and grouped queries. State: keys and values of all tokens so far, each [B, G, S, d]."""

    def __init__(self, config) -> None:
        super().__init__()
        heads, kv_heads = config.attention["num_heads"], config.attention["num_kv_heads"]
        self.theta, self.head_width = config.attention["rope_theta"], config.attention["head_width"] or config.width // heads
        self.query, self.out = linear(config.width, heads * self.head_width), linear(heads * self.head_width, config.width)
        self.key, self.value = (linear(config.width, kv_heads * self.head_width) for _ in range(2))

    def forward(self, x: Tensor, state: tuple | None, past: int, pads_B: Tensor | None) -> tuple[Tensor, tuple]:
        q, k, v = (project(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for project in (self.query, self.key, self.value))
        place = torch.arange(past, past + x.shape[1], device=x.device)
        position = place if pads_B is None else (place - pads_B[:, None])[:, None]
        q, k = self.rotated(q, position), self.rotated(k, position)
        if state is not None:
            k, v = torch.cat((state[0], k), dim=2), torch.cat((state[1], v), dim=2)
        mask, seen = None, torch.arange(k.shape[2], device=x.device)
        if pads_B is not None:  # a token of padding sees itself: a row that sees nothing would be NaN
            own = (seen >= pads_B[:, None])[:, None, None] | (seen == place[:, None])
            mask = own & (seen <= place[:, None])
        elif past and len(place) > 1:
            mask = seen <= place[:, None]
        causal = mask is None and len(place) > 1
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        return self.out(o.transpose(1, 2).flatten(2)), (k, v)

    def rotated(self, x: Tensor, position: Tensor) -> Tensor:
        """Each pair (i, i + d/2) turned by position * theta^(-2i/d)."""
        frequency = self.theta ** (-torch.arange(0, self.head_width, 2, device=x.device, dtype=torch.float64) / self.head_width)
        angle = position.double()[..., None] * frequency
        first, second = wide(x).chunk(2, dim=-1)
        cosine, sine = angle.cos().to(first.dtype), angle.sin().to(first.dtype)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)
