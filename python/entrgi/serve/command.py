"""``entrgi serve``: an OpenAI-compatible server of guided texts, with a page that shows what guidance does."""

from __future__ import annotations

import argparse
import errno
import socket
import sys

from .. import flags, loading
from ..errors import UsageError, require
from .offer import KEY_VARIABLE, LIMITS, describe, load
from .settings import Limits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``entrgi serve``."""
    parser.description = (
        "Serve guided texts over HTTP: OpenAI's /v1/chat/completions, a page at /, /healthz and /metrics. "
        "The guidance and sampling flags are what a request gets that does not say otherwise."
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="default: %(default)s; others ask for API keys")
    group.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    group.add_argument("--name", help="the model's name in the API (default: the last part of --model, or tiny)")
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help=f"keys, one per line, of which requests must bring one ({KEY_VARIABLE} holds one too)",
    )
    group.add_argument(
        "--memory-budget",
        type=_budget,
        metavar="BYTES|SHARE",
        help="what a batch may take beyond the weights: bytes, or a share of what is free (default: 0.9)",
    )
    group.add_argument("--access-log", action="store_true", help="a line for every request, without its text")
    group.add_argument("--ray", action="store_true", help="serve by Ray Serve, on as many GPUs as there are replicas")
    group.add_argument("--replicas", type=int, metavar="N", help="with --ray: copies of the models (default: 1)")
    group.add_argument("--traceback", action="store_true", help="show where an error came from")
    group = parser.add_argument_group("limits of a request")
    for flag, (field, counted) in LIMITS.items():
        default = getattr(Limits(), field)
        group.add_argument(
            flag, type=type(default), default=default, metavar="N", help=f"{counted} (default: {default:g})"
        )
    flags.add_sampler_arguments(parser)
    flags.add_model_arguments(parser, several=True)
    parser.set_defaults(num_samples=1)


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop.

    Returns:
        0.

    Raises:
        UsageError: for bad input; the command line turns it into one line and exit code 2.
    """
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, "entrgi serve", "serve")
    if args.replicas is not None and (args.replicas < 1 or not args.ray):
        raise UsageError(f"--replicas {args.replicas}: expected 1 or more, with --ray")
    served = describe(args)
    listening = _listening(args.host, args.port)
    if args.ray:
        from .on_ray import serve_on_ray

        return serve_on_ray(args, served, listening)
    from .server import serve

    print(f"loading {loading.TINY if served.tiny else args.model} ...", file=sys.stderr, flush=True)
    samplers = load(args, served)
    return serve(samplers, served, args, listening)


def _listening(host: str, port: int) -> socket.socket:
    """The address, ours before the models are loaded: who connects meanwhile waits for them.

    A bound socket is not enough, since on Linux another server could bind the same address and fail after its loading.

    Raises:
        UsageError: it cannot be had.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port}: expected one from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        said = error.strerror or error
        if error.errno == errno.EADDRINUSE:
            said = f"{said}; end the server that has it, or give another --port (0 takes a free one)"
        raise UsageError(f"cannot listen on {host}, port {port}: {said}") from None
    return listening


def _budget(text: str) -> int | float:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected bytes, or a share up to 1, got {text!r}") from None
