"""The protocol of every benchmark: parity before time, interleaved runs, medians with spread, no ratio from noise."""

import argparse
import json
import math
import platform
import re
import subprocess
from collections.abc import Callable, Iterable
from functools import partial
from importlib import metadata
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from torch import Tensor, nn

from sana_lab.bench import device_name
from sana_lab.dit.sana import Sana
from sana_lab.evaluation.efficiency import NOISE, Clock, Comparison, compare, interleave
from sana_lab.types import Json, Text

RESULTS = Path(__file__).parent / "results"

SAME, EXACT, OTHER = "same work", "exact algebra", "another function"
"""What a ratio compares: the same operations; fewer operations for equal outputs; or two different functions."""

Run = Callable[[Any], Tensor]


class Case(NamedTuple):
    """Peer and ours on the same inputs. Parity is with a truth that is computed otherwise, in float64 if possible."""

    name: str
    tier: str
    peer_name: str
    ours_name: str
    peer: Run
    ours: Run
    inputs: list[Any]  # fresh noise for each repeat in turn
    peer_truth: Tensor  # what `peer` should give for inputs[0]
    ours_truth: Tensor
    tolerance: float = 1e-4  # of the relative L2 error
    least_bytes: int = 0  # what ours must read and write at least, where bandwidth is the limit


class Protocol(NamedTuple):
    """How calls are timed; the same for all cases of a run."""

    device: torch.device
    warmup: int
    repeats: int
    clock: Clock | None = None
    stretch_s: float = 0.02  # a shorter call is repeated until it takes so long, and its time divided


def error(found: Tensor, truth: Tensor) -> float:
    """Relative L2 error."""
    truth = truth.double()
    return float((found.double() - truth).norm() / truth.norm())


@torch.no_grad()
def run_case(case: Case, protocol: Protocol) -> Json:
    """Print parity, then time, then the ratio if there is one; the same as plain data."""
    errors = error(case.peer(case.inputs[0]), case.peer_truth), error(case.ours(case.inputs[0]), case.ours_truth)
    print(
        f"\n{case.name}  [{case.tier}]\n  error: {case.peer_name} {errors[0]:.1e}, {case.ours_name} {errors[1]:.1e}",
        flush=True,
    )
    record = {"case": case.name, "tier": case.tier, "peer": case.peer_name, "ours": case.ours_name}
    record |= {"peer_error": errors[0], "ours_error": errors[1]}
    if not max(errors) <= case.tolerance:
        print(f"  outputs are off by more than {case.tolerance:.0e}: not timed")
        return {**record, "ratio": None, "why": "outputs differ"}
    inner = times_to_stretch(case, protocol)
    calls = [rotating(run, case.inputs, inner) for run in (case.peer, case.ours)]
    found = compare(*calls, protocol.warmup, protocol.repeats, protocol.device, protocol.clock)
    return record | report(case, found, inner)


def times_to_stretch(case: Case, protocol: Protocol) -> int:
    """How often the quicker of both must run to fill the shortest time that is read off a clock."""
    runs = {str(i): rotating(run, case.inputs, 1) for i, run in enumerate((case.peer, case.ours))}
    found = interleave(runs, protocol.warmup, 3, protocol.device, protocol.clock)
    return max(1, math.ceil(protocol.stretch_s / min(t.typical_s for t in found.values())))


def rotating(run: Run, inputs: list[Any], inner: int) -> Callable[[], None]:
    """A call that takes the next input each time, so that no result and no cache line is reused."""
    following = cycle(inputs)

    def call() -> None:
        for _ in range(inner):
            run(next(following))

    return call


def report(case: Case, found: Comparison, inner: int) -> Json:
    times = {}
    for role, name, timing in (("peer", case.peer_name, found.peer), ("ours", case.ours_name, found.ours)):
        median, low, high = (1e3 * s / inner for s in (timing.typical_s, timing.min_s, timing.iqr_s))
        print(f"  {name:<44}{median:>11.3f} ms   min {low:.3f}, quartiles {high:.3f} apart, n {timing.n}")
        times[role] = {k: v / inner if k.endswith("_s") and v is not None else v for k, v in timing._asdict().items()}
    why = None if found.ratio else f"{case.peer_name} differs from itself by {found.noise:.1%}, more than {NOISE:.0%}"
    print(
        f"  ratio {found.ratio:.2f}x  (A against A: {found.noise:.1%})" if found.ratio else f"  no ratio: {why}",
        flush=True,
    )
    return {"times": times, "inner": inner, "noise": found.noise, "ratio": found.ratio, "why": why}


