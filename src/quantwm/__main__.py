"""`python -m quantwm` is the `quantwm` command."""

from quantwm.cli import main

if __name__ == "__main__":
    main()
