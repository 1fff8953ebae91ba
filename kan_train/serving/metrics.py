"""What a server has done, as Prometheus reads it (text format 0.0.4)."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LONGEST_WAIT = 60
"""Seconds; clients wait no longer than this when they are told to try again."""


@dataclass
class Times:
    """How often something was, and how long in all."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.seconds += seconds
        self.count += 1


@dataclass
class Metrics:
    """Counts since the start. Each is changed by one thread alone: responses by the event loop's, the others by the engine's."""

    responses: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(path, status) -> responses; a path that is not served counts as "other"."""
    continuations: Counter[str] = field(default_factory=Counter)
    """Why they ended -> continuations."""
    first_token: Times = field(default_factory=Times)
    """From the arrival of a request to its first token."""
    seconds: Times = field(default_factory=Times)
    """From the arrival of a request to the end of its last continuation."""
    engine_failures: int = 0
    """How often the engine failed and was made anew."""

    def retry_after(self) -> int:
        """Seconds after which a request that found no room may try again: what a request took on the average."""
        mean = self.seconds.seconds / self.seconds.count if self.seconds.count else 1.0
        return min(LONGEST_WAIT, max(1, round(mean)))

    def text(self, worker: Any) -> str:
        """Everything, with what `worker` (a Worker) has under way, in the text format."""
        speed = worker.speed
        lines = [*_family("kan_http_responses_total", "counter", "Responses by path and status; 499: the client had left.")]
        lines += [f'kan_http_responses_total{{path="{path}",status="{status}"}} {count}' for (path, status), count in sorted(self.responses.items())]
        lines += _family("kan_continuations_total", "counter", "Continuations that ended, by the reason.")
        lines += [f'kan_continuations_total{{finish="{finish}"}} {self.continuations[finish]}' for finish in ("stop", "length", "cancelled", "error")]
        for name, kind, meaning, value in (
            ("kan_prompt_tokens_total", "counter", "Tokens of prompts.", speed.prompt_tokens),
            ("kan_prompt_kept_tokens_total", "counter", "Of them, those that a kept prefix had read already.", speed.kept_tokens),
            ("kan_tokens_total", "counter", "Tokens given.", speed.tokens),
            ("kan_stepped_tokens_total", "counter", "Tokens that took a step: all but the first of each continuation.", speed.stepped),
            ("kan_prefill_seconds_total", "counter", "Seconds of reading prompts.", speed.prefill_seconds),
            ("kan_decode_seconds_total", "counter", "Seconds of steps of decoding.", speed.decode_seconds),
            ("kan_engine_failures_total", "counter", "How often the engine failed and was made anew.", self.engine_failures),
            ("kan_rows", "gauge", "Continuations that are decoded now.", worker.rows),
            ("kan_rows_limit", "gauge", "Continuations that can be decoded at a time.", worker.max_rows),
            ("kan_queue", "gauge", "Continuations that wait for a row.", worker.queue),
            ("kan_queue_limit", "gauge", "Continuations that may wait.", worker.max_queue),
        ):
            lines += [*_family(name, kind, meaning), f"{name} {value}"]
        for name, meaning, times in (
            ("kan_first_token_seconds", "From the arrival of a request to its first token.", self.first_token),
            ("kan_request_seconds", "From the arrival of a request to its end.", self.seconds),
        ):
            lines += [*_family(name, "summary", meaning), f"{name}_sum {times.seconds}", f"{name}_count {times.count}"]
        return "\n".join(lines) + "\n"


def _family(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
