"""Command `pack`: an ablation's table, reports, configurations and weights as one archive that other machines read."""

import contextlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from sana_lab.ablation import plan
from sana_lab.ablation.plan import Plan
from sana_lab.ablation.record import TrialRecord
from sana_lab.ablation.search.proposals import with_proposals
from sana_lab.ablation.trials import as_timed, records, weights_of
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, interpolation
from sana_lab.config.atomic_write import replacing
from sana_lab.config.paths import check_file
from sana_lab.config.specs import SpecError
from sana_lab.evaluation.report_files import NUMBERS, REPORT
from sana_lab.tracking.store import Store
from sana_lab.types import Json

ABOUT = """{title}: {done} of {trials} trials, packed by sana-lab.

table/          table.md, .csv, .json and .tex, plots, report.html (open it in a browser)
ablation.yaml   the ablation as it was written
trials.json     label, seed, state, model and metrics of each trial
trials/KEY/     config.yaml, the resolved configuration, and report.json, its evaluation,
                with its numbers per image in a file beside it
models/MODEL/   averaged weights with their card

The weights are read from where they lie, in Python or on the command line:
  from sana_lab import load; system = load("{name}/models/{model}/weights.safetensors")
  sana-lab sample "a red circle" --out pictures --model {name}/models/{model}/weights.safetensors
"""


def main(
    recipe: str,
    overrides: Sequence[str] = (),
    scale: str | None = None,
    out: Path | None = None,
    *,
    retrain: bool = False,
    seeds: str | None = None,
) -> None:
    """Write NAME.tar.gz, or `out`, with what has finished of an ablation. SpecError where nothing has, or where the
    table is of other seeds."""
    ablation = plan.load(recipe, overrides, scale, retrain=retrain, seeds=plan.parse_seeds(seeds))
    name = ablation.name.replace("/", "-")
    path = out or Path(f"{name}.tar.gz")
    check_file(path)
    store = Store(weights.HOME)
    trials = records(store, ablation := as_timed(store, with_proposals(store, ablation)))
    if not any(record.done for record in trials):
        raise SpecError(f"no trial of {recipe!r} has finished; expected `sana-lab ablate {recipe}` first")
    if not (table := weights.HOME / "tables" / ablation.name).is_dir():
        raise SpecError(f"there is no table in {table}; expected `sana-lab table {recipe}` first")
    check_seeds(table, trials, f"sana-lab table {recipe}" + (f" --seeds {seeds}" if seeds else ""))
    with replacing(path) as partial, tarfile.open(partial, "w:gz") as archive:
        for inside, content in contents(store, ablation, trials, table, recipe):
            _add(archive, f"{name}/{inside}", content)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; unpack it with tar xzf {path}, then see {name}/README.txt")


def check_seeds(table: Path, trials: Sequence[TrialRecord], command: str) -> None:
    """SpecError if the table in a folder is not of the seeds that have finished; `command` writes it again."""
    rows = json.loads((table / "table.json").read_text())["rows"]
    written = {seed for row in rows for seed in row["seeds"]}
    if written != (done := {record.trial.seed for record in trials if record.done}):
        raise SpecError(
            f"the table in {table} is of seeds {numbers(written)}, and the trials to pack of {numbers(done)}; expected "
            f"--seeds as the table has them, or `{command}` first"
        )


def numbers(seeds: Iterable[int]) -> str:
    """Seeds in words, such as 0,1,2."""
    return ",".join(map(str, sorted(seeds))) or "none"


def contents(
    store: Store, ablation: Plan, trials: Sequence[TrialRecord], table: Path, recipe: str
) -> Iterator[tuple[str, Path | str]]:
    """(path in the archive, file or text) of everything in it; no path of this machine."""
    models = {r.model: path for r in trials if (path := _weights(r)) is not None}
    done = [record for record in trials if record.done]
    yield "README.txt", _about(ablation, len(done), next(iter(models), "MODEL"))
    yield "ablation.yaml", experiments.locate("ablations", recipe)
    yield "trials.json", json.dumps([_row(record) for record in trials], indent=2)
    yield from ((f"table/{p.relative_to(table).as_posix()}", p) for p in sorted(table.rglob("*")) if p.is_file())
    for record in done:
        config = OmegaConf.to_yaml(OmegaConf.create(interpolation.as_written(record.trial.config)))
        yield f"trials/{record.key}/config.yaml", config
        for file in _reports(store, record):
            yield f"trials/{record.key}/{file.name}", file
    yield from ((f"models/{model}/weights.safetensors", path) for model, path in models.items())


def _about(ablation: Plan, done: int, model: str) -> str:
    name = ablation.name.replace("/", "-")
    return ABOUT.format(title=ablation.table.title, done=done, trials=len(ablation.trials), name=name, model=model)


def _row(record: TrialRecord) -> Json:
    trial, run = record.trial, record.run
    about = {"label": trial.label, "labels": trial.labels, "seed": trial.seed, "key": record.key, "model": record.model}
    return {**about, "status": run.status if run else "MISSING", "metrics": run.metrics if run else {}}


def _weights(record: TrialRecord) -> Path | None:
    return weights_of(record.trial) if record.done and record.trial.kind == "quality" else None


def _reports(store: Store, record: TrialRecord) -> Iterator[Path]:
    """The evaluation of a trial, and its numbers per image."""
    with contextlib.suppress(FileNotFoundError):
        yield (report := store.file(record.run_id, REPORT))
        if (name := json.loads(report.read_text()).get(NUMBERS)) is not None:
            yield store.file(record.run_id, name)


def _add(archive: tarfile.TarFile, name: str, content: Path | str) -> None:
    if isinstance(content, Path):
        archive.add(content, name, filter=_anonymous)
        return
    data = content.encode()
    about = _anonymous(tarfile.TarInfo(name))
    about.size = len(data)
    archive.addfile(about, io.BytesIO(data))


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the names of this machine's users."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o644
    return entry
