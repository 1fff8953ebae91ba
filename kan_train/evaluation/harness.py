"""A run as a model of EleutherAI's lm-evaluation-harness, so that any of its tasks runs on it: the model "kan".

    python -m kan_train.evaluation.harness run --model kan --model_args run=kan_tiny --tasks lambada_openai

takes what `lm_eval` takes. Only this module imports the harness (the extra `harness`).
"""

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kan_train.config import ConfigError
from kan_train.evaluation.questions import Question, Reading, readings
from kan_train.evaluation.score import Likelihood, continuation_likelihoods, longest_context, require_finite
from kan_train.inference.engine import Engine
from kan_train.inference.load import load_run
from kan_train.inference.requests import Request
from kan_train.inference.sample import Sampling

_ALIKE = 32
"""First tokens by which contexts are put together that may share more."""

_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


@register_model("kan")
class HarnessModel(LM):
    """The run `run`, as `kan evaluate` reads it; the other arguments are its settings of these names."""

    def __init__(
        self, run: str, root: str = "runs", dtype: str = "fp32", active_groves: int | None = None, device: str | None = None,
        batch_size: int | str | None = None, max_batch_size: int | None = None, max_gen_toks: int = 256,
    ) -> None:  # fmt: skip
        """batch_size: sequences read at a time, 32 where it is unset or "auto"; max_gen_toks: tokens to generate where a task does not say."""
        super().__init__()
        loaded = load_run(run, root, (device or "auto").partition(":")[0], dtype, active_groves)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.batch_size = int(str(batch_size)) if str(batch_size).isdigit() else max_batch_size or 32
        self.max_gen_toks = max_gen_toks

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log P(continuation | context) in nats, whether it is what greedy decoding writes), in order."""
        texts: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            texts.setdefault(request.args[0], []).append(number)
        asked, places = [], []
        for context, numbers in texts.items():
            question = Question(contexts=(context,), continuations=tuple(requests[number].args[1] for number in numbers), answer=0)
            asked += readings(question, self.tokenizer)
            places.append(numbers)
        found: dict[int, Likelihood] = {}
        for numbers, some in zip(places, self._likelihoods(asked), strict=True):
            found |= dict(zip(numbers, some, strict=True))
        return [(found[number].log_prob, found[number].greedy) for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log P of each whole text in nats: after one state in a model of ADA layers, in the harness's windows where a layer is softmax."""
        asked, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tokenizer.encode(request.args[0])
            window = longest_context(self.model) or max(1, len(tokens))
            for pair in get_rolling_token_windows(token_list=tokens, prefix_token=self.tokenizer.boundary, max_seq_len=window, context_len=1):
                context, continuation = make_disjoint_window(pair)
                asked.append(Reading(tuple(context), (tuple(continuation),)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (likelihood,) in zip(owners, self._likelihoods(asked), strict=True):
            sums[owner] += likelihood.log_prob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context up to the first of its stop texts, greedy unless the task samples. ConfigError on settings that are not known."""
        engine = Engine(self.model, self.tokenizer, max_rows=self.batch_size)
        rows = [engine.add(self._request(*request.args)) for request in requests]
        while not engine.idle:
            engine.step()
        return [row.text for row in rows]

    def _request(self, context: str, settings: dict[str, Any]) -> Request:
        settings = dict(settings)
        until, samples = settings.pop("until", []), settings.pop("do_sample", settings.get("temperature", 0) > 0)
        limit = settings.pop("max_gen_toks", None) or settings.pop("max_new_tokens", None) or self.max_gen_toks
        chosen = {name: settings.pop(name) for name in _SAMPLING if name in settings}
        if settings.get("num_beams") == 1:  # no beams, as some tasks write it
            del settings["num_beams"]
        if settings:
            raise ConfigError(f"generation_kwargs: {', '.join(settings)} is not known; use until, do_sample, max_gen_toks, {', '.join(_SAMPLING)}")
        # A task that does not sample means temperature 0, whatever temperature it names.
        chosen["temperature"] = chosen.get("temperature", 1.0) if samples else 0.0
        stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        return Request(prompt=context, max_tokens=limit, sampling=Sampling(**chosen), stop=stop)

    def _likelihoods(self, asked: list[Reading]) -> list[list[Likelihood]]:
        families: dict[tuple[int, ...], list[int]] = {}
        for number, reading in enumerate(asked):
            families.setdefault(reading.context[:_ALIKE], []).append(number)
        found: dict[int, list[Likelihood]] = {}
        for numbers in families.values():
            some = continuation_likelihoods(self.model, [asked[number] for number in numbers], batch_size=self.batch_size)
            found |= dict(zip(numbers, some, strict=True))
        require_finite((one.log_prob for some in found.values() for one in some), "a log-likelihood")
        return [found[number] for number in range(len(asked))]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
