"""Efficiency tables: rows are counted from shapes and timed where a device is, and nothing else stands in them."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from sana_lab import __main__
from sana_lab.ablation import efficiency, efficiency_table, plan, worker
from sana_lab.ablation.plan import Plan
from sana_lab.ablation.trials import records, state
from sana_lab.bench.probes import Probe, ProbeSettings
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, specs
from sana_lab.config.schema import EfficiencyTable, Trial
from sana_lab.report import efficiency_plots, render
from sana_lab.report.columns import column
from sana_lab.report.table import Table, load_published
from sana_lab.tracking.store import Store

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:DeprecationWarning"  # mlflow 3.17 with sqlalchemy 2.1
)

NAMES = [
    name
    for folder in (".", "paper")
    for name in experiments.available("ablations", folder)
    if plan.compares_efficiency(name)
]
BY_SCALE = [
    (name, scale)
    for name in NAMES
    for scale in (None, *experiments.read(experiments.locate("ablations", name))["scales"])
]
CPU = torch.device("cpu")

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
scales:
  big:
    gpu: true
    over: plain
    axes:
      kernels:
        fused:
          system.dit: {backend: triton, attention: {name: linear, backend: triton}, ffn: {name: mix, backend: triton}}
        plain:
          system.dit: {backend: torch, attention: {name: linear, backend: torch}, ffn: {name: mix, backend: torch}}
"""


@pytest.fixture
def folder(here: Path, runs: Path) -> Path:
    tiny.write_experiment(here, changes={"data.size": 16})
    tiny.write(here, "ablations/two.yaml", TABLE)
    return here


def record(label: str, labels: dict[str, str] | None = None, **metrics: float) -> dict[str, Any]:
    base = {"seed": 0, "status": "finished", "error": None, "commit": None, "run_id": None}
    return {**base, "label": label, "labels": labels or {"model": label}, "metrics": metrics}


def tabulated(rows: list[dict[str, Any]], device: str | None = "a device", **options: Any) -> Table:
    axes = {"model": {r["label"]: {} for r in rows}}
    defaults = {"title": "t", "probe": {}, "axes": axes, "columns": ["tmacs_image", "latency_s", "images_per_s"]}
    conditions = efficiency_table.Conditions(device, ["float32"], options.pop("unmeasured", {}), ["x: all"])
    return efficiency_table.tabulate(EfficiencyTable(**{**defaults, **options}), rows, conditions)


# --- what ships


@pytest.mark.parametrize(("name", "scale"), BY_SCALE)
def test_every_table_that_ships_loads_and_its_columns_are_known(name: str, scale: str | None, here: Path):
    _, table, trials = plan.load(name, scale=scale)[:3]
    assert len({t.label for t in trials}) == len(trials) == len({efficiency.trial_hash(t, "cpu") for t in trials})
    assert not [c for c in table.columns if column(c).heading == c]
    assert (
        table.published is None
        or scale
        or {t.label for t in trials}
        <= {row.label for row in load_published(experiments.locate("eval/published", table.published)).rows}
    )


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("paper/")])
def test_tables_of_the_paper_need_a_gpu_and_their_toys_do_not(name: str):
    assert plan.load(name).table.gpu
    toy = plan.load(name, scale="toy").table
    assert (toy.gpu, toy.published) == (False, None)  # the paper's numbers are of other sizes


BLOCKS = [name for name, scale in BY_SCALE if scale == "blocks"]


def test_efficiency_tables_of_images_have_a_scale_from_blocks():
    assert BLOCKS == ["paper/figure2", "paper/table14", "paper/table8"]


@pytest.mark.parametrize("name", BLOCKS)
def test_rows_from_blocks_are_the_papers_and_expect_its_orders(name: str, here: Path):
    """Labels of the paper's rows, models of its sizes, and orders that its numbers have."""
    plain, (_, table, trials) = plan.load(name), plan.load(name, scale="blocks")[:3]
    published = load_published(experiments.locate("eval/published", table.published))
    assert not table.gpu
    assert {t.label for t in trials} <= {row.label for row in published.rows} & {
        *(t.label for t in plain.trials),
        *(t.label.replace("4096", "2048") for t in plain.trials),
    }
    for expected in table.expect:
        metric = column(expected.metric).published or expected.metric
        numbers = [cell.mean for label in expected.order if (cell := published.cell(label, metric))]
        assert len(numbers) in (0, len(expected.order))
        assert numbers == sorted(numbers, reverse=column(metric).better == "higher")


