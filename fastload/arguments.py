"""The arguments of the command ``fastload``: what can be said, not what is done with it."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import fastload

from . import profiling
from .lock import FILENAME
from .serving import options as serving

#: By name, what runs a command.
Commands = Mapping[str, Callable[[argparse.Namespace], Any]]


def parser(commands: Commands) -> argparse.ArgumentParser:
    """Return the parser of the whole command line; each command's function is its ``run``.

    Args:
        commands: By name, the function that runs it.
    """
    parser = argparse.ArgumentParser(
        prog="fastload", description="Streams model weights, verified while they download."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    adder = parser.add_subparsers(required=True, metavar="COMMAND")
    p = _command(adder, "prefetch", commands, "download into the Hugging Face cache; needs no torch")
    _add_source(p, nargs="*", help="what to download; with --locked, everything in the lock where none is given")
    _add_download(p)
    p = _command(adder, "load", commands, "load a model, print where the time went, and exit")
    _add_source(p, nargs=1)
    _add_download(p)
    p.add_argument("--device", help="where the weights go (default: cpu)")
    p.add_argument("--dtype", help="of the weights, for example bfloat16")
    builder = p.add_mutually_exclusive_group()
    builder.add_argument("--framework", help="who builds it; the files decide where it is not given")
    builder.add_argument(
        "--tensors", action="store_true", help="its tensors alone, of any format; nobody builds a model"
    )
    profiling.add_options(p)
    p = _command(adder, "exec", commands, "begin to download, then become the program after `--`, which will load it")
    _add_source(p, nargs="+")
    _add_download(p)
    p = _command(
        adder, "serve", commands, "supervise a model server, or a hook that makes one; wakes, holds, puts to sleep"
    )
    serving.add_options(p)
    p.add_argument("--model", dest="source", action="append", default=[], metavar="SOURCE", help="fetched at wake")
    p.add_argument("--revision", help="branch, tag or commit")
    _add_download(p)
    p = _command(adder, "profile", commands, "profile the Python program after `--`, or compare two histories")
    p.add_argument(
        "words", nargs="*", metavar="compare BEFORE.jsonl AFTER.jsonl", help="what moved between two histories"
    )
    profiling.add_options(p)
    p = _command(adder, "verify", commands, "hash a snapshot in the cache again; 1 if a file is corrupt or missing")
    _add_source(p, nargs=1)
    p = _command(adder, "lock", commands, f"write commit, files, sizes and digests to {FILENAME}")
    _add_source(p, nargs="+")
    p.add_argument(
        "-o", "--output", default=FILENAME, metavar="FILE", help="(default: %(default)s); other entries stay"
    )
    p = _command(adder, "doctor", commands, "measure this machine: what bounds a load here; 1 if something is broken")
    _add_source(p, nargs="?", help="the model to judge by (default: 10 GB in five files)")
    p.add_argument("--link", type=_rate, metavar="RATE", help="what the link carries: 250MB/s, 10Gbit/s")
    _command(adder, "plugins", commands, "list the plugins and what is wrong with those that are not in use")
    _command(adder, "settings", commands, "list the settings, where their values come from and what they do")
    return parser


def _command(adder: Any, name: str, commands: Commands, help: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = adder.add_parser(name, help=help, description=help)
    parser.set_defaults(run=commands[name], parser=parser, locked=None)
    parser.add_argument(
        "--set", action="append", default=[], type=_pair, metavar="NAME=VALUE", help="a setting; repeatable"
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="the Hugging Face cache")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def _add_source(
    parser: argparse.ArgumentParser, nargs: str | int, help: str = "org/name, org/name@revision, …"
) -> None:
    parser.add_argument("source", nargs=nargs, metavar="SOURCE", help=help)
    parser.add_argument("--revision", help="branch, tag or commit")


def _add_download(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", action="append", metavar="GLOB", help="only files that match; repeatable")
    parser.add_argument("--mirror", action="append", metavar="URL", help="a further base URL to fetch from; repeatable")
    parser.add_argument(
        "--locked", metavar="FILE", help=f"accept only what this .lock file lists (default: {FILENAME})"
    )


def split_command(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words for us and, of commands that run another program, those after ``--``, which are its own."""
    words = list(argv)
    at = words.index("--") if words[:1] in (["exec"], ["serve"], ["profile"]) and "--" in words else len(words)
    return words[:at], words[at + 1 :]


def join_locked(argv: Sequence[str]) -> list[str]:
    """Give a bare ``--locked`` its file, so that the source after it is not taken for one."""
    words = list(argv)
    for index, word in enumerate(words):
        if word == "--locked" and not "".join(words[index + 1 : index + 2]).endswith(".lock"):
            words[index] = f"--locked={FILENAME}"
    return words


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _rate(text: str) -> float:
    """Return bytes a second."""
    match = re.fullmatch(r"([\d.]+)\s*([kMGT]?)(B|bit|b)(?:/s|ps)", text.strip())
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate such as 250MB/s or 10Gbit/s")
    return number * 1000.0 ** " kMGT".index(match[2] or " ") / (1 if match[3] == "B" else 8)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        sys.stdout.write(f"fastload {fastload.__version__}\n")
        parser.exit()
