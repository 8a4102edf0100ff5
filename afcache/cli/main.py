"""The command line: `afcache generate`, `afcache calibrate`, `afcache serve` and `afcache info`.

What is heavy to import is imported by the command that needs it, after its arguments have been checked: help and errors
come at once. Next to nothing is imported before `main` is called, so that Ctrl-C meets it from the start.
"""

import contextlib
import os

from afcache.cli.interrupt import STATUS, leaving_at_once, say_interrupted


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status.

    Expected failures (bad values, missing folders, unsupported models) are one line on stderr and status 2; Ctrl-C is one line
    and status 130, whenever it comes.

    Args:
        argv: the words after the command's name; None takes the process's own, which is ours then, and which Ctrl-C may end.

    """
    try:
        with leaving_at_once() if argv is None else contextlib.nullcontext():
            return _run(argv)
    except KeyboardInterrupt:
        # Under -m, CPython takes an interrupt that has left a string's exec (dataclasses are made so) for unhandled, and would
        # die of the signal; the next string makes it forget.
        exec("")
        say_interrupted()
        return STATUS


def _run(argv: list[str] | None) -> int:
    from afcache.cli.arguments import ERROR_STATUS, build_parser, say_error
    from afcache.cli.silence import quiet

    arguments = build_parser().parse_args(argv)
    try:
        with quiet():
            if arguments.command == "info":
                from afcache.cli import info

                lines = info.collect_info() if arguments.model is None else info.describe_model(arguments.model)
                print("\n".join(f"{name:<14} {value}" for name, value in lines.items()))
            elif arguments.command == "calibrate":
                from afcache.cli import calibration

                calibration.run(arguments)
            elif arguments.command == "serve":
                from afcache.cli import serve

                serve.run(arguments)
            else:
                from afcache.cli import generate

                generate.run(arguments)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        say_error(str(error), everywhere=isinstance(error, OSError))
        return ERROR_STATUS
    except (RuntimeError, MemoryError, AssertionError) as error:
        if os.environ.get("AFCACHE_DEBUG"):
            raise
        reason = (str(error).strip() or "no message").splitlines()[0]
        say_error(f"{type(error).__name__}: {reason} ({_cure(reason)}AFCACHE_DEBUG=1 shows the traceback)", everywhere=True)
        return ERROR_STATUS
    return 0


def _cure(reason: str) -> str:
    if "compil" in reason.lower():
        return "Is the compiler broken? --no-compile does without; "
    return "" if "rank" in reason else "Too little memory? "