def diffusers_core(qkv: Tensor, heads: int) -> Tensor:
    """diffusers' own linear-attention processor on a fused projection (B, N, 3 C), without its projections."""
    third = qkv.shape[-1] // 3
    same = nn.Identity()
    attention = argparse.Namespace(
        to_q=lambda x: x[..., :third],
        to_k=lambda x: x[..., third : 2 * third],
        to_v=lambda x: x[..., 2 * third :],
        norm_q=None,
        norm_k=None,
        heads=heads,
        to_out=[same, same],
    )
    return SanaLinearAttnProcessor2_0()(attention, qkv)


def split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """A fused projection (B, N, 3 C) as three views (B, N, H, D)."""
    return tuple(part.unflatten(-1, (heads, -1)) for part in qkv.chunk(3, -1))


def naive_linear(qkv: Tensor, heads: int) -> Tensor:
    """Linear attention through its N x N weights, in float64: (B, N, C)."""
    return naive(qkv, heads, lambda q, k: normalised(q.relu() @ k.relu().mT))


def naive_softmax(qkv: Tensor, heads: int) -> Tensor:
    """Softmax attention through its N x N weights, in float64: (B, N, C)."""
    return naive(qkv, heads, lambda q, k: (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))


def normalised(weights: Tensor) -> Tensor:
    return weights / (weights.sum(-1, keepdim=True) + 1e-8)


