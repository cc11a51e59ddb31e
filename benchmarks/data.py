"""Speed of the data path on one machine: cached reads, an index of millions of rows, and how long a training waits.

    python benchmarks/data.py                       # writes results/data-<device>.json; about 3 GB of disk, 5 minutes
    python benchmarks/data.py --rows 20000 --quick  # checks that it works; writes nothing

Everything is synthetic: latents and text features of random numbers in the sizes of SANA at 512 pixels with Gemma-2
(32 x 16 x 16 in fp16, 45 tokens x 2304 in bf16 on average), an index with random captions. The files are read from the
page cache. Seconds of the processor are beside seconds of the clock, since the machine may be shared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

DIT = {"name": "sana", "dim": 128, "depth": 4, "cross_heads": 4}
"""The toy denoiser whose training is watched."""

SAMPLES = 1536
BATCH = 64


# synthetic files


def write_index(folder: Path, rows: int, captions: int) -> None:
    """An index of `rows` pictures, and the pointer by which `pictures` finds it without them."""
    from sana_lab.data import disk_columns, pictures
    from sana_lab.data.picture_index import COLUMNS

    rng, digest = np.random.default_rng(0), f"synthetic {rows} {captions}"
    with disk_columns.Writer(folder / "index" / "synthetic", COLUMNS) as writer:
        name_end = caption_end = row_end = 0
        for first in range(0, rows, 2**18):
            n = min(2**18, rows - first)
            writer.extend("name", b"".join(b"%015d.jpg" % i for i in range(first, first + n)))
            writer.extend("name_end", name_end + 19 * np.arange(1, n + 1))
            lengths = rng.integers(40, 200, n * captions)
            writer.extend("caption", np.full(int(lengths.sum()), ord("a"), np.uint8))
            writer.extend("caption_end", caption_end + np.cumsum(lengths))
            writer.extend("row_captions_end", row_end + captions * np.arange(1, n + 1))
            writer.extend("score", rng.uniform(20, 32, n * captions))
            writer.extend("share", rng.uniform(size=n))
            writer.extend("split", np.zeros(n))
            writer.extend("height", rng.integers(256, 4096, n))
            writer.extend("width", rng.integers(256, 4096, n))
            for column in ("file", "offset", "length"):
                writer.extend(column, np.zeros(n))
            name_end, caption_end, row_end = name_end + 19 * n, caption_end + int(lengths.sum()), row_end + captions * n
        facts = {"rows": rows, "digest": digest, "scores": True, "groups": False, "skipped": 0, "examples": ""}
        writer.finish(facts)
    pointer = folder / "index" / f"{pictures._key(str((folder / 'absent').absolute()), None)}.json"
    pointer.write_text(json.dumps({"index": "synthetic"}))


def write_parts(folder: Path) -> None:
    """Weights of the tiny networks that the cache is said to be made by."""
    from safetensors.torch import save_file

    from sana_lab.config import specs

    for kind, spec in parts(folder).items():
        plain = {k: v for k, v in spec.items() if k != "weights"}
        save_file(specs.build(kind, plain).state_dict(), spec["weights"])


def parts(folder: Path) -> dict[str, Any]:
    """Specs of an autoencoder of SANA's factor and channels, in the folder `toy` of 8x and 4, and a text encoder."""
    widths, latent = ([8] * 4, 4) if folder.name == "toy" else ([8] * 6, 32)
    vae = {"name": "vae", "widths": widths, "latent": latent, "groups": 2, "depth": 1, "middle_attention": False}
    t5 = {"name": "t5", "width": 32, "layers": 1, "heads": 2}
    return {
        "autoencoder": {**vae, "weights": str(folder / "vae.safetensors")},
        "text_encoder": {**t5, "weights": str(folder / "t5.safetensors")},
    }


def cached(folder: Path, **options: Any) -> Any:
    """`data: cached` of the synthetic files."""
    from sana_lab.data.cached import Cached

    size, multiple = (64, 8) if folder.name == "toy" else (512, 32)
    source = {"name": "pictures", "root": str(folder / "absent"), "size": size, "multiple": multiple, "held_out": 0}
    source |= {"index": str(folder / "index"), "buckets": "sana"}
    given = {"batch": BATCH, "workers": 0, "choice": {"rule": "power", "min_score": 22.0}, **options}
    return Cached(source, **parts(folder), cache=str(folder / "cache"), **given)


