"""What a trained model becomes for other programs, and what others' models become here."""
