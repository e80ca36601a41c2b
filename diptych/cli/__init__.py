"""The commands. Nothing heavy is imported before a command needs it, so that help comes at once."""

from diptych.cli import data, measuring, models, training, using
from diptych.cli.group import cli, main

__all__ = ["cli", "data", "main", "measuring", "models", "training", "using"]
