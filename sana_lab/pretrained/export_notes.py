"""Notes and README of an exported folder: what diffusers does differently from the lab, and the call that samples."""

from typing import Any

from sana_lab.config.specs import name_of
from sana_lab.diffusion.flow import Flow
from sana_lab.models.dit import Dit
from sana_lab.models.text.llm import Llm

Spec = dict[str, Any]


def pipeline_notes(text: Llm, dit: Dit, flow: Flow, sampling: Spec) -> list[str]:
    """Sentences on what SanaPipeline does differently from these parts unless it is passed other arguments."""
    null = "the lab's null condition is seen through the prompt's mask (nvlabs), SanaPipeline's through its own."
    length = f"Prompts have at most {text.max_tokens} tokens: pass max_sequence_length={text.max_tokens}."
    return [
        _instruction_note(text),
        *([length] if text.max_tokens != 300 else []),
        *([] if text.lowercase else ["diffusers writes every prompt in lower case; the lab did not."]),
        *([f"In guidance {null}"] if text.null == "nvlabs" and not dit.distilled else []),
        *(_sprint_notes(sampling) if dit.distilled else _sampling_notes(flow, sampling)),
        *dit_notes(dit),
    ]


def _instruction_note(text: Llm) -> str:
    if text.instruction_option == "released":
        return "Prompts were read with an instruction, the pipeline's own default of complex_human_instruction."
    instruction = [text.instruction] if text.instruction else None
    return f"Prompts were encoded with a custom instruction: pass complex_human_instruction={instruction!r}."


def _sampling_notes(flow: Flow, sampling: Spec) -> list[str]:
    solver, interval = name_of(sampling["solver"]), sampling["guidance_interval"]
    is_euler = solver == "euler"
    is_other_grid = sampling["grid"] != ("flow_match" if is_euler else "even")
    is_note = {
        f"diffusers begins at t = 0.999, the lab at {flow.start:g}.": not is_euler and flow.start != 0.999,
        "diffusers tells the network times rounded down to 1/1000, the lab exact ones.": (
            not is_euler and flow.model_time == "exact"
        ),
        "diffusers' Flow-Euler has a grid of its own, the lab sampled on an even one (grid: flow_match is theirs).": (
            is_euler and is_other_grid
        ),
        "The lab sampled on the grid flow_match, diffusers' Flow-DPM-Solver on an even one.": (
            not is_euler and is_other_grid
        ),
        "The lab guided from t {:g} to {:g} alone, SanaPipeline does everywhere.".format(*interval or (0, 1)): (
            interval is not None
        ),
        f"The lab samples with {solver}, this folder with Flow-DPM-Solver of order 2.": (
            solver not in ("dpmpp", "euler")
        ),
    }
    return [note for note, applies in is_note.items() if applies]


def _sprint_notes(sampling: Spec) -> list[str]:
    solver = name_of(sampling["solver"])
    if solver != "scm":
        return [f"The lab samples with {solver}, this folder with SCMScheduler, as SANA-Sprint."]
    return []


def _sprint_angle(sampling: Spec) -> float | None:
    """The argument intermediate_timesteps, which SanaSprintPipeline has for 2 steps alone."""
    solver = sampling["solver"]
    middle = solver.get("middle", 1.3) if isinstance(solver, dict) else 1.3
    return middle if sampling["steps"] == 2 else None


def dit_notes(dit: Dit) -> list[str]:
    spec = dit.spec
    if not spec["cross_norm"] or spec["cross_norm_eps"] == 1e-5:
        return []
    return [f"diffusers' norms of q and k in cross-attention add 1e-5, this model's {spec['cross_norm_eps']:g}."]


def readme(pipeline: str, notes: list[str], size: int, sampling: Spec) -> str:
    """The README.md of a pipeline's folder; `size` is pixels a side."""
    call = f"    pipe('a red circle', height={size}, width={size}, use_resolution_binning=False,\n"
    call += f"         num_inference_steps={sampling['steps']}, guidance_scale={sampling['guidance']}"
    call += f", intermediate_timesteps={_sprint_angle(sampling)})" if pipeline == "SanaSprintPipeline" else ")"
    lines = [f"# A model of sana_lab for diffusers' {pipeline}", "", *(f"- {note}" for note in notes), ""]
    return "\n".join([*lines, f"    pipe = {pipeline}.from_pretrained(FOLDER)", call, ""])
