"""The report of a state dict that does not fit."""

from pathlib import Path

import pytest
import tiny_peers
import torch
from tiny_peers import NVLABS_HINTS, nvlabs_state

from sana_lab.checkpoints.mismatch import LIMIT, check_state, mismatches
from sana_lab.config.validation import SpecError
from sana_lab.pretrained import loading


def test_every_mismatch_is_named_with_the_nearest_name(tmp_path: Path):
    state = nvlabs_state(tiny_peers.sana_transformer())
    state["blocks.1.attn.prj.weight"] = state.pop("blocks.1.attn.proj.weight")
    state["t_block.1.bias"] = state["t_block.1.bias"][:5]
    state["extra.weight"] = torch.zeros(1)
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(SpecError) as error:
        loading.load(tmp_path / "a.pth", **NVLABS_HINTS)
    for phrase in (
        "blocks.1.attn.proj.weight is missing (did you mean 'blocks.1.attn.prj.weight'?)",
        "blocks.1.attn.prj.weight is not expected (did you mean 'blocks.1.attn.proj.weight'?)",
        "extra.weight is not expected",
        "t_block.1.bias is (5,), expected (192,)",
    ):
        assert phrase in str(error.value)


def test_the_first_mismatches_are_named_and_the_others_counted():
    expected = {f"block.{i}.weight": (4, 3) for i in range(20)}
    assert mismatches(expected, {name: torch.zeros(4, 3) for name in expected}) == []
    state = {"block.0.weight": torch.zeros(4, 3), "block.1.weight": torch.zeros(3), "mask": torch.zeros(1)}
    phrases = mismatches(expected, state)
    assert len(phrases) == LIMIT + 1
    assert phrases[0] == "block.2.weight is missing"
    assert phrases[-1] == f"and {18 + 1 + 1 - LIMIT} more"
    assert mismatches({}, state, ignored=("mask", "block.*")) == []
    with pytest.raises(SpecError, match=r"a.pth .* Vae: mask is not .*; block.1.weight is \(3,\), expected \(4, 3\)"):
        check_state({k: expected[k] for k in ("block.0.weight", "block.1.weight")}, state, "a.pth", "Vae")
