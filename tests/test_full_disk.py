"""A disk that is full: one line with path and room, whole old files, and a rerun that goes on."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch

from sana_lab.config import digests
from sana_lab.config.atomic_write import DiskFull
from sana_lab.data.shards import Shards
from sana_lab.evaluation.distances import reference
from sana_lab.evaluation.distances.moments import Gaussian

NO_ROOM = r"no room for it: .* MiB are free in"


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """A limit on the size of files, which fails a write as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_shards_that_do_not_fit_are_made_on_the_next_run(tmp_path: Path):
    def encode(rows: range) -> tuple[torch.Tensor, list[tuple[str, ...]]]:
        return torch.ones(len(rows), 4, 32, 32), [("a red circle",) for _ in rows]

    with small_disk(10_000), pytest.raises(DiskFull, match=NO_ROOM) as caught:
        Shards(tmp_path, "train", 8, 4, "f").fill(encode)
    assert caught.value.filename == str(tmp_path / "train-00000.safetensors")
    assert not [p for p in tmp_path.iterdir() if p.name.endswith((".partial", ".tmp"))]
    shards = Shards(tmp_path, "train", 8, 4, "f")
    shards.fill(encode)
    assert shards.latents(range(8)).sum() == 8 * 4 * 32 * 32


def test_statistics_that_do_not_fit_leave_the_old_file(tmp_path: Path):
    path = tmp_path / "real.safetensors"
    path.write_bytes(b"old")
    statistics = reference.Reference(Gaussian(torch.zeros(200).double(), torch.eye(200).double()), None, {"format": 1})
    with small_disk(10_000), pytest.raises(DiskFull, match=NO_ROOM):
        reference.save(statistics, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_digests_are_right_without_room_for_their_cache(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(digests, "LARGE", 0)
    monkeypatch.setattr(digests, "FRESH", -1.0)
    Path("runs").mkdir()
    digests.CACHE.write_text(json.dumps({"k" * 64: "d" * 64}))
    Path("a").write_bytes(b"content")
    with small_disk(100):
        digest = digests.sha256(Path("a"))
    assert digest == digests.sha256(Path("a"))
    assert json.loads(digests.CACHE.read_text()) == {"k" * 64: "d" * 64}
    assert [p.name for p in Path("runs").iterdir()] == ["digests.json"]


SCRIPT = """
mount -t tmpfs -o size={size}k none runs || exit 77
{python} -m sana_lab train tiny > first 2>&1; echo $? > status
mount -o remount,size=64m runs
{python} -m sana_lab train tiny > second 2>&1; echo $? >> status
find runs -name '*.partial' > left; ls runs/models/* > models
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("unshare") is None, reason="mounts a small disk")
@pytest.mark.parametrize("size", [400, 1100, 1300])  # KiB: within the database, the checkpoint and the weights
def test_a_training_on_a_small_disk_goes_on_once_there_is_room(here: Path, size: int):
    tiny.write_experiment(here, changes={"prompts": []})
    Path("runs").mkdir()
    script = SCRIPT.format(size=size, python=sys.executable)
    done = subprocess.run(["unshare", "--mount", "--map-root-user", "sh", "-c", script], capture_output=True, text=True)
    if done.returncode == 77 or not Path("status").exists():
        pytest.skip(f"this machine mounts no disk: {done.stderr}")
    first, second = Path("status").read_text().split()
    said = [line for line in Path("first").read_text().splitlines() if line.startswith("sana-lab: ")]
    assert "Traceback" not in Path("first").read_text()
    assert first == "0" or (first == "1" and len(said) == 1), said
    assert second == "0", Path("second").read_text()[-2000:]
    assert "weights.safetensors" in Path("models").read_text()
    assert Path("left").read_text() == ""