def naive(qkv: Tensor, heads: int, weigh: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """One head at a time, so that its weights fit in memory."""
    q, k, v = (part.double().transpose(1, 2).flatten(0, 1) for part in split(qkv, heads))  # (B H, N, D)
    mixed = torch.stack([weigh(*pair) @ value for *pair, value in zip(q, k, v, strict=True)])
    return mixed.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


def sana_pair(depth: int, device: torch.device) -> tuple[SanaTransformer2DModel, Sana]:
    """SANA-0.6B at that depth twice, in float32 with the same random weights: diffusers' and ours."""
    torch.manual_seed(0)
    theirs = SanaTransformer2DModel(
        num_attention_heads=36,
        num_layers=depth,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        cross_attention_dim=1152,
        caption_channels=2304,
    )
    ours = Sana(depth=depth, channels=32, text_dim=2304)
    ours.load_state_dict(to_ours(theirs.state_dict(), depth))
    return theirs.eval().to(device), ours.eval().to(device)


def to_ours(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """diffusers' state of a SANA transformer under our names."""
    time, caption, block = (
        "time_embed.emb.timestep_embedder.linear_",
        "caption_projection.linear_",
        "transformer_blocks.{}.",
    )
    names = {
        "patch_embed.proj": "patch_embed.proj",
        **{f"time_embed.mlp.{i}": f"{time}{j}" for i, j in ((0, 1), (2, 2))},
        "time_block.1": "time_embed.linear",
        **{f"caption_embed.mlp.{i}": f"{caption}{j}" for i, j in ((0, 1), (2, 2))},
        "head.linear": "proj_out",
    }
    whole = {f"{ours}.{end}": state[f"{theirs}.{end}"] for ours, theirs in names.items() for end in ("weight", "bias")}
    whole |= {"caption_embed.norm.weight": state["caption_norm.weight"], "head.table": state["scale_shift_table"]}
    for i in range(depth):
        prefix = block.format(i)
        inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        whole |= {f"blocks.{i}.{k}": v for k, v in block_to_ours(inner).items()}
    return whole


def block_to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {
        "attention.proj": "attn1.to_out.0",
        "cross.q": "attn2.to_q",
        "cross.proj": "attn2.to_out.0",
        "ffn.depthwise": "ff.conv_depth",
    }
    found = {
        f"{ours}.{end}": state[f"{theirs}.{end}"] for ours, theirs in renamed.items() for end in ("weight", "bias")
    }
    return found | {
        "table": state["scale_shift_table"],
        "attention.qkv.weight": torch.cat([state[f"attn1.to_{x}.weight"] for x in "qkv"]),
        **{f"cross.kv.{end}": torch.cat([state[f"attn2.to_{x}.{end}"] for x in "kv"]) for end in ("weight", "bias")},
        "ffn.expand.weight": state["ff.conv_inverted.weight"].flatten(1),
        "ffn.expand.bias": state["ff.conv_inverted.bias"],
        "ffn.project.weight": state["ff.conv_point.weight"].flatten(1),
    }


class Step(NamedTuple):
    """A guided step (batch 2) of 0.6B-shaped models on side x side latents; 80 of 300 caption tokens are real."""

    depth: int
    side: int
    dtype: torch.dtype
    device: torch.device
    tolerance: float

    @torch.no_grad()
    def cases(self, wrap: Callable[[nn.Module], Callable[..., Any]] = lambda m: m, how: str = "") -> Iterable[Case]:
        """Truth is diffusers in float32; `wrap` may compile both models, and `how` says so."""
        theirs, ours = sana_pair(self.depth, self.device)
        text = Text(
            torch.randn(2, 300, 2304, device=self.device), torch.arange(300, device=self.device).expand(2, -1) < 80
        )
        inputs = [torch.randn(2, 32, self.side, self.side, device=self.device) for _ in range(3)]
        truth = peer_step(theirs, inputs[0], text)
        text, inputs = Text(text.tokens.to(self.dtype), text.mask), [x.to(self.dtype) for x in inputs]
        if self.dtype != torch.float32:
            theirs, ours = theirs.to(self.dtype), ours.to(self.dtype)
        peer, runs = partial(peer_step, wrap(theirs), text=text), self.ours(ours, wrap(ours), text)
        shape = f"0.6B step{how}, {self.depth} blocks, batch 2, latents {self.side}x{self.side}, {self.dtype}"
        for tier, name, run in runs:
            title = shape.replace("torch.", "")
            yield Case(title, tier, f"diffusers{how}", name, peer, run, inputs, truth, truth, self.tolerance)

    def ours(self, dit: Sana, call: Callable[..., Tensor], text: Text) -> list[tuple[str, str, Run]]:
        t = torch.full((2,), 0.5, device=self.device)
        cached, cut = dit.prepare(text), dit.prepare(Text(text.tokens[:, :80], text.mask[:, :80]))
        return [
            (SAME, "ours", lambda x: call(x, t, text)),
            (EXACT, "ours, text prepared once", lambda x: call(x, t, cached)),
            (EXACT, "ours, prepared once, padding cut", lambda x: call(x, t, cut)),
        ]


def peer_step(model: Callable[..., Any], x: Tensor, text: Text) -> Tensor:
    """diffusers' transformer at t = 0.5."""
    t = torch.full((len(x),), 500.0, device=x.device)
    keep = text.mask.to(text.tokens.dtype)
    return model(x, text.tokens, timestep=t, encoder_attention_mask=keep, return_dict=False)[0]


def environment(device: torch.device) -> Json:
    """Where a result comes from."""
    packages = {p: metadata.version(p) for p in ("torch", "diffusers", "triton") if installed(p)}
    return {
        "device": device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": packages,
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "commit": commit(),
    }


def installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def commit() -> str:
    """The checkout's commit, with "+" where files differ from it; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def table(records: list[Json]) -> str:
    """All cases, one line each: the last thing that is printed."""
    wide = max(len(r["case"]) for r in records)
    lines = [f"{'case':<{wide}}  {'tier':<17}{'peer ms':>10}{'ours ms':>10}{'ratio':>8}  ours / peer"]
    for r in records:
        times = r.get("times", {})
        cells = [milliseconds(times[role]) if times else "-" for role in ("peer", "ours")]
        ratio = f"{r['ratio']:.2f}x" if r["ratio"] else "-"
        names = f"{r['ours']} / {r['peer']}"
        lines.append(f"{r['case']:<{wide}}  {r['tier']:<17}{cells[0]:>10}{cells[1]:>10}{ratio:>8}  {names}")
    return "\n".join(lines)


def milliseconds(timing: Json) -> str:
    return f"{1e3 * (timing['median_s'] if timing['device_s'] is None else timing['device_s']):.3f}"


def save(name: str, settings: Json, records: list[Json], device: torch.device, extra: Json | None = None) -> Path:
    """results/<name>-<device>.json"""
    found = environment(device)
    slug = re.sub(r"[^a-z0-9]+", "-", str(found["device"]).lower()).strip("-")
    path = RESULTS / f"{name}-{slug}.json"
    path.parent.mkdir(exist_ok=True)
    whole = {**found, "settings": settings, **(extra or {}), "cases": records}
    path.write_text(json.dumps(whole, indent=2) + "\n")
    return path
