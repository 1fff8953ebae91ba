"""`python -m kan_train` is `kan`: torchrun starts the trainer with `-m kan_train train ...`."""

from kan_train.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
