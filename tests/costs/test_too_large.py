"""Work that cannot fit is one line before it begins; what ships fits anywhere."""

import pytest
import tiny
import torch

from sana_lab import __main__
from sana_lab.config.validation import SpecError
from sana_lab.costs import too_large

LARGE = {
    "batch": (["data.batch=65536", "data.size=8192"], "data.batch is 65,536 images of 8192 px, 49,152 GiB of pixels"),
    "eval": (["eval.batch=65536", "data.size=8192"], "eval.batch is 65,536 images of 8192 px"),
    "bench": (["eval.bench_batch=65536", "eval.bench_size=8192"], "eval.bench_batch is 65,536 images of 8192 px"),
    "images": (["eval.images_per_prompt=10000000", "eval.prompts_per_task=1000"], "expected at most 10,000,000"),
    "prompts": ([f"prompts=[{','.join(['a'] * 9000)}]", "data.size=8192"], "prompts is 9,000 images of 8192 px"),
    "model": (["system.dit.dim=65536", "system.dit.depth=256"], "billion parameters"),
}


@pytest.mark.parametrize("name", LARGE)
def test_too_much_is_one_line_before_any_work(here, name: str, capsys: pytest.CaptureFixture[str]):
    tiny.write_experiment(here)
    overrides, words = LARGE[name]
    for verb in (["train"], *([["eval"]] if name in ("eval", "images") else [])):
        assert __main__.main([*verb, "tiny", *overrides]) == 1
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not (here / "runs/models").exists()


def test_bench_says_it_too(here, capsys: pytest.CaptureFixture[str]):
    tiny.write_experiment(here)
    assert __main__.main(["bench", "tiny", "--batch", "65536", "--size", "8192"]) == 1
    assert "--batch is 65,536 images of 8192 px" in capsys.readouterr().err


def test_as_much_as_the_memory_holds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(too_large, "total_memory", lambda: 3 * 64 * 64 * 4 * 10)
    too_large.check_pixels("data.batch", 10, 64)
    with pytest.raises(SpecError, match="expected at most 10 at this size"):
        too_large.check_pixels("data.batch", 11, 64)


def test_parameters_are_counted_without_memory():
    with torch.device("meta"):
        small, large = torch.nn.Linear(1000, 1000), torch.nn.Linear(10**6, 2 * 10**5)
    too_large.check_parameters(small)
    with pytest.raises(SpecError, match="the system has 200 billion parameters, 745 GiB"):
        too_large.check_parameters(large)
