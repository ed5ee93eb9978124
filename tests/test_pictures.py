"""Pictures get the format of their name, whole or not at all."""

import pytest
from matplotlib import image
from matplotlib.figure import Figure

from fp8lm.pictures import picture_path, save_figure
from fp8lm.runtime.errors import InputError


def drawn() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1], [1, 0])
    return figure


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("x.png", b"\x89PNG"),
        ("x", b"\x89PNG"),
        ("x.svg", b"<?xml"),
        ("x.PDF", b"%PDF"),
        ("x.jpeg", b"\xff\xd8"),
    ],
)
def test_the_name_says_the_format(tmp_path, name, begins):
    path = picture_path(str(tmp_path / "made" / name))
    save_figure(drawn(), path)
    assert path.read_bytes().startswith(begins)
    assert [file.name for file in path.parent.iterdir()] == [name]


def test_options_of_savefig(tmp_path):
    for dpi in (50, 100):
        save_figure(drawn(), tmp_path / "x.png", dpi=dpi)
        assert image.imread(tmp_path / "x.png").shape[:2] == (dpi, 2 * dpi)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        save_figure(drawn(), tmp_path / "file" / "x.png")
