"""Contracts of DiTs, autoencoders and text encoders."""

import warnings

import torch
from torch import Tensor

from sana_lab.contracts import (
    Rule,
    Subject,
    Violation,
    expect,
    expect_close,
    expect_gradients,
    expect_meta,
    expect_round_trip,
    expect_shape,
)
from sana_lab.types import Text

WORDS = ["a red circle", "", "three small green triangles left of a white square"]
LONG = " ".join(["a purple star above a black cross"] * 200)
"""A prompt of 7,000 characters, more than toy encoders read."""


def meta(subject: Subject) -> None:
    """It can be built without memory (meta device)."""
    expect_meta(subject)


# denoisers


def _inputs(subject: Subject, patch: int) -> tuple[Tensor, Tensor, Text]:
    generator = torch.Generator().manual_seed(0)
    channels, width = subject.supplied["channels"], subject.supplied["text_dim"]
    x = torch.randn(3, channels, 4 * patch, 6 * patch, generator=generator)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])
    return x, torch.tensor([0.0, 0.5, 1.0]), Text(torch.randn(3, 5, width, generator=generator), mask)


def _guidance(dit: object) -> Tensor | None:
    return torch.full((3,), 4.5) if getattr(dit, "guidance", None) is not None else None


@torch.no_grad()
def dit_shape(subject: Subject) -> None:
    """Velocity has the latents' shape, at t = 0, 0.5 and 1."""
    dit = subject.make()
    for name in ("channels", "text_dim", "patch"):
        expect(isinstance(getattr(dit, name, None), int), f"it sets no attribute `{name}`, expected a number")
    x, t, text = _inputs(subject, dit.patch)
    expect_shape(dit(x, t, text, _guidance(dit)), tuple(x.shape), "the velocity")


def dit_gradients(subject: Subject) -> None:
    """Every parameter gets a finite gradient."""
    dit = subject.make().train()
    expect_gradients(dit, dit(*_inputs(subject, dit.patch), _guidance(dit)))


@torch.no_grad()
def dit_padding(subject: Subject) -> None:
    """Text behind the mask changes nothing."""
    dit = subject.make()
    x, t, text = _inputs(subject, dit.patch)
    other = Text(torch.where(text.mask[..., None], text.tokens, 7.0), text.mask)
    a, b = dit(x, t, text, _guidance(dit)), dit(x, t, other, _guidance(dit))
    expect_close(a, b, "features of padding, which `text.mask` excludes, change the velocity")


@torch.no_grad()
def dit_rows(subject: Subject) -> None:
    """The velocity of an image does not depend on the others of its batch."""
    dit = subject.make()
    x, t, text = _inputs(subject, dit.patch)
    guidance = _guidance(dit)
    alone = dit(x[1:2], t[1:2], Text(text.tokens[1:2], text.mask[1:2]), None if guidance is None else guidance[1:2])
    expect_close(dit(x, t, text, guidance)[1:2], alone, "an image alone and in a batch differ")


@torch.no_grad()
def dit_sampling(subject: Subject) -> None:
    """`prepare`, used in sampling, gives the velocity of `forward`."""
    dit = subject.make()
    x, t, text = _inputs(subject, dit.patch)
    if _guidance(dit) is None:
        expect_close(dit.prepare(text)(x, t), dit(x, t, text), "`prepare(text)(x, t)` differs from `forward`")


def dit_round_trip(subject: Subject) -> None:
    """Weights load into another instance."""
    expect_round_trip(subject, lambda dit: dit(*_inputs(subject, dit.patch), _guidance(dit)))


DIT: tuple[Rule, ...] = (meta, dit_shape, dit_gradients, dit_padding, dit_rows, dit_sampling, dit_round_trip)


# autoencoders


def _images(downsample: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, downsample, 2 * downsample, generator=generator) * 2 - 1


