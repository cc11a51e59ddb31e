"""Work that cannot fit, said before it begins: pixels of a batch beyond the machine's memory, too many images."""

import os

import torch

from sana_lab.config import experiments
from sana_lab.config.memo import reuse
from sana_lab.config.schema import Config
from sana_lab.config.validation import SpecError

MAX_IMAGES = 10**7
"""Most images of one evaluation: a year of a GPU at one image in three seconds."""

MAX_PARAMETERS = 10**11
"""Most parameters of a system; the largest open text-to-image models have less."""

GIB = 2**30


def total_memory() -> int:
    """Bytes of the machine's memory, and of its GPUs where those have more."""
    return reuse(("total memory",), _total_memory)


def host_memory() -> int:
    """Bytes of the machine's own memory."""
    return reuse(("host memory",), _own_memory)


def device_memory() -> int:
    """Bytes of the GPU that has the least; of the machine where there is none."""
    return reuse(("device memory",), lambda: min(_gpus(), default=_own_memory()))


def _total_memory() -> int:
    return max(_own_memory(), sum(_gpus()))


def _own_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpus() -> list[int]:
    """Bytes of each GPU."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return [torch.cuda.get_device_properties(i).total_memory for i in gpus]


def check_pixels(option: str, images: int, size: int, bytes_per_value: int = 4) -> None:
    """SpecError if the pixels of so many RGB images of `size` alone do not fit in the memory."""
    one, memory = 3 * size**2 * bytes_per_value, total_memory()
    if images * one > memory:
        raise SpecError(
            f"{option} is {images:,} images of {size} px, {images * one / GIB:,.0f} GiB of pixels alone, and this "
            f"machine has {memory / GIB:,.1f} GiB of memory; expected at most {memory // one:,} at this size"
        )


def check_experiment(experiment: Config, ranks: int = 1) -> None:
    """SpecError for batches, prompts or images of an evaluation that are too many; data without a size have none."""
    source = experiments.source_of(experiment["data"])
    if (size := source.get("size")) is None:
        return
    if source is experiment["data"] and "batch" in source:  # batches of a cache hold latents
        check_pixels("data.batch", -(-source["batch"] // ranks), size)
    check_pixels("prompts", len(experiment["prompts"]), size, bytes_per_value=1)
    check_evaluation(experiment["eval"], size)


def check_evaluation(options: Config, size: int) -> None:
    """SpecError for batches that do not fit, and for too many images."""
    check_pixels("eval.batch", options["batch"], size)
    check_pixels("eval.bench_batch", options["bench_batch"], options["bench_size"] or size)
    if images_per_task(options) > MAX_IMAGES:
        raise SpecError(
            f"eval.prompts_per_task {options['prompts_per_task']:,} x eval.images_per_prompt "
            f"{options['images_per_prompt']:,} are {images_per_task(options):,} images, expected at most {MAX_IMAGES:,}"
        )


def images_per_task(options: Config) -> int:
    return int(options["prompts_per_task"] * options["images_per_prompt"])


def check_parameters(module: torch.nn.Module) -> None:
    """SpecError for a system of more parameters than any machine trains; it may be on the meta device."""
    count = sum(p.numel() for p in module.parameters())
    if count > MAX_PARAMETERS:
        raise SpecError(
            f"the system has {count / 1e9:,.0f} billion parameters, {4 * count / GIB:,.0f} GiB of them alone; expected "
            f"at most {MAX_PARAMETERS / 1e9:,.0f} billion: smaller dim, depth, widths or ratios"
        )
