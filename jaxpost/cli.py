"""What every command shares: flags, exit codes, and one line on stderr instead of a traceback.

A command is a module with a docstring, a function and two lines:

    '''Counts rows.  python -m jaxpost.count --config=FILE [--limit=N] [key=value ...]'''
    from jaxpost import cli

    def run(args: cli.Arguments) -> None:
        from jaxpost import config              # heavy imports belong in here: --help must answer at once
        loaded = config.from_arguments(args)    # --config, key=value and --import
        count(loaded.config, args.flags["limit"])

    if __name__ == "__main__":
        cli.main(run, doc=__doc__, flags=[*cli.CONFIG_FLAGS, cli.Flag("limit", 10, "rows to count")])

Exit codes: 0 done; 2 wrong usage or config, 3 data, 4 checkpoint, 5 training (errors.py); 130 Ctrl-C; 1 a bug, with
its traceback. Python code calls the function behind the command, never this module.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, logging
from absl import flags as absl_flags

from jaxpost.errors import ConfigError, JaxpostError
from jaxpost.redact import redact_text

_OVERRIDE = re.compile(r"[^\W\d]\w*(\.[^=/]*)?=", re.DOTALL)  # a path such as runs/lr=3 does not match
_HELP = ("-h", "-help", "--help", "--helpfull", "--helpshort")
_REFUSED = ("flagfile", "undefok")  # absl's own; the second makes a mistyped flag vanish


@dataclasses.dataclass(frozen=True)
class Flag:
    """One --name of a command; the default's type (bool, int, float, str, list or None for text) is the flag's type."""

    name: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A parsed command line."""

    flags: dict[str, Any]  # flag name -> value
    overrides: tuple[str, ...]  # key=value, in the order typed
    positional: tuple[str, ...]  # the rest

    @property
    def config(self) -> str | None:
        """--config=FILE, or the one positional FILE; None where neither is given. Raises ConfigError for two."""
        files = [*([self.flags["config"]] if self.flags["config"] else []), *self.positional]
        if len(files) > 1:
            raise ConfigError(f"one config file at a time, not {_quoted(files)}; settings are typed as key=value")
        return files[0] if files else None


DEBUG = Flag("debug", False, "show the traceback of an error")
CONFIG_FLAGS = (
    Flag("config", None, "YAML file; a positional FILE does the same"),
    Flag("import", [], "path/to/file.py with your own algorithm; may be given again"),
)


def main(run: Callable[[Arguments], Any], *, doc: str, flags: Sequence[Flag] = ()) -> NoReturn:
    """Parses the command line, calls run(args) and exits with the code that its outcome deserves."""

    def keep(argv: list[str]) -> list[str]:
        absl_flags.FLAGS.mark_as_parsed()  # libraries read theirs at the defaults; ours live in a set of their own
        return argv

    def call(argv: list[str]) -> int:
        logging.set_verbosity(logging.WARNING)  # absl says INFO once flags are parsed; Orbax is talkative there
        return execute(run, argv, doc=doc, flags=flags)

    app.run(call, flags_parser=keep)
    raise AssertionError("app.run exits")


def execute(run: Callable[[Arguments], Any], argv: Sequence[str], *, doc: str, flags: Sequence[Flag] = ()) -> int:
    """What main() does, without exiting: argv[0] is the program's name. Returns the exit code."""
    typed = argv[1 : argv.index("--")] if "--" in argv else argv[1:]
    if any(arg in _HELP for arg in typed):
        return _call(lambda: print(help_text(doc, flags)), debug=False)
    try:
        args = parse(argv, flags)
    except ConfigError as error:
        _complain(f"{error}; --help lists the flags")
        return error.exit_code
    return _call(lambda: run(args), debug=args.flags["debug"])


def parse(argv: Sequence[str], flags: Sequence[Flag]) -> Arguments:
    """argv (argv[0] is the program's name) into Arguments. Raises ConfigError for anything that is not known."""
    known = [*flags, DEBUG]
    values = _flag_values(known)
    for arg in argv[1:]:
        name = arg.lstrip("-").partition("=")[0]
        if arg == "--":
            break
        if arg.startswith("-") and name in _REFUSED:
            raise ConfigError(f"unknown flag --{name}")
    try:
        rest = values(list(argv))[1:]
    except absl_flags.UnrecognizedFlagError as error:
        raise ConfigError(_unknown_flag(error.flagname, known)) from None
    except absl_flags.Error as error:
        raise ConfigError(" ".join(str(error).split())) from None
    overrides = tuple(arg for arg in rest if _OVERRIDE.match(arg))
    positional = tuple(arg for arg in rest if not _OVERRIDE.match(arg))
    return Arguments({flag.name: values[flag.name].value for flag in known}, overrides, positional)


def help_text(doc: str, flags: Sequence[Flag]) -> str:
    """What --help prints."""
    lines = [doc.strip(), "", "flags:"]
    for flag in [*flags, DEBUG, Flag("help", False, "show this")]:
        kind = "" if isinstance(flag.default, bool) else f"={'|'.join(flag.choices) or _kind(flag).upper()}"
        default = "" if flag.default in (None, False, [], "") else f" (default: {flag.default})"
        lines.append(f"  {'--' + flag.name + kind:<24}  {flag.help}{default}")
    if any(flag.name == "config" for flag in flags):
        lines += ["", "key=value sets any config key by its dotted name, e.g. optim.learning_rate=1e-4; the file"]
        lines += ["configs/schema.json lists them, and --print_config of jaxpost.train shows what a run would use."]
    return "\n".join(lines)


def _call(run: Callable[[], Any], *, debug: bool) -> int:
    """Runs the command; every outcome becomes an exit code, every error that a user can act on one line."""
    try:
        run()
        sys.stdout.flush()
    except JaxpostError as error:
        if debug:
            sys.stderr.write(redact_text(traceback.format_exc()))
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
        return 141
    except Exception:  # a bug: all that helps to find it, except secrets
        sys.stderr.write(redact_text(traceback.format_exc()))
        return 1
    return 0


def _complain(message: str) -> None:
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in message)
    print(f"error: {redact_text(line)}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr)


def _flag_values(known: Sequence[Flag]) -> absl_flags.FlagValues:
    values = absl_flags.FlagValues()
    values.set_gnu_getopt(True)  # flags may follow key=value
    define = {
        "bool": absl_flags.DEFINE_bool,
        "int": absl_flags.DEFINE_integer,
        "float": absl_flags.DEFINE_float,
        "list": absl_flags.DEFINE_multi_string,
        "text": absl_flags.DEFINE_string,
    }
    for flag in known:
        if flag.choices:
            absl_flags.DEFINE_enum(flag.name, flag.default, list(flag.choices), flag.help, flag_values=values)
        else:
            define[_kind(flag)](flag.name, flag.default, flag.help, flag_values=values)
    return values


def _kind(flag: Flag) -> str:
    for name, kind in (("bool", bool), ("int", int), ("float", float), ("list", list)):
        if isinstance(flag.default, kind):
            return name
    return "text"


def _unknown_flag(name: str, known: Sequence[Flag]) -> str:
    if "." in name:
        return f"unknown flag --{name}; config keys are typed without dashes: {name}=VALUE"
    near = difflib.get_close_matches(name[:80], [*(flag.name for flag in known), "help"], n=1)
    return f"unknown flag --{name}" + (f"; did you mean --{near[0]}?" if near else "")


def _quoted(names: Sequence[str]) -> str:
    return " and ".join(repr(name) for name in names)
