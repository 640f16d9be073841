"""Errors that a user can act on: each says what, where and what to do. Standard library only."""


class JaxpostError(Exception):
    """Base of every error that ends a command with one line instead of a traceback."""

    exit_code = 1


class ConfigError(JaxpostError):
    """A wrong option, key, value or file named in a config or on the command line."""

    exit_code = 2


class DataError(JaxpostError):
    """A row, file, tokenizer or template that cannot be turned into examples."""

    exit_code = 3


class CheckpointError(JaxpostError):
    """A checkpoint that is damaged, missing, or belongs to another run."""

    exit_code = 4


class TrainingError(JaxpostError):
    """A run that cannot go on, e.g. too many non-finite updates in a row."""

    exit_code = 5
