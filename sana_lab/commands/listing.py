"""Command `sana-lab list`: experiments, ablations, parts, trained models and runs, a line each."""

import json
import sqlite3
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from sana_lab.config import experiments, parts_verb, registry
from sana_lab.config.text_files import read
from sana_lab.tracking.store import Store

HOME = Path("runs")
"""Folder of results; `checkpoints.weights.HOME`, which imports torch."""

Rows = list[tuple[str, ...]]


def main(what: str | None = None) -> None:
    """Print a table of one kind of thing, or of every kind how many there are."""
    if what is None:
        counts = [(name, *_count(make, words)) for name, (make, words) in KINDS.items()]
        parts_verb.print_table("sana-lab list WHAT", counts, ("what", "there are", "what it is"))
        return
    make, words = KINDS[what]
    rows = make()
    parts_verb.print_table(f"{what}: {words}", rows, COLUMNS[what])
    if not rows:
        print(EMPTY.get(what, ""))


def _count(make: Callable[[], Rows], words: str) -> tuple[str, str]:
    """The number of rows and what they are; why it is unknown where a server does not answer."""
    try:
        return str(len(make())), words
    except ValueError as error:
        return "?", f"{words}; {error}"


def recipes(kind: str) -> Rows:
    """Name and purpose of every recipe of a kind: its title, its first comment, or what it changes in its base."""
    names = dict.fromkeys([*experiments.available(kind), *_deeper(kind)])
    return [(name, _purpose(experiments.locate(kind, name))) for name in names]


def _deeper(kind: str) -> list[str]:
    """Names in folders one level down, such as paper/captions."""
    folders = sorted({path.name for root in experiments.roots(kind) if root.is_dir() for path in root.glob("*/")})
    return [name for folder in folders for name in experiments.available(kind, folder)]


def _purpose(path: Path) -> str:
    text = read(path)
    raw = {line.partition(":")[0]: line.partition(":")[2].strip() for line in text.splitlines() if line[:1].isalpha()}
    if title := raw.get("title", "").strip("'\""):
        return title
    first = next((line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#")), "")
    return first or (f"{raw['base']} with changes" if raw.get("base") else "")


def parts() -> Rows:
    """Kind, registered names, purpose."""
    return [(kind, ", ".join(names), registry.KINDS[kind]) for kind, names in registry.TABLE.items()]


def models() -> Rows:
    """Name, steps, samples, time of training and file of every model that is trained here or ships."""
    roots = [root / "weights" for root in experiments.roots("experiments")]
    own = sorted((HOME / "models").glob("*/weights.safetensors"))
    return [_model(path) for path in [*own, *(path for root in roots for path in sorted(root.rglob("*.safetensors")))]]


def _model(path: Path) -> tuple[str, ...]:
    card = _card(path)
    name = str(card.get("name") or path.stem)
    return (name, *(_number(card.get(key)) for key in ("steps", "samples", "seconds")), str(path))


def _number(value: object) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else ""


def _card(path: Path) -> dict[str, object]:
    """The card in a weights file's header, read without torch; {} if it has none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(min(length, 10**7))).get("__metadata__", {})
    return next((c for text in metadata.values() if isinstance(c := _parsed(text), dict)), {})


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def runs() -> Rows:
    """Experiment or sweep, name, status, start and duration of every run of the lab, newest first. A database is read
    without MLflow. ValueError for a server that does not answer."""
    store = Store(HOME)
    if store.server is not None:
        return [_run(name, run.name, run.status, _ms(run.started), _ms(run.ended)) for name, run in store.recorded()]
    if store.is_empty():
        return []
    query = (
        "select e.name, r.name, r.status, r.start_time, r.end_time from runs r join experiments e on "
        "r.experiment_id = e.experiment_id where r.lifecycle_stage = 'active' order by r.start_time desc"
    )
    with sqlite3.connect(f"{store.database.as_uri()}?mode=ro", uri=True) as connection:
        return [_run(*row) for row in connection.execute(query)]


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else round(1000 * seconds)


def _run(sweep: str, name: str, status: str, start: int | None, end: int | None) -> tuple[str, ...]:
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(start / 1000)) if start else ""
    return (sweep, name or "", status, began, f"{(end - start) / 1000:.0f} s" if start and end else "")


KINDS: dict[str, tuple[Callable[[], Rows], str]] = {
    "experiments": (lambda: recipes("experiments"), "to train, sample, evaluate and benchmark by name"),
    "ablations": (lambda: recipes("ablations"), "tables: `sana-lab ablate NAME`"),
    "parts": (parts, "`sana-lab parts KIND NAME` shows the options of one"),
    "models": (models, "trained here or shipped"),
    "runs": (runs, "recorded in MLflow; `sana-lab ui` shows them"),
}

COLUMNS: dict[str, tuple[str, ...]] = {
    "experiments": ("name", "what it is"),
    "ablations": ("name", "what it is"),
    "parts": ("kind", "names", "what they do"),
    "models": ("name", "steps", "samples", "seconds", "file"),
    "runs": ("sweep", "run", "status", "began", "took"),
}

EMPTY = {"runs": "`sana-lab train` and `sana-lab ablate` record runs here", "models": "`sana-lab train` makes models"}


def usage(verb: str, kind: str) -> Iterable[str]:
    """What a verb without its recipe prints: how to call it, and what there is."""
    yield f"sana-lab {verb} {kind.rstrip('s').upper()} [key=value ...]\n"
    width = max(len(name) for name, *_ in recipes(kind))
    yield from (f"  {name:<{width}}  {words}" for name, words in recipes(kind))
