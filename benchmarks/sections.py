"""Sections of a benchmark, each in a process of its own with a time limit; a line of JSON per result as it comes.

A crash, a hang or a device error costs the case that has it: the section goes on with the next case in a new process.
The driver imports no torch, so it never touches the device.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

Line = dict[str, Any]

LEAST_S = 3.0  # remaining seconds below which nothing is started
POLL_S = 0.05


class Section(NamedTuple):
    """A part of a plan."""

    name: str
    limit_s: float  # of the whole section
    case_limit_s: float | None = None  # of one case; None: the section's


class Place(NamedTuple):
    """What the driver runs and where the lines go."""

    module: str  # importable module with SECTIONS (name -> list of builders of cases) and COMMANDS
    out: Path
    arguments: Sequence[str] = ()  # passed to the child
    environment: Mapping[str, str] = {}


def drive_together(plan: Sequence[Section], place: Place) -> list[Line]:
    """Run the sections of a plan at the same time, each to its limit, and return all lines."""
    first, now = _begin(place), time.monotonic()
    with ThreadPoolExecutor(len(plan)) as threads:
        list(threads.map(lambda section: _run_section(section, place, now + section.limit_s), plan))
    return read(place.out)[first:]


def drive(plan: Sequence[Section], place: Place, budget_s: float | None = None) -> list[Line]:
    """Run the sections of a plan in order and return all lines. What the budget leaves no time for is named."""
    end = time.monotonic() + (budget_s or float("inf"))
    first = _begin(place)
    for section in plan:
        left = min(section.limit_s, end - time.monotonic())
        if left < LEAST_S:
            append(place.out, {"section": section.name, "why": f"not run: the budget of {budget_s:.0f} s is used up"})
        else:
            print(f"== {section.name}, at most {left:.0f} s", flush=True)
            _run_section(section, place, time.monotonic() + left)
    return read(place.out)[first:]


def _begin(place: Place) -> int:
    """The number of lines that the file of results, new or not, has already."""
    place.out.parent.mkdir(parents=True, exist_ok=True)
    place.out.touch()
    return len(read(place.out))


def _run_section(section: Section, place: Place, end: float) -> None:
    """Start the section's process, again after each case that took it down, until it is through or out of time."""
    start = 0
    while end - time.monotonic() >= LEAST_S:
        process = _start(section, place, start)
        why = _watch(process, section, place, end)
        if why is None:
            return
        index = _last_case(place.out, section.name, start)
        append(place.out, {"section": section.name, "case": _name(place.out, section.name, index), "error": why})
        start = index + 1
    append(place.out, {"section": section.name, "why": f"stopped after its limit of {section.limit_s:.0f} s"})


def _start(section: Section, place: Place, start: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, place.module, section.name, "--out", str(place.out), "--start", str(start)]
    return subprocess.Popen(
        [*command, *place.arguments], start_new_session=True, env={**os.environ, **place.environment}
    )


def _watch(process: subprocess.Popen[bytes], section: Section, place: Place, end: float) -> str | None:
    """Wait for the process; the reason for which it stopped early, None if it ran to its end."""
    limit = section.case_limit_s or section.limit_s
    case, since = None, time.monotonic()
    while (status := process.poll()) is None:
        current = _started(place.out, section.name)
        if current != case:
            case, since = current, time.monotonic()
        if time.monotonic() - since > limit or time.monotonic() > end:
            _kill(process)
            return f"stopped after {time.monotonic() - since:.0f} s"
        time.sleep(POLL_S)
    if status == 0:
        return None
    return f"killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _started(out: Path, section: str) -> int | None:
    """Index of the case of a section that started last; None before the first."""
    indices = [line["index"] for line in read(out) if line.get("section") == section and "index" in line]
    return indices[-1] if indices else None


def _last_case(out: Path, section: str, start: int) -> int:
    """Index of the case that took the process down: the last that started, or the first of it."""
    index = _started(out, section)
    return start if index is None else max(index, start)


def _name(out: Path, section: str, index: int) -> str:
    names = [line["case"] for line in read(out) if line.get("section") == section and line.get("index") == index]
    return names[-1] if names else f"case {index}"


def read(out: Path) -> list[Line]:
    """The lines of a results file; a line that was cut off by a kill is left out."""
    return list(_whole(out.read_text().splitlines()))


def _whole(rows: Sequence[str]) -> Iterator[Line]:
    for row in rows:
        try:
            yield json.loads(row)
        except json.JSONDecodeError:
            continue


def append(out: Path, line: Line) -> None:
    """Write a line through to the disk."""
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


# --- the process of a section


def child(arguments: Sequence[str] | None = None) -> int:
    """Run one section's cases from `--start` on; status 3 after an error that leaves the device unusable."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("section")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=int, default=0)
    options, rest = parser.parse_known_args(arguments)
    if options.section in (commands := getattr(importlib.import_module(options.module), "COMMANDS", {})):
        return _command(options, commands[options.section])
    return _cases(options, rest)


def _command(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Run a command, such as tests, and record its status and its last lines."""
    append(options.out, {"section": options.section, "index": 0, "case": " ".join(command)})
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    tail = (process.stdout + process.stderr).splitlines()[-15:]
    print("\n".join(tail), flush=True)
    append(options.out, {"section": options.section, "status": process.returncode, "output": tail})
    return 0


def _cases(options: argparse.Namespace, rest: Sequence[str]) -> int:
    module = importlib.import_module(options.module)
    context = module.context(rest)
    for index, build in enumerate(module.builders(options.section, context)):
        if index < options.start:
            continue
        name = module.label(build)
        append(options.out, {"section": options.section, "index": index, "case": name})
        try:
            for record in module.run(build, context):
                append(options.out, {"section": options.section, **record})
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:500]
            print(f"  {name}: {text}", flush=True)
            append(options.out, {"section": options.section, "case": name, "error": text})
            if not module.is_usable(context):
                return 3
    return 0


if __name__ == "__main__":
    sys.exit(child())
