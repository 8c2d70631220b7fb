"""`python -m fhe_fx` is the `fhe-fx` command."""

from fhe_fx.cli import main

if __name__ == "__main__":
    main()
