"""Columns of tables: heading, unit, better direction and decimals of every metric."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

ENDS = ("_low", "_high")
"""Suffixes of the ends of a metric's 95 % interval: `x_low` and `x_high`."""


@dataclass(frozen=True)
class Column:
    """Display and better direction of a metric."""

    name: str
    heading: str
    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    decimals: int | None = None  # None: three significant digits
    interval: bool = False  # show the 95 % interval if there is no spread over seeds
    printed: bool = False  # show at most six significant digits, for published (rounded) numbers
    zero: str = ""  # text of 0 where it is no number, such as "not reached"
    published: str = ""  # metric of a paper that stands beside it, if it has another name

    @property
    def title(self) -> str:
        """Heading, unit, and an arrow in the better direction."""
        arrow = {"higher": " ↑", "lower": " ↓", None: ""}[self.better]
        return self.heading + (f" ({self.unit})" if self.unit else "") + arrow

    def text(self, value: float) -> str:
        if value == 0 and self.zero:
            return self.zero
        if self.printed:
            return f"{value:g}"
        return significant(value) if self.decimals is None else f"{value:.{self.decimals}f}"


BLOCKS = ", this machine, from blocks"
"""End of the headings of times that are sums over blocks, each timed alone."""

COLUMNS = (
    Column("params_m", "Params", "M"),
    Column("dit_params_m", "DiT params", "M"),
    Column("dit_params_b", "DiT params", "B"),
    Column("text_params_m", "Text params", "M"),
    Column("params_b", "Params", "B"),
    Column("gmacs", "MACs", "G", "lower"),
    Column("tmacs", "MACs of a forward", "T", "lower"),
    Column("tmacs_pair", "MACs of a guided pair", "T", "lower"),
    Column("tmacs_image", "MACs of an image", "T", "lower"),
    Column("gmacs_image", "MACs of an image", "G", "lower"),
    Column("text_gmacs", "MACs of a prompt", "G", "lower"),
    Column("fewer_macs", "Fewer MACs", "times"),
    Column("tokens", "Tokens", decimals=0),
    Column("text_tokens", "Text tokens", decimals=0),
    Column("steps", "Steps", decimals=0),
    Column("evaluations", "Forwards", decimals=0),
    Column("blocks_computed", "Blocks computed", "%", None, 0),
    Column("latency_s", "Latency", "s", "lower", interval=True),
    Column("latency_ms", "Latency", "ms", "lower"),
    Column("text_s", "Text", "s", "lower"),
    Column("text_ms", "Text", "ms", "lower"),
    Column("denoise_ms", "Denoise", "ms", "lower"),
    Column("decode_ms", "Decode", "ms", "lower"),
    Column("images_per_s", "Throughput", "img/s", "higher"),
    Column("speedup", "Speed-up"),
    Column("blocks_latency_s", f"Latency{BLOCKS}", "s", "lower", interval=True, published="latency_s"),
    Column("blocks_range", f"Range of latency{BLOCKS}", "% of the median", None, 1),
    Column("blocks_text_s", f"Text{BLOCKS}", "s", "lower"),
    Column("blocks_denoise_s", f"Denoise{BLOCKS}", "s", "lower"),
    Column("blocks_decode_s", f"Decode{BLOCKS}", "s", "lower"),
    Column("blocks_images_per_s", f"Throughput{BLOCKS}", "img/s", "higher", interval=True, published="images_per_s"),
    Column("blocks_speedup", f"Speed-up{BLOCKS}", published="speedup"),
    Column("blocks_rounds", f"Rounds{BLOCKS}", decimals=0),
    Column("peak_mib", "Peak memory", "MiB", "lower", 0),
    Column("peak_gib", "Peak memory", "GiB", "lower", 2),
    Column("reserved_mib", "Reserved memory", "MiB", "lower", 0),
    Column("energy_j", "Energy", "J", "lower"),
    Column("exact", "Exact", "", "higher", 2, interval=True),
    Column("exact_single_object", "Exact: single", "", "higher", 2),
    Column("exact_two_object", "Exact: two", "", "higher", 2),
    Column("exact_counting", "Exact: counting", "", "higher", 2),
    Column("exact_colors", "Exact: colors", "", "higher", 2),
    Column("exact_position", "Exact: position", "", "higher", 2),
    Column("exact_color_attr", "Exact: attribution", "", "higher", 2),
    Column("exact_partial", "Exact, PARTIAL", "", "higher", 2, interval=True),
    Column("exact_correct_images", "Exact images", "", "higher", 2),
    Column("exact_correct_prompts", "Exact prompts", "", "higher", 2),
    Column("geneval", "GenEval", "", "higher", 2, interval=True),
    Column("geneval_single_object", "Single", "", "higher", 2),
    Column("geneval_two_object", "Two", "", "higher", 2),
    Column("geneval_counting", "Counting", "", "higher", 2),
    Column("geneval_colors", "Colors", "", "higher", 2),
    Column("geneval_position", "Position", "", "higher", 2),
    Column("geneval_color_attr", "Attribution", "", "higher", 2),
    Column("geneval_partial", "GenEval, PARTIAL", "", "higher", 2, interval=True),
    Column("geneval_no_exclude", "GenEval, counting as at least", "", "higher", 2, interval=True),
    Column("geneval_partial_no_exclude", "GenEval, PARTIAL, counting as at least", "", "higher", 2, interval=True),
    Column("geneval_correct_images", "Correct images", "", "higher", 2),
    Column("geneval_correct_prompts", "Correct prompts", "", "higher", 2),
    Column("dpg", "DPG", "", "higher", 1, interval=True),
    Column("dpg_partial", "DPG, PARTIAL", "", "higher", 1, interval=True),
    Column("dpg_global", "Global", "", "higher", 1),
    Column("dpg_entity", "Entity", "", "higher", 1),
    Column("dpg_attribute", "Attribute", "", "higher", 1),
    Column("dpg_relation", "Relation", "", "higher", 1),
    Column("dpg_other", "Other", "", "higher", 1),
    Column("image_reward", "ImageReward", "", "higher", 2, interval=True),
    Column("image_reward_truncated", "Prompts over 35 tokens", "%", None, 1),
    Column("hps", "HPS", "", "higher", 2, interval=True),
    Column("hps_truncated", "Prompts cut for HPS", "%", None, 1),
    Column("clip", "CLIP", "", "higher", 2, interval=True),
    Column("clip_truncated", "Prompts cut for CLIP", "%", None, 1),
    Column("clip_chunks", "CLIP (chunks)", "", "higher", 2, interval=True),
    Column("clip_shapes", "CLIP-shapes", "", "higher", 1, interval=True),
    Column("emoji_tone", "Skin tone", "", "higher", 2, interval=True),
    Column("emoji_recall", "Recall@1 of 32", "", "higher", 2, interval=True),
    Column("emoji_recall_all", "Recall@1 of all", "", "higher", 2, interval=True),
    Column("emoji_concept", "Concept", "", "higher", 2, interval=True),
    Column("fid", "FID", "", "lower", 2, interval=True),
    Column("fid_infinity", "FID∞", "", "lower", 2, interval=True),
    Column("fd_shapes", "FD-shapes", "", "lower", 3, interval=True),
    Column("fd_emoji", "FD-emoji", "", "lower", 3, interval=True),
    Column("fd_dinov2", "FD-DINOv2", "", "lower", 1, interval=True),
    Column("fd_clip", "FD-CLIP", "", "lower", 2, interval=True),
    Column("kid", "KID", "", "lower", 4, interval=True),
    Column("kd_shapes", "KD-shapes", "", "lower", 4, interval=True),
    Column("kd_emoji", "KD-emoji", "", "lower", 4, interval=True),
    Column("cmmd", "CMMD", "", "lower", 3, interval=True),
    Column("cmmd_biased", "CMMD (biased)", "", "lower", 3, interval=True),
    Column("inception_score", "IS", "", "higher", 2, interval=True),
    *(
        Column(f"{name}{of}", name.capitalize(), "", "higher", 2)
        for of in ("", "_dinov2", "_clip", "_shapes", "_emoji")
        for name in ("precision", "recall", "density", "coverage")
    ),
    Column("rfid", "rFID", "", "lower", 2, interval=True),
    Column("psnr", "PSNR", "dB", "higher", 2, interval=True),
    Column("ssim", "SSIM", "", "higher", 3, interval=True),
    Column("lpips", "LPIPS", "", "lower", 3, interval=True),
    Column("val_loss", "Val. loss", "", "lower", 4),
    Column("train_loss", "Train loss", "", "lower", 4),
    Column("train_steps", "Training steps", "", None, 0),
    Column("train_samples", "Training samples", "", None, 0),
    Column("train_s", "Training", "s", None, 0),
    *(
        Column(f"speedup_{axis}", "Speed-up to reach the baseline", axis, "higher", 2, True, zero="not reached")
        for axis in ("steps", "seconds")
    ),
)
"""All known metrics in table order. Other metrics get a column by the ending of their name."""

