"""What `kan generate` samples, and how (GenerateConfig)."""

import math
from dataclasses import dataclass, field

from kan_train.config.errors import ConfigError, require_at_least, require_choice
from kan_train.config.run import DEVICES

PENALTIES = (0.01, 100.0)
"""Least and largest repetition penalty: further ones say no more, and logits would overflow."""


def require_unicode(setting: str, text: str) -> None:
    """Raise ConfigError where `text` holds half a character (a lone surrogate, as of bytes that are not UTF-8): no tokenizer reads it."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{setting} is no Unicode text; use {setting} in UTF-8, without half characters such as \\ud800")


@dataclass(kw_only=True)
class DecodeParallelConfig:
    """Decoding in several processes, which torchrun starts; the names are those of training. What a model cannot be split by is refused."""

    tensor_parallel: int = 1
    """Ranks that share heads, hidden units and vocabulary, and the states of the heads."""
    expert_parallel: int = 1
    """Ranks that share the groves of every layer."""
    expert_tensor_parallel: int | None = None
    """Ranks that split each grove's hidden units: 1, or tensor_parallel. Unset: what the number of processes and the model allow."""
    pipeline_parallel: int = 1
    """1: decoding has no pipeline."""
    context_parallel: int = 1
    """1: decoding reads one token at a time."""
    sequence_parallel: bool = False
    """false: likewise."""
    timeout_minutes: float = 10.0
    """A process that another one waits for so long is taken for lost."""

    @property
    def is_alone(self) -> bool:
        """Whether one process is asked for."""
        sizes = (self.tensor_parallel, self.expert_parallel, self.expert_tensor_parallel or 1, self.pipeline_parallel, self.context_parallel)
        return all(size == 1 for size in sizes) and not self.sequence_parallel

    def validate(self) -> None:
        for name in ("tensor_parallel", "expert_parallel", "expert_tensor_parallel", "pipeline_parallel", "context_parallel"):
            if getattr(self, name) is not None:
                require_at_least(f"parallel.{name}", getattr(self, name), 1)
        if not 0 < self.timeout_minutes < math.inf:
            raise ConfigError(f"parallel.timeout_minutes={self.timeout_minutes} must be a number above 0; use parallel.timeout_minutes=10")


@dataclass(kw_only=True)
class GenerateConfig:
    """`kan generate`: sample from a trained run."""

    run: str = "???"
    """The run: its name below `root`, or a path to its directory, to one of its checkpoints, or to a file that `kan checkpoint export` wrote."""
    root: str = "runs"
    """Folder of run directories."""
    prompt: str = ""
    """Text to continue; empty: from the start of a document."""
    prompts: str = ""
    """Many prompts instead, decoded together: a file with one a line, or JSON lines with `prompt` (name.jsonl); `-`: standard input, one a line. What comes
    of each is written as a line of JSON."""
    max_tokens: int = 128
    """Tokens to generate at most; the end of the document stops earlier."""
    temperature: float = 0.8
    """0: always the likeliest token; 1: the model's own distribution."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probabilities sum to this."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that came before, in the prompt too, become less likely; 1: none. From 0.01 to 100."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a continuation, and are not given: stop='["\\n\\n"]'."""
    seed: int = 0
    """Seed of the sampling: the same seed gives the same text."""
    samples: int = 1
    """Continuations to generate."""
    active_groves: int | None = None
    """Groves that compute a token in every KalmaGrove layer, in the place of the K of the training: fewer are faster, and the text is another. Unset: K."""
    max_rows: int = 16
    """Continuations that are decoded at a time."""
    dtype: str = "fp32"
    """fp32, or bf16: half the memory, and half the bytes that a token reads."""
    device: str = "auto"
    """auto, cpu or cuda."""
    parallel: DecodeParallelConfig = field(default_factory=DecodeParallelConfig)
    """How several processes share the model."""

    def validate(self) -> None:
        self.parallel.validate()
        require_at_least("max_tokens", self.max_tokens, 1)
        require_at_least("temperature", self.temperature, 0.0)
        require_at_least("top_k", self.top_k, 0)
        require_at_least("samples", self.samples, 1)
        require_at_least("max_rows", self.max_rows, 1)
        if self.active_groves is not None:
            require_at_least("active_groves", self.active_groves, 1)
        require_choice("dtype", self.dtype, ("fp32", "bf16"))
        require_choice("device", self.device, DEVICES)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must lie above 0 and not above 1; use top_p=0.95")
        least, most = PENALTIES
        if not least <= self.repetition_penalty <= most:
            raise ConfigError(
                f"repetition_penalty={self.repetition_penalty} must lie between {least:g} and {most:g}; use repetition_penalty=1.1, or 1 for none"
            )
        for name, texts in (("prompt", [self.prompt]), ("stop", self.stop)):
            for text in texts:
                require_unicode(name, text)
        if "" in self.stop:
            raise ConfigError("stop has an empty text, which would end every continuation before it begins; leave it out")
        if self.prompt and self.prompts:
            raise ConfigError("both prompt and prompts are set; use prompt=TEXT for one, or prompts=FILE for many")
