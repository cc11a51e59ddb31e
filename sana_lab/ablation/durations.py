"""The duration of a trial's run: the work on it, without the time that it waited for others."""

from sana_lab.tracking.store import Store

STARTED, WORKED = "sana.began", "sana.worked_s"
"""Tags of a run: when the work on it began, in seconds since 1970, and how long it took so far."""


def add(store: Store, run_id: str, start: float, end: float) -> None:
    """Add a stretch of work to a run. Its start in MLflow becomes that of the first stretch; once it has ended, its end
    is so much later as all work took."""
    run = store.run(run_id)
    started = float(run.tags.get(STARTED, start))
    worked = float(run.tags.get(WORKED, 0)) + end - start
    store.set_tags(run_id, {STARTED: started, WORKED: round(worked, 3)})
    store.set_times(run_id, started, None if run.status == "RUNNING" else started + worked)
