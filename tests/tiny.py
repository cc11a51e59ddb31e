"""The tiny parts, systems, experiments and captions that many tests share: specs, and functions that build them.

Each function seeds torch first, so the same call gives the same weights. Sizes fit together: `DIT` on the latents of
`VAE` with the text of `LLM` or `T5`. Reference models of diffusers are in `tiny_peers`, of transformers in
`tiny_folders`, short trainings on the embedded world in `tiny_world`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from torch import Tensor, nn

from sana_lab.config import specs
from sana_lab.types import Text

Spec = dict[str, Any]

CHANNELS = 4  # latent channels of VAE
TEXT_DIM = 12  # width of `caption`'s features, and of the text that `dit` reads

DIT: Spec = {"name": "sana", "dim": 32, "depth": 1, "cross_heads": 2}
TWO_BLOCKS: Spec = {**DIT, "depth": 2, "attention": {"name": "linear", "head_dim": 8}}  # four heads of width 8
VAE: Spec = {"name": "vae", "widths": [8, 8, 8, 8], "depth": 1, "groups": 2}  # 8x
VAE_2X: Spec = {**VAE, "widths": [8, 8]}  # 2x
DCAE: Spec = {"name": "dcae", "widths": [8, 16, 16], "attention_stages": 1, "latent": 8, "head_dim": 8}  # 4x
DCAE |= {"encoder_depths": [0, 1, 1], "decoder_depths": [0, 1, 1]}
LLM: Spec = {"name": "llm", "width": 32, "layers": 1, "heads": 2, "max_tokens": 16}  # random weights, offline tokenizer
T5: Spec = {**LLM, "name": "t5"}

EXPERIMENT = """
system:
  name: text2image
  dit: {name: sana, dim: 32, depth: 1, cross_heads: 2}
  autoencoder: {name: vae, widths: [8, 8, 8, 8], depth: 1, groups: 2}
  text_encoder: {name: t5, width: 32, layers: 1, heads: 2, max_tokens: 24}
  warmup: 2
data: {name: shapes, size: 32, batch: 4, held_out: 4}
sampling: {solver: euler, steps: 2}
trainer: {max_steps: 4, accelerator: cpu, threads: 1, log_every: 1, validate_every: 2, checkpoint_every: 2}
eval: {prompts_per_task: 1, images_per_prompt: 1, bench_size: 64, bench_repeats: 1, bench_steps: 1}
prompts: [a red circle, three stars]
"""
"""A whole text-to-image experiment in YAML: trains in a second."""

SQUEEZE = """
system: {name: autoencoder, autoencoder: {name: vae, widths: [8, 8, 8, 8], depth: 1, groups: 2}}
data: {name: shapes, size: 16, batch: 64, held_out: 4}
trainer: {max_steps: 2, accelerator: cpu, threads: 1}
"""
"""An autoencoder's experiment, for `system.autoencoder: experiment:squeeze`."""

SEEDED = """
system:
  name: text2image
  dit: {name: sana, dim: 32, depth: 1, cross_heads: 2, attention: {name: linear, eps: 1.0e-6}}
  autoencoder: {name: vae, widths: [8, 8], depth: 1, latent: 4, groups: 2}
  text_encoder: {name: llm, width: 16, layers: 1}
  seed: ${seed}
data: {name: shapes, size: 16, batch: 4}
trainer: {max_steps: 2}
seed: 3
"""
"""An experiment for tests of configuration: an interpolation, and options of options."""


def build(kind: str, spec: specs.Spec, seed: int = 0, **supplied: Any) -> Any:
    """A part with the weights of this seed."""
    torch.manual_seed(seed)
    return specs.build(kind, spec, **supplied)


def dit(spec: Spec = TWO_BLOCKS, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A DiT in evaluation mode that reads `caption` and 4-channel latents."""
    return build("dit", {**spec, **options}, channels=CHANNELS, text_dim=TEXT_DIM).to(dtype).eval()


def autoencoder(spec: Spec = VAE, **options: Any) -> Any:
    """An autoencoder in evaluation mode."""
    return build("autoencoder", {**spec, **options}).eval()


def scatter(model: nn.Module) -> None:
    """Norms' weights, biases and statistics away from one and zero, so that a lost one shows."""
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name and p.is_floating_point():
            nn.init.uniform_(p, 0.5, 1.5) if "var" in name else nn.init.normal_(p, 0.5, 0.3)


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest value."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def error(a: Tensor, b: Tensor) -> float:
    """The L2 norm of the difference over that of `b`."""
    return ((a - b).norm() / b.norm()).item()


def text2image(**options: Any) -> Any:
    """A text-to-image system of DIT, VAE and LLM; options are those of its constructor."""
    from sana_lab.systems.text2image import TextToImage

    torch.manual_seed(0)
    return TextToImage(**{"dit": DIT, "autoencoder": VAE, "text_encoder": LLM, "warmup": 2, "ema": 0.9, **options})


def caption(
    counts: Sequence[int], seed: int = 0, length: int | None = None, dtype: torch.dtype = torch.float64
) -> Text:
    """Random features of captions with so many tokens, right-padded to `length` (the longest caption's)."""
    random, length = torch.Generator().manual_seed(seed), length or max(counts)
    mask = torch.arange(length) < torch.tensor(list(counts))[:, None]
    return Text(torch.randn(len(counts), length, TEXT_DIM, generator=random, dtype=torch.float64).to(dtype), mask)


def latents(rows: int = 2, size: tuple[int, int] = (4, 6), seed: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal latents of (rows, CHANNELS, *size)."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, CHANNELS, *size, generator=random, dtype=torch.float64).to(dtype)


def trainer(steps: int, **options: Any) -> L.Trainer:
    """A Lightning trainer on the CPU that prints and writes nothing, unless the options ask it to."""
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    limits = {"max_steps": steps, "max_epochs": -1, "num_sanity_val_steps": 0}
    return L.Trainer(**{"accelerator": "cpu", **limits, **quiet, **options})


class Losses(Callback):
    """The loss of each training step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.values.append(trainer.callback_metrics["train/loss"].item())


def write(root: Path, name: str, text: str) -> Path:
    """A file below `root`, its folders made."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def write_experiment(root: Path, name: str = "tiny", text: str = EXPERIMENT, changes: Mapping[str, Any] = {}) -> Path:
    """experiments/NAME.yaml below `root`: the text with changes by dotted key."""
    config = OmegaConf.create(text)
    for key, value in changes.items():
        OmegaConf.update(config, key, value, merge=False)
    return write(root, f"experiments/{name}.yaml", OmegaConf.to_yaml(config) if changes else text)
