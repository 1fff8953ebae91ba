"""A workspace of W&B with the charts of a report, built by code: needs `wandb-workspaces`, and an account only to be published."""

from typing import Any

from kan_train.config import ConfigError

TITLE = "kan-train: cost of every token"

SECTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "Cost": {
        "Spent, and forecast of the end": ("cost/spent_usd", "cost/forecast_usd", "cost/forecast_usd_low", "cost/forecast_usd_high"),
        "Dollars a million retained tokens": ("cost/usd_per_million_tokens",),
        "Device-hours, and forecast of the end": ("cost/device_hours", "cost/forecast_hours", "cost/forecast_hours_low", "cost/forecast_hours_high"),
        "Budget left": ("cost/budget_left_usd", "cost/budget_left_hours"),
        "Joules a token": ("energy/joules_per_token",),
    },
    "Loss": {"Loss": ("cross_entropy", "validation/loss"), "Gradient norm": ("grad_norm",), "Learning rate": ("learning_rate",)},
    "Throughput": {
        "Tokens a second": ("throughput/tokens_per_second",),
        "Share of the peak": ("throughput/mfu", "throughput/mfu_causal", "throughput/hfu"),
        "Seconds of a step": ("time/step", "time/data", "time/forward_backward", "time/optimizer"),
    },
    "Events": {
        "Restarts and rewinds": ("events/restart", "events/rewind"),
        "Seconds of saving and validation": ("events/save_seconds", "events/validation_seconds"),
    },
}  # fmt: skip
"""Section -> chart -> its figures."""

PATTERNS = {
    "Where the time goes": {"Device-hours by bucket": "cost/bucket/.*"},
    "What it can do": {"Accuracy, by task": "evaluation/.*/accuracy"},
    "Sparsity and load": {"Load of the groves, by layer": "load/cv/.*", "Groves touched, by layer": "sparsity/touched/.*"},
}
"""Section -> chart -> a pattern of figures, where their number is the model's."""


def workspace(project: str, entity: str) -> Any:
    """The workspace, not yet published: `.save()` does that, and needs an account. ConfigError where wandb-workspaces is not installed."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ConfigError(f"a workspace needs wandb-workspaces ({error}); install it with: pip install 'kan-train[wandb]'") from error
    lines: dict[str, list[Any]] = {}
    for name, charts in SECTIONS.items():
        lines[name] = [panels.LinePlot(title=title, x="tokens", y=list(figures)) for title, figures in charts.items()]
    lines |= {name: [panels.LinePlot(title=title, x="tokens", metric_regex=one) for title, one in charts.items()] for name, charts in PATTERNS.items()}
    sections = [workspaces.Section(name=name, is_open=True, panels=plots) for name, plots in lines.items()]
    return workspaces.Workspace(entity=entity, project=project, name=TITLE, sections=sections, settings=workspaces.WorkspaceSettings(x_axis="tokens"))


def as_json(made: Any) -> str:
    """What would be sent."""
    return str(made._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1))
