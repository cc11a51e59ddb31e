"""diffusers' scheduler_config.json to options of flow and sampling, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_lab.config.specs import SpecError, name_of
from sana_lab.diffusion.flow import Flow

Spec = dict[str, Any]

DPM: Spec = {
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}
"""Settings of Flow-DPM-Solver that are written; the same are required when one is read."""

DPM_OFF: Spec = dict.fromkeys(("euler_at_final", "thresholding", "use_dynamic_shifting"), False)
EULER: Spec = {
    "use_dynamic_shifting": False,
    "stochastic_sampling": False,
    "num_train_timesteps": 1000,
    "shift_terminal": None,
    "invert_sigmas": False,
}
GRIDS: Spec = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"), False)
"""Settings that must have these values for our sampling to be the same."""

DEFAULTS: Spec = {"prediction_type": "epsilon", "use_flow_sigmas": False}
"""diffusers' defaults that differ from the required value; other settings may be omitted."""


def read_scheduler(config: Mapping[str, Any], path: Path) -> tuple[Spec, Spec]:
    """Options of the flow and of sampling. SpecError if diffusers would sample in a way that the lab does not."""
    name = config.get("_class_name")
    released = {"start": 0.999, "model_time": "released"}
    if name == "DPMSolverMultistepScheduler":
        _check_settings(config, path, DPM | DPM_OFF)
        solver = {"name": "dpmpp", "order": config.get("solver_order", 2)}
        return {"shift": float(config.get("flow_shift", 1.0)), **released}, {"solver": solver}
    if name == "FlowMatchEulerDiscreteScheduler":
        _check_settings(config, path, EULER)
        return {"shift": float(config.get("shift", 1.0)), **released}, {"solver": "euler", "grid": "flow_match"}
    if name == "SCMScheduler":  # the data's standard deviation cancels in its steps
        if config.get("prediction_type", "trigflow") != "trigflow":
            raise SpecError(f"{path}: the scheduler has prediction_type {config['prediction_type']!r}, not trigflow")
        return {"shift": 1.0}, {"solver": "scm", "steps": 2}
    raise SpecError(
        f"{path} samples with {name}; the lab has DPMSolverMultistepScheduler's, FlowMatchEuler's and SCMScheduler's"
    )


def write_scm(version: str) -> Spec:
    """The scheduler_config.json of SANA-Sprint."""
    header = {"_class_name": "SCMScheduler", "_diffusers_version": version}
    return {**header, "num_train_timesteps": 1000, "prediction_type": "trigflow", "sigma_data": 0.5}


def _check_settings(config: Mapping[str, Any], path: Path, required: Spec) -> None:
    for key, value in {**required, **GRIDS}.items():
        setting = config.get(key, DEFAULTS.get(key, value))
        if setting != value and (setting or value):  # null is false
            raise SpecError(f"{path}: the scheduler has {key} {setting!r}; only {value!r} is supported")


def write_scheduler(flow: Flow, sampling: Spec, version: str) -> Spec:
    """The scheduler_config.json that is closest to these sampling options: Flow-Euler for euler, else
    Flow-DPM-Solver."""
    solver = sampling["solver"]
    shift = flow.shift if sampling["shift"] is None else sampling["shift"]
    if name_of(solver) == "euler":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": version, "shift": shift}
    order = solver.get("order", 2) if isinstance(solver, dict) and solver["name"] == "dpmpp" else 2
    header = {"_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": version}
    return {**header, **DPM, "flow_shift": shift, "solver_order": order}
