"""The report: one page that loads nothing, of any number of steps and layers."""

from __future__ import annotations

import base64
import json
import math
import random
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from io import BytesIO
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from matplotlib.image import imread as read_image

from fp8lm.telemetry.table import as_metrics
from tests.launch.conftest import ROOT

pytestmark = pytest.mark.slow

MEGABYTE = 1 << 20
MOST_NODES = 1000  # of a page of a few runs
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
LAYERS = [f"decoder.layers.{i}.mlp.linear_fc1" for i in range(4)]
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Nodes, texts and what a page refers to; raises for tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.nodes, self.text, self.sources, self.open = 0, "", [], []
        self.alts = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.nodes += 1
        attributes = dict(attributes)
        self.sources += [v for k, v in attributes.items() if k in ("src", "href", "data", "action")]
        self.alts += [attributes["alt"]] if "alt" in attributes else []
        assert tag not in ("script", "iframe", "object")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


def statistics(step, layers, kinds=("input",), **worse):
    found = {}
    for number, layer in enumerate(layers):
        for kind in kinds:
            wave = math.sin(step / 50 + number)
            found[layer, kind] = {"snr": 31.0 + wave, "kurtosis": 4.0 + wave, "saturation": 0.0}
    for name, value in worse.items():
        found[layers[2], kinds[0]][name] = value
    return as_metrics(found)


def write_run(folder, steps=20, layers=LAYERS, offset=0.0, interval=1, **worse):
    folder.mkdir(parents=True)
    noise = random.Random(str(folder))
    with (folder / "metrics.jsonl").open("w") as file:

        def write(**line):
            file.write(json.dumps(line) + "\n")

        for step in range(1, steps + 1):
            loss = 5.0 * step**-0.1 + offset + 0.02 * noise.random()
            report = {"lm loss": loss, "grad-norm": 1.0 / step, "tokens-per-second": 900.0}
            report |= {"iteration-time": 0.5, "memory/rss": 1e9, "state_bytes/weights": 1e6}
            write(iteration=step, **report)
            if interval and step % interval == 0:
                write(iteration=step, **statistics(step, layers, **worse))
        write(iteration=steps, **{"lm loss validation": loss})
    return folder


def page_of(path):
    text = path.read_text()
    return text, Page(text)


def pictures(text):
    """The SVG pictures of a page, parsed."""
    found = re.findall(r"data:image/svg\+xml,([^\"]+)", text)
    return [ElementTree.fromstring(unquote(data)) for data in found]


def pixels(picture):
    """Those of the heat map in a picture, rows x columns x RGB."""
    image = next(picture.iter("{http://www.w3.org/2000/svg}image"))  # then that of the colours
    data = image.get("{http://www.w3.org/1999/xlink}href").partition(",")[2]
    return read_image(BytesIO(base64.b64decode(data)))[..., :3]


def test_a_page_loads_nothing_and_parses(run_tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "o3", saturation=0.4, scale=64.0)
    assert run_tool("report", run) == 0
    text, page = page_of(tmp_path / "report.html")
    assert page.nodes < MOST_NODES and len(text) < MEGABYTE
    assert all(source.startswith("data:image/svg+xml,") for source in page.sources)
    assert len(pictures(text)) == len(page.sources) == len(page.alts) > 5
    for said in (LAYERS[2], "input", "40.000%", "precision.guard.action=bf16"):
        assert said in page.text
    assert "snr of input by layer and iteration, o3" in page.alts


def test_runs_side_by_side_with_seeds(run_tool, tmp_path):
    bf16 = [write_run(tmp_path / f"bf16-{seed}", interval=0) for seed in (1, 2)]
    o3 = [write_run(tmp_path / f"o3-{seed}", offset=0.5) for seed in (1, 2)]
    names = [f"{name}={own[0]},{own[1]}" for name, own in (("bf16", bf16), ("o3", o3))]
    assert run_tool("report", *names, "--output", tmp_path / "r.html") == 0
    _, page = page_of(tmp_path / "r.html")
    (gap,) = re.findall(r"\+(\d+\.\d+) %", page.text)
    assert 10 < float(gap) < 20
    assert "gap of the training loss to the baseline" in page.alts
    assert "bf16 has no statistics" in page.text and "No tensor is beyond its bounds." in page.text
    assert "±" in page.text


