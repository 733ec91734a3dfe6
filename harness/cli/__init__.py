"""The commands. Only this package uses Hydra, the command line and the terminal.

`python -m harness` and the installed script `ptqbench` call `main`.
"""

from harness.cli.main import main as main