def test_sums_over_blocks_stand_beside_the_papers_numbers(here: Path):
    """On made-up seconds, with the verdicts: softmax against linear is decided, what differs by its spread is not."""
    _, table, trials = plan.load("paper/table8", scale="blocks")[:3]
    seconds = dict(zip([t.label for t in trials], (40.0, 30.0, 30.1, 8.0), strict=True))
    rows = [
        record(
            label,
            {"blocks": label},
            blocks_latency_s=s,
            blocks_latency_s_low=s - 0.2,
            blocks_latency_s_high=s + 0.2,
            blocks_images_per_s=1 / s,
            blocks_images_per_s_low=1 / (s + 0.2),
            blocks_images_per_s_high=1 / (s - 0.2),
            tmacs_pair=s / 10,
        )
        for label, s in seconds.items()
    ]
    conditions = efficiency_table.Conditions("a device, 2 threads", ["float32"], {}, ["x: all"], [], ["rounds"])
    built = efficiency_table.tabulate(table, rows, conditions)
    text = render.to_markdown(built)
    assert "Latency, this machine, from blocks (s) ↓ | Latency (s) ↓, published" in text
    assert "40.0 [39.8, 40.2] | 2.25 |" in text
    first, second = (note for note in built.notes if "Throughput, this machine, from blocks" in note and "Full" in note)
    assert "Reproduced" in first
    assert "Not reproduced" in second  # Mix-FFN's price: the paper's slower than softmax
    assert built.rows[3].cells["blocks_speedup"].mean == 5.0
    assert any("2 threads, float32, weights drawn at random: rounds" in note for note in built.notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("paper/")])
def test_toys_run_from_end_to_end(name: str, here: Path):
    """The first and the last row, smaller still and timed once."""
    _, table, trials = plan.load(name, scale="toy")[:3]
    for trial in (trials[0], trials[-1]):
        probe = {**trial.config["probe"], **{k: 64 for k in ("size",) if "size" in trial.config["probe"]}}
        small = trial._replace(config={"probe": probe, "repeats": 1, "warmup": 0})
        metrics, reason = efficiency.run_probe(small.config, CPU)
        assert reason is None
        assert not [c for c in table.columns if c not in metrics and c not in ("speedup", "fewer_macs", "tmacs_pair")]


# --- rows


def test_rows_that_differ_in_the_backend_alone_are_rows_of_their_own(folder: Path):
    trials = plan.load("two").trials
    assert len({efficiency.trial_hash(t, "cpu") for t in trials}) == 3
    assert efficiency.trial_hash(trials[0], "cpu") != efficiency.trial_hash(trials[0], None)  # counted is not yet timed


def test_a_changed_experiment_is_another_trial(here: Path):
    """The experiment whose image is timed enters the key by content, not by name."""
    tiny.write_experiment(here, "own", tiny.EXPERIMENT, {})
    table = "title: t\nprobe: {name: image, experiment: own, size: 32}\naxes: {a: {x: {}}}\ncolumns: [tokens]\n"
    (here / "ablations").mkdir()
    (here / "ablations/image.yaml").write_text(table)
    keys = [efficiency.trial_hash(plan.load("image").trials[0], "cpu") for _ in range(2)]
    tiny.write_experiment(here, "own", tiny.EXPERIMENT, {"system.dit.depth": 2})
    keys.append(efficiency.trial_hash(plan.load("image").trials[0], "cpu"))
    assert keys[0] == keys[1] != keys[2]


def test_an_image_is_counted_as_bench_counts_it(folder: Path):
    """From shapes alone, on the meta device: the same MACs as those of the real modules at work."""
    from sana_lab.bench import bench, untrained

    probe: Any = specs.build("probe", {"name": "image", "experiment": "tiny", "size": 32})
    counted = probe.count()
    system = untrained.untrained_system(probe.experiment["system"], CPU, torch.float32)
    real = bench.bench(system, probe.sampling, 32, repeats=1, prompts=["a photo of a red circle left of a blue square"])
    assert counted["tmacs"] * 1e3 == pytest.approx(real["gmacs"])
    assert counted["tmacs_image"] * 1e3 == pytest.approx(real["gmacs_image"])
    assert counted["tmacs_pair"] == pytest.approx(real["tmacs_pair"])
    assert counted["params_b"] * 1e3 == pytest.approx(real["params_m"])
    assert counted["text_tokens"] == real["text_tokens"]
    assert (counted["tokens"], counted["steps"], counted["evaluations"]) == (16, 2, 2)


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
    assert "two: all 3 trials are done" in capsys.readouterr().out
    assert __main__.main(["table", "two", "--out", "again"]) == 0
    assert (Path("again") / "table.md").read_text() == text


