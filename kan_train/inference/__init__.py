"""Text from a trained model: recurrent decoding, sampling, and loading a run in one process."""
