"""kan-train: pretraining of KalmaGrove-Arnold Network language models, and the true cost of every token."""

__version__ = "0.1.0"
