"""The sections of an experiment and of an ablation, as dataclasses."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from sana_lab.config.ranges import (
    BatchSize,
    Count,
    Depth,
    Evaluations,
    Flops,
    Images,
    Interval,
    Nonnegative,
    Number,
    Pixels,
    Positive,
    PositiveShare,
    Real,
    Seed,
    Share,
    Steps,
    Threads,
)
from sana_lab.config.specs import RUNTIME, AsBefore, Spec

Config = dict[str, Any]
LoggerName = Literal["csv", "tensorboard", "wandb"]


@dataclass
class TrainerOptions:
    """`trainer:` of an experiment. Steps, precision, clipping and accumulation train the model; the rest runs it."""

    max_steps: Steps = 1000  # optimiser steps
    # Seconds after which training ends before `max_steps`, data preparation included; the learning rate decays over
    # the last share of them. The number of steps, and so the result, depends on the machine.
    max_seconds: Annotated[Positive | None, AsBefore(None)] = None
    # Training images, each as often as it is in a batch, in place of max_steps; rounded up to whole steps.
    max_images: Annotated[Images | None, AsBefore(None)] = None
    # FLOPs of forward and backward of what trains, as `train --dry-run` counts them, in place of max_steps.
    max_flops: Annotated[Flops | None, AsBefore(None)] = None
    # Precision of forward and backward, as in Lightning: true casts the weights, mixed only matrix products.
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"] = "32-true"
    gradient_clip: Nonnegative = 1.0  # largest norm of the gradient over all parameters; 0 is no clipping
    accumulate: Count = 1  # batches whose gradients are averaged for one step
    # A loss above so many times its running mean is a spike, which ends training as a loss that is not finite does.
    spike: Annotated[Positive | None, AsBefore(None)] = None
    # Most returns to the last checkpoint where loss or weights are not finite, or at a spike; the batches since are
    # skipped. 0 ends the training.
    returns: Annotated[Number, AsBefore(0)] = 0
    # Device of the training; auto is a GPU if available.
    accelerator: Annotated[Literal["auto", "cpu", "gpu", "cuda", "mps"], RUNTIME] = "auto"
    # Number of devices, which share each batch, or a list such as 0,1; auto is all of them that can.
    devices: Annotated[int | str, RUNTIME] = "auto"
    # How several devices share a training: each has a copy of the model (ddp), or a shard of the DiT (fsdp2).
    strategy: Annotated[Literal["ddp", "fsdp2"], RUNTIME] = "ddp"
    threads: Annotated[Threads | None, RUNTIME] = None  # CPU threads of torch; null is torch's own choice
    log_every: Annotated[Interval, RUNTIME] = 25  # optimiser steps between logged losses
    validate_every: Annotated[Interval, RUNTIME] = 500  # optimiser steps between validations and sample grids
    checkpoint_every: Annotated[Interval, RUNTIME] = (
        250  # optimiser steps between checkpoints that training resumes from
    )
    compile: Annotated[bool, RUNTIME] = False  # torch.compile of each block of the DiT
    # Lightning's own loggers that record curves beside MLflow, in the model's folder: a name or a list of names.
    logger: Annotated[LoggerName | list[LoggerName] | None, RUNTIME] = None


@dataclass
class EvaluationOptions:
    """`eval:` of an experiment: what quality and costs are measured on. Files and folders enter hashes by content."""

    prompts_per_task: Count = 20  # prompts drawn for each GenEval task of the embedded world
    images_per_prompt: Count = 2  # images sampled for each prompt of GenEval
    # Repeat the prompts of tasks that have fewer than prompts_per_task, so that every task has as many images.
    fill_tasks: Annotated[bool, AsBefore(False)] = False
    batch: BatchSize = 64  # images sampled at a time
    seed: Seed = 43  # of the noise, and of the prompts of the embedded world
    # Seeds of the noise, from `seed` on: each draws images_per_prompt more images of the same prompts and weights.
    noise_seeds: Annotated[Count, AsBefore(1)] = 1
    reconstructions: Count = 1000  # held-out images that an autoencoder is measured on
    bench_size: Pixels | None = None  # pixels a side of timed images; null is the training size
    bench_batch: BatchSize = 1  # images at a time when latency is timed
    bench_repeats: Count = 5  # timed repeats, of which the median counts
    bench_steps: Evaluations | None = None  # denoiser evaluations that are timed; null is all of them
    fid_weights: str | None = None  # file of torch-fidelity's Inception .pth; null omits FID
    held_out: Count = 1000  # held-out images and captions, for measures without built-in prompts
    # Measures besides Exact and GenEval on the embedded world and FID (see `fid_weights`).
    measures: Annotated[list[Annotated[Spec, "measure"]], AsBefore([])] = field(default_factory=list)
    captions: Annotated[str | None, AsBefore(None)] = None  # folder of captioned images in place of held-out data
    # Reconstruct held-out images by the autoencoder of a text-to-image system too (PSNR, SSIM).
    reconstruct: Annotated[bool, AsBefore(False)] = False
    lpips_weights: Annotated[str | None, AsBefore(None)] = None  # file of torchvision's .pth; null omits LPIPS
    lpips_net: Annotated[Literal["vgg", "alex"], AsBefore("alex")] = "alex"  # network of LPIPS
    rfid: Annotated[Spec | None, "extractor", AsBefore(None)] = None  # features of an autoencoder's FID; null is none
    # Folder of images that an autoencoder reconstructs at their own sizes, in place of held-out data.
    reconstruction_folder: Annotated[str | None, AsBefore(None)] = None
    worst: Annotated[Number, AsBefore(0)] = 0  # worst reconstructions to list and to show in `worst_picture`
    worst_picture: Annotated[str | None, AsBefore(None)] = None  # .png to write them to; null writes none
    # Shares of the training, in (0, 1], at whose ends the averaged weights are measured, for curves of quality.
    at: Annotated[list[PositiveShare], RUNTIME] = field(default_factory=list)
    every: Annotated[Interval | None, RUNTIME] = None  # optimiser steps between such points; null is none but those
    at_images: Annotated[Count, RUNTIME] = 72  # images of each set of prompts, or reconstructions, at a point


@dataclass(frozen=True)
class SamplingOptions:
    """`sampling:` of an experiment. It does not affect training, so changing it reuses the trained model."""

    solver: Annotated[Spec, "solver"] = "dpmpp"  # name or spec of the ODE solver
    steps: Evaluations = 20  # solver steps; one or two evaluations of the network each
    guidance: Real = 4.5  # scale of classifier-free guidance; 1 is none, in half the work
    shift: Positive | None = None  # shift of the flow's times towards noise; None is that of training
    # Times [low, high] from 0 (data) to 1 (noise), ends included, of guidance (arXiv 2404.07724); None is all.
    guidance_interval: Annotated[tuple[Share, Share] | None, AsBefore(None)] = None
    # Spacing of times: even before the shift, or that of diffusers' FlowMatch schedulers.
    grid: Annotated[Literal["even", "flow_match"], AsBefore("even")] = "even"
    # Products in the denoiser's blocks: none is as trained, int8 has 8-bit weights, w8a8 8-bit weights and activations,
    # fp8 both in e4m3 (CUDA from 8.9 on). The simulated ones have the same rounding on any device, and no speed.
    quantize: Annotated[
        Literal["none", "int8", "w8a8", "fp8", "fp8_simulated", "int4_simulated", "nvfp4_simulated"], AsBefore("none")
    ] = "none"
    # Rank of SVDQuant's correction of 4-bit products (arXiv 2411.05007), after smoothing; null rounds alone.
    quantize_rank: Annotated[Number | None, AsBefore(None)] = None
    # Reuse of the blocks of an earlier step where they would change little: an approximation; null computes all.
    cache: Annotated[Spec | None, "cache", AsBefore(None)] = None
    # Scale of perturbed-attention guidance (arXiv 2403.17377), beside that of the null text; 0 is none. It takes one
    # more row of the denoiser for each image.
    pag: Annotated[Nonnegative, AsBefore(0.0)] = 0.0
    # Blocks, from 0 on, whose self-attention is the identity in the perturbed rows of `pag`; null is the middle one.
    pag_layers: Annotated[list[Number] | None, AsBefore(None)] = None
    # Regions of the picture with prompts of their own: how they are chosen, and how strictly they hold; null is none.
    regions: Annotated[Spec | None, "regions", AsBefore(None)] = None
    # Images sampled for each prompt, from different noise, of which the best by `best_by` is returned.
    best_of: Annotated[Count, AsBefore(1)] = 1
    # Measure that scores the candidates of `best_of`, such as clip_shapes. With the measure that judges the result it
    # is an oracle: an upper bound, and no method.
    best_by: Annotated[Spec | None, "measure", AsBefore(None)] = None
    offload: Annotated[bool, RUNTIME] = False  # each network is on the device only while it works; same result
    # Replay of denoiser steps as CUDA graphs: auto if possible, always is an error if impossible.
    graph: Annotated[Literal["auto", "never", "always"], RUNTIME] = "auto"


@dataclass
class ParentOptions:
    """`parent:` of an experiment: the model that its training begins from."""

    # Its weights: a file, experiment:NAME, or a released model (NVlabs' .pth, a diffusers folder, a hub id); null is
    # none, and weights are initialised.
    weights: str | None = None
    # exact is an error where a tensor does not fit; partial keeps what fits, grows what is smaller in one dimension,
    # and leaves the rest.
    fit: Literal["exact", "partial"] = "exact"
    # The first blocks of its DiT that are kept, with fit partial; null is all. Blocks beyond them begin as identities.
    blocks: Depth | None = None
    # Go on from its last checkpoint, with optimiser, average and steps, which count as steps of this model.
    resume: bool = False


@dataclass
class Experiment:
    """One complete run: a system, its data, and how it is trained, sampled and evaluated."""

    system: Annotated[Spec, "system"]  # networks, objective and optimiser
    data: Annotated[Spec, "data"]  # images and captions to train on and to hold out
    sampling: SamplingOptions = field(default_factory=SamplingOptions)  # solver, steps and guidance
    trainer: TrainerOptions = field(default_factory=TrainerOptions)  # steps, precision, devices, logging
    eval: EvaluationOptions = field(default_factory=EvaluationOptions)  # measures; or the name of a suite in eval/
    parent: ParentOptions = field(default_factory=ParentOptions)  # the model that training begins from
    prompts: list[str] = field(default_factory=list)  # sampled as a grid at each validation
    seed: Seed = 0  # of the weights, the data's order and the training noise


class Trial(NamedTuple):
    """One cell of an ablation: labels on its axes, and all that is run under them."""

    labels: dict[str, str]  # axis -> label
    seed: Seed
    config: Config  # of kind quality: a complete experiment; of efficiency: a probe, repeats and warm-up calls
    kind: Literal["quality", "efficiency"] = "quality"
    weights: Path | None = None  # file that ships with its weights, which are measured in place of training
    retrain: bool = False  # train from nothing, although weights may ship

    @property
    def label(self) -> str:
        return " · ".join(self.labels.values())


@dataclass
class Expectation:
    """A claim of a paper: an order of rows in one metric. The table says whether it is reproduced."""

    metric: str  # a column, of which more or less is better
    order: list[str]  # labels of rows, from the best to the worst


@dataclass
class Range:
    """A range of a numeric option, for `samples:` and `ranges:` of an ablation."""

    low: Real  # smallest value
    high: Real  # largest value
    log: bool = False  # spread over the logarithm of the value, as for learning rates
    integer: bool = False  # whole numbers, both ends included
    step: Count = 1  # of whole numbers, counted from the low end, such as 32 for widths


@dataclass
class Samples:
    """`samples:` of an ablation: points in ranges of options, a row for each."""

    number: Count  # of points; more of them keep the first
    ranges: dict[str, Range]  # path of an option such as system.optimizer.lr -> its range
    method: Literal["sobol", "random"] = "sobol"  # a Sobol sequence covers the ranges evenly
    seed: Seed = 0  # of the points


@dataclass
class Match:
    """`match:` of an ablation: an option of every other row is set so that it has as much as the reference row."""

    equal: Literal["parameters", "macs", "images", "seconds"]  # what is equal; parameters and MACs are of the denoiser
    by: str | None = None  # path of the whole-numbered option that is chosen, such as system.dit.dim; null for seconds
    reference: str | None = None  # label of the row whose quantity is the target; null is the first row
    step: Count = 1  # the option is a multiple of this
    within: PositiveShare = 0.02  # largest relative difference from the target
    seconds: Positive | None = None  # of every row's training, for seconds


@dataclass
class Ablation:
    """`ablations/*.yaml` with a `base`: experiments that are trained, evaluated and benchmarked, a row for each."""

    title: str  # heading of the table and of its plots
    base: str  # experiment that every row starts from: a name in experiments/ or a path
    axes: dict[str, dict[str, Config | None]]  # axis -> label -> overrides such as {system.dit.attention: linear}
    seeds: list[Seed] = field(default_factory=lambda: [0])  # each row is trained once with each of them
    columns: list[str] = field(default_factory=list)  # metrics in the order to show; empty shows all
    common: dict[str, Any] = field(default_factory=dict)  # overrides of every row, before those of its labels
    notes: list[str] = field(default_factory=list)  # lines under the table
    x: str | None = None  # axis whose labels are numbers, for a line plot of quality over it
    question: str | None = None  # what the table answers, in the reader's words: heading of the sweep's page and report
    parent: ParentOptions = field(default_factory=ParentOptions)  # the model that training begins from
    prompts: list[str] = field(default_factory=list)  # sampled from the same noise in each row; empty: the base's own
    published: str | None = None  # file in eval/published, whose numbers stand beside those of rows of the same label
    expect: list[Expectation] = field(default_factory=list)  # claims to test on the table
    stand_in: dict[str, str] = field(default_factory=dict)  # metric of a claim -> metric that is tested instead
    baseline: str | None = None  # label of the row that others are tested against; the first row where None
    weights: str | None = None  # folder with weights of trained rows: a name in experiments/weights, or a path
    # How axes combine: every combination, the labels at the same place, or one axis at a time from the first labels.
    combine: Literal["product", "zip", "list"] = "product"
    # Combinations without a row: axis -> a label or several, such as {attention: softmax, size: [512, 1024]}.
    exclude: list[dict[str, Any]] = field(default_factory=list)
    samples: Samples | None = None  # an axis `sample` of points in ranges; null is none
    match: Match | None = None  # rows matched at equal parameters, MACs, images or seconds; null is not
    # What proposes trials by the results of those before, in place of a row for each combination; null is nothing.
    search: Annotated[Spec | None, "search"] = None
    ranges: dict[str, Range] = field(default_factory=dict)  # path of an option -> its range, searched beside the axes
    executor: Annotated[Spec, "executor"] = "local"  # where trials run: local, ray or slurm, with options
    scales: dict[str, dict[str, Any]] = field(default_factory=dict)  # `--scale NAME` -> keys above that it replaces


@dataclass
class EfficiencyTable:
    """`ablations/*.yaml` with a `probe`: costs that are counted from shapes and timed, a row for each probe."""

    title: str  # heading of the table and of its plot
    probe: dict[str, Any]  # probe that every row starts from, such as {name: image, experiment: sana_600m_1024}
    axes: dict[str, dict[str, Config | None]]  # axis -> label -> overrides of the probe
    columns: list[str]  # metrics in the order to show
    gpu: bool = False  # rows too large for a CPU: without a CUDA device they are counted, not timed
    repeats: Count = 5  # timed calls, of which the median is shown
    warmup: Number = 1  # calls before them
    over: str | None = None  # base of `speedup` and `fewer_macs`: a label of the first axis, or `before`
    # Metric that `speedup` is the ratio of; of a sum over blocks, `blocks_speedup`.
    of: Literal["images_per_s", "latency_s", "layer_ms", "blocks_latency_s"] = "images_per_s"
    question: str | None = None  # what the table answers, in the reader's words: heading of the sweep's page and report
    notes: list[str] = field(default_factory=list)  # lines under the table
    published: str | None = None  # file in eval/published, whose numbers stand beside those of rows of the same label
    expect: list[Expectation] = field(default_factory=list)  # claims to test on the table
    plot: Literal["walk", "crossing"] | None = None  # a bar per row, or two costs over sizes with their crossover
    # How axes combine: every combination, the labels at the same place, or one axis at a time from the first labels.
    combine: Literal["product", "zip", "list"] = "product"
    # Combinations without a row: axis -> a label or several, such as {attention: softmax, size: [512, 1024]}.
    exclude: list[dict[str, Any]] = field(default_factory=list)
    executor: Annotated[Spec, "executor"] = "local"  # where trials run: local, ray or slurm, with options
    scales: dict[str, dict[str, Any]] = field(default_factory=dict)  # `--scale NAME` -> keys above that it replaces
