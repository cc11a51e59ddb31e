"""Tables of README.md and docs/, generated from benchmarks/results and the cards of the shipped models.

    python benchmarks/results_page.py            # write docs/results.md and fill the marked blocks
    python benchmarks/results_page.py --check    # name the files that differ; exit status 1 where there are any

A page marks a table with `<!-- results: NAME -->` and `<!-- /results -->`. NAME is a Markdown file of
benchmarks/results (included unchanged), a file with a renderer (`RENDERERS`), or one of `TABLES`.
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sana_lab.checkpoints import weights
from sana_lab.intervals import wilson
from sana_lab.types import Json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WEIGHTS = ROOT / "experiments" / "weights"
PAGE = Path("docs/results.md")
BLOCK = re.compile(r"(<!-- results: (?P<name>[^\n]+?) -->\n).*?(<!-- /results -->)", re.DOTALL)

INTRODUCTION = """# Results

Generated from `benchmarks/results` by `python benchmarks/results_page.py`; do not edit.
"""
CPU_FILES = ("cpu-amd-epyc-2-threads.json", "cpu-full-amd-epyc-2-threads.json")
CPU_AVX2 = "cpu-amd-epyc-2-threads-avx2.json"
SECTIONS = (
    ("Quickstart", "quickstart/table.md", ("samples.png", "exact.png", "exact_latency_s.png", "exact_by_images.png")),
    ("Models that ship", "models", ()),
    ("What helps to learn fast", "recipe", ()),
    ("The paper's quality ablations at toy scale", "paper", ()),
    ("Exact and GenEval of shapes_sana", "shapes_sana/eval.json", ("samples.png",)),
    ("Controls of the exact score", "exact/controls.md", ()),
    ("Solvers and steps", "sampler/table.md", ("geneval_by_steps.png", "samples.png")),
    ("Step caches", "caching/table.md", ("exact_latency_s.png", "samples.png")),
    ("Regional prompts", "regions/table.md", ("samples.png",)),
    ("Guidance", "guidance/table.md", ("samples.png",)),
    ("Best of N images", "best_of/table.md", ("samples.png",)),
    ("Edits by inversion", "edits/table.md", ()),
    ("Few steps by MeanFlow", "few_steps/table.md", ("samples.png",)),
    ("Fewer bits", "quantize/table.md", ("samples.png",)),
    ("Real pictures: emoji", "emoji_autoencoder/table.md", ("samples.png",)),
    ("Skin tones of emoji, asked for and drawn", "emoji_autoencoder/tones.json", ()),
    ("Representation alignment", "field/prx_repa/table.md", ("samples.png", "geneval_by_steps.png")),
    ("Softmax and linear attention", "attention_speed/table.md", ("crossing.png",)),
    ("Against diffusers on a CPU", "cpu", ()),
    ("Against diffusers on a CPU without AVX-512", CPU_AVX2, ()),
    ("Against diffusers on a CPU, all pieces at full size", CPU_FILES[1], ()),
    ("Memory of SANA-0.6B", "memory/sana_600m_1024.json", ()),
    ("The paper's Table 8", "table8/table.md", ()),
    ("The paper's Table 8 on a CPU, from blocks", "table8_blocks/table.md", ()),
    ("SANA-0.6B from blocks against the whole model", "blocks/check.md", ()),
    ("The paper's Table 9", "table9/table.md", ()),
    ("The paper's Table 14", "table14/table.md", ()),
    ("The paper's Figure 2", "figure2/table.md", ("walk_tmacs_image.png",)),
)
"""(heading, block, figures beside the block's file) of docs/results.md."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file differs")
    check = parser.parse_args().check
    changed = stale(ROOT)
    for path, text in changed.items():
        print(f"{'differs' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(text)
    return 1 if check and changed else 0


def stale(root: Path) -> dict[Path, str]:
    """The new text of each page that differs from its results."""
    pages = {root / PAGE: results_page()}
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        if path != root / PAGE:
            pages[path] = fill(path.read_text())
    return {path: text for path, text in pages.items() if not path.is_file() or path.read_text() != text}


def fill(text: str) -> str:
    """A page with all its blocks rendered. ValueError for an unknown name or a block that is not closed."""
    if text.count("<!-- results: ") != len(BLOCK.findall(text)):
        raise ValueError("a block '<!-- results: NAME -->' is not closed by '<!-- /results -->'")
    return BLOCK.sub(lambda match: f"{match[1]}{render(match['name'])}\n{match[3]}", text)


def results_page() -> str:
    """docs/results.md."""
    sections = []
    for heading, name, figures in SECTIONS:
        folder = Path("../benchmarks/results") / Path(name).parent
        pictures = [f"![{heading}]({folder / figure})" for figure in figures]
        body = re.sub(r"^#+ (.*)$", r"**\1**", render(name), flags=re.MULTILINE)  # headings of this page only
        sections.append("\n\n".join([f"## {heading}", body, *pictures, *source(name)]))
    return "\n\n".join([INTRODUCTION.strip(), *sections]) + "\n"


def source(name: str) -> list[str]:
    """Source files of a block's numbers."""
    files = {
        "recipe": ["benchmarks/results/recipe/runs.json"],
        "paper": ["benchmarks/results/paper/"],
        "cpu": [f"benchmarks/results/{file}" for file in CPU_FILES],
        "models": ["experiments/weights/"],
    }
    return [f"Source: {', '.join(f'`{file}`' for file in files.get(name, [f'benchmarks/results/{name}']))}."]


def render(name: str) -> str:
    """The Markdown of a block."""
    if name in TABLES:
        return TABLES[name]()
    path = RESULTS / name
    if not path.is_file():
        raise ValueError(f"no results {name!r}; expected a file of benchmarks/results, or one of {', '.join(TABLES)}")
    if path.suffix == ".md":
        return path.read_text().strip()
    renderer = next((render for pattern, render in RENDERERS if re.fullmatch(pattern, name)), None)
    if renderer is None:
        raise ValueError(f"results {name!r} have no renderer; expected a name such as quickstart/table.md")
    return renderer(path)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first `left` columns are aligned left, all others right."""
    align = [":--" if i < left else "--:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, align, *rows))


# Speed against a peer


def cpu_table() -> str:
    """The main cases: those of `make bench`, and full-size cases of `--full`."""
    short, full = (json.loads((RESULTS / file).read_text()) for file in CPU_FILES)
    models = [case for case in full["cases"] if "26 of 26" in case["case"] or "decode, 512" in case["case"]]
    cases = [case for case in (*models[::-1], *short["cases"]) if case["peer"] != "diffusers, channels last"]
    order = ("text", "0.6B step", "DC-AE", "whole", "attention")
    cases = sorted((c for c in cases if rank(c, order) < len(order)), key=lambda c: rank(c, order))
    table = speed_table(cases, full.get("image"), short)
    return f"{table} Rows of 26 text layers, of 512 px decoded and of the sum: `--full`, commit {full['commit']}."


def rank(case: Json, order: Sequence[str]) -> int:
    return next((i for i, start in enumerate(order) if case["case"].startswith(start)), len(order))


def cpu_file(path: Path) -> str:
    """All cases of one file of benchmarks/cpu.py."""
    record = json.loads(path.read_text())
    return speed_table(record["cases"], record.get("image"), record)


def speed_table(cases: Iterable[Json], image: Json | None, record: Json) -> str:
    """Medians of peer and ours, their ratio and its tier; then the machine."""
    rows = []
    for case in (c for c in cases if "times" in c):
        sides = (seconds(case["times"][side]["median_s"]) for side in ("peer", "ours"))
        ratio = f"{case['ratio']:.2f}x" if case["ratio"] else "-"
        rows.append((case["case"], case["peer"], case["ours"], *sides, ratio, case["tier"]))
    if image and image["ratio"]:
        rows += [image_row(part, row) for part, row in image_sums(image)]
    table = markdown(("case", "peer", "ours", "peer's time", "our time", "ratio", "tier"), rows, left=3)
    versions = ", ".join(f"{package} {record['versions'][package]}" for package in ("torch", "diffusers"))
    machine = f"{record['device']}, {record['cpu_capability']}, {versions}, commit {record['commit']}"
    return f"{table}\n\nMedians on {machine}; a ratio above 1 means that ours is faster."


def image_sums(image: Json) -> list[tuple[str, Json]]:
    """The sums of an image's pieces with and without its text, which a session caches."""
    stages = [row for stage, row in image["stages"].items() if stage != "text"]
    peer, ours = (sum(row[side] for row in stages) for side in ("peer_s", "ours_s"))
    textless = {"ratio": peer / ours, "peer_s": peer, "ours_s": ours}
    return [("the sum of its pieces at full size", image), ("that sum without text", textless)]


def image_row(part: str, row: Json) -> tuple[str, ...]:
    sides = (seconds(row["peer_s"]), seconds(row["ours_s"]))
    name = f"image of 512 px, 20 steps: {part}"
    return (name, "diffusers", "ours, as in sampling", *sides, f"{row['ratio']:.2f}x", "exact algebra")


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 0.1 else f"{1e3 * value:.3g} ms"


# Data


def data_table(path: Path) -> str:
    """Figures of benchmarks/data.py, by the clock and by the processor."""
    record = json.loads(path.read_text())
    sana, toy, opened = record["read_sana"], record["read_toy"], record["open"]
    reading = "cached training batches, samples a second, "
    rows = [
        (
            f"{reading}{read['kilobytes_per_sample']:.0f} kB each",
            f"{read['samples_per_s']:,.0f}",
            f"{read['samples_per_processor_s']:,.0f}",
            f"{read['load']:.1f}",
        )
        for read in (sana, toy)
    ]
    rows += [
        (
            f"share of a toy training that waits for data, {idle['workers']} workers",
            f"{idle['idle_share']:.1%}",
            "",
            f"{idle['load']:.1f}",
        )
        for idle in (record["idle_0_workers"], record["idle_1_workers"])
    ]
    seconds = (f"{opened['with_first_batch_s']:.2f} s", f"{opened['processor_s']:.2f} s")
    rows += [
        (
            f"open {opened['rows']:,} rows with their cache, without the pictures, and read a batch",
            *seconds,
            f"{opened['load']:.1f}",
        )
    ]
    rows += [("memory of that, at its peak", f"{opened['peak_mb']:.0f} MB", "", "")]
    table = markdown(("", "by the clock", "by the processor of one thread", "load"), rows)
    machine = f"{record['device']}, torch {record['versions']['torch']}, commit {record['commit']}"
    load = "The load is that of a shared machine of two cores: it lengthens the clock's time, not the processor's."
    clock, bar = opened["with_first_batch_s"], 2.0
    verdict = "above" if clock > bar else "within"
    bar_text = f"To open, {clock:.1f} s by the clock of the loaded machine are {verdict} the bar of {bar:g} s."
    return f"{table}\n\nSingle runs on {machine}. {load} {bar_text}"


# Memory


def memory_table(path: Path) -> str:
    """Configurations of `sana-lab bench EXPERIMENT --memory`, in GiB."""
    record = json.loads(path.read_text())
    stages = ("text", "denoise", "decode", "peak")
    cards = [*next(iter(record["configurations"].values()))["free"]]
    rows = [
        (name, *(f"{row[stage]:.2f}" for stage in stages), *(f"{row['free'][card]:.2f}" for card in cards))
        for name, row in record["configurations"].items()
    ]
    table = markdown(("GiB", *stages, *(f"left of {card} GiB" for card in cards)), rows)
    names = {"text_encoder": "text encoder", "dit": "DiT", "autoencoder": "autoencoder"}
    weights = ", ".join(f"{names[name]} {c['weights']:.2f} GiB" for name, c in record["components"].items())
    settings = f"{record['size']} x {record['size']} pixels, batch {record['batch']}, {record['dtype']}"
    return f"{table}\n\n{settings}; weights: {weights}. Computed on the meta device, not measured on a GPU."


# Quality


def quality_table(path: Path) -> str:
    """Exact and GenEval by task, and the other measures, of a file of `sana-lab eval --json`."""
    report = json.loads(path.read_text())
    scores = {title: report[key] for key, title in (("exact", "Exact"), ("geneval", "GenEval")) if key in report}
    geneval = report["geneval"]
    headings = {"single_object": "Single", "two_object": "Two", "color_attr": "Attribution"}
    header = ["", "Overall", *(headings.get(task, task.capitalize()) for task in geneval["tasks"])]
    rows = [
        [title, bounds(score["overall"], *score["interval"])]
        + [bounds(task["value"], *task["interval"]) for task in score["tasks"].values()]
        for title, score in scores.items()
    ]
    other = [
        f"{name} {v['value']:.3g} [{v['low']:.3g}, {v['high']:.3g}]"
        for measure, entry in report["measures"].items()
        if measure not in ("exact_shapes", "geneval")
        for name, v in entry["values"].items()
    ]
    counts = f"{geneval['prompts']} prompts, {geneval['images']} images"
    return f"{markdown(header, rows)}\n\n{counts}, 95 % intervals. Also measured: {', '.join(other)}."


def bounds(value: float, low: float, high: float) -> str:
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def summary_table(path: Path) -> str:
    """Columns of an ablation's table.csv: size, costs, and the scores that it has."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    columns = {"params_m": "Params (M)", "gmacs": "MACs (G) ↓", "latency_s": "Latency (s) ↓"}
    columns["peak_mib"] = "Peak memory (MiB) ↓"
    scores = {k: title for k, title in (("exact", "Exact ↑"), ("geneval", "GenEval ↑")) if k in rows[0]}
    cells = []
    for row in rows:
        values = [bounds(*(float(row[f"{score}{end}"]) for end in ("", "_low", "_high"))) for score in scores]
        cells.append((row["model"], *(f"{float(row[column]):.3g}" for column in columns), *values))
    return markdown(("Model", *columns.values(), *scores.values()), cells)


def tones_table(path: Path) -> str:
    """Skin tones asked for and drawn, of two rows or more: shares of right ones where skin shows, beside the share that
    the best single tone would have."""
    record, rows = json.loads(path.read_text()), []
    for label, counts in record["rows"].items():
        skins = [row[:-1] for row in counts]  # without the column "no skin"
        shown, asked = sum(map(sum, skins)), sum(map(sum, counts))
        right = wilson([1.0] * (hits := sum(row[i] for i, row in enumerate(skins))) + [0.0] * (shown - hits))
        for tone, row in zip(record["order"], counts, strict=False):
            rows.append((label if tone == record["order"][0] else "", tone, *map(str, row), "", ""))
        constant = max(map(sum, skins)) / shown
        score = bounds(right.value, right.low or 0.0, right.high or 1.0)
        rows.append(("", f"skin shows in {shown} of {asked}", *[""] * len(record["order"]), score, f"{constant:.2f}"))
    header = ("Row", "Asked for", *record["order"], "right where skin shows", "one tone always, at best")
    return markdown(header, rows, left=2)


def models_table() -> str:
    """The models in experiments/weights: numbers in the file, training, and quality on held-out scenes or prompts."""
    rows = []
    for path in sorted(WEIGHTS.glob("*.safetensors")):
        card = weights.card(path)
        numbers = sum(tensor.numel() for tensor in weights.read(path).values())
        sizes = (f"{numbers / 1e6:.2f}", f"{path.stat().st_size / 1e6:.1f}")
        rows.append(
            (f"`{path.stem}`", *sizes, f"{card['steps']:,}", card["date"], quality(path.stem, card["measured"]))
        )
    return markdown(("Model", "Numbers (M)", "File (MB)", "Steps", "Trained", "Measured, 95 % intervals"), rows)


def quality(model: str, card: Json) -> str:
    """The headline measure of a model, from its card or from benchmarks/results/MODEL/eval.json."""
    if "psnr" in card:
        interval = "[{}, {}]".format(*card["psnr_interval"])
        return f"PSNR {card['psnr']} dB {interval}, SSIM {card['ssim']:.3f}, {card['n']:,} held-out scenes"
    if "geneval" in card:
        interval = bounds(card["geneval"], *card["geneval_interval"])
        exact = f"Exact {bounds(card['exact'], *card['exact_interval'])}, " if "exact" in card else ""
        return f"{exact}GenEval-shapes {interval}, {card['prompts']} prompts, {card['images']} images"
    measure = json.loads((RESULTS / model / "eval.json").read_text())["measures"]["held_out"]
    name, value = next(iter(measure["values"].items()))
    interval = f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{name.replace('_', ' ')} {interval}, {value['n']:,} held-out scenes"


def recipe_table() -> str:
    """Short trainings of two rows of the quickstart under different recipes."""
    trial = json.loads((RESULTS / "recipe" / "runs.json").read_text())
    rows = [
        (
            r["row"],
            str(r["batch"]),
            f"{r['samples']:,}",
            f"{r['loss']:.3f}",
            f"{r['geneval']:.3f}",
            f"{r['counts']:.3f}",
        )
        for r in trial["runs"]
    ]
    header = ("Row and recipe", "Batch", "Samples", "Loss", "GenEval ↑", "GenEval and no object more ↑")
    return f"{markdown(header, rows)}\n\n{trial['settings']}. {trial['machine']}."


PAPER = {
    "objective": "Table 3",
    "captions": "Table 4",
    "text_encoder": "Table 9",
    "instruction": "Table 2",
    "model_size": "Table 7",
    "block_design": "Table 12",
    "latent_channels": "Figure 3b",
    "autoencoder_split": "Figure 3a",
    "sampler_steps": "Figure 8",
}
"""Quality ablations of the paper, in ablations/paper, and where the paper has them."""


def paper_table() -> str:
    """Each claim that ablations/paper has tested at toy scale, with the paper's numbers and the verdict."""
    rows, run = [], [name for name in PAPER if (RESULTS / "paper" / name / "table.json").is_file()]
    for name in run:
        table = json.loads((RESULTS / "paper" / name / "table.json").read_text())
        for verdict in table["verdicts"]:
            claim = f"{verdict['better']} better than {verdict['worse']}"
            numbers = published_pair(table, verdict)
            tested = (numbers, verdict["metric"], f"**{verdict['outcome']}**", verdict["why"])
            rows.append((f"`{name}`", PAPER[name], claim, *tested))
    header = ("Ablation", "Paper", "Claim", "Paper's numbers", "Tested in", "Verdict", "Here")
    missing = ", ".join(f"`{name}` ({place})" for name, place in PAPER.items() if name not in run)
    return markdown(header, rows, left=7) + (f"\n\nNot run yet: {missing}." if missing else "")


def published_pair(table: Json, verdict: Json) -> str:
    """The paper's two numbers of a claim, or a dash where it prints none."""
    rows = {row["label"]: row["cells"] for row in (table["published"] or {"rows": []})["rows"]}
    cells = [rows.get(verdict[side], {}).get(verdict["claimed"]) for side in ("better", "worse")]
    if None in cells:
        return "-"
    better, worse = (f"{cell['mean']:g}" for cell in cells if cell)
    return f"{verdict['claimed']} {better} against {worse}"


TABLES: dict[str, Callable[[], str]] = {
    "cpu": cpu_table,
    "models": models_table,
    "paper": paper_table,
    "recipe": recipe_table,
}
"""Tables made of several files."""

RENDERERS: tuple[tuple[str, Callable[[Path], str]], ...] = (
    (r"cpu-.*\.json", cpu_file),
    (r"data-.*\.json", data_table),
    (r"memory/.*\.json", memory_table),
    (r".*/tones\.json", tones_table),
    (r".*/eval\.json", quality_table),
    (r".*/table\.csv", summary_table),
)
"""Pattern of a file's path in benchmarks/results, and the function that renders it."""

if __name__ == "__main__":
    sys.exit(main())
