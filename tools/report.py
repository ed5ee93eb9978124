"""Report on runs as one HTML page: losses, gaps, speed, memory, FP8 health of every layer.

python tools/report.py RUN [RUN ...] [--output report.html]
python tools/report.py bf16=runs/a-1,runs/a-2 o3=runs/b-1,runs/b-2
python tools/report.py --serve RUN [--port 8321]

A RUN is a folder with a metrics.jsonl, or NAME=FOLDER[,FOLDER...]: several folders are seeds of one
setting. Gaps are to the first. The page loads nothing, and has no script. --serve shows the runs as
they are now, on this machine alone, in a page that loads itself again.
"""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from reporting.page import page
from reporting.runs import Run, read_run

from fp8lm.arguments import file_to_write, number_type, path_text
from fp8lm.data.files import write_aside
from fp8lm.runtime.errors import CommandParser, InputError, run_command

COLUMNS = 400  # of all heat maps of one kind together
LOOPBACK = "127.0.0.1"
Folders = dict[str, list[Path]]


def main(argv: list[str]) -> None:
    """Write the page, or serve it until interrupted."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", type=path_text, nargs="+", metavar="RUN", help="FOLDER or NAME=FOLDER[,FOLDER]"
    )
    parser.add_argument("--output", type=file_to_write, help="file to write; default: report.html")
    parser.add_argument("--serve", action="store_true", help="serve it on this machine instead")
    parser.add_argument(
        "--port", type=number_type(0, 65535), default=8321, help="of --serve; default: 8321, 0: any"
    )
    parser.add_argument(
        "--refresh", type=number_type(1), default=30, help="seconds, of --serve; default: 30"
    )
    options = parser.parse_args(argv)
    if options.serve and options.output is not None:
        parser.error("--serve writes no --output: give one of them")
    folders = read_arguments(options.runs)
    if options.serve:
        serve(folders, options.port, options.refresh)
        return
    output = options.output or Path("report.html")
    write_aside(output, page(read_runs(folders)).encode())
    print(f"wrote {output}")


def read_arguments(arguments: list[str]) -> Folders:
    """Folders by name; InputError for a name that comes twice, and where one is missing."""
    found: Folders = {}
    for argument in arguments:
        name, separator, listed = argument.partition("=")
        folders = listed.split(",")
        if Path(argument).is_dir():  # a name of a sweep, such as lr=1e-3,wd=0.1
            name, folders = Path(argument).resolve().name, [argument]
        elif not separator:
            name, folders = Path(argument).resolve().name, argument.split(",")
        if not (name and all(folders)):
            raise InputError(f"{argument!r}: write FOLDER or NAME=FOLDER[,FOLDER]")
        if name in found:
            raise InputError(f"two runs are named {name}: write NAME=FOLDER")
        found[name] = [Path(folder) for folder in folders]
    return found


def read_runs(folders: Folders) -> dict[str, list[Run]]:
    """The runs, their heat maps of a size that several of them fit into a page."""
    columns = max(20, COLUMNS // (2 * len(folders)))
    return {name: [read_run(folder, columns) for folder in own] for name, own in folders.items()}


def serve(folders: Folders, port: int, refresh: int) -> None:
    """Serve the page until interrupted."""
    read_runs(folders)  # what is wrong now is said now
    with make_server(folders, port, refresh) as server:
        host, port = server.server_address[:2]
        print(f"serving http://{host!s}:{port}/ until interrupted", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


def make_server(folders: Folders, port: int, refresh: int) -> ThreadingHTTPServer:
    """A server on the loopback interface; InputError if the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/":
                self.send_error(404)
                return
            try:
                content = page(read_runs(folders), refresh=refresh).encode()
            except InputError as error:
                self.send_error(503, explain=str(error))
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    try:
        return ThreadingHTTPServer((LOOPBACK, port), Handler)
    except OSError as error:
        raise InputError(f"--port {port}: {error.strerror}: use another, or 0 for any") from error


if __name__ == "__main__":
    sys.exit(run_command(main))