def test_rows_of_equal_settings_are_named_under_the_table(folder: Path, capsys: pytest.CaptureFixture[str]):
    text = TABLE.replace(
        "    linear, auto: {system.dit.attention: {name: linear, backend: auto}}",
        "    same: {system.dit.attention: softmax}",
    )
    tiny.write(folder, "ablations/equal.yaml", text)
    line = "Rows 'softmax', 'same' have equal settings: one trial, run once."
    assert __main__.main(["ablate", "equal", "--dry-run"]) == 0
    assert line in capsys.readouterr().out
    equal = plan.load("equal")
    assert isinstance(equal.table, EfficiencyTable)
    assert line in efficiency_table.build(equal.table, records(Store(weights.HOME), equal)).notes


def test_without_a_gpu_large_rows_are_counted_alone(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The table says that nothing was timed. Fused kernels count what they fuse, also in a process where they are used
    for the first time."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert __main__.main(["ablate", "two", "--scale", "big"]) == 0
    text = (weights.HOME / "tables" / "two-big" / "table.md").read_text()
    assert "Latency, throughput and memory are NOT MEASURED" in text
    assert "- Not measured: Latency, Throughput, Speed-up, Peak memory." in text
    fused, plain = (r.run.metrics for r in records(Store(weights.HOME), plan.load("two", scale="big")))
    assert not [m for m in plain if m.endswith("_s") or "per_s" in m or m.startswith("peak")]
    assert plain["tmacs_image"] > 0
    assert fused == plain


class Broken(Probe):
    """A probe that is counted, and then raises what it is told."""

    dtype = "float32"
    inside = "nothing"

    def __init__(self, how: str = "memory") -> None:
        self.how = how

    def count(self) -> dict[str, float]:
        return {"tmacs": 1.0}

    def measure(self, how: ProbeSettings) -> dict[str, float]:
        raise MemoryError("1 GB too much") if self.how == "memory" else KeyError("a bug")


def broken(how: str) -> Trial:
    probe = specs.resolve("probe", {"name": f"{__name__}:Broken", "how": how})
    return Trial({"a": how}, 0, {"probe": probe, "repeats": 1, "warmup": 0}, "efficiency")


def test_a_row_that_does_not_fit_keeps_what_was_counted_and_says_why():
    assert efficiency.run_probe(broken("memory").config, CPU) == ({"tmacs": 1.0}, "out of memory: 1 GB too much")
    with pytest.raises(KeyError):
        efficiency.run_probe(broken("bug").config, CPU)
    rows = [record("a", tmacs_image=2.0), record("b", tmacs_image=1.0, latency_s=3.0, images_per_s=0.3)]
    table = tabulated(rows, unmeasured={"a": "out of memory: 1 GB too much"})
    assert "Not measured: a: out of memory: 1 GB too much." in table.notes
    assert "latency_s" not in table.rows[0].cells


def test_a_row_that_fails_is_a_hole_and_others_go_on(folder: Path):
    """The worker's part, in this process."""
    store = Store(weights.HOME)
    trials = [broken("bug"), broken("memory")]
    ablation = Plan("broken", EfficiencyTable("t", {}, {"a": {"bug": {}, "memory": {}}}, ["tmacs"]), trials)
    for row in records(store, ablation):
        tags = {"sana.kind": "trial", "sana.trial": row.key}
        job = {"run": store.start_run("broken", row.trial.label, tags), "label": row.trial.label}
        worker.measure(store, {**job, "kind": "efficiency", "config": row.trial.config}, "cpu")
    failed, counted = (row.run for row in records(store, ablation))
    assert failed is not None
    assert counted is not None
    assert (failed.status, failed.tags["sana.error"]) == ("FAILED", "KeyError: 'a bug'")
    assert (counted.status, counted.metrics) == ("FINISHED", {"tmacs": 1.0})
    assert counted.tags[efficiency.UNMEASURED] == "out of memory: 1 GB too much"
    assert [state(row) for row in records(store, ablation)] == ["failed: KeyError: 'a bug'", "done"]


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
        table = plan.load("paper/figure2").table
        paths = efficiency_table.plot(table, tabulated(rows, plot="walk", published="sana_figure2"), tmp_path)
        assert [p.name for p in paths] == [name]
        assert paths[0].stat().st_size > 10_000