SPEEDUPS: dict[str, Literal["steps", "seconds"]] = {"speedup_steps": "steps", "speedup_seconds": "seconds"}
"""Columns of the speed-up to reach the baseline -> what is compared; 0 where a row never reaches it."""

ENDINGS: tuple[tuple[str, str, Literal["higher", "lower"] | None], ...] = (
    ("_per_s", "/s", "higher"),
    ("_ms", "ms", "lower"),
    ("_gmacs", "GMACs", "lower"),
    ("_mib", "MiB", "lower"),
    ("_gib", "GiB", "lower"),
    ("_s", "s", "lower"),
    ("_m", "M", None),
    ("_db", "dB", "higher"),
    ("loss", "", "lower"),
)
"""(ending of a metric's name, unit, better direction), for metrics not in `COLUMNS`."""


COUNTS = frozenset(
    {
        *("params_m", "dit_params_m", "dit_params_b", "text_params_m", "params_b", "gmacs", "gmacs_image"),
        *("tmacs", "tmacs_pair", "tmacs_image", "text_gmacs", "fewer_macs", "tokens", "text_tokens"),
        *("steps", "evaluations", "prompts", "images", "train_steps", "train_samples"),
    }
)
"""Metrics that are counted, not measured: any difference is real, and no test applies."""


