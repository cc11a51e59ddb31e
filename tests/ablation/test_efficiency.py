"""Efficiency tables: rows are counted from shapes and timed where a device is, and nothing else stands in them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sana_lab.ablation.efficiency_spec import Speed

from sana_lab import __main__
from sana_lab.ablation import efficiency, efficiency_table
from sana_lab.bench.probes import How, Probe
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, specs
from sana_lab.config.schema import Trial
from sana_lab.config.specs import SpecError
from sana_lab.report import efficiency_plots
from sana_lab.report.table import Table, column, load_published
from sana_lab.tracking.store import Store

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:DeprecationWarning"  # mlflow 3.17 with sqlalchemy 2.1
)

NAMES = [
    name
    for folder in (".", "paper")
    for name in experiments.available("ablations", folder)
    if efficiency.is_speed(name)
]
BY_SCALE = [
    (name, scale)
    for name in NAMES
    for scale in (None, *experiments.read(experiments.locate("ablations", name))["scales"])
]
CPU = torch.device("cpu")

TINY = """
system:
  name: text2image
  dit: {name: sana, dim: 32, depth: 1, cross_heads: 2}
  autoencoder: {name: vae, widths: [8, 8, 8, 8], depth: 1, groups: 2}
  text_encoder: {name: t5, width: 32, layers: 1, heads: 2, max_tokens: 16}
data: {name: shapes, size: 16, batch: 4, held_out: 4}
sampling: {steps: 2}
"""
TABLE = """
title: Two backends
probe: {name: image, experiment: tiny, size: 32}
repeats: 2
axes:
  attention:
    softmax: {system.dit.attention: softmax}
    linear: {system.dit.attention: {name: linear, backend: torch}}
    linear, auto: {system.dit.attention: {name: linear, backend: auto}}
columns: [dit_params_m, tmacs_image, fewer_macs, latency_s, images_per_s, speedup, peak_gib]
over: softmax
scales: {big: {gpu: true}}
"""


@pytest.fixture
def folder(here: Path) -> Path:
    for path, text in (("experiments/tiny", TINY), ("ablations/two", TABLE)):
        Path(f"{path}.yaml").parent.mkdir(exist_ok=True)
        Path(f"{path}.yaml").write_text(text)
    return here


def record(label: str, labels: dict[str, str] | None = None, **metrics: float) -> dict[str, Any]:
    base = {"seed": 0, "status": "finished", "error": None, "commit": None, "run_id": None}
    return {**base, "label": label, "labels": labels or {"model": label}, "metrics": metrics}


def tabulated(records: list[dict[str, Any]], device: str | None = "a device", **options: Any) -> Table:
    axes = {"model": {r["label"]: {} for r in records}}
    given = {"title": "t", "probe": {}, "axes": axes, "columns": ["tmacs_image", "latency_s", "images_per_s"]}
    unmeasured = options.pop("unmeasured", {})
    return efficiency_table.tabulate(
        Speed(**{**given, **options}),
        records,
        efficiency_table.Conditions(device, ["float32"], unmeasured),
        ["x: all"],
    )


# --- what ships


@pytest.mark.parametrize(("name", "scale"), BY_SCALE)
def test_every_table_that_ships_loads_and_its_columns_are_known(name: str, scale: str | None, here: Path):
    table, trials = efficiency.load(name, scale=scale)
    assert len({t.label for t in trials}) == len(trials) == len({efficiency.row_hash(t, CPU) for t in trials})
    assert not [c for c in table.columns if column(c).heading == c]
    assert (
        table.published is None
        or scale
        or {t.label for t in trials}
        <= {row.label for row in load_published(experiments.locate("eval/published", table.published)).rows}
    )


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("paper/")])
def test_tables_of_the_paper_need_a_gpu_and_their_toys_do_not(name: str):
    assert efficiency.load(name)[0].gpu
    toy = efficiency.load(name, scale="toy")[0]
    assert (toy.gpu, toy.published) == (False, None)  # the paper's numbers are of other sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("paper/")])
def test_toys_run_from_end_to_end(name: str, here: Path):
    """The first and the last row, smaller still and timed once."""
    table, trials = efficiency.load(name, scale="toy")
    for trial in (trials[0], trials[-1]):
        probe = {**trial.experiment["probe"], **{k: 64 for k in ("size",) if "size" in trial.experiment["probe"]}}
        small = trial._replace(experiment={"probe": probe, "repeats": 1, "warmup": 0})
        metrics, why = efficiency.probe_row(small, CPU)
        assert why is None
        assert not [c for c in table.columns if c not in metrics and c not in ("speedup", "fewer_macs", "tmacs_pair")]


# --- rows


def test_rows_that_differ_in_the_backend_alone_are_rows_of_their_own(folder: Path):
    trials = efficiency.load("two")[1]
    assert len({efficiency.row_hash(t, CPU) for t in trials}) == 3
    assert efficiency.row_hash(trials[0], CPU) != efficiency.row_hash(trials[0], None)  # counted is not yet timed


def test_an_image_is_counted_as_bench_counts_it(folder: Path):
    """From shapes alone, on the meta device: the same MACs as those of the real modules at work."""
    from sana_lab.bench import bench

    probe: Any = specs.build("probe", {"name": "image", "experiment": "tiny", "size": 32})
    counted = probe.count()
    system = bench.draw_untrained(probe.experiment["system"], CPU, torch.float32)
    real = bench.bench(system, probe.sampling, 32, repeats=1, prompts=["a photo of a red circle left of a blue square"])
    assert counted["tmacs"] * 1e3 == pytest.approx(real["gmacs"])
    assert counted["tmacs_image"] * 1e3 == pytest.approx(real["gmacs_image"])
    assert counted["tmacs_pair"] == pytest.approx(real["tmacs_pair"])
    assert counted["params_b"] * 1e3 == pytest.approx(real["params_m"])
    assert counted["text_tokens"] == real["text_tokens"]
    assert (counted["tokens"], counted["steps"], counted["evaluations"]) == (16, 2, 2)


COUNT = """
from sana_lab import parts
for backend in ("triton", "triton", "torch"):
    how = {"backend": backend}
    dit = {**how, "attention": {"name": "linear", **how}, "ffn": {"name": "mix", **how}}
    print(parts.build("probe", {"name": "image", "experiment": "tiny", "size": 32, "system": {"dit": dit}}).count())
