"""Probe of a text2image experiment from parts: one block of each kind at a time, multiplied by depth and steps."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from sana_lab.bench.network_parts import machine_key, network_parts, unit_part
from sana_lab.bench.parts import SUMMARY, Part, columns, time_parts
from sana_lab.bench.probes import PROMPT, Dtype, Probe, ProbeSettings
from sana_lab.bench.probes.image import Image
from sana_lab.bench.split import Split, allocated, decoder_units, random_tensor, repeated_modules, rest_of
from sana_lab.bench.stages import evaluation_times
from sana_lab.bench.untrained import without_cache
from sana_lab.checkpoints.build import build_on_meta
from sana_lab.config.ranges import Pixels, Positive
from sana_lab.config.specs import SpecError
from sana_lab.costs.flops import expanded_masks
from sana_lab.costs.timing import Call
from sana_lab.diffusion.guidance import reads_null
from sana_lab.diffusion.solvers import at
from sana_lab.models.attention import layers
from sana_lab.types import Text, Velocity

if TYPE_CHECKING:
    from sana_lab.systems.text2image import TextToImage


@final
class ImageBlocks(Probe):
    """An image of a text2image experiment at its real widths and numbers of tokens, without its memory.

    One block of each kind, the embeddings and the head, each kind of layer of the text encoder and each kind of block
    of the decoder are allocated with random weights and timed, one after the other, in rounds. Their times are
    multiplied by depth, steps and rows of guidance and added. Batch 1.
    """

    inside = (
        "each kind of block by itself, times its number in an image: text encoder with the whole instruction, all "
        "denoiser evaluations with guidance, decoder; without solver and 8-bit images"
    )

    summary = SUMMARY

    def __init__(
        self,
        experiment: str,  # name of an experiment whose system is text2image
        system: dict[str, Any] | None = None,  # options merged over the experiment's `system`
        sampling: dict[str, Any] | None = None,  # options merged over its `sampling`
        size: Pixels = 1024,  # pixels a side
        dtype: Dtype = "float32",  # of weights and activations
        seconds: Positive = 60.0,  # of readings, after which no round begins but the first two
    ) -> None:
        self.image = Image(experiment, system, sampling, size, dtype=dtype)
        self._check_sampling()
        self.size, self.dtype, self.seconds = size, dtype, seconds
        spec = self.image.experiment["system"]
        self.spec = {**spec, "text_encoder": without_cache(spec["text_encoder"])}
        if not {"depth", "attention"} <= spec["dit"].keys():
            raise SpecError(
                f"dit {spec['dit']['name']!r} has no options depth and attention, of which blocks are multiplied; "
                "expected such as sana, or probe image"
            )

    def _check_sampling(self) -> None:
        """SpecError for options of `sampling` that blocks alone do not show."""
        sampling = self.image.sampling
        odd = {
            "best_of": (sampling.best_of, 1),
            "pag": (sampling.pag, 0),
            "regions": (sampling.regions, None),
            "quantize": (sampling.quantize, "none"),
        }
        for name, (value, expected) in odd.items():
            if value != expected:
                raise SpecError(
                    f"sampling.{name} is {value!r}, which probe image_blocks does not time; expected "
                    f"{'null' if expected is None else expected}, or probe image"
                )

    def count(self) -> dict[str, float]:
        return self.image.count()

    def measure(self, settings: ProbeSettings) -> dict[str, float]:
        return columns(time_parts(self.parts(settings.device), settings, self.seconds))

    def parts(self, device: torch.device) -> list[Part]:
        """All parts of an image; nothing stays allocated."""
        with torch.no_grad():
            context = Context(self, device)
            return [*context.text(), *context.denoise(), *context.decode()]

    def whole(self, device: torch.device) -> list[Part]:
        """The three stages as one part each, with all of their networks: to compare the sum of the blocks with."""
        with torch.no_grad():
            return Context(self, device).stages()


class Context:
    """The system on the meta device, and the random inputs of one image."""

    def __init__(self, probe: ImageBlocks, device: torch.device) -> None:
        self.probe, self.device, self.dtype = probe, device, getattr(torch, probe.dtype)
        self.sampling, self.spec = probe.image.sampling, probe.spec
        self.system: TextToImage = build_on_meta("system", self.spec).to(self.dtype)
        shape = self.system.latent_shape(probe.size)
        self.noise = random_tensor((1, *shape), device, self.dtype)
        self.guided = reads_null(self.system.dit, self.sampling.guidance)
        self.times = evaluation_times(self.sampling, self.system.flow)
        self.shapes = f"{shape} {json.dumps(self.sampling.guidance_interval)} {self.guided}"

    def text(self) -> list[Part]:
        """The prompt with the instruction, and the empty prompt if guidance reads it."""
        encoder = self.system.text_encoder
        units = repeated_modules(encoder)
        parts = []
        for prompt, call in self.prompts().items():
            split = Split(call, units, rest_of(encoder, units))
            parts += network_parts("text", "text encoder", split, 1, self.device, self.dtype, prompt)
        return parts

    def prompts(self) -> dict[str, Call]:
        encoder = self.system.text_encoder
        calls: dict[str, Call] = {PROMPT: partial(encoder, [PROMPT])}
        return {**calls, "": partial(encoder.without_instruction, [""])} if self.guided else calls

    def features(self) -> tuple[Text, Text]:
        """Random features of the prompt and the empty prompt, of as many tokens as the encoder gives."""
        with expanded_masks(self.system.text_encoder):
            lengths = [call().tokens.shape[1] for call in self.prompts().values()]
        texts = [
            Text(
                random_tensor((1, n, self.system.text_encoder.dim), self.device, self.dtype),
                torch.ones(1, n, dtype=torch.bool, device=self.device),
            )
            for n in lengths
        ]
        return texts[0], texts[-1]

    def denoise(self) -> list[Part]:
        """Preparation of captions and times, the denoiser without blocks, and each kind of block."""
        spec, features = self.spec["dit"], self.features()
        kinds = Counter(json.dumps(kind, sort_keys=True) for kind in layers(spec["attention"], spec["depth"]))
        parts: list[Part] = []
        for kind, number in kinds.items():
            dit = self.shallow({**spec, "depth": 1, "attention": json.loads(kind)})
            parts += self.denoiser_parts(dit, features, number, ends=not parts)
        return parts

    def shallow(self, spec: dict[str, Any]) -> Any:
        """A denoiser on the meta device."""
        channels, width = self.system.dit.channels, self.system.dit.text_dim
        return build_on_meta("dit", spec, channels=channels, text_dim=width).to(self.dtype)

    def denoiser_parts(self, dit: Any, features: tuple[Text, Text], number: int, ends: bool) -> list[Part]:
        """Parts of a denoiser with one block, which stands for `number` of them; `ends` are all but the block."""
        where, modules = machine_key(self.device, self.dtype), [*dit.modules()]
        velocity = self.velocity(dit, modules, features)
        parts = []
        for t, evaluations in self.times.items():
            split = Split(partial(velocity, self.noise, at(t, self.noise)), [*dit.blocks], modules)
            blocks = [
                unit_part("denoise", "denoiser", unit, evaluations, self.device, self.dtype, number)
                for unit in split.record(self.device, self.dtype)
            ]
            key = f"{where} denoiser {self.shapes} {t} {split.key()}"
            rest = partial(split.allocate, self.device, self.dtype)
            parts += [Part("denoise", "denoiser without blocks", key, evaluations, split.bytes(), rest)] if ends else []
            parts += blocks
        lengths = [len(text.tokens[0]) for text in features]
        key = f"{where} {lengths} {len(self.times)} {Split(lambda: None, [], modules).key()}"
        if ends:
            prepare = partial(self.system.velocity, *features, self.sampling, dit)
            parts.append(Part("denoise", "preparation", f"prepare {key}", 1, 0, partial(self.call, modules, prepare)))
        if hasattr(dit.blocks[0], "cross") and number > ends:
            keys = partial(self.keys_values, dit.blocks[0].cross, features)
            block = [*dit.blocks[0].cross.modules()]
            parts.append(Part("denoise", "keys", f"keys {key}", number - ends, 0, partial(self.call, block, keys)))
        return parts

    def velocity(self, dit: Any, modules: list[nn.Module], features: tuple[Text, Text]) -> Velocity:
        with allocated(modules, self.device, self.dtype):
            return self.system.velocity(*features, self.sampling, dit)

    def keys_values(self, cross: Any, features: tuple[Text, Text]) -> None:
        """What a block more adds to the preparation: keys and values of captions, of one token its output."""
        for i, text in enumerate(features[: 1 + self.guided]):
            shape = (1, text.tokens.shape[1], cross.kv.in_features)
            _, values = cross.keys_values(random_tensor(shape, self.device, self.dtype))
            if i and shape[1] == 1:
                cross.constant(values)

    @contextmanager
    def call(self, modules: list[nn.Module], call: Call) -> Iterator[Call]:
        """The call, with these modules allocated."""
        with allocated(modules, self.device, self.dtype):
            yield call

    def decode(self) -> list[Part]:
        autoencoder: Any = self.system.autoencoder
        decoder = getattr(autoencoder, "decoder", autoencoder)
        units = decoder_units(decoder)
        unused = [*autoencoder.encoder.modules()] if hasattr(autoencoder, "encoder") else []
        rest = [module for module in rest_of(autoencoder, units) if module not in unused]
        split = Split(partial(autoencoder.decode, self.noise), units, rest)
        return network_parts("decode", "decoder", split, 1, self.device, self.dtype, self.shapes)

    def stages(self) -> list[Part]:
        """The whole stages, each a part of its own."""
        system, features = self.system, self.features()

        def text() -> None:
            for call in self.prompts().values():
                call()

        def denoise() -> Tensor:
            velocity = system.velocity(*features, self.sampling, system.dit)
            return self.sampling.run(velocity, self.noise, system.flow, lambda: self.noise)

        def decode() -> Tensor:
            return system.autoencoder.decode(self.noise)

        stages: dict[str, tuple[nn.Module, Callable[[], Any]]] = {
            "text": (system.text_encoder, text),
            "denoise": (system.dit, denoise),
            "decode": (system.autoencoder, decode),
        }
        where = machine_key(self.device, self.dtype)
        return [
            Part(
                stage,
                f"whole {stage}",
                f"{where} whole {stage} {self.shapes}",
                1,
                sum(p.nbytes for p in module.parameters()),
                partial(self.call, [*module.modules()], call),
            )
            for stage, (module, call) in stages.items()
        ]