COST_UNITS = frozenset({"s", "ms", "img/s", "/s", "MiB", "GiB", "J", "M", "B", "G", "T", "GMACs", "times"})
"""Units of time, memory, energy, size and work."""


def is_count(name: str) -> bool:
    """Whether a metric is counted, also one that `COLUMNS` does not have."""
    return name in COUNTS or name.endswith(("_params_m", "_gmacs"))


def column(name: str) -> Column:
    """The registered column of a metric, or one derived from the ending of its name."""
    registered = {c.name: c for c in COLUMNS}
    if name in registered:
        return registered[name]
    for end, unit, better in ENDINGS:
        if name.endswith(end):
            stem = name if end == "loss" else name.removesuffix(end)
            return Column(name, words(stem), unit, better)
    return Column(name, words(name))


PLOTTED_COSTS = {"latency_s": "latency", "gmacs_image": "MACs of an image"}
"""Costs that quality is plotted over, in words: the first that a table shows, else the first."""


def is_quality(name: str, measured: Collection[str]) -> bool:
    """Whether a metric is a measure of quality: it has a better direction and an interval, and is no cost."""
    known = column(name)
    if known.better is None or name in SPEEDUPS or is_cost(name):
        return False
    return known.interval or f"{name}_low" in measured


def is_cost(name: str) -> bool:
    """Whether a metric is counted or timed: what a row takes, in a unit."""
    return is_count(name) or column(name).unit in COST_UNITS or name in SPEEDUPS


def quality_of(columns: Iterable[str], measured: Collection[str]) -> str | None:
    """The first of a table's columns that is a measure of quality; without one, the first with a better direction."""
    present = [name for name in columns if name in measured]
    better = [name for name in present if column(name).better]
    return next((name for name in present if is_quality(name, measured)), next(iter(better), None))


def cost_of(columns: Iterable[str], measured: Collection[str]) -> str | None:
    """The first measured metric that a quality is plotted over: latency before work before size."""
    order = (
        "latency_s",
        "latency_ms",
        "images_per_s",
        "tmacs_image",
        "gmacs_image",
        "gmacs",
        "peak_mib",
        "train_s",
        "params_m",
    )
    names = [*(name for name in order if name in set(columns)), *order]
    return next((name for name in names if name in measured), None)


def words(name: str) -> str:
    """An identifier as a heading."""
    text = name.replace("_", " ").replace("/", " ").strip()
    return text[:1].upper() + text[1:]


def significant(value: float, digits: int = 3) -> str:
    """`digits` significant digits without an exponent; larger numbers are rounded to integers."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = digits - 1 - math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    return f"{value:.{max(0, places)}f}"
