"""What `kan serve` serves, and how much it takes on (ServeConfig)."""

from dataclasses import dataclass

from kan_train.config.errors import ConfigError, require_at_least, require_between, require_choice
from kan_train.config.run import DEVICES


@dataclass(kw_only=True)
class ServeConfig:
    """`kan serve`: a trained run behind an HTTP interface as OpenAI's."""

    run: str = "???"
    """The run: its name below `root`, or a path to its directory, to one of its checkpoints, or to a file that `kan checkpoint export` wrote."""
    root: str = "runs"
    """Folder of run directories."""
    name: str = ""
    """What requests call the model; empty: the last part of `run`."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: every one of this machine. Whoever reaches it may use it: there are no keys."""
    port: int = 8000
    """Port to listen on; 0: one that is free, which is printed."""
    max_rows: int = 16
    """Continuations that are decoded at a time; each choice of a request is one."""
    max_queue: int = 64
    """Continuations that wait for a row; beyond them requests are refused with status 429."""
    max_prompt_tokens: int = 8192
    """Tokens of a prompt at most. While one is read, the others wait."""
    max_tokens: int = 2048
    """Tokens that a request may ask for at most; one that does not say gets 16."""
    max_body_bytes: int = 1048576
    """Size of a request's body at most."""
    prefix_megabytes: int = 0
    """Memory for prompts that were read, so that one that begins with another need not read it again; 0: none."""
    shutdown_seconds: float = 30.0
    """How long requests under way may go on after SIGTERM or Ctrl-C."""
    active_groves: int | None = None
    """Groves that compute a token in every KalmaGrove layer, in the place of the K of the training. Unset: K."""
    dtype: str = "fp32"
    """fp32, or bf16: half the memory, and half the bytes that a token reads."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def validate(self) -> None:
        if not self.host:
            raise ConfigError("host is empty; use host=127.0.0.1, or host=0.0.0.0 for every address of this machine")
        require_between("port", self.port, 0, 65535)
        for name in ("max_rows", "max_prompt_tokens", "max_tokens"):
            require_at_least(name, getattr(self, name), 1)
        for name in ("max_queue", "prefix_megabytes", "shutdown_seconds"):
            require_at_least(name, getattr(self, name), 0)
        require_at_least("max_body_bytes", self.max_body_bytes, 1024)
        if self.active_groves is not None:
            require_at_least("active_groves", self.active_groves, 1)
        require_choice("dtype", self.dtype, ("fp32", "bf16"))
        require_choice("device", self.device, DEVICES)
