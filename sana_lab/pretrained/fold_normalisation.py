"""Fold the latents' per-channel shift and scale into the adjacent convolutions: an equivalent model without them.

Computed in float64. With C channels beside the latent and L of the latent, both shortcuts of DC-AE average or repeat
runs of C / L channels.
"""

from typing import Any

import torch
from torch import Tensor

from sana_lab.config.validation import SpecError
from sana_lab.models.autoencoders import Autoencoder

State = dict[str, Tensor]


def fold(part: Autoencoder) -> tuple[dict[str, Any], State]:
    """The spec and state of an autoencoder with shift 0 and scale 1 that encodes and decodes the same.

    SpecError for a `dcae` with a shift: the zeros that pad its decoder's input would have to be shifted too.
    """
    spec: Any = part.spec
    state = {k: v.detach() for k, v in part.state_dict().items() if k not in ("shift", "scale")}
    shift, scale = part.shift.double(), part.scale.double()
    spec = {**spec, "shift": 0.0, "scale": 1.0}
    if spec["name"] == "dcae":
        return spec, state | _fold_dcae(state, shift, scale)
    return {**spec, "quant": True}, state | _fold_vae(state, shift, scale)


def _fold_dcae(state: State, shift: Tensor, scale: Tensor) -> State:
    """Scale the 3x3 convolutions. The shortcuts have no parameters: their part is added to the kernels' centres."""
    if shift.any():
        raise SpecError(
            f"the dcae shifts its latents, by up to {shift.abs().max():.3g}, which diffusers' AutoencoderDC cannot "
            "take in at borders; expected shift 0: train the autoencoder with system.normalise=scale"
        )
    head, stem = state["encoder.head.weight"], state["decoder.stem.weight"]
    out, back = head.double() * scale[:, None, None, None], stem.double() / scale[:, None, None]
    run, channels = head.shape[1] // head.shape[0], torch.arange(head.shape[1], device=head.device)
    out[channels // run, channels, 1, 1] += ((scale - 1) / run).repeat_interleave(run)
    run, channels = stem.shape[0] // stem.shape[1], torch.arange(stem.shape[0], device=stem.device)
    back[channels, channels // run, 1, 1] += (1 / scale - 1).repeat_interleave(run)
    bias = state["encoder.head.bias"]
    return {
        "encoder.head.weight": out.to(head.dtype),
        "encoder.head.bias": (bias.double() * scale).to(bias.dtype),
        "decoder.stem.weight": back.to(stem.dtype),
    }


def _fold_vae(state: State, shift: Tensor, scale: Tensor) -> State:
    """Fold into the 1x1 convolutions on both sides of the latent, which have no padding: identities if it has none."""
    dtype, latent, eye = state["decoder.stem.weight"].dtype, len(shift), torch.eye(2 * len(shift)).to(shift)
    zero = torch.zeros(2 * latent).to(shift)
    out, bias = (state.get(f"quant.{x}", v).double() for x, v in (("weight", eye[:, :, None, None]), ("bias", zero)))
    rows = torch.cat([scale, torch.ones_like(scale)])  # of the mean and of the log-variance
    more = torch.cat([-shift * scale, 2 * scale.log()])
    back = state.get("post_quant.weight", eye[:latent, :latent, None, None]).double()
    after = state.get("post_quant.bias", zero[:latent]).double() + back[:, :, 0, 0] @ shift
    folded = {
        "quant.weight": rows[:, None, None, None] * out,
        "quant.bias": rows * bias + more,
        "post_quant.weight": back / scale[:, None, None],
        "post_quant.bias": after,
    }
    return {k: v.to(dtype) for k, v in folded.items()}
