"""`data: latents`: what is kept is what the autoencoder gives, once, whatever is killed or started twice."""

import json
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sana_lab.checkpoints.build import build
from sana_lab.config import specs
from sana_lab.data.latents import Latents, state_digest
from sana_lab.data.shards import Shards

VAE = {**tiny.VAE, "widths": [8, 8, 8], "middle_attention": False}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A file of weights, so that each building of the autoencoder gives the same one."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vae.safetensors"
    state = specs.build("autoencoder", VAE).state_dict()
    save_file({f"autoencoder.{k}": v for k, v in state.items()}, path)
    return str(path)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Ten pictures with three captions each."""
    root = tmp_path / "pictures"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"picture {i}\nphoto {i}\nimage\u2028{i}\n", "utf-8")
    return root


@pytest.fixture
def make(pictures, weights, tmp_path):
    """Latents of the ten pictures with options."""

    def make(source: dict | None = None, **options) -> Latents:
        spec = {"name": "folder", "root": str(pictures), "size": 16, "held_out": 2} | (source or {})
        given = {"batch": 3, "cache": str(tmp_path / "cache"), "shard": 4, **options}
        return Latents(spec, VAE | {"weights": weights}, **given)

    return make


def source_of(data: Latents):
    source = specs.build("data", data.source)
    source.setup("fit")
    return source


def files(data: Latents) -> dict[str, int]:
    """Files of the cache and when they were written."""
    folder = data.stores.train.folder
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.suffix in (".safetensors", ".jsonl")}


def test_kept_latents_are_those_of_the_autoencoder(make):
    data = make()
    autoencoder = build("autoencoder", data.autoencoder).eval()
    for split, count in (("train", 8), ("val", 2)):
        pictures = source_of(data).batch_at(range(count), split)
        kept = data.batch_at(range(count), split)
        with torch.no_grad():
            torch.testing.assert_close(kept.latents, autoencoder.encode(pictures.images), atol=1e-5, rtol=1e-5)
        assert kept.images is None
        assert kept.latents.shape == (count, 4, 4, 4)
        assert [p[-1] for p in kept.prompts] == [p[-1] for p in pictures.prompts]
    assert (data.len_train, data.len_val, data.size) == (8, 2, 16)


def test_every_item_once_an_epoch_and_every_caption_in_turn(make):
    data = make(batch=4)
    stream = iter(data.train_dataloader())
    epochs = [next(stream).prompts + next(stream).prompts for _ in range(3)]
    items = {p[-1] for p in epochs[0]}
    assert len(items) == 8
    assert all({p[-1] for p in epoch} == items for epoch in epochs)
    assert len({p for epoch in epochs for p in epoch}) == 8 * 3


def test_no_more_captions_than_asked_for(make):
    data = make(captions=2)
    assert {len(c) for c in data.stores.train.captions} == {2}
    assert {len(c) for c in make(captions=9).stores.train.captions} == {3}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_a_function_of_seed_and_step(make, workers):
    data, again = make(), make(workers=workers)
    for number, batch in zip(range(7), again.train_dataloader(), strict=False):
        expected = data.train_batch(number)
        assert torch.equal(batch.latents, expected.latents)
        assert batch.prompts == expected.prompts
    assert make(seed=1).train_batch(0).prompts != data.train_batch(0).prompts


def test_validation_in_order_with_first_captions(make):
    data = make({"held_out": 5}, batch=2)
    source = source_of(data)
    prompts = [p for batch in data.val_dataloader() for p in batch.prompts]
    assert prompts == source.prompts_at(range(5), "val")
    assert len(data.val_dataloader()) == 3


def test_more_items_than_pictures_are_further_views(make):
    data = make({"crop": "random", "held_out": 2}, items=20)
    assert data.len_train == 20
    source = source_of(data)
    autoencoder = build("autoencoder", data.autoencoder).eval()
    views = torch.cat([source.batch_at([5], draw=d).images for d in (0, 1)])
    with torch.no_grad():
        torch.testing.assert_close(data.batch_at([5, 13]).latents, autoencoder.encode(views), atol=1e-5, rtol=1e-5)
    assert not torch.equal(*data.batch_at([5, 13]).latents)


def test_an_endless_source_needs_a_number(make, weights, tmp_path):
    shapes = {"name": "shapes", "size": 16, "held_out": 3}
    with pytest.raises(ValueError, match=r"no end.*`items`"):
        Latents(shapes, VAE | {"weights": weights}, cache=str(tmp_path)).setup("fit")
    data = Latents(shapes, VAE | {"weights": weights}, items=5, shard=2, cache=str(tmp_path))
    source = source_of(data)
    assert data.batch_at(range(5)).latents.shape == (5, 4, 4, 4)
    assert (data.len_train, data.len_val) == (5, 3)
    said = {source.batch_at([4], draw=d).prompts[0] for d in range(4)}
    assert set(data.stores.train.captions[4]) == said


@pytest.mark.parametrize("options", [{"items": 0}, {"captions": 0}, {"batch": 0}, {"shard": 0}, {"workers": -1}])
def test_numbers_out_of_range(make, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make(**options)


def test_a_size_that_the_autoencoder_does_not_divide(make):
    with pytest.raises(ValueError, match="nearest is 16x16"):
        make({"size": 18}).setup("fit")


def test_a_cache_that_cannot_be_written(make, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write to .*file.*`cache`"):
        make(cache=str(tmp_path / "file")).setup("fit")


def test_a_spec_builds_one(make):
    data = make()
    spec = {"name": "latents", "source": data.source, "autoencoder": data.autoencoder, "cache": str(data.cache)}
    assert specs.build("data", spec | {"shard": 4}).digest() == data.digest()
    with pytest.raises(specs.SpecError, match="did you mean 'captions'"):
        specs.resolve("data", spec | {"caption": 3})


class TestCache:
    def test_encoded_once(self, make):
        before = files(make())
        assert len(before) == 2 * (2 + 1)
        assert files(make()) == before

    def test_batch_and_seed_of_the_stream_change_nothing(self, make):
        before = files(make())
        assert files(make({"batch": 7, "workers": 1}, batch=5, seed=9)) == before

    def test_whatever_changes_the_latents_makes_another_set(self, make, pictures, weights, tmp_path):
        digests = [make().digest(), make({"size": 32}).digest(), make({"held_out": 3}).digest()]
        digests.append(make(captions=2).digest())
        Image.new("RGB", (20, 24)).save(pictures / "3.png")
        digests.append(make().digest())
        other = {k: v + 1 for k, v in load_file(weights).items()}
        save_file(other, tmp_path / "other.safetensors")
        data = make()
        data.autoencoder = VAE | {"weights": str(tmp_path / "other.safetensors")}
        digests.append(data.digest())
        assert len(set(digests)) == 6

    def test_the_same_content_elsewhere_is_the_same_set(self, make, pictures, tmp_path):
        before = files(make())
        pictures.rename(tmp_path / "moved")
        assert files(make({"root": str(tmp_path / "moved")})) == before

    def test_a_longer_set_goes_on_from_a_shorter_one(self, make):
        before = files(make(items=6))
        longer = make(items=8)
        after = files(longer)
        assert after["train-00000.safetensors"] == before["train-00000.safetensors"]
        assert after["train-00001.safetensors"] != before["train-00001.safetensors"]
        shorter = make(items=6)
        assert files(shorter) == after
        assert len(shorter.stores.train.captions) == 6
        assert torch.equal(shorter.batch_at(range(6)).latents, longer.batch_at(range(6)).latents)

    @pytest.mark.parametrize("harm", ["cut", "index", "gone", "stranger"])
    def test_a_damaged_shard_is_made_again(self, make, harm):
        data = make()
        folder, latents = data.stores.train.folder, data.batch_at(range(8)).latents
        before = files(data)
        shard, index = folder / "train-00001.safetensors", folder / "train-00001.jsonl"
        if harm == "cut":
            os.truncate(shard, shard.stat().st_size - 10)
        elif harm == "index":
            index.write_text(index.read_text("utf-8").replace("photo", "video"), "utf-8")
        elif harm == "gone":
            shard.unlink()
        else:
            save_file({"latents": torch.zeros(4, 4, 4, 4)}, shard, {"fingerprint": "another", "index": ""})
        again = make()
        assert torch.equal(again.batch_at(range(8)).latents, latents)
        changed = {name for name, when in files(again).items() if when != before[name]}
        assert changed == {shard.name, index.name}

    def test_memory_maps_are_not_pickled(self, make):
        data = make()
        data.batch_at([0, 7])
        copy = pickle.loads(pickle.dumps(data))
        assert copy.stores.train._open == {}
        assert torch.equal(copy.batch_at([0, 7]).latents, data.batch_at([0, 7]).latents)


def slow_rows(rows: range) -> tuple[torch.Tensor, list[tuple[str, ...]]]:
    """Rows that tell their number and the process that made them, slowly enough to be caught at it."""
    time.sleep(0.15)
    latents = torch.tensor([[i, os.getpid()] for i in rows], dtype=torch.float64).reshape(-1, 2, 1, 1)
    return latents, [(f"row {i}",) for i in rows]


def fill(folder: Path) -> None:
    Shards(folder, "train", 22, 4, "print").fill(slow_rows)


def contents(folder: Path) -> tuple[list[int], set[int]]:
    """(row numbers, processes that made them)"""
    rows = torch.cat([load_file(p)["latents"] for p in sorted(folder.glob("*.safetensors"))])[:, :, 0, 0]
    return rows[:, 0].int().tolist(), set(rows[:, 1].int().tolist())


class TestProcesses:
    def start(self, folder: Path) -> multiprocessing.Process:
        process = multiprocessing.get_context("fork").Process(target=fill, args=(folder,))
        process.start()
        return process

    def test_two_at_once_share_the_work(self, tmp_path):
        processes = [self.start(tmp_path) for _ in range(2)]
        for process in processes:
            process.join(60)
        assert [p.exitcode for p in processes] == [0, 0]
        rows, makers = contents(tmp_path)
        assert rows == list(range(22))
        assert makers == {p.pid for p in processes}

    def test_a_killed_one_is_resumed_at_the_missing_shard(self, tmp_path):
        process = self.start(tmp_path)
        while len(list(tmp_path.glob("*.safetensors"))) < 2:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        done = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")}
        assert 2 <= len(done) < 6
        fill(tmp_path)
        rows, makers = contents(tmp_path)
        assert rows == list(range(22))
        assert makers == {process.pid, os.getpid()}
        assert all((tmp_path / name).stat().st_mtime_ns == when for name, when in done.items())

    def test_a_waiting_one_takes_over_from_a_killed_one(self, tmp_path):
        first, second = self.start(tmp_path), self.start(tmp_path)
        time.sleep(0.2)
        os.kill(first.pid, signal.SIGKILL)
        second.join(60)
        first.join(60)
        assert second.exitcode == 0
        assert contents(tmp_path)[0] == list(range(22))

    def test_an_error_while_encoding_leaves_nothing_half_done(self, tmp_path):
        def broken(rows: range):
            if rows.start >= 8:
                raise RuntimeError("out of memory")
            return slow_rows(rows)

        store = Shards(tmp_path, "train", 22, 4, "print")
        with pytest.raises(RuntimeError, match="out of memory"):
            store.fill(broken)
        assert len(list(tmp_path.glob("*.safetensors"))) == 2
        store.fill(slow_rows)
        assert contents(tmp_path)[0] == list(range(22))


def test_index_is_one_line_a_row(make):
    data = make()
    lines = (data.stores.train.folder / "train-00000.jsonl").read_text("utf-8").split("\n")
    assert len(lines) == 5
    assert [tuple(json.loads(line)["captions"]) for line in lines[:4]] == data.stores.train.captions[:4]
    assert any("\u2028" in line for line in lines)  # a line separator that must not end the row


def test_state_digest_sees_values_names_and_types():
    states = [{"a": torch.zeros(3)}, {"b": torch.zeros(3)}, {"a": torch.zeros(3).bfloat16()}, {"a": torch.ones(3)}]
    states.append({"a": torch.zeros(3, 1)})
    modules = []
    for state in states:
        module = torch.nn.Module()
        for name, value in state.items():
            module.register_buffer(name, value)
        modules.append(module)
    assert len({state_digest(m) for m in modules}) == 5
    assert state_digest(torch.nn.BatchNorm2d(2)) == state_digest(torch.nn.BatchNorm2d(2))  # has a 0-dimensional buffer


class Recorder(L.LightningModule):
    """Remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []

    def training_step(self, batch, index):
        self.seen.append(batch.prompts)
        return (self.weight - batch.latents.mean()).square()

    def validation_step(self, batch, index):
        assert batch.latents.shape[1:] == (4, 4, 4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's, not ours
def test_a_resumed_run_goes_on_where_it_stopped(make, tmp_path):
    def fit(steps: int, checkpoint: Path | None = None) -> tuple[list[list[str]], L.Trainer]:
        module = Recorder()
        trainer = tiny.trainer(steps)
        trainer.fit(module, datamodule=make(), ckpt_path=checkpoint)
        return module.seen, trainer

    whole, _ = fit(6)
    first, trainer = fit(4)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    second, _ = fit(6, tmp_path / "some.ckpt")
    assert first + second == whole
    assert whole == [make().train_batch(n).prompts for n in range(6)]


def test_images_are_those_that_the_latents_are_of(make):
    """Also on later turns, in which a row is another crop of its picture."""
    data = make({"crop": "random", "held_out": 0}, items=25, images=True)
    rows = [0, 9, 10, 24]
    batch = data.batch_at(rows)
    autoencoder = build("autoencoder", data.autoencoder).eval()
    with torch.no_grad():
        torch.testing.assert_close(autoencoder.encode(batch.images), batch.latents, atol=1e-2, rtol=1e-2)
    assert not torch.equal(batch.images[0], batch.images[2])  # picture 0 on its first and second turn
    plain = make({"crop": "random", "held_out": 0}, items=25)
    assert (plain.batch_at(rows).images, plain.gives_images, data.gives_images) == (None, False, True)
    assert plain.digest() == data.digest()
