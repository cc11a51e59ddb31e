"""Sampling options of diffusers' schedulers; schedulers that sample differently are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_peers

from sana_lab.config import experiments, specs
from sana_lab.config.validation import SpecError
from sana_lab.diffusion.flow import Flow
from sana_lab.pretrained import schedulers


@pytest.mark.parametrize(("name", "solver", "grid"), [("dpm", "dpmpp", "even"), ("euler", "euler", "flow_match")])
def test_options_of_a_scheduler(tmp_path: Path, name: str, solver: str, grid: str):
    folder = tiny_peers.saved(tiny_peers.scheduler(name, 6.0), tmp_path)
    flow, options = schedulers.read_scheduler(json.loads((folder / "scheduler_config.json").read_text()), folder)
    sampling = experiments.check_sampling(options)
    assert flow == {"shift": 6.0, "start": 0.999, "model_time": "released"}
    assert (specs.name_of(sampling["solver"]), sampling["grid"]) == (solver, grid)
    assert schedulers.read_scheduler(schedulers.write_scheduler(Flow(6.0), sampling, "0"), folder) == (flow, options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_flow_sigmas": False}, "use_flow_sigmas False; only True"),
        ({"algorithm_type": "sde-dpmsolver++"}, "algorithm_type 'sde-dpmsolver\\+\\+'"),
        ({"_class_name": "DDIMScheduler"}, "samples with DDIMScheduler"),
        *(
            ({f"use_{x}": True}, f"use_{x} True")
            for x in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")
        ),
        *(
            ({"_class_name": "FlowMatchEulerDiscreteScheduler", **x}, next(iter(x)))
            for x in (
                {"shift_terminal": 0.1},
                {"invert_sigmas": True},
                {"stochastic_sampling": True},
                {"use_karras_sigmas": True},
            )
        ),
    ],
)
def test_settings_that_sample_differently(sana_folder: Path, change: dict[str, Any], message: str):
    config = json.loads((sana_folder / "scheduler/scheduler_config.json").read_text())
    with pytest.raises(SpecError, match=message):
        schedulers.read_scheduler({**config, **change}, sana_folder)
