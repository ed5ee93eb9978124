"""What may stand behind the launcher's options."""

from __future__ import annotations

import argparse
import re

from fp8lm.arguments import number_type
from fp8lm.runtime.errors import InputError

DEFAULT_PORT = 29400
MOST_PORT = 65535
# Beyond these a number is a slip, and the layout of so many processes not worth waiting for.
MOST_PROCESSES = 65536
MOST_PER_NODE = 1024
MOST_SIMULATED = 256
_IPV6 = re.compile(r"(?=.*:.*:)[0-9a-fA-F:.]+(%\w+)?", re.ASCII)  # without its brackets
_ENDPOINT = re.compile(r"(\[[\w.:-]+\]|[\w.-]+)(?::([0-9]+))?", re.ASCII)


def node_count(text: str) -> int:
    """N, or N:N as Kubeflow writes it; the batches of a run do not fit any number of machines."""
    least, _, most = text.partition(":")
    if most not in ("", least):
        raise argparse.ArgumentTypeError(f"{text!r} is a range: give one number")
    return number_type(1, MOST_PROCESSES, "no job has so many machines")(least)


def endpoint(text: str) -> str:
    """HOST:PORT of HOST, HOST:PORT or [IPv6]:PORT; InputError if it is none of them."""
    option = f"--rdzv-endpoint={text}"
    match = _ENDPOINT.fullmatch(text)
    if match is None and _IPV6.fullmatch(text):
        raise InputError(f"{option}: an IPv6 address is written in brackets, [::1]:{DEFAULT_PORT}")
    if match is None:
        raise InputError(f"{option}: write it as HOST:PORT")
    host, port = match[1], int(match[2] or DEFAULT_PORT)
    if not 1 <= port <= MOST_PORT:
        raise InputError(f"{option}: a port is a number from 1 to {MOST_PORT}")
    return f"{host}:{port}"


def job_name(text: str) -> str:
    """The name of a job, which is part of a folder's; InputError if it cannot be."""
    if not re.fullmatch(r"[^/\s]+", text):
        raise InputError(f"--rdzv-id={text}: a folder of logs gets that name: no slashes or spaces")
    return text
