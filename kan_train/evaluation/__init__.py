"""What a trained model can be shown to do: perplexity, multiple choice by log-likelihood, recall; with intervals and baselines."""
