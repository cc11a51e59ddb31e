"""Side by side on the CPU: python benchmarks/cpu.py [--full] [--compiled] [--only CASE ...] [--quick]

Attention cores, a step of SANA-0.6B, DC-AE's decoder, text encoding and a whole pipeline, against diffusers with the
same random weights. `--full` runs every piece at full size and sums the time of an image of 512 px, with and without
its text. `--compiled` adds diffusers' blocks compiled by Inductor, which needs a C++ compiler and compiles for minutes.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import cores
import models
import torch
from common import (
    EXACT,
    OTHER,
    SAME,
    Case,
    Pair,
    Protocol,
    Side,
    environment,
    fresh,
    run_case,
    save,
    table,
    thread_clock,
)
from models import SIZES
from torch import Tensor

from sana_lab.diffusion.sampling import Sampling, noise_like
from sana_lab.models.dit import TextDit
from sana_lab.models.text.instruction import read_instruction
from sana_lab.types import Json

HEADS, WIDTH = 9, 32  # a quarter of SANA-0.6B's 36 heads
TOKENS, PADDED = 80, 300  # tokens of a caption without and with diffusers' padding
STEPS = 20
CPU = torch.device("cpu")
PEER, LAST, COMPILED = "diffusers", "diffusers, channels last", "diffusers, compiled"
NULL_KEPT = "diffusers, empty prompt kept"  # encoded once, as a session of one user could
COLD = "ours, first prompt of a session"  # the instruction is not cached
SAMPLING = "ours, as in sampling"  # captions and times prepared once, no padding, the empty prompt as a constant


def main() -> None:
    options = arguments()
    torch.set_num_threads(1 if options.clock == "thread" else options.threads)
    clock = thread_clock if options.clock == "thread" else None
    protocol = Protocol(CPU, warmup=0 if options.quick else 1, repeats=3 if options.quick else 9, clock=clock)
    print(environment(CPU))
    records = []
    for name in options.only or CASES:
        for case in CASES[name](Extent.of(options)):
            records += run_case(case, protocol)
    print("\n" + table(records))
    extra = {"image": image(records)} if options.full and not options.only else {}
    settings = {
        "clock": options.clock,
        "warmup": protocol.warmup,
        "repeats": protocol.repeats,
        "full": options.full,
        "compiled": options.compiled,
    }
    if not options.quick and not options.only:
        print(f"\nwritten to {save('cpu-full' if options.full else 'cpu', settings, records, CPU, extra)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--full", action="store_true", help="every piece at full size and depth: a quarter of an hour, 16 GB"
    )
    parser.add_argument(
        "--compiled", action="store_true", help="also diffusers' blocks compiled, of the step and the decoder"
    )
    parser.add_argument("--only", nargs="+", choices=CASES, help="these cases alone; nothing is written")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument(
        "--clock", choices=["wall", "thread"], default="wall", help="thread: one thread, its processor time"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small shapes and few repeats, to see that it runs; nothing is written"
    )
    return parser.parse_args()


class Extent:
    """Sizes of the cases."""

    def __init__(self, quick: bool, full: bool, compiled: bool = False) -> None:
        self.quick, self.full, self.compiled = quick, full, compiled
        self.tokens = (64, 256) if quick else (64, 256, 1024, 4096)
        self.blocks = 1 if quick else SIZES["0.6B"].depth
        self.decoded = (64,) if quick else (256, 512) if full else (256,)
        self.layers = 1 if quick else 26 if full else 4

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Extent":
        return cls(options.quick, options.full, options.compiled)


def attention(extent: Extent) -> Iterator[Case]:
    for tokens in extent.tokens:
        yield attention_case(tokens)


def attention_case(tokens: int) -> Case:
    torch.manual_seed(0)
    inputs = [torch.randn(1, tokens, 3 * HEADS * WIDTH) for _ in range(3)]
    linear, by_softmax = cores.naive_linear(inputs[0], HEADS), cores.naive_softmax(inputs[0], HEADS)
    sides = {
        "linear": Side(partial(cores.ours, heads=HEADS), linear),
        "softmax (fused)": Side(partial(cores.softmax, heads=HEADS), by_softmax),
        "diffusers linear": Side(partial(cores.diffusers, heads=HEADS), linear),
    }
    pairs = [Pair(OTHER, "softmax (fused)", "linear"), Pair(SAME, "diffusers linear", "linear")]
    return Case(f"attention core, {tokens} tokens, {HEADS} heads of {WIDTH}, float32", sides, pairs, inputs)


def step(extent: Extent) -> Iterator[Case]:
    yield step_case(extent.blocks, 8 if extent.quick else 16, extent.compiled)
    if extent.full:
        yield step_case(2, 32)


@torch.no_grad()
def step_case(blocks: int, side: int, compiled: bool = False) -> Case:
    """A guided step (batch 2) of SANA-0.6B: a caption of 80 tokens and the empty prompt of one token. diffusers
    projects both, padded to 300, in every step."""
    theirs = models.transformer(SIZES["0.6B"], blocks)
    ours, t = models.ours_of(theirs), torch.full((2,), 0.5)
    text = models.captions(TOKENS, PADDED)
    inputs = [torch.randn(2, 32, side, side) for _ in range(3)]
    truth = models.peer_step(theirs, inputs[0], *text)
    mine = {
        "ours": TextDit(ours, text),
        "ours, text prepared once": ours.prepare(text),
        SAMPLING: models.prepared(ours, text, t),
    }
    sides = {name: Side(lambda x, model=model: model(x, t), truth) for name, model in mine.items()}
    sides[PEER] = Side(lambda x: models.peer_step(theirs, x, *text), truth)
    peers = [PEER]
    if compiled:
        faster = models.compiled_peer(theirs, "default")
        sides[COMPILED] = Side(lambda x: models.peer_step(faster, x, *text), truth)
        peers.append(COMPILED)
    pairs = [Pair(SAME if name == "ours" else EXACT, peer, name) for peer in peers for name in mine]
    name = f"0.6B step, {blocks} blocks, batch 2, {32 * side} px, {TOKENS} and 1 of {PADDED} caption tokens, float32"
    return Case(name, sides, pairs, inputs, repeats=3)


def decode(extent: Extent) -> Iterator[Case]:
    for size in extent.decoded:
        yield decode_case(size, 1 if extent.quick else 3, extent.compiled and size < 512)


@torch.no_grad()
def decode_case(size: int, blocks: int, compiled: bool = False) -> Case:
    """DC-AE f32c32's decoder, batch 1."""
    theirs = models.autoencoder(blocks)
    ours = models.ours_of(theirs)
    inputs = [torch.randn(1, 32, size // 32, size // 32) for _ in range(3)]
    truth = theirs.decode(inputs[0], return_dict=False)[0]
    last = models.channels_last(models.autoencoder(blocks))
    sides = {
        "ours": Side(ours.reconstruct, truth),
        PEER: Side(lambda z: theirs.decode(z, return_dict=False)[0], truth),
        LAST: Side(lambda z: last.decode(z.to(memory_format=torch.channels_last), return_dict=False)[0], truth),
    }
    if compiled:
        decoder = models.compiled_decoder(last)
        sides[COMPILED] = Side(lambda z: decoder.decode(z, return_dict=False)[0], truth)
    pairs = [Pair(EXACT, peer, "ours") for peer in sides if peer != "ours"]
    whole = "" if blocks == 3 else f", {blocks} blocks a stage"
    return Case(f"DC-AE f32c32 decode{whole}, {size} px, float32", sides, pairs, inputs, repeats=3 + (size < 512))


def text(extent: Extent) -> Iterator[Case]:
    yield text_case(extent.layers)


@torch.no_grad()
def text_case(layers: int) -> Case:
    """A prompt with instruction and the empty prompt through Gemma-2-2B; no prompt is repeated. Ours keeps the
    instruction's keys and values, and the empty prompt's features, for a session."""
    theirs = models.pipeline(layers, 1, 1)
    ours = models.encoder_of(theirs)
    truth = encoded(theirs, 0)
    null = truth[len(encoded(theirs, 0, guidance=False)) :]
    sides = {
        "ours": Side(fresh(partial(features, ours)), truth),
        COLD: Side(fresh(lambda i: features(models.encoder_of(theirs), i)), truth),
        PEER: Side(fresh(partial(encoded, theirs)), truth),
        NULL_KEPT: Side(fresh(lambda i: torch.cat([encoded(theirs, i, guidance=False), null])), truth),
    }
    name = f"text encoding, Gemma-2-2B's widths, {layers} of 26 layers, prompt and empty prompt, float32"
    pairs = [Pair(EXACT, PEER, "ours"), Pair(EXACT, NULL_KEPT, "ours"), Pair(EXACT, PEER, COLD)]
    return Case(name, sides, pairs, [None], repeats=3)


def encoded(pipeline: Any, number: int, guidance: bool = True) -> Tensor:
    """diffusers' features of valid tokens, of the prompt and, for guidance, of the empty prompt: (L + L0, D)."""
    chi, texts = read_instruction("released").split("\n"), [models.prompt(number)]
    tokens, mask, null, null_mask = pipeline.encode_prompt(
        texts, guidance, max_sequence_length=PADDED, complex_human_instruction=chi
    )
    valid = tokens[mask.bool()]
    return torch.cat([valid, null[null_mask.bool()]]) if guidance else valid


def features(encoder: Any, number: int) -> Tensor:
    caption = encoder([models.prompt(number)])
    null = encoder.negative([""], caption)
    return torch.cat([t.tokens[t.mask] for t in (caption, null)])


def whole(extent: Extent) -> Iterator[Case]:
    small = extent.quick
    yield whole_case(1 if small else 4, 1 if small else 4, 1, 64 if small else 512, 2 if small else STEPS)


@torch.no_grad()
def whole_case(layers: int, blocks: int, stage: int, size: int, steps: int) -> Case:
    """Prompt to image with Flow-DPM-Solver and guidance, from the same noise, at SANA-0.6B's widths."""
    theirs = models.pipeline(layers, blocks, stage)
    ours = models.system_of(theirs)
    how = Sampling(**{**ours.experiment["sampling"], "steps": steps, "guidance": 4.5})

    def ours_image(i: int) -> Tensor:
        return ours.sample([models.prompt(i)], size=size, sampling=how, seed=i)

    def peer_image(i: int) -> Tensor:
        noise = noise_like((32, size // 32, size // 32), i, [0])
        options = {"num_inference_steps": steps, "guidance_scale": 4.5, "height": size, "width": size}
        result = theirs([models.prompt(i)], latents=noise, use_resolution_binning=False, output_type="pt", **options)
        return result.images.mul(255).round()

    truth = peer_image(0)
    sides = {"ours": Side(fresh(ours_image), truth), PEER: Side(fresh(peer_image), truth)}
    name = (
        f"whole pipeline, {size} px, {steps} steps, guidance, 0.6B's widths at reduced depth "
        f"({layers} of 26 text layers, {blocks} of 28 blocks, {stage} of 3 a decoder stage), float32"
    )
    return Case(name, sides, [Pair(EXACT, PEER, "ours")], [None], tolerance=1e-2, repeats=3)


CASES: dict[str, Callable[[Extent], Iterator[Case]]] = {
    "attention": attention,
    "step": step,
    "decode": decode,
    "text": text,
    "whole": whole,
}


def image(records: list[Json]) -> Json:
    """An image of 512 px in 20 guided steps, summed from full-size pieces, and the sum without text, which is cached
    in a session; no ratio if a piece has none."""
    pieces = {
        "text": ("text encoding", "ours", 1),
        "denoise": ("0.6B step, 28", SAMPLING, STEPS),
        "decode": ("DC-AE f32c32 decode, 512", "ours", 1),
    }
    stages = {stage: piece(records, start, ours, times) for stage, (start, ours, times) in pieces.items()}
    if not all(stages.values()):
        return {"ratio": None, "why": "a piece has no ratio", "stages": stages}
    whole = total(stages.values())
    textless = total(stage for name, stage in stages.items() if name != "text")
    print(f"\nan image of 512 px, {STEPS} steps, added up from full-size pieces: {whole['peer_s']:.1f} s / ", end="")
    print(f"{whole['ours_s']:.1f} s = {whole['ratio']:.2f}x; without text {textless['ratio']:.2f}x")
    return {**whole, "stages": stages, "how": "sum of pieces at full size"}


def total(stages: Iterable[Json]) -> Json:
    """Times of stages, added up, and their ratio."""
    rows = list(stages)
    peer, ours = (sum(row[side] for row in rows) for side in ("peer_s", "ours_s"))
    return {"ratio": peer / ours, "peer_s": peer, "ours_s": ours}


def piece(records: list[Json], start: str, ours: str, times: int) -> Json | None:
    for r in records:
        if r["case"].startswith(start) and r["ours"] == ours and r["peer"] == PEER and r["ratio"]:
            return {f"{side}_s": times * r["times"][side]["median_s"] for side in ("peer", "ours")}
    return None


if __name__ == "__main__":
    main()