def test_a_run_that_is_writing(run_tool, tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 21, "lm lo')
    assert run_tool("report", run, "--output", tmp_path / "r.html") == 0


def test_a_folder_named_after_its_keys_is_a_run(run_tool, tmp_path):
    run = write_run(tmp_path / "lr=1e-3,wd=0.1", steps=2, interval=0)
    assert run_tool("report", run, "--output", tmp_path / "r.html") == 0
    assert "FP8 report: lr=1e-3,wd=0.1" in page_of(tmp_path / "r.html")[1].text
    for wrong in ("=runs/a", "a=runs/a,", "a="):
        assert run_tool("report", wrong, "--output", tmp_path / "no.html") == 2
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": null}\n')
    assert run_tool("report", run, "--output", tmp_path / "no.html") == 2
    assert not (tmp_path / "no.html").exists()


BAD_STEP, BAD_LAYER = 6667, 7


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """10,000 reports of 96 layers, of which one step is bad in one layer."""
    layers = [f"decoder.layers.{i}.mlp.linear_fc1" for i in range(96)]
    keys = [f"fp8_stats/{layer}/input/snr" for layer in layers]
    noise = random.Random(1)
    steps = [json.dumps({key: round(noise.uniform(25, 32), 3) for key in keys}) for _ in range(50)]
    run = tmp_path_factory.mktemp("long")
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 10_001):
            values = steps[step % 50]
            if step == BAD_STEP:
                values = json.dumps(json.loads(values) | {keys[BAD_LAYER]: -9.0})
            file.write(f'{{"iteration": {step}, "lm loss": {5 / step**0.1}, {values[1:]}\n')
    return run


def test_a_long_run_of_many_layers(run_tool, long_run, tmp_path):
    """A page of a stated size, in which a single bad step is seen."""
    output = tmp_path / "r.html"
    assert run_tool("report", long_run, "--output", output) == 0
    text, page = page_of(output)
    assert len(text) < 10 * MEGABYTE and page.nodes < MOST_NODES

    sys.path.insert(0, str(ROOT / "tools"))
    from reporting.runs import read_run

    heat = read_run(long_run, 200).heat["input", "snr"]
    assert heat.values.shape[0] == 96 and 200 <= heat.values.shape[1] < 400
    assert len(heat.layers) == 96 and (heat.values == -9.0).sum() == 1
    column = int((heat.values[BAD_LAYER] == -9.0).argmax())
    assert heat.iterations[column] <= BAD_STEP < heat.iterations[column + 1]
    red, green, _ = pixels(pictures(text)[-1]).astype(float).transpose(2, 0, 1)
    assert 0 < (red - green > 0.3).mean() < 1e-3


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("is_long", [False, True], ids=["short", "long"])
def test_a_browser_opens_it_without_an_error(is_long, run_tool, long_run, tmp_path):
    run = long_run if is_long else write_run(tmp_path / "run", saturation=0.4)
    output, picture = tmp_path / "r.html", tmp_path / "r.png"
    assert run_tool("report", run, "--output", output) == 0
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'browser'}", f"--screenshot={picture}"]
    ended = subprocess.run(
        [*command, "--window-size=1250,3000", output.as_uri()],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    assert "CONSOLE" not in ended.stderr  # what a page logs, errors among it
    seen = read_image(picture)
    assert seen.shape[0] > 1000 and len({tuple(row) for row in seen[::9, ::9, 0]}) > 20


def test_it_is_served_on_this_machine_and_follows_the_run(tool, tmp_path, capsys):
    run = write_run(tmp_path / "run")
    module = tool("report")
    server = module.make_server({"run": [run]}, port=0, refresh=5)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        host, port = server.server_address
        assert host == "127.0.0.1"

        def get(path="/"):
            with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=60) as answer:
                return answer.read().decode()

        first = get()
        assert Page(first) and 'http-equiv="refresh" content="5"' in first
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"iteration": 4711, "lm loss": 1.0}) + "\n")
        assert "4711" in get()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get("/../metrics.jsonl")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