"""


def test_fused_kernels_count_what_they_fuse_also_when_they_are_used_for_the_first_time(folder: Path):
    """In a process of its own, where no kernel has been registered yet."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    first, again, plain = done.stdout.strip().splitlines()[-3:]
    assert first == again == plain


def test_a_table_is_run_shown_and_not_run_again(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert __main__.main(["ablate", "two", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("to run") == 3
    assert __main__.main(["ablate", "two"]) == 0
    text = (weights.HOME / "tables" / "two" / "table.md").read_text()
    assert "Not measured" not in text
    assert "NOT MEASURED" not in text
    assert "Inside the timer: image: tokenizing, text encoder" in text
    assert "median of 2 calls after 1 to warm up, the extremes in brackets" in text
    capsys.readouterr()
    assert __main__.main(["ablate", "two"]) == 0
    assert "two: all 3 rows are done" in capsys.readouterr().out
    assert __main__.main(["table", "two", "--out", "again"]) == 0
    assert (Path("again") / "table.md").read_text() == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is shown without CUDA")
def test_without_a_gpu_large_rows_are_counted_and_the_table_says_that_nothing_was_timed(folder: Path):
    assert __main__.main(["ablate", "two", "--scale", "big"]) == 0
    text = (weights.HOME / "tables" / "two-big" / "table.md").read_text()
    assert "Latency, throughput and memory are NOT MEASURED" in text
    assert "- Not measured: Latency, Throughput, Speed-up, Peak memory." in text
    runs = [r for r in Store(weights.HOME).find("two-big") if r.tags["sana.kind"] == "trial"]
    assert len(runs) == 3
    assert not [m for r in runs for m in r.metrics if m.endswith("_s") or "per_s" in m or m.startswith("peak")]
    assert all(r.metrics["tmacs_image"] > 0 for r in runs)


class Broken(Probe):
    """A probe that is counted, and then raises what it is told."""

    dtype = "float32"
    inside = "nothing"

    def __init__(self, how: str = "memory") -> None:
        self.how = how

    def count(self) -> dict[str, float]:
        return {"tmacs": 1.0}

    def measure(self, how: How) -> dict[str, float]:
        raise MemoryError("1 GB too much") if self.how == "memory" else KeyError("a bug")


def broken(how: str) -> Trial:
    probe = specs.resolve("probe", {"name": f"{__name__}:Broken", "how": how})
    return Trial({"a": how}, 0, {"probe": probe, "repeats": 1, "warmup": 0})


def test_a_row_that_does_not_fit_keeps_what_was_counted_and_says_why():
    assert efficiency.probe_row(broken("memory"), CPU) == ({"tmacs": 1.0}, "out of memory: 1 GB too much")
    with pytest.raises(KeyError):
        efficiency.probe_row(broken("bug"), CPU)
    rows = [record("a", tmacs_image=2.0), record("b", tmacs_image=1.0, latency_s=3.0, images_per_s=0.3)]
    table = tabulated(rows, unmeasured={"a": "out of memory: 1 GB too much"})
    assert "Not measured: a: out of memory: 1 GB too much." in table.notes
    assert "latency_s" not in table.rows[0].cells


def test_a_row_that_fails_is_a_hole_and_others_go_on(folder: Path, capsys: pytest.CaptureFixture[str]):
    store = Store(weights.HOME)
    trials = [broken("bug"), broken("memory")]
    table = Speed("t", {}, {"a": {"bug": {}, "memory": {}}}, ["tmacs"])
    efficiency.run(store, "broken", table, trials, CPU)
    failed, kept = efficiency.found(store, "broken", trials, CPU)
    assert failed.run is not None
    assert kept.run is not None
    assert (failed.run.status, failed.run.tags["sana.error"]) == ("FAILED", "KeyError: 'a bug'")
    assert (kept.run.status, kept.run.metrics) == ("FINISHED", {"tmacs": 1.0})
    assert kept.run.tags[efficiency.UNMEASURED] == "out of memory: 1 GB too much"


# --- the table


def test_a_ratio_is_over_the_row_that_is_named_or_the_row_before():
    rows = [record("a", tmacs_image=8.0, latency_s=4.0), record("b", tmacs_image=2.0, latency_s=2.0), record("c")]
    over = tabulated(rows, over="a", of="latency_s", columns=["speedup", "fewer_macs"])
    assert [r.cells["speedup"].mean for r in over.rows[:2]] == [1.0, 2.0]
    assert [r.cells["fewer_macs"].mean for r in over.rows[:2]] == [1.0, 4.0]
    assert over.rows[2].cells == {}
    before = tabulated(rows, over="before", of="latency_s", columns=["speedup"])
    assert ["speedup" in r.cells for r in before.rows] == [False, True, False]


def test_a_ratio_stays_within_its_size():
    rows = [
        record(f"{m} · {s}", {"model": m, "size": s}, images_per_s=v)
        for (m, s), v in {("x", "512"): 1.0, ("y", "512"): 3.0, ("x", "1024"): 0.5, ("y", "1024"): 5.0}.items()
    ]
    table = tabulated(rows, axes={"model": {"x": {}, "y": {}}, "size": {"512": {}, "1024": {}}}, over="x",
                      columns=["speedup"])  # fmt: skip
    assert [r.cells["speedup"].mean for r in table.rows] == [1, 3, 1, 10]


def pair(n: int, ratio: float | None, noise: float = 0.0) -> dict[str, Any]:
    """A row of an attention sweep, of which softmax takes n^2 and linear n / ratio times that."""
    times = {"softmax_core_ms": float(n * n), "linear_core_ms": n * n / (ratio or 1.0), "core_noise": noise}
    ratios = (
        {} if ratio is None else {"core_ratio": ratio, "core_ratio_low": ratio / 1.1, "core_ratio_high": ratio * 1.1}
    )
    return record(str(n), {"tokens": str(n)}, **times, **ratios)


def test_a_sweep_says_where_linear_becomes_faster_and_which_ratios_are_noise(tmp_path: Path):
    rows = [pair(n, n / 500) for n in (256, 1024, 4096)] + [pair(16384, None, noise=0.2)]
    table = tabulated(rows, axes={"tokens": {r["label"]: {} for r in rows}}, columns=["core_ratio"], plot="crossing")
    notes = "\n".join(table.notes)
    assert "linear becomes faster than softmax, mixing of q, k, v: at 500 (95 %: 455 to 550)." in notes
    assert "softmax differs from itself by more than 5 %, mixing of q, k, v: 16384." in notes
    assert all(c.better is None for c in table.columns)
    assert efficiency_plots.crossings(table, ("softmax", "linear"), tmp_path / "x.png").stat().st_size > 10_000


def test_a_walk_is_drawn_of_what_was_timed_or_else_of_what_was_counted(tmp_path: Path):
    counted = [record("FLUX-dev", tmacs_image=900.0), record("SANA baseline", tmacs_image=90.0)]
    timed = [record("FLUX-dev", latency_s=9.0, tmacs_image=900.0), record("SANA baseline", latency_s=3.0)]
    for rows, name in ((counted, "walk_tmacs_image.png"), (timed, "walk_latency_s.png")):
        table = efficiency.load("paper/figure2")[0]
        drawn = efficiency_table.draw(table, tabulated(rows, plot="walk", published="sana_figure2"), tmp_path)
        assert [p.name for p in drawn] == [name]
        assert drawn[0].stat().st_size > 10_000


# --- bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"probe: {name: image": "probe: {name: imag"}, "no probe is called 'imag'; did you mean 'image'?"),
        ({"experiment: tiny": "experiment: tyny"}, "there is no experiment 'tyny'; did you mean 'tiny'?"),
        ({"attention: softmax}": "attention: sofmax}"}, "no attention is called 'sofmax'; did you mean 'softmax'?"),
        ({"size: 32": "sizes: 32"}, "has no option 'sizes'; did you mean 'size'?"),
        ({"over: softmax": "over: sofmax"}, "compares with 'sofmax', which is no row; did you mean 'softmax'?"),
        ({"columns:": "colums:"}, "has no option 'colums'; did you mean 'columns'?"),
    ],
)
def test_wrong_tables(folder: Path, change: dict[str, str], words: str):
    ((old, new),) = change.items()
    Path("ablations/odd.yaml").write_text(TABLE.replace(old, new))
    with pytest.raises(SpecError) as raised:
        efficiency.load("odd")
    assert words in str(raised.value)
