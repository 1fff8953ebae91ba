"""Exit statuses of `kan train`, besides 0: what launchers and scripts go by. Needs no PyTorch."""

EXIT_SETTINGS = 2
"""A setting or a checkpoint is wrong: the same command would end the same way."""

EXIT_BAD_STEPS = 3
"""Too many steps in a row were bad, and going back to a checkpoint did not help."""

EXIT_BUDGET = 4
"""accounting.budget_usd or accounting.budget_hours is used up, and the run is saved: the same command with a larger one goes on with it."""

EXIT_STOPPED = 75
"""A signal stopped the run, and it is saved: the same command goes on with it. (EX_TEMPFAIL: try again later.)"""

EXIT_HANG = 76
"""The watchdog ended the run."""
