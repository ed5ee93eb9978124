"""Statistics of layers by place, depth and time, from the metrics of two runs."""

from __future__ import annotations

import json

import pytest

from fp8lm.telemetry.table import as_metrics

LAYERS, STEPS = 3, 8
PLACES = ("self_attention.linear_proj", "mlp.linear_fc2")


def write_run(folder, offset):
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, STEPS + 1):
            found = {
                (f"decoder.layers.{layer}.{where}", kind): {
                    "snr": 20.0 + layer + step + offset,
                    "underflow": 0.0,
                    "kurtosis": 3.0 + step,
                    "amax": 2.0**layer,
                }
                for layer in range(LAYERS)
                for where in PLACES
                for kind in ("input", "grad_output", "exp_avg")
            }
            found["output_layer", "input"] = {"snr": 1.0}
            line = {"iteration": step, "lm loss": 1.0, **as_metrics(found)}
            file.write(json.dumps(line) + "\n")
    return folder


def test_by_place_depth_and_time(run_tool, tmp_path, capsys):
    runs = [f"{name}={write_run(tmp_path / name, 5.0 * (name == 'b'))}" for name in ("a", "b")]
    files = {name: tmp_path / name for name in ("layers.json", "time.png", "depth.png")}
    options = zip(("--json", "--over-time", "--by-depth"), files.values(), strict=True)
    assert run_tool("compare_layers", *runs, *(word for pair in options for word in pair)) == 0
    records = json.loads(files["layers.json"].read_text())
    assert {record["kind"] for record in records} == {"input", "grad_output"}
    assert {record["place"] for record in records} == set(PLACES)  # within transformer layers
    (snr,) = (
        record
        for record in records
        if (record["run"], record["place"], record["kind"], record["statistic"])
        == ("b", PLACES[1], "input", "snr")
    )
    assert snr["iterations"] == list(range(1, STEPS + 1))
    assert snr["over_time"] == [26.0 + step for step in range(1, STEPS + 1)]  # of the middle layer
    assert snr["by_layer"] == [32.5, 33.5, 34.5]  # of steps 7 and 8
    assert all(files[name].stat().st_size > 10_000 for name in ("time.png", "depth.png"))
    out = capsys.readouterr().out
    rows = [line.split() for line in out.partition("\nb\n")[2].splitlines()]
    (row,) = [row for row in rows if row[:2] == [PLACES[1], "input"]]
    assert row[2:] == ["33.5", "0.000%", "10.5", "nan%", "2.33", "32.50", "34.50"]


@pytest.mark.parametrize("argument", ["missing", "a={}", "a=nowhere"])
def test_bad_input(argument, run_tool, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "lm loss": 1.0}\n')
    assert run_tool("compare_layers", argument.format(tmp_path)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
