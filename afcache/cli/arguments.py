"""The parser of the command line: what may be given, and the words that explain it. It imports nothing heavy."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from afcache._version import __version__
from afcache.settings.policies import POLICIES

_GENERATE = """Draw pictures or videos of prompts, with the cache. Several processes, one for each GPU, are started by torchrun:
torchrun --nproc-per-node 2 -m afcache generate ...; degrees that are not given are chosen."""
_CALIBRATE = """Draw every prompt uncached and at one tolerance after another, until a speed or a quality is met; write the
settings and the curve to a file for 'afcache generate --config'."""
_SERVE = """Draw what is asked for over HTTP, many requests at once, in replicas that Ray Serve starts, scales and starts again.
What was accepted is written down, and drawn whatever becomes of them. Needs pip install 'afcache[serve]'."""
_DTYPES = ("float32", "bfloat16", "float16")
_PRESETS = ("quality", "balanced", "fast")
ERROR_STATUS = 2
_MAX_STEPS = 1000
_MAX_PIXELS = 8192
_MAX_FRAMES = 10_000
_MAX_RATE = 100
_MAX_TOKENS = 4096
_MAX_IMAGES = 100_000


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        say_error(f"{message} (see '{self.prog} --help')", everywhere=False)
        sys.exit(ERROR_STATUS)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse '--' as a value: until Python 3.13 argparse drops it, and the option would be an empty list."""
        for word in sys.argv[1:] if args is None else args:
            option, _, value = word.partition("=")
            if option.startswith("--") and value == "--":
                self.error(f"argument {option}: expected one argument, got '--'")
        return super().parse_known_args(args, namespace)


