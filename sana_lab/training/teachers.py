"""Checks of the teachers of training methods against the model, whose text features and latents they read."""

from typing import Any

from sana_lab.config import experiments, specs
from sana_lab.config.schema import Config
from sana_lab.config.specs import Spec, SpecError


def check(experiment: Config) -> None:
    """SpecError unless a teacher `experiment:NAME` was trained with the text encoder that it reads, the model's or that
    of the method's option `text_encoder`, and with the model's autoencoder."""
    methods = experiment["system"].get("method") or []
    for method in methods if isinstance(methods, list) else [methods]:
        reference = _reference(method)
        if reference is not None:
            assert isinstance(method, dict)
            _check(experiment["system"], reference, method)


def _reference(method: Spec) -> str | None:
    """`experiment:NAME` of the weights of a method's teacher; None for another one."""
    teacher = method.get("teacher") if isinstance(method, dict) else None
    weights = teacher.get("weights") if isinstance(teacher, dict) else teacher
    return weights if isinstance(weights, str) and weights.startswith("experiment:") else None


def _check(system: Config, reference: str, method: dict[str, Any]) -> None:
    other, name = experiments.load(reference.removeprefix("experiment:"))["system"], specs.name_of(method)
    for kind in ("text_encoder", "autoencoder"):
        owner, where = (method, "method") if method.get(kind) else (system, "model")
        if not (owner.get(kind) and other.get(kind)):
            continue
        own, given = ({**specs.canonical(kind, s[kind])} for s in (owner, other))  # a copy: specs are reused
        weights, of_teacher = own.pop("weights", None), given.pop("weights", None)
        places = [f"system.method.{kind}"] if kind in method else []
        places = places if owner is method else [f"system.{kind}", *places]
        expected = f"expected {' or '.join(places)}: {reference}"
        differing = [key for key in {**own, **given} if own.get(key) != given.get(key)]
        if differing:
            key = differing[0]
            raise SpecError(
                f"method {name!r} has the teacher {reference}, whose {kind} has {key} {given.get(key)!r}, and the "
                f"{where}'s has {own.get(key)!r}; {expected}"
            )
        if weights == reference or (weights == of_teacher and not _trains(kind, own, weights)):
            continue
        raise SpecError(
            f"method {name!r} has the teacher {reference}, which was trained with another {kind} than the {where}'s, "
            f"of weights {weights!r}; {expected}"
        )


def _trains(kind: str, spec: dict[str, Any], weights: object) -> bool:
    """Whether a part is a text encoder without pretrained weights, which trained with the teacher."""
    return kind == "text_encoder" and weights is None and spec.get("model") is None
