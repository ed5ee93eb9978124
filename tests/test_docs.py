"""What the pages name is there: files, headings, keys of the config, modules, and no more."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from fp8lm.arguments import split_overrides
from fp8lm.config import Config, load_config
from fp8lm.config.keys import list_keys

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SECTIONS = "|".join(Config.model_fields)
NO_KEYS = {"train.trian_iters", "optimizer.num_steps", "optimizer.amax"}  # a typo shown; tensors
FOLDERS = "configs|docker|docs|fp8lm|scripts|tests|tools"
ARCHITECTURE = ROOT / "docs/concepts/architecture.md"


@pytest.fixture(params=PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def page(request):
    return request.param


def anchors(path):
    """The anchors that a public host gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"https?:", target):
            file, _, anchor = target.partition("#")
            linked = (page.parent / file).resolve() if file else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def test_keys_exist(page):
    keys = list_keys()
    groups = {path.rpartition(".")[0] for path in keys}
    pattern = rf"(?<![\w./-])((?:{SECTIONS})\.[a-z_0-9]+(?:\.[a-z_0-9]+)?)\b(?![*(])"
    named = set(re.findall(pattern, page.read_text())) - NO_KEYS
    files = {name for name in named if re.search(r"\.(py|yaml|json|model|sh|md)$", name)}
    assert named - files - groups <= keys.keys()


def test_paths_exist(page):
    """Every file that a page names with its folder; braces and stars as a shell reads them."""
    pattern = rf"(?<![\w./-])(?:{FOLDERS})/[\w./*-]+\.(?:py|sh|sbatch|yaml|md|json|txt|png)\b"
    missing = [name for name in re.findall(pattern, page.read_text()) if not any(ROOT.glob(name))]
    assert set(missing) <= {"configs/mine.yaml"}  # what the reader writes


def test_modules_named_after_another_exist():
    """In tables of what a change touches: `fp8lm/model/mlp.py`, `attention.py`."""
    page = ROOT / "docs/developer/extending.md"
    named = re.findall(r"`([a-z_]+\.py)`", page.read_text())
    modules = {path.name for path in (ROOT / "fp8lm").rglob("*.py")}
    assert named and set(named) <= modules


def test_lines_are_short(page):
    """Of prose; tables and code may be wider."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert [line for line in prose.splitlines() if len(line) > 100 and line[0] != "|"] == []


def test_architecture_names_every_package():
    named = re.findall(r"^\| `fp8lm/(\w+)/` \|", ARCHITECTURE.read_text(), re.MULTILINE)
    packages = [path.parent.name for path in ROOT.glob("fp8lm/*/__init__.py")]
    assert sorted(named) == sorted(packages)


def test_architecture_shows_the_imports_that_are_checked():
    (shown,) = re.findall(r"^```\n(launch\n.*?)^```$", ARCHITECTURE.read_text(), re.M | re.S)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = (c["layers"] for c in settings["contracts"] if c["type"] == "layers")
    assert shown.splitlines() == layers
    assert all("ignore_imports" not in contract for contract in settings["contracts"])


def test_commands_have_configs_that_load(page):
    """The settings that follow a config in blocks of bash, but those that the reader fills in."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        words = line.partition(" #")[0].split()
        configs = [word for word in words if re.fullmatch(r"configs/[\w/]+\.yaml", word)]
        if any(word.endswith("quickstart.sh") for word in words):
            configs = ["configs/quickstart.yaml"]
        _, overrides = split_overrides(words)
        given = [text for text in overrides if not re.search(r"[$'\"\[]|\.\.\.", text)]
        if configs and (ROOT / configs[0]).exists():
            load_config(ROOT / configs[0], ["checkpoint.save=runs/a", *given])


def test_navigation_names_every_page():
    """The order of the site; the API pages show every package."""
    named = re.findall(r"^ +- .*: ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = (ROOT / "docs").rglob("*.md")
    assert sorted(named) == sorted(str(page.relative_to(ROOT / "docs")) for page in pages)
    api = "".join(page.read_text() for page in (ROOT / "docs/reference/api").glob("*.md"))
    shown = set(re.findall(r"^::: fp8lm\.(\w+)$", api, re.MULTILINE))
    packages = {path.parent.name for path in ROOT.glob("fp8lm/*/__init__.py")}
    assert shown == packages | {"batch", "scaled_tensor"}


@pytest.mark.parametrize("name", ["extending", "debugging"])
def test_code_runs(name, monkeypatch):
    """The Python blocks of a page, one after the other in one namespace, in the checkout."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / f"docs/developer/{name}.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:  # blank lines above it, so that a traceback names the page's line
        line = page[: page.index(block)].count("\n")
        exec(compile("\n" * line + block, f"docs/developer/{name}.md", "exec"), namespace)


def test_flags_of_preprocess_data():
    """Those that a table calls the same as Megatron's are all there are, but its own."""
    page = (ROOT / "docs/user-guide/migration.md").read_text()
    page = page.split("`preprocess_data.py` | here |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (`--[^|]*) \| ([^|]*) \|$", page, re.MULTILINE)
    same = {flag for flags, here in rows if "the same" in here for flag in flags_in(flags)}
    other = {flag for flags, here in rows if "the same" not in here for flag in flags_in(flags)}
    source = (ROOT / "tools/preprocess_data.py").read_text()
    there = set(re.findall(r'add\(\s*"(--[\w-]+)"', source))
    own = {"--split-lines", "--prepend-bos", "--parse-special-tokens"}
    own |= {"--format", "--chat-template"}
    assert same == there - own and other and not other & there


def flags_in(text):
    return re.findall(r"--[\w-]+", text)
