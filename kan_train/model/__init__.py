"""The model: KalmaGrove layers and ADA in plain PyTorch. It knows mathematics, not process groups; importing it needs torch and numpy alone."""
