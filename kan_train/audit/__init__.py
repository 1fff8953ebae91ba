"""What a trained model's edge functions and groves have become: importance, pruning, shapes, specialisation (docs/audit.md)."""
