"""The sections of an experiment and of an ablation, as dataclasses."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from sana_lab.config.specs import RUNTIME, AsBefore, Spec

Config = dict[str, Any]


@dataclass
class TrainerOptions:
    """`trainer:` of an experiment. Precision, steps and clipping train the model; the rest is how it runs."""

    max_steps: int = 1000
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"] = "32-true"
    gradient_clip: float = 1.0
    accumulate: int = 1
    accelerator: Annotated[Literal["auto", "cpu", "gpu", "cuda", "mps"], RUNTIME] = "auto"
    devices: Annotated[int | str, RUNTIME] = "auto"
    threads: Annotated[int | None, RUNTIME] = None  # CPU threads of torch; None leaves torch's choice
    log_every: Annotated[int, RUNTIME] = 25
    validate_every: Annotated[int, RUNTIME] = 500
    checkpoint_every: Annotated[int, RUNTIME] = 250
    compile: Annotated[bool, RUNTIME] = False  # torch.compile of each block of a DiT


@dataclass
class EvaluationOptions:
    """`eval:` of an experiment: what the quality and cost columns are measured on."""

    prompts_per_task: int = 20
    images_per_prompt: int = 2
    batch: int = 64
    seed: int = 43
    reconstructions: int = 1000
    bench_size: int | None = None  # pixels a side; None is the training size
    bench_batch: int = 1
    bench_repeats: int = 5
    bench_steps: int | None = None  # denoiser evaluations that are timed; None times all of them
    fid_weights: str | None = None  # torch-fidelity's Inception .pth; without it there is no FID column
    held_out: int = 1000  # held-out pictures and captions, for measures that bring no prompts
    measures: Annotated[list[Annotated[Spec, "measure"]], AsBefore([])] = field(default_factory=list)
    captions: Annotated[str | None, AsBefore(None)] = None  # a folder of images that stands for held-out data
    lpips_weights: Annotated[str | None, AsBefore(None)] = None  # torchvision's .pth; without it there is no LPIPS
    lpips_net: Annotated[Literal["vgg", "alex"], AsBefore("alex")] = "alex"
    rfid: Annotated[Spec | None, "extractor", AsBefore(None)] = None
    reconstruction_folder: Annotated[str | None, AsBefore(None)] = None  # its images, at their own sizes
    worst: Annotated[int, AsBefore(0)] = 0  # of the worst reconstructions so many are drawn
    worst_picture: Annotated[str | None, AsBefore(None)] = None  # their .png


@dataclass(frozen=True)
class SamplingOptions:
    """`sampling:` of an experiment. It trains nothing, so changing it reuses the trained model."""

    solver: Annotated[Spec, "solver"] = "dpmpp"  # name or spec of the ODE solver
    steps: int = 20  # solver steps; one or two evaluations of the network each
    guidance: float = 4.5  # scale of classifier-free guidance; 1 is none, in half the work
    shift: float | None = None  # shift of the flow's times towards noise; None is that of training
    # Times [low, high] from 0 (data) to 1 (noise), ends included, of guidance (arXiv 2404.07724); None is all.
    guidance_interval: Annotated[tuple[float, float] | None, AsBefore(None)] = None
    # Spacing of times: even before the shift, or that of diffusers' FlowMatch schedulers.
    grid: Annotated[Literal["even", "flow_match"], AsBefore("even")] = "even"
    # Products in the denoiser's blocks: none is as trained, int8 has 8-bit weights, w8a8 8-bit weights and activations.
    quantize: Annotated[Literal["none", "int8", "w8a8"], AsBefore("none")] = "none"
    offload: Annotated[bool, RUNTIME] = False  # each network is on the device only while it works; same result
    # Replay of denoiser steps as CUDA graphs: auto is where that works, always is an error where it does not.
    graph: Annotated[Literal["auto", "never", "always"], RUNTIME] = "auto"


@dataclass
class Experiment:
    """One complete run: a system, its data, and how it is trained, sampled and judged."""

    system: Annotated[Spec, "system"]
    data: Annotated[Spec, "data"]
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    eval: EvaluationOptions = field(default_factory=EvaluationOptions)
    prompts: list[str] = field(default_factory=list)  # drawn as a grid while training
    seed: int = 0


class Trial(NamedTuple):
    """One cell of an ablation: labels on its axes, and all that is run under them."""

    labels: dict[str, str]  # axis -> label
    seed: int
    config: Config  # of kind quality: a complete experiment; of efficiency: a probe, repeats and warm-up calls
    kind: Literal["quality", "efficiency"] = "quality"

    @property
    def label(self) -> str:
        return " · ".join(self.labels.values())


@dataclass
class Expectation:
    """A claim of a paper: an order of rows in one metric. The table says whether it is reproduced."""

    metric: str  # a column, of which more or less is better
    order: list[str]  # labels of rows, from the best to the worst


@dataclass
class Ablation:
    """`ablations/*.yaml` with a `base`: experiments that are trained, evaluated and benchmarked, a row for each."""

    title: str  # heading of the table and of its plots
    base: str  # experiment that every row starts from: a name in experiments/ or a path
    axes: dict[str, dict[str, Config | None]]  # axis -> label -> overrides such as {system.dit.attention: linear}
    seeds: list[int] = field(default_factory=lambda: [0])  # each row is trained once with each of them
    columns: list[str] = field(default_factory=list)  # metrics in the order to show; empty shows all
    common: dict[str, Any] = field(default_factory=dict)  # overrides of every row, before those of its labels
    notes: list[str] = field(default_factory=list)  # lines under the table
    x: str | None = None  # axis whose labels are numbers, for a line plot of quality over it
    prompts: list[str] = field(default_factory=list)  # sampled from the same noise in each row; empty: the base's own
    published: str | None = None  # file in eval/published, whose numbers stand beside those of rows of the same label
    expect: list[Expectation] = field(default_factory=list)  # claims to test on the table
    stand_in: dict[str, str] = field(default_factory=dict)  # metric of a claim -> metric that is tested instead
    baseline: str | None = None  # label of the row that others are tested against; the first row where None
    scales: dict[str, dict[str, Any]] = field(default_factory=dict)  # `--scale NAME` -> keys above that it replaces


@dataclass
class EfficiencyTable:
    """`ablations/*.yaml` with a `probe`: costs that are counted from shapes and timed, a row for each probe."""

    title: str  # heading of the table and of its plot
    probe: dict[str, Any]  # probe that every row starts from, such as {name: image, experiment: sana_600m_1024}
    axes: dict[str, dict[str, Config | None]]  # axis -> label -> overrides of the probe
    columns: list[str]  # metrics in the order to show
    gpu: bool = False  # rows too large for a CPU: without a CUDA device they are counted, not timed
    repeats: int = 5  # timed calls, of which the median is shown
    warmup: int = 1  # calls before them
    over: str | None = None  # base of `speedup` and `fewer_macs`: a label of the first axis, or `before`
    of: Literal["images_per_s", "latency_s"] = "images_per_s"  # metric that `speedup` is the ratio of
    notes: list[str] = field(default_factory=list)  # lines under the table
    published: str | None = None  # file in eval/published, whose numbers stand beside those of rows of the same label
    expect: list[Expectation] = field(default_factory=list)  # claims to test on the table
    plot: Literal["walk", "crossing"] | None = None  # a bar for each row, or two costs over sizes and where they cross
    scales: dict[str, dict[str, Any]] = field(default_factory=dict)  # `--scale NAME` -> keys above that it replaces
