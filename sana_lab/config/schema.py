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


@dataclass
class SamplingOptions:
    """`sampling:` of an experiment; trains nothing. The same fields as `sana_lab.diffusion.sampling.Sampling`."""

    solver: Annotated[Spec, "solver"] = "dpmpp"
    steps: int = 20
    guidance: float = 4.5
    shift: float | None = None
    guidance_interval: Annotated[tuple[float, float] | None, AsBefore(None)] = None
    grid: Annotated[Literal["even", "flow_match"], AsBefore("even")] = "even"
    quantize: Annotated[Literal["none", "int8", "w8a8"], AsBefore("none")] = "none"
    offload: Annotated[bool, RUNTIME] = False
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
    """One cell of an ablation: an experiment under labels."""

    labels: dict[str, str]
    seed: int
    experiment: Config

    @property
    def label(self) -> str:
        return " · ".join(self.labels.values())


@dataclass
class Expectation:
    """What others found: rows of a table, by their labels, from the best to the worst in one metric."""

    metric: str
    order: list[str]


@dataclass
class Ablation:
    """`ablations/*.yaml`: a base experiment, axes of labelled overrides, seeds, and the table's columns.

    `published` names a file of eval/published, whose numbers stand beside those measured in rows of the same label.
    `scales` holds, by name, what takes the place of the file's own keys (`--scale toy`); `stand_in` says which metric
    takes the place of one that a scale cannot measure. `baseline` is the label that other rows are tested against.
    """

    title: str
    base: str
    axes: dict[str, dict[str, Config | None]]
    seeds: list[int] = field(default_factory=lambda: [0])
    columns: list[str] = field(default_factory=list)
    common: dict[str, Any] = field(default_factory=dict)  # overrides of every row
    notes: list[str] = field(default_factory=list)
    x: str | None = None  # the axis whose labels are numbers, for a line plot
    prompts: list[str] = field(default_factory=list)
    published: str | None = None
    expect: list[Expectation] = field(default_factory=list)
    stand_in: dict[str, str] = field(default_factory=dict)
    baseline: str | None = None
    scales: dict[str, dict[str, Any]] = field(default_factory=dict)
