"""Shows the data of a config as the model will see them.

  python -m jaxpost.data FILE.yaml [key=value ...] [--rows=N] [--scan=N] [--no_color]

Prints lengths, packing, dropped and bad rows of data.train and data.eval, then packed rows with the trained tokens
in colour. Exit code 3 where training would stop at a row.
"""

from __future__ import annotations

from jaxpost import cli

FLAGS = (
    *cli.CONFIG_FLAGS,
    cli.Flag("rows", 2, "packed rows to show"),
    cli.Flag("scan", 2000, "records to read of each list of sources; 0 reads all"),
    cli.Flag("no_color", False, "mark trained tokens with brackets; NO_COLOR in the environment does the same"),
)


def main(args: cli.Arguments) -> None:
    """The command."""
    from jaxpost.config import from_arguments
    from jaxpost.data.command import inspect
    from jaxpost.errors import ConfigError

    for name in ("rows", "scan"):
        if args.flags[name] < 0:
            raise ConfigError(f"--{name}={args.flags[name]}: must not be negative")
    config = from_arguments(args).config
    inspect(config, rows=args.flags["rows"], scan=args.flags["scan"], color=not args.flags["no_color"])


if __name__ == "__main__":
    cli.main(main, doc=__doc__, flags=FLAGS)