def write_cache(folder: Path, tokens: int, width: int) -> None:
    """Shards of random latents and text features, with about `tokens` tokens for each caption."""
    from sana_lab.data import cache_keys
    from sana_lab.data.ragged import Encoded

    data, random = cached(folder), torch.Generator().manual_seed(0)
    numbers = torch.randn(2**22, generator=random)
    ends, vae = data.table["row_captions_end"], parts(folder)["autoencoder"]
    factor, channels = 2 ** (len(vae["widths"]) - 1), vae["latent"]

    def some(length: int, width: int) -> torch.Tensor:
        return numbers.repeat(-(-length * width // len(numbers)))[: length * width].view(length, width)

    def latents(rows: range) -> Encoded:
        shapes = [data.shapes[int(k)] for k in data.source.buckets_of[rows.start : rows.stop]]
        lengths = [channels * (h // factor) * (w // factor) for h, w in shapes]
        return Encoded(some(sum(lengths), 1).half(), lengths, {})

    def text(rows: range) -> Encoded:
        count = int(ends[rows.stop - 1] - (ends[rows.start - 1] if rows.start else 0))
        lengths = torch.randint(tokens // 3, 2 * tokens - tokens // 3 + 1, (count,), generator=random).tolist()
        return Encoded(some(sum(lengths), width).bfloat16(), lengths, {})

    stores = data.stores
    for store, encode in ((stores.latents, latents), (stores.text, text)):
        cache_keys.begin(store.folder, store.facts, store.per_shard)
        store.fill(encode)
        store.join()
    stores.null.fill(lambda rows: Encoded(torch.randn(1, width, generator=random).bfloat16(), [1], {}))
    stores.null.join()


def write_hollow_cache(folder: Path) -> None:
    """The index and the shards of millions of rows, whose latents and features are holes in the files."""
    from sana_lab.data import cache_keys, disk_columns
    from sana_lab.data.ragged import _COLUMNS

    data = cached(folder)
    heights, widths = np.array(data.shapes).T
    area = (heights // 32) * (widths // 32) * 32
    per_row = int(data.table["row_captions_end"][0])
    plain = {"latents": (1, "float16", "F16"), "text": (2304, "bfloat16", "BF16"), "null": (2304, "bfloat16", "BF16")}
    for store in data.stores.each():
        width, kind, code = plain[store.kind]
        cache_keys.begin(store.folder, store.facts, store.per_shard) if store.kind != "null" else None
        with disk_columns.Writer(store.folder / "index", _COLUMNS) as writer:
            for k in range(len(store)):
                inside = range(store.rows)[k * store.per_shard : (k + 1) * store.per_shard]
                if store.kind == "latents":
                    lengths = area[data.source.buckets_of[inside.start : inside.stop]]
                else:
                    lengths = np.full(len(inside) * (per_row if store.kind == "text" else 1), 45)
                ends = np.concatenate([[0], np.cumsum(lengths)])
                bytes_of = int(ends[-1]) * width * 2
                shape = {"dtype": code, "shape": [int(ends[-1]), width], "data_offsets": [0, bytes_of]}
                last = {"dtype": "I64", "shape": [len(ends)], "data_offsets": [bytes_of, bytes_of + 8 * len(ends)]}
                header = json.dumps({"data": shape, "ends": last}).encode()
                path = store._path(k)
                with path.open("wb") as file:
                    file.write(len(header).to_bytes(8, "little") + header)
                    file.truncate(8 + len(header) + bytes_of + 8 * len(ends))
                writer.extend("start", ends[:-1])
                writer.extend("length", lengths)
                writer.extend("bytes", [path.stat().st_size])
            facts = {"width": width, "type": kind, "unreadable": 0, "examples": {}, "rows": store.rows}
            writer.finish({**facts, "per_shard": store.per_shard})


# measurements


def read_speed(folder: Path, seconds: float) -> dict[str, float]:
    """Samples a second of one process that assembles training batches, from the page cache."""
    data = cached(folder)
    data.setup()
    for number in range(SAMPLES // BATCH * 2):
        data.train_batch(number)
    count, number = 0, SAMPLES
    wall, processor, bytes_read = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < seconds:
        batch = data.train_batch(number)
        count, number = count + len(batch.prompts), number + 1
        bytes_read += batch.latents.nbytes // 2 + int(batch.text.mask.sum()) * batch.text.tokens.shape[2] * 2
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    rates = {"samples_per_s": count / wall, "samples_per_processor_s": count / processor}
    return {**rates, "kilobytes_per_sample": bytes_read / count / 1e3, "samples": count}


def opening(folder: Path) -> dict[str, float]:
    """Seconds and memory of opening an index and a cache of many rows and reading a first batch, in this process."""
    cached(folder.parent / "sana").stores  # noqa: B018  # imports what the networks need

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    before, started, processor = resident(), time.perf_counter(), time.process_time()
    data = cached(folder)
    data.source.rows  # noqa: B018
    opened = time.perf_counter() - started
    data.setup()
    whole = time.perf_counter() - started
    batch = data.train_batch(1_000)
    ended, used = time.perf_counter() - started, time.process_time() - processor
    assert len(batch.prompts) == BATCH
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3
    seconds = {"index_s": opened, "with_cache_s": whole, "with_first_batch_s": ended, "processor_s": used}
    return {"rows": data.len_train, **seconds, "memory_mb": resident() - before, "peak_mb": peak - before}


def idle_share(folder: Path, workers: int, steps: int) -> dict[str, float]:
    """How much of a training's time passes while it waits for the next batch."""
    import lightning as L

    from sana_lab.config import specs

    waited: list[float] = []

    class Timed:
        """A loader whose waits are timed."""

        def __init__(self, loader: Any) -> None:
            self.loader = loader

        def __iter__(self) -> Iterator[Any]:
            batches = iter(self.loader)
            while True:
                started = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    return
                waited.append(time.perf_counter() - started)
                yield batch

    ends: list[float] = []

    class Clock(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            ends.append(time.perf_counter())

    data = cached(folder, workers=workers)
    data.setup()
    loader = data.train_dataloader()
    text = {**parts(folder)["text_encoder"], "width": data.stores.text.table.meta["width"]}
    text = {k: v for k, v in text.items() if k != "weights"}
    vae = {k: v for k, v in parts(folder)["autoencoder"].items() if k != "weights"}
    system = specs.build("system", {"name": "dit", "dit": DIT, "autoencoder": vae, "text_encoder": text})
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    options |= {"enable_progress_bar": False, "max_steps": steps, "callbacks": [Clock()]}
    L.Trainer(**options).fit(system, train_dataloaders=Timed(loader))
    skipped = steps // 4  # the first ones start the workers
    span = ends[-1] - ends[skipped - 1]
    idle = sum(waited[skipped:steps])
    return {"workers": workers, "idle_share": idle / span, "step_ms": 1e3 * span / (steps - skipped), "steps": steps}


def in_a_process(folder: Path) -> dict[str, float]:
    """`opening` in a fresh process."""
    command = [sys.executable, __file__, "--open", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=5_000_000, help="rows of the large index")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; writes nothing")
    parser.add_argument("--folder", type=Path, help="where the synthetic files are written (a temporary folder)")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.open:
        print(json.dumps(opening(options.open)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        results = run(Path(name), options.rows, options.quick)
    print(json.dumps(results, indent=1))
    if not options.quick:
        from common import save

        print(save("data", {"rows": options.rows, "batch": BATCH}, [], torch.device("cpu"), results))


def run(folder: Path, rows: int, quick: bool) -> dict[str, Any]:
    """All measurements, with the load of the machine before each."""
    results: dict[str, Any] = {}
    for size, (tokens, width) in {"sana": (45, 2304), "toy": (16, 64)}.items():
        place = folder / size
        place.mkdir()
        write_index(place, 256 if quick else SAMPLES, 2)
        write_parts(place)
        write_cache(place, tokens, width)
        results[f"read_{size}"] = {"load": os.getloadavg()[0], **read_speed(place, 1.0 if quick else 10.0)}
    for workers in (0, 1):
        watched = idle_share(folder / "toy", workers, 8 if quick else 40)
        results[f"idle_{workers}_workers"] = {"load": os.getloadavg()[0], **watched}
    large = folder / "large"
    large.mkdir()
    write_index(large, rows, 1)
    write_parts(large)
    write_hollow_cache(large)
    results["open"] = {"load": os.getloadavg()[0], **in_a_process(large)}
    return results


if __name__ == "__main__":
    main()
