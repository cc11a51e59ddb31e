"""Pictures are looked at by people; here, their mathematics and the pixels that must be exact."""

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from sana_lab.report import efficiency_plots, plots
from sana_lab.report.columns import column
from sana_lab.report.grids import grid
from sana_lab.report.plots import against, curves, pareto, quality, running_mean, span, tradeoff
from sana_lab.report.table import TIER, Cell, build_table


def record(label, seed=0, labels=None, **metrics):
    common = {"label": label, "labels": labels or {"row": label}, "seed": seed, "status": "finished", "error": None}
    return common | {"metrics": metrics, "run_id": "r", "commit": None}


@pytest.fixture
def table():
    names = ["DiT baseline", "+ linear attention", "+ Mix-FFN, a label so long that it must be wrapped"]
    scores = [{"geneval": 0.3 + 0.1 * i, "geneval_low": 0.2 + 0.1 * i, "geneval_high": 0.4 + 0.1 * i} for i in range(3)]
    return build_table([record(n, latency_ms=900 / 4**i, **scores[i]) for i, n in enumerate(names)], title="A walk")


def is_a_picture(path):
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.shape[1] == 1200
    assert pixels[0].min() == pixels[-1].min() == pixels[:, 0].min() == pixels[:, -1].min() == 255  # nothing is cut off
    assert (pixels < 128).mean() > 0.002


def test_quality_and_tradeoff_draw_within_the_picture(table, tmp_path):
    is_a_picture(quality(table, "geneval", tmp_path / "new" / "q.png"))
    is_a_picture(quality(table, "latency_ms", tmp_path / "l.png"))
    is_a_picture(tradeoff(table, "latency_ms", "geneval", tmp_path / "t.png"))


def test_curves_draw_one_point_or_many_and_leave_out_what_is_not_finite(tmp_path):
    many = [(i, 1 / (i + 1)) for i in range(400)]
    is_a_picture(
        curves({"a": many, "b": [(0, 1.0)], "c": [(0, float("nan")), (9, 0.5)]}, tmp_path / "c.png", title="T")
    )


def test_against_draws_a_line_for_each_setting_of_the_other_axes(tmp_path):
    rows = [
        record(f"{s}{k}", labels={"solver": s, "steps": k}, fid=1.0 / int(k)) for s in "ab" for k in ("5", "20", "50")
    ]
    is_a_picture(against(build_table(rows, title="T"), "steps", "fid", tmp_path / "a.png"))
    with pytest.raises(ValueError, match=r"axis 'solver' of row 'a.*' is not a number"):
        against(build_table(rows, title="T"), "solver", "fid", tmp_path / "a.png")


def test_against_does_not_cut_a_line_where_the_tier_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "save", lambda figure, path: figure)
    tiers = {"1": "exact", "2": "oracle", "4": "oracle"}
    rows = [
        record(f"{c}{n}", labels={"chooser": c, "n": n, TIER: tier}, fid=1.0) for c in "ab" for n, tier in tiers.items()
    ]
    figure = against(build_table(rows, title="T"), "n", "fid", tmp_path / "a.png")
    lines = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert lines == {"a": [1, 2, 4], "b": [1, 2, 4]}


ODD = ("$$ 1", "$x_1$", "costs $5", r"\$ and \alpha_", "_hidden", "a^b {c} %d & <e>", "$\\frac$ $")


def drawn(monkeypatch, draw):
    """The texts of a figure as matplotlib renders them, none of them as mathematics."""
    texts = []

    def keep(figure, path):
        figure.savefig(path)
        texts.extend(text._preprocess_math(text.get_text()) for text in figure.findobj(Text) if text.get_text())
        return path

    for module in (plots, efficiency_plots):
        monkeypatch.setattr(module, "save", keep)
    draw()
    assert not [text for text, mathematics in texts if mathematics and "mathdefault" not in text]
    return {text.strip() for text, _ in texts}


def test_labels_and_titles_are_drawn_as_they_are_written(tmp_path, monkeypatch):
    """Mathematics in a label crashed the plots after all trials."""
    rows = [record(n, labels={"row": n, "steps": "2"}, geneval=0.5, latency_ms=2.0 + i) for i, n in enumerate(ODD)]
    path, title = tmp_path / "p.png", "All of $$ it"
    table = build_table(rows, title=title)
    for draw in (
        lambda: quality(table, "geneval", path),
        lambda: tradeoff(table, "latency_ms", "geneval", path),
        lambda: curves({n: [(0, 1.0), (1, 2.0)] for n in ODD}, path, title=title),
        lambda: against(table, "steps", "geneval", path),
        lambda: efficiency_plots.walk(table, "latency_ms", path),
    ):
        assert {title, *ODD} <= drawn(monkeypatch, draw)
    grid({n: torch.zeros(1, 3, 8, 8, dtype=torch.uint8) for n in ODD}, ["$x"], path)


