"""The commands. The only package that knows Hydra, the command line and the terminal."""

from harness.cli.main import main as main
