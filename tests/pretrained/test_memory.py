"""Peak resident memory of loading."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from tiny_peers import nvlabs_training

from sana_lab.checkpoints import key_tables, rename_keys
from sana_lab.config import specs
from sana_lab.pretrained import export

MEASURE = """
import json, sys, time
from pathlib import Path

import torch

from sana_lab import pretrained
from sana_lab.checkpoints import formats, weights
from sana_lab.config import specs
from sana_lab.pretrained import imported, pipeline, released, restore


def memory(key):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


with torch.device("meta"):
    specs.build("dit", {"name": "sana", "depth": 1}, channels=32, text_dim=8)  # imports everything
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
began = time.perf_counter()
dit = pretrained.load(sys.argv[1])
seconds = time.perf_counter() - began
for p in dit.parameters():
    p.detach().flatten().view(torch.uint8)[::4096].sum()  # touches every page
size = sum(p.numel() * p.element_size() for p in dit.parameters())
print(json.dumps({"size": size, "extra": memory("VmHWM") - before, "seconds": seconds, "dtype": str(p.dtype)}))
"""


def measure(path: Path) -> dict[str, Any]:
    process = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    return json.loads(process.stdout)


def wide_files(folder: Path, depth: int) -> list[Path]:
    """A fp16 DiT as wide as SANA-1.6B: NVlabs' .pth with both states and a training's, and diffusers' folders."""
    with torch.device("meta"):
        dit = specs.build(
            "dit", {"name": "sana", "dim": 2240, "depth": depth, "cross_heads": 20}, channels=32, text_dim=2304
        )
    state = {k: torch.ones(v.shape, dtype=torch.float16) for k, v in dit.state_dict().items()}
    theirs = rename_keys.to_theirs(state, key_tables.sana_nvlabs(dit.spec))
    states = {"state_dict": theirs, "state_dict_ema": {k: v.clone() for k, v in theirs.items()}}
    torch.save({**states, **nvlabs_training({"a": torch.zeros(10_000_000)})}, folder / "a.pth")
    dit.load_state_dict(state, assign=True)
    export.export(dit, folder / "one")
    shutil.copytree(folder / "one", folder / "shards")
    whole = folder / "shards/diffusion_pytorch_model.safetensors"
    huggingface_hub.save_torch_state_dict(
        load_file(whole), folder / "shards", filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size="200MB",
    )  # fmt: skip
    return [folder / name for name in ("a.pth", "one", "shards")]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of memory")
def test_loading_takes_little_more_memory_than_the_weights(tmp_path: Path):
    """As wide as SANA-1.6B, with one block: the peak of resident memory, every weight read, is <= 1.3 x their size."""
    for path in wide_files(tmp_path, 1):
        record = measure(path)
        assert record["dtype"] == "torch.float16"
        assert record["size"] > 200e6
        assert record["extra"] <= 1.3 * record["size"], (path.name, record)
