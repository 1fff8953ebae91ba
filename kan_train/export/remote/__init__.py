"""The code that an exported folder carries: pure torch and transformers, nothing of kan_train (docs/export.md)."""
