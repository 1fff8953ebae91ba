"""What `kan generate` samples, and how (GenerateConfig)."""

from dataclasses import dataclass

from kan_train.config.errors import ConfigError, require_at_least, require_choice
from kan_train.config.run import DEVICES


@dataclass(kw_only=True)
class GenerateConfig:
    """`kan generate`: sample from a trained run."""

    run: str = "???"
    """The run: its name below `root`, or a path to its directory, to one of its checkpoints, or to a file that `kan checkpoint export` wrote."""
    root: str = "runs"
    """Folder of run directories."""
    prompt: str = ""
    """Text to continue; empty: from the start of a document."""
    max_tokens: int = 128
    """Tokens to generate at most; the end of the document stops earlier."""
    temperature: float = 0.8
    """0: always the likeliest token; 1: the model's own distribution."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probabilities sum to this."""
    seed: int = 0
    """Seed of the sampling: the same seed gives the same text."""
    samples: int = 1
    """Continuations to generate."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def validate(self) -> None:
        require_at_least("max_tokens", self.max_tokens, 1)
        require_at_least("temperature", self.temperature, 0.0)
        require_at_least("top_k", self.top_k, 0)
        require_at_least("samples", self.samples, 1)
        require_choice("device", self.device, DEVICES)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must lie above 0 and not above 1; use top_p=0.95")
