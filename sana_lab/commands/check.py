"""Command `sana-lab check`: run the contract of a part's kind on it, before anything is trained."""

from collections.abc import Sequence

from sana_lab.config import experiments, registry
from sana_lab.config.options import yaml_words
from sana_lab.config.specs import SpecError
from sana_lab.contracts import run


def main(part: str, overrides: Sequence[str] = (), kind: str | None = None) -> int:
    """Print each rule and whether the part keeps it; exit status 1 if it breaks one. SpecError for an unknown name."""
    kind = kind or _kind(part)
    if kind not in registry.TABLE:
        raise SpecError(f"no kind of part is called {kind!r}; {run.nearest_kind(kind)}")
    spec = experiments.resolve(kind, experiments.apply({"name": part}, overrides))
    settings = {key: value for key, value in spec.items() if key != "name"}
    print(f"{kind} {part} {yaml_words(settings) if settings else ''}".rstrip())
    findings = run.check(kind, spec)
    for finding in findings:
        print(f"  {'ok  ' if finding.problem is None else 'FAIL'}  {finding.rule}")
        print("" if finding.problem is None else f"        {finding.problem}\n", end="")
    if missing := run.unexplained(kind, part):
        shown = f"`sana-lab parts {kind} {part}` shows them without a meaning"
        print(f"  note  no comment beside {', '.join(missing)}: {shown}")
    broken = sum(finding.problem is not None for finding in findings)
    print(f"{broken} of {len(findings)} rules broken" if broken else f"all {len(findings)} rules kept")
    return 1 if broken else 0


def _kind(part: str) -> str:
    """The kind of a user's part by its interface, or of a registered name that is unique."""
    if ":" in part:
        return run.kind_of(part)
    kinds = [kind for kind, names in registry.TABLE.items() if part in names]
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        raise SpecError(f"{part!r} is the name of several kinds: {', '.join(kinds)}; expected --kind KIND")
    raise SpecError(f"{part!r} is no module:attribute and no registered part; `sana-lab list parts` shows them")
