"""`python -m quantwm.cli`."""

from quantwm.cli import main

main()
