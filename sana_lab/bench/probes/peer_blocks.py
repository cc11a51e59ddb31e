"""Probe of a diffusers pipeline from parts: one block of each kind at a time, multiplied by depth and steps."""

from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from sana_lab.bench.network_parts import network_parts
from sana_lab.bench.parts import SUMMARY, Part, columns, time_parts
from sana_lab.bench.probes import PROMPT, Dtype, Probe, ProbeSettings
from sana_lab.bench.probes.peer import PeerImage
from sana_lab.bench.split import Split, decoder_units, random_tensor, repeated_modules, rest_of
from sana_lab.config.ranges import Evaluations, Pixels, Positive, Real
from sana_lab.peers import random_init
from sana_lab.peers.random_init import CallCounter, NetworkCall


@final
class PeerBlocks(Probe):
    """An image of a published pipeline at its real widths and numbers of tokens, without its memory.

    The pipeline runs once on the meta device, which says how often each network is called and with which shapes. One
    block of each kind, and what is around the blocks, are then allocated with random weights and timed, one after the
    other, in rounds. Batch 1.
    """

    inside = (
        "each kind of block by itself, times its number in an image: text encoders, all steps with guidance, decoder; "
        "without tokenizing, scheduler and 8-bit images"
    )

    summary = SUMMARY

    def __init__(
        self,
        pipeline: str = "flux_dev",  # name in `sana_lab.peers.configs`, such as sd3_medium
        size: Pixels = 1024,  # pixels a side
        steps: Evaluations | None = None,  # solver steps; None is the model card's value
        guidance: Real | None = None,  # guidance scale; None is the model card's value
        dtype: Dtype = "float32",  # of weights and activations
        seconds: Positive = 60.0,  # of readings, after which no round begins but the first two
        toy: bool = False,  # small networks of the same classes, for tests
    ) -> None:
        self.image = PeerImage(pipeline, size, steps, guidance, dtype=dtype, toy=toy)
        self.size, self.dtype, self.seconds = size, dtype, seconds

    def count(self) -> dict[str, float]:
        return self.image.count()

    def measure(self, settings: ProbeSettings) -> dict[str, float]:
        return columns(time_parts(self.parts(settings.device), settings, self.seconds))

    def parts(self, device: torch.device) -> list[Part]:
        """All parts of an image; nothing stays allocated."""
        image, dtype = self.image, getattr(torch, self.dtype)
        counter = random_init.trace(image.pipeline, PROMPT, image.size, image.steps, image.guidance, image.toy, dtype)
        with torch.no_grad():
            calls = [part for call in counter.network_calls() for part in self._network(counter, call, device, dtype)]
            return [*calls, *self._decoder(counter, device, dtype)]

    def _network(self, counter: CallCounter, call: NetworkCall, device: torch.device, dtype: torch.dtype) -> list[Part]:
        """Parts of a text encoder or the denoiser, called with these shapes."""
        network: Any = counter.peer.networks[call.role]
        args, kwargs = tree_map(partial(_input, device=device, dtype=dtype), (call.args, call.kwargs))
        units = repeated_modules(network)
        split = Split(lambda: network(*args, **kwargs), units, rest_of(network, units))
        stage = str(counter.peer.stage_of(call.role))
        return network_parts(stage, call.role, split, call.times, device, dtype, call.key)

    def _decoder(self, counter: CallCounter, device: torch.device, dtype: torch.dtype) -> list[Part]:
        vae: Any = counter.peer.networks["vae"]
        side = self.size // counter.peer.pipeline.vae_scale_factor
        latents = random_tensor((1, vae.config.latent_channels, side, side), device, dtype)
        units, unused = decoder_units(vae.decoder), [*vae.encoder.modules()]
        rest = [module for module in rest_of(vae, units) if module not in unused]
        split = Split(lambda: vae.decode(latents), units, rest)
        return network_parts("decode", "decoder", split, 1, device, dtype, str(tuple(latents.shape)))


def _input(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """An argument on the device: latents and features are random, masks and token ids as they are or, without values,
    ones."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return random_tensor(value.shape, device, dtype)
    return torch.ones_like(value, device=device) if value.is_meta else value.to(device)