def _grid(autoencoder: object, images: Tensor) -> tuple[int, ...]:
    unit, channels = getattr(autoencoder, "downsample", 1), getattr(autoencoder, "channels", 0)
    return (len(images), channels, images.shape[2] // unit, images.shape[3] // unit)


@torch.no_grad()
def latents(subject: Subject) -> None:
    """Images give a mean and log-variance (B, channels, H / downsample, W / downsample)."""
    autoencoder = subject.make()
    images = _images(autoencoder.downsample)
    posterior = autoencoder.posterior(images)
    expect(isinstance(posterior, tuple) and len(posterior) == 2, "`posterior` returns no pair (mean, log-variance)")
    for name, value in zip(("mean", "log-variance"), posterior, strict=True):
        expect_shape(value, _grid(autoencoder, images), f"the {name} for images {tuple(images.shape)}")


@torch.no_grad()
def pictures(subject: Subject) -> None:
    """Latents give images of the size that they came from."""
    autoencoder = subject.make()
    images = _images(autoencoder.downsample)
    expect_shape(autoencoder.decode(autoencoder.encode(images)), tuple(images.shape), "the reconstruction")


@torch.no_grad()
def autoencoder_rows(subject: Subject) -> None:
    """Images of a batch do not mix, and the result is the same twice."""
    autoencoder = subject.make()
    images = _images(autoencoder.downsample)
    whole = autoencoder.decode(autoencoder.encode(images))
    alone = autoencoder.decode(autoencoder.encode(images[1:]))
    expect_close(whole[1:], alone, "an image alone and in a batch differ")


def autoencoder_gradients(subject: Subject) -> None:
    """Every parameter gets a finite gradient."""
    autoencoder = subject.make().train()
    if not any(p.requires_grad for p in autoencoder.parameters()):
        return
    mean, log_variance = autoencoder.posterior(_images(autoencoder.downsample))
    image = autoencoder.reconstruct(mean + (log_variance / 2).exp())
    expect_gradients(autoencoder, image)


def autoencoder_round_trip(subject: Subject) -> None:
    """Weights load into another instance."""
    expect_round_trip(subject, lambda a: a.decode(a.encode(_images(a.downsample))))


AUTOENCODER: tuple[Rule, ...] = (
    meta,
    latents,
    pictures,
    autoencoder_rows,
    autoencoder_gradients,
    autoencoder_round_trip,
)


# text encoders


def encode(encoder: object, prompts: list[str]) -> Text:
    """The features of prompts, of as many different ones as the encoder reads. `Violation` for no `Text`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of truncation
        text = encoder(_readable(encoder, prompts))  # type: ignore[operator]
    if not isinstance(text, Text):
        raise Violation(f"it returns a {type(text).__name__}, expected sana_lab.types.Text(tokens, mask)")
    return text


def _readable(encoder: object, prompts: list[str]) -> list[str]:
    """As many prompts that the encoder reads, where it does not read any text."""
    known = getattr(encoder, "prompts", None)
    return prompts if known is None else [known[i % len(known)] if prompt else "" for i, prompt in enumerate(prompts)]


@torch.no_grad()
def features(subject: Subject) -> None:
    """Prompts give tokens (B, L, dim) and a mask (B, L), True at real tokens from the left."""
    encoder = subject.make()
    for name in ("dim", "max_tokens"):
        expect(isinstance(getattr(encoder, name, None), int), f"it sets no attribute `{name}`, expected a number")
    tokens, mask = encode(encoder, WORDS)
    length = tokens.shape[1] if tokens.ndim > 1 else 0
    expect_shape(tokens, (len(WORDS), length, encoder.dim), "the tokens")
    expect(mask.dtype == torch.bool, f"the mask is {mask.dtype}, expected torch.bool")
    expect(tuple(mask.shape) == (len(WORDS), length), f"the mask has shape {tuple(mask.shape)}, the tokens another")
    expect(bool((mask[:, :-1] | ~mask[:, 1:]).all()), "the mask has padding before real tokens, expected it behind")


@torch.no_grad()
def empty_prompt(subject: Subject) -> None:
    """The empty prompt, the null condition of guidance, has at least one real token."""
    expect(bool(encode(subject.make(), [""]).mask.any()), "the empty prompt has no real token")


@torch.no_grad()
def long_prompt(subject: Subject) -> None:
    """A prompt of any length has at most `max_tokens` tokens."""
    encoder = subject.make()
    length = encode(encoder, [LONG]).tokens.shape[1]
    expect(length <= encoder.max_tokens, f"a long prompt has {length} tokens, max_tokens is {encoder.max_tokens}")


@torch.no_grad()
def padding(subject: Subject) -> None:
    """The features of a prompt do not depend on the others of its batch."""
    encoder = subject.make()
    alone, batch = encode(encoder, WORDS[:1]), encode(encoder, WORDS)
    expect_close(alone.tokens[alone.mask], batch.tokens[0][batch.mask[0]], "a prompt alone and in a batch differ")


@torch.no_grad()
def words(subject: Subject) -> None:
    """Other words give other features."""
    text = encode(subject.make(), ["a red circle", "a blue circle"])
    same = text.mask.sum(1).unique().numel() == 1 and torch.equal(text.tokens[0], text.tokens[1])
    expect(not same, "'a red circle' and 'a blue circle' have the same features")


def text_gradients(subject: Subject) -> None:
    """A text encoder that trains gets gradients; a pretrained one needs none."""
    encoder = subject.make().train()
    if encoder.pretrained or not any(p.requires_grad for p in encoder.parameters()):
        return
    expect_gradients(encoder, encode(encoder, WORDS).tokens)


TEXT_ENCODER: tuple[Rule, ...] = (meta, features, empty_prompt, long_prompt, padding, words, text_gradients)
