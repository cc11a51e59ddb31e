"""Training, sampling and tiled decoding at 4096 px, in the memory that a dry run promised."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors.torch import save_file

from sana_lab.costs import allocator

SIZE = 4096
DCAE: tiny.Spec = {
    "name": "dcae",
    "widths": [8, 8, 16, 16, 32, 32],
    "encoder_depths": [0, 1, 1, 1, 1, 1],
    "decoder_depths": [0, 1, 1, 1, 1, 1],
    "attention_stages": 2,
    "latent": 16,
    "head_dim": 8,
    "tile": 32,
}
"""32x, so that the latents have 128 x 128 cells; encodes and decodes tiles of 1024 px."""

DIT = "{name: sana, dim: 256, depth: 3, cross_heads: 4, checkpointing: true, position: sincos, base: 128}"

EXPERIMENT = """
system: {{name: dit, dit: {dit}, autoencoder: {autoencoder}, text_encoder: {text}}}
data:
  name: features
  source:
    name: latents
    source: {{name: folder, root: pictures, size: {size}, held_out: 1}}
    autoencoder: {autoencoder}
  text_encoder: {text}
  batch: 1
sampling: {{solver: euler, steps: 2}}
trainer: {{max_steps: 2, accelerator: cpu, threads: 1, log_every: 1, validate_every: 2, checkpoint_every: 100}}
"""

WHOLE = """
system:
  name: text2image
  dit: experiment:big
  autoencoder: {autoencoder}
  text_encoder: {text}
  train_text: false
data: {{name: folder, root: pictures, size: {size}, held_out: 1, batch: 1}}
sampling: {{solver: euler, steps: 2}}
trainer: {{max_steps: 0, accelerator: cpu, threads: 1}}
"""


class Done(NamedTuple):
    """A finished process."""

    output: str
    peak_gib: float


def run(*words: str) -> Done:
    """`sana-lab` in a process of its own, with its largest resident size."""
    with subprocess.Popen(
        [sys.executable, "-m", "sana_lab", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, output
    return Done(output, usage.ru_maxrss / 2**20)


def gib(pattern: str, text: str) -> float:
    match = re.search(pattern + r"(\d+\.\d+)", text)
    assert match, text
    return float(match[1])


@pytest.fixture(scope="module")
def promised(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What the dry run prints, in a folder with three pictures."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "pictures").mkdir()
    random = np.random.default_rng(0)
    for i in range(3):
        picture = Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(root / f"pictures/{i}.jpg")
        (root / f"pictures/{i}.txt").write_text(f"picture number {i}")
    for kind, spec in (("autoencoder", DCAE), ("text_encoder", tiny.LLM)):
        save_file(tiny.build(kind, spec).state_dict(), root / f"{kind}.safetensors")
    encoders = {
        "autoencoder": json.dumps({**DCAE, "weights": "autoencoder.safetensors"}),
        "text": json.dumps({**tiny.LLM, "weights": "text_encoder.safetensors"}),
    }
    tiny.write(root, "experiments/big.yaml", EXPERIMENT.format(dit=DIT, size=SIZE, **encoders))
    tiny.write(root, "experiments/whole.yaml", WHOLE.format(size=SIZE, **encoders))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield run("train", "big", "--dry-run").output


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of other systems was not measured")
def test_a_training_on_4096_px_takes_what_the_dry_run_promised(promised: str):
    """Cached latents, activation checkpointing: encoding, two steps, a validation, and the weights."""
    done = run("train", "big")
    assert "trained: " in done.output
    assert done.peak_gib == pytest.approx(gib("; memory ", promised), rel=0.2)
    assert gib("activations and batches ", promised) > 0.5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of other systems was not measured")
def test_so_does_sampling_with_tiled_decoding(promised: str):
    promise = gib("memory of sampling an image of 4096 px, decoded in tiles of 32 latents: ", promised)
    run("train", "whole")  # its denoiser, unless that is done, and no step of its own
    done = run("sample", "a picture", "--model", "whole", "--out", "samples")
    (file,) = Path("samples").glob("*.png")
    with Image.open(file) as picture:
        assert picture.size == (SIZE, SIZE)
    assert done.peak_gib == pytest.approx(promise, rel=0.2)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_returns_to_the_system():
    """A hole in the heap below a block in use: 24 MiB that glibc keeps once its limit has grown."""
    script = f"""
import ctypes, os, sys
from sana_lab.costs.allocator import return_freed_memory
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
if sys.argv[1] == "yes":
    assert return_freed_memory({allocator.LEAST})
size = 24 * 2**20
c.free(c.malloc(30 * 2**20))  # raises the limit, unless it is fixed
block = c.malloc(size)
ctypes.memset(block, 1, size)
above = c.malloc(size)
ctypes.memset(above, 1, size)
before = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
c.free(block)
print(before - int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") > size * 0.9)
"""
    for returned, expected in (("yes", "True"), ("no", "False")):
        command = [sys.executable, "-c", script, returned]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout.strip() == expected, done.stderr