def test_a_metric_that_no_row_has_is_named(table, tmp_path):
    with pytest.raises(
        ValueError, match=r"no row of 'A walk' has the metric 'fid'; it has \['latency_ms', 'geneval'\]"
    ):
        quality(table, "fid", tmp_path / "q.png")


def test_span_is_the_spread_over_seeds_or_the_interval_or_nothing():
    assert span(Cell(1.0, 0.25, (0.0, 3.0), 3, ())) == (0.75, 1.25)
    assert span(Cell(1.0, None, (0.0, 3.0), 1, ())) == (0.0, 3.0)
    assert span(Cell(1.0, None, None, 1, ())) == (1.0, 1.0)


@pytest.mark.parametrize(("cost", "gain"), [("latency_ms", "geneval"), ("images_per_s", "geneval"), ("gmacs", "fid")])
def test_the_front_is_what_no_other_point_beats(cost, gain):
    points = [(float(x), float(y)) for x, y in np.random.default_rng(0).integers(0, 12, (40, 2))]
    sx, sy = (1 if column(name).better == "higher" else -1 for name in (cost, gain))
    beaten = {p for p in points for q in points if q != p and sx * q[0] >= sx * p[0] and sy * q[1] >= sy * p[1]}
    assert pareto(points, column(cost), column(gain)) == sorted(set(points) - beaten)


def test_running_mean_agrees_with_a_loop():
    values = np.random.default_rng(0).normal(size=50)
    values[[3, 20]] = np.nan
    expected = [np.nanmean(values[max(0, i - 6) : i + 1]) for i in range(50)]
    np.testing.assert_allclose(running_mean(values, 7), expected)
    np.testing.assert_allclose(running_mean(values[:3], 7), [np.mean(values[: i + 1]) for i in range(3)])


def test_grid_enlarges_pixels_without_blending(tmp_path):
    images = {label: torch.randint(256, (2, 3, 8, 16), dtype=torch.uint8) for label in ("first", "+ second, longer")}
    path = grid(images, ["a red circle left of a blue square", "two stars"], tmp_path / "new" / "g.png", scale=8)
    pixels = np.asarray(Image.open(path)).astype(int)
    for batch in images.values():
        for image in batch:
            big = image.permute(1, 2, 0).numpy().repeat(8, 0).repeat(8, 1)
            assert contains(pixels, big)


def contains(pixels, part):
    height, width = part.shape[:2]
    ys, xs = np.where((pixels[: -height + 1, : -width + 1] == part[0, 0]).all(-1))
    return any(np.array_equal(pixels[y : y + height, x : x + width], part) for y, x in zip(ys, xs, strict=True))


def test_grid_chooses_a_legible_size_and_fits_rows_of_another_size(tmp_path):
    images = {
        "big": torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        "small": torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
    }
    pixels = np.asarray(Image.open(grid(images, ["x"], tmp_path / "g.png")).convert("L"))
    black = pixels == 0
    assert black.sum(1).max() >= 112
    assert black.sum(0).max() >= 2 * 112  # both rows have the larger size


def test_grid_refuses_no_rows_and_rows_of_another_count_or_type(tmp_path):
    with pytest.raises(ValueError, match="no samples to show for 1 prompts"):
        grid({}, ["x"], tmp_path / "g.png")
    with pytest.raises(
        ValueError, match=r"row 'a' is uint8 \(1, 3, 4, 4\), expected uint8 \(2, 3, H, W\) for 2 prompts"
    ):
        grid({"a": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}, ["x", "y"], tmp_path / "g.png")
    with pytest.raises(ValueError, match="row 'a' is float32"):
        grid({"a": torch.zeros(1, 3, 4, 4)}, ["x"], tmp_path / "g.png")


def test_a_single_curve_has_the_name_of_its_row(monkeypatch, tmp_path):
    """Of several rows, one may have a curve."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure) or path)
    curves({"linear": [(0.0, 1.0), (1.0, 0.5)]}, tmp_path / "loss.png", title="T")
    assert [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()] == ["linear"]


def test_a_pdf_is_written_beside_each_png(tmp_path):
    path = curves({"linear": [(0.0, 1.0), (1.0, 0.5)]}, tmp_path / "loss.png", title="T")
    assert path == tmp_path / "loss.png"
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
