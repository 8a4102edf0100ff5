"""The command line: `afcache generate`, `afcache calibrate` and `afcache info`.

What is heavy to import is imported by the command that needs it, after its arguments have been checked: help and errors
come at once.
"""

import os
import sys

from afcache.cli.arguments import ERROR_STATUS, build_parser, say_error
from afcache.cli.silence import quiet


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status.

    Expected failures (bad values, missing folders, unsupported models) are one line on stderr and status 2.
    """
    arguments = build_parser().parse_args(argv)
    try:
        with quiet():
            if arguments.command == "info":
                from afcache.cli.info import collect_info

                print("\n".join(f"{name:<14} {value}" for name, value in collect_info().items()))
            elif arguments.command == "calibrate":
                from afcache.cli import calibration

                calibration.run(arguments)
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
    except KeyboardInterrupt:
        print("afcache: interrupted", file=sys.stderr)
        return 130
    return 0


def _cure(reason: str) -> str:
    if "compil" in reason.lower():
        return "Is the compiler broken? --no-compile does without; "
    return "" if "rank" in reason else "Too little memory? "
