"""Every command and every Python example of README.md and docs/*.md runs, in the order of its page.

Each page runs in an empty folder. An HTML comment above a block of commands says how it is tested:
`<!-- test: slow tiny="trainer.max_steps=2" -->`. `tiny` is appended to each `sana-lab` command of the block, so that
what takes hours takes seconds; `slow` leaves the block to `-m slow`; `as="..."` runs another command in its place, such
as that of a `make` target at a tiny size. A block whose first line is `# a/path.py` (.yaml, .csv) is written to that
file. Names in capitals, such as PICTURES, are made by `PLACEHOLDERS`.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_emoji
import torch

import sana_lab
from sana_lab import __main__
from sana_lab.commands.examples import EXAMPLES
from sana_lab.config import experiments

ROOT = Path(sana_lab.__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?:^<!-- test: (?P<test>.*?) -->\n)?^```(?P<language>\w+)\n(?P<body>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\((?!https?:|#|mailto:)([^)#]+)(?:#[^)]*)?\)")
INLINE = re.compile(r"`(sana-lab [^`]*|make [^`]*)`")

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:The ``noload`` loader strategy:DeprecationWarning"
    ),  # mlflow with sqlalchemy 2.1
    pytest.mark.filterwarnings("ignore:trainer.precision is 'bf16:UserWarning"),  # a CPU without AVX-512 BF16
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers on numpy 2
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),  # a plain Trainer without validation data
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode"),  # the frozen autoencoder, in a plain Trainer
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6 with torch >= 2.13
]


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    body: str
    slow: bool
    tiny: list[str]
    instead: str | None

    @property
    def commands(self) -> list[str]:
        """Its commands, without comments."""
        lines = (self.instead or self.body).replace("\\\n", " ").splitlines()
        return [command for line in lines if (command := re.sub(r"\s+#.*", "", line).strip()) and command[0] != "#"]

    @property
    def path(self) -> str | None:
        """The file that the block is, by its first line."""
        first = re.match(r"# ([\w./-]+\.(?:py|yaml|csv))\n", self.body)
        return first[1] if first else None


def blocks(page: Path) -> list[Block]:
    return [_block(match) for match in FENCE.finditer(page.read_text())]


def _block(match: re.Match[str]) -> Block:
    words = shlex.split(match["test"] or "")
    values = dict(word.split("=", 1) for word in words if "=" in word)
    assert values.keys() <= {"tiny", "as"}, match["test"]
    assert {w for w in words if "=" not in w} <= {"slow"}, match["test"]
    return Block(
        match["language"], match["body"], "slow" in words, shlex.split(values.get("tiny", "")), values.get("as")
    )


# --- what the pages call by a name in capitals


def pictures(path: Path) -> None:
    """Eight coloured pictures with a manifest of captions."""
    from PIL import Image

    path.mkdir()
    for i in range(8):
        Image.new("RGB", (96, 96), (31 * i, 255 - 31 * i, 128)).save(path / f"{i}.png")
    rows = "".join(f"{i}.png,a plain picture {i}\n" for i in range(8))
    (path / "captions.csv").write_text("file_name,text\n" + rows)


def pipeline(path: Path) -> None:
    import tiny_peers

    tiny_peers.saved(tiny_peers.sana_pipeline(), path)


def sprint(path: Path) -> None:
    import tiny_peers

    tiny_peers.saved(tiny_peers.sprint_pipeline(), path)


def clip(path: Path) -> None:
    import tiny_folders

    tiny_folders.clip(path)


def tars(path: Path) -> None:
    """Two tars of twelve small pictures of several shapes, with scored captions."""
    import tiny_pictures

    tiny_pictures.tars(path, range(24))


def model(path: Path) -> None:
    """A tiny decoder as transformers saves it."""
    import tiny_folders

    tiny_folders.decoder(path)


PLACEHOLDERS: dict[str, Callable[[Path], None]] = {
    "PICTURES": pictures,
    "PIPELINE": pipeline,
    "SPRINT": sprint,
    "CLIP": clip,
    "TARS": tars,
    "MODEL": model,
}


def prepare(command: str, folder: Path) -> None:
    for name, make in PLACEHOLDERS.items():
        if re.search(rf"\b{name}\b", command) and not (folder / name).exists():
            make(folder / name)


# --- running


def run(command: str, block: Block, folder: Path) -> None:
    prepare(command, folder)
    words = shlex.split(command)
    if words[0] == "sana-lab":
        assert __main__.main([*words[1:], *block.tiny]) == 0, command
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), f"no target {words[1]}"
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\[(\w+)\]", command)) <= set(extras), command
    else:
        words = [sys.executable, *words[1:]] if words[0] == "python" else words
        words = [str(ROOT / w) if w.startswith(("benchmarks/", "tests")) else w for w in words]
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}:{folder}",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def walk(page: Path, folder: Path, slow: bool) -> int:
    """Run a page from its top; in the default run without its slow blocks."""
    scope: dict[str, object] = {}
    count = 0
    for block in blocks(page):
        if block.slow and not slow:
            continue
        if block.path:
            (folder / block.path).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.path).write_text(block.body)
            prepare(block.body, folder)
        elif block.language == "python":
            exec(compile(block.body, page.name, "exec"), scope)
        elif block.language == "sh":
            for command in block.commands:
                run(command, block, folder)
        count += 1
    return count


@pytest.fixture
def folder(here: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    modules = set(sys.modules)
    monkeypatch.syspath_prepend(str(here))
    yield here
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and str(here) in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_runs(page: Path, folder: Path):
    torch.manual_seed(0)
    assert walk(page, folder, slow=False) >= 0


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if any(b.slow for b in blocks(p))], ids=lambda page: page.stem)
def test_the_page_runs_with_what_takes_minutes(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    if page.stem == "emoji":
        tiny_emoji.write(folder / "emoji", monkeypatch)
    assert walk(page, folder, slow=True) > 0


# --- words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path):
    assert [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_the_text_parse(page: Path):
    """Also those inside sentences: the verb and its flags exist."""
    text = FENCE.sub("", page.read_text())
    for command in INLINE.findall(text):
        words = shlex.split(command.split("...")[0])
        if words[0] == "sana-lab" and len(words) > 1:
            help_text = __main__.parser().format_help()
            assert re.search(rf"\b{re.escape(words[1])}\b", help_text), command


def test_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_examples_ask_for_shapes_that_the_world_has():
    """Commands and code of the pages, and examples of the command line."""
    texts = [block.body for page in PAGES for block in blocks(page)] + [line for e in EXAMPLES.values() for line in e]
    assert [text for text in texts if re.search(r"\b(star|diamond|heart|hexagon)s?\b", text)] == []


def test_every_ablation_that_ships_is_listed():
    rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs" / "ablations.md").read_text(), re.M)
    listed = {name for row in rows for name in re.findall(r"`([^`]*)`", row)}
    shipped = {name for name in experiments.available("ablations") if not name.startswith("paper/")}
    assert shipped - listed == set()
    assert "paper/*" in listed


def test_every_page_is_listed_in_readme():
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in text] == []