def say_error(message: str, *, everywhere: bool) -> None:
    """One line on stderr; what goes wrong alike in all processes that torchrun started is said once."""
    rank = os.environ.get("RANK", "0")
    if everywhere or rank == "0":
        where = f" (rank {rank})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 and everywhere else ""
        print(f"afcache: error{where}: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return value


def _at_most(limit: int, why: str = "") -> Callable[[str], int]:
    """A kind of argument: a whole number from 1 to a limit, with the words that the limit has in errors."""

    def read(text: str) -> int:
        value = _positive_int(text)
        if value > limit:
            raise argparse.ArgumentTypeError(f"must be at most {limit}{why}, got {text!r}")
        return value

    return read


_steps = _at_most(_MAX_STEPS, ", the length of a flow's schedule")
_pixels = _at_most(_MAX_PIXELS, " pixels")
_frames = _at_most(_MAX_FRAMES)
_rate = _at_most(_MAX_RATE)
_tokens = _at_most(_MAX_TOKENS)
_images = _at_most(_MAX_IMAGES)


def _seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^63 - 1, got {text!r}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """Make the parser."""
    parser = _Parser(prog="afcache", description="Adaptive feature cache for diffusion transformers.")
    parser.add_argument("--version", action="version", version=f"afcache {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    generate = commands.add_parser("generate", help="draw images", description=_GENERATE)
    _add_drawing(generate)
    add = generate.add_argument
    add("--num-images", type=_images, default=1, help="images per prompt, with seeds counting up (default 1)")
    careful = generate.add_mutually_exclusive_group()
    careful.add_argument("--preset", choices=_PRESETS, help="how careful (default balanced)")
    careful.add_argument("--tolerance", type=float, help="error budget between refreshes; 0 computes every step")
    careful.add_argument("--policy", choices=tuple(POLICIES), metavar="NAME", help=f"another policy: {', '.join(POLICIES)}")
    careful.add_argument("--config", type=Path, metavar="FILE", help="settings that 'afcache calibrate' wrote")
    careful.add_argument("--no-cache", action="store_true", help="run the pipeline as it is")
    add("--no-compile", action="store_true", help="do not compile: starts at once, runs slower")
    add("--ulysses", type=_positive_int, metavar="N", help="processes that share tokens and exchange attention heads")
    add("--ring", type=_positive_int, metavar="N", help="processes that share tokens and pass keys and values on")
    add("--cfg-parallel", type=int, choices=(1, 2), help="2: guidance branches on different processes")
    add("--output", type=Path, default=Path("outputs"), metavar="DIR", help="where to write (default outputs)")
    add("--compare", action="store_true", help="also run uncached, and show pictures, gain and difference side by side")
    add("--fps", type=_rate, metavar="N", help="frames per second of a video (default: the model's own, else 16)")
    calibrate = commands.add_parser("calibrate", help="find the settings for a speed or a quality", description=_CALIBRATE)
    target = calibrate.add_mutually_exclusive_group(required=True)
    target.add_argument("--target-speedup", type=float, metavar="X", help="how many times fewer block evaluations, at least")
    target.add_argument(
        "--target-psnr", type=float, metavar="DB", help="mean PSNR to the uncached images, at least; 40 is hard to see"
    )
    _add_drawing(calibrate)
    add = calibrate.add_argument
    add("--num-images", type=_images, default=4, help="images per prompt, with seeds counting up (default 4)")
    add("--output", type=Path, default=Path("afcache.json"), metavar="FILE", help="where to write (default afcache.json)")
    _add_serving(commands.add_parser("serve", help="draw over HTTP", description=_SERVE))
    info = commands.add_parser("info", help="show versions and what can be used here, or what is known of a model")
    cached = "say what this pipeline is, and whether it is cached; mini-flux and mini-wan are built in"
    info.add_argument("--model", metavar="FOLDER_OR_HUB_ID", help=cached)
    info.set_defaults(dtype=None)
    return parser


def _replicas(text: str) -> tuple[int, int]:
    least, dash, most = text.partition("-")
    found = _positive_int(least), _positive_int(most if dash else least)
    if found[0] > found[1]:
        raise argparse.ArgumentTypeError(f"must be N, or from a number to one that is no less, such as 1-4, got {text!r}")
    return found


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0 and at most a day, got {text!r}")
    return value


def _add_serving(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="FOLDER_OR_HUB_ID", help="whose requests can share calls (default mini-flux, which is built in)")
    add("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1; 0.0.0.0 is all of them)")
    add("--port", type=_at_most(65535), default=8000, help="port to listen at (default 8000)")
    add("--replicas", type=_replicas, default=(1, 1), metavar="N[-M]", help="processes that draw, or from N to M (default 1)")
    add("--max-batch", type=_at_most(1024), default=8, help="samples of one computed call (default 8)")
    add("--max-requests", type=_positive_int, help="that a replica draws at once (default four times --max-batch)")
    careful = parser.add_mutually_exclusive_group()
    careful.add_argument("--preset", choices=_PRESETS, help="of requests that ask for none (default balanced)")
    careful.add_argument("--tolerance", type=float, help="of requests that ask for none; 0 computes every step")
    add("--compile", action="store_true", help="make a graph of every shape and size of a call")
    add("--folder", type=Path, default=Path("served"), metavar="DIR", help="keeps what was accepted (default served)")
    add("--checkpoint-seconds", type=_seconds, default=2.0, metavar="S", help="of work that a replica may lose (default 2)")
    add("--drain-seconds", type=_seconds, default=60.0, metavar="S", help="that a leaving replica has to finish (default 60)")
    add("--dtype", choices=_DTYPES, help="default: bfloat16 on CUDA, float32 elsewhere and for mini-FLUX")
    add("--device", help="cpu or cuda (default: cuda if there is one)")


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    """What both commands that draw must know."""
    add = parser.add_argument
    add("--prompt", action="append", metavar="TEXT", help="what to draw; may be repeated (what is built in has defaults)")
    add(
        "--model",
        metavar="FOLDER_OR_HUB_ID",
        help="draws from text; mini-flux (default) and mini-wan are built in",
    )
    add("--steps", type=_steps, default=28, help="denoising steps (default 28)")
    add("--seed", type=_seed, default=0, help="seed of the first image (default 0)")
    add("--guidance-scale", type=float, help="guidance, as pipelines mean it that call it so (default: the pipeline's)")
    add("--true-cfg-scale", type=float, help="classifier-free guidance beside a distilled one, as of FLUX.1 and Qwen-Image")
    add("--negative-prompt", metavar="TEXT", help="what guidance leads away from (default: the empty prompt)")
    add("--height", type=_pixels, help="pixels (default: the model's own)")
    add("--width", type=_pixels, help="pixels (default: the model's own)")
    add("--num-frames", type=_frames, help="of a video (default: the model's own)")
    add("--max-sequence-length", type=_tokens, help="text tokens (default: the model's own)")
    add("--dtype", choices=_DTYPES, help="default: bfloat16 on CUDA, float32 elsewhere and for mini-FLUX")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
