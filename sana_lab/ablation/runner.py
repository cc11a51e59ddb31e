"""Commands `ablate` and `table`: run each trial of an ablation once, record it in MLflow, and write the table.

A trial is known by the hash of everything that its numbers depend on. A run of that hash that has FINISHED is not run
again, a model that another trial trained is not trained again, and a failed trial is a hole with its error.
"""

import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from sana_lab import environment
from sana_lab.ablation import checks, efficiency, generations, parameters, plan, results, sweep_page
from sana_lab.ablation.executors import Executor
from sana_lab.ablation.heartbeat import Heartbeat, check_alone, signs, works_elsewhere
from sana_lab.ablation.jobs import Jobs, by_model, in_order, untrained
from sana_lab.ablation.plan import Plan
from sana_lab.ablation.pool import WorkerPool
from sana_lab.ablation.progress import ProgressBar
from sana_lab.ablation.protocol import EVALUATION, MEASUREMENT
from sana_lab.ablation.record import PRUNED, TRIAL, TrialRecord, equal_rows, within_time
from sana_lab.ablation.search import describing, settings
from sana_lab.ablation.search.proposals import Explorer, with_proposals
from sana_lab.ablation.trials import as_timed, measure_tags, records, state, weights_of
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, interpolation, schema, specs
from sana_lab.config.memo import reuse, reusing
from sana_lab.config.paths import check_folder
from sana_lab.config.yaml_text import read_value
from sana_lab.data import DataModule
from sana_lab.evaluation.sources import check_evaluation_captions
from sana_lab.tracking.outbox import deliver_all
from sana_lab.tracking.store import CONFIG, Run, Store, artifact_link
from sana_lab.tracking.view import CURRENT, STATE, write_view
from sana_lab.training import tenths
from sana_lab.training.checks import check, warn_slow_precision
from sana_lab.training.terminated import SAVING, Terminated


def main(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    workers: int | None = None,
    executor: str | None = None,
    dry_run: bool = False,
    out: Path | None = None,
    scale: str | None = None,
    retrain: bool = False,
    seeds: str | None = None,
    force: bool = False,
) -> int:
    """Run the missing trials of an ablation, then write its table; exit status 1 if a trial failed.

    With `retrain` every row is trained from nothing, in a separate sweep, where weights ship otherwise. `seeds` such as
    0-4 are in place of the file's; seeds that are trained already are not trained again. SpecError where memory or disk
    clearly do not suffice, unless `force`.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}, expected at least 1, or none for one per core and two at most")
    store = Store(weights.HOME)
    with reusing():
        ablation = plan.load(recipe, overrides, scale, retrain=retrain, seeds=plan.parse_seeds(seeds))
        place: Executor = specs.build("executor", executor_of(ablation, executor, workers))
        ablation = ablation._replace(elsewhere=(place.devices or 0) if place.elsewhere else None)
        examples = ablation.examples
        if (search := settings.search_of(ablation.table)) is not None:
            search.check()
        seed = [t for t in examples if t.kind == "quality" and t.seed == examples[0].seed]  # others differ only in it
        for trial in seed:
            if ablation.elsewhere is None and trial.weights is None and weights.trained(trial.config) is None:
                warn_slow_precision(trial.config["trainer"])
        quality = [trial.config for trial in seed]
        for config in quality:
            checks.check_evaluates(ablation.table, check(config, ablation.training_devices), recipe)
            reuse(("captions", config["data"], config["eval"]), partial(check_evaluation_captions, config))
        if dry_run:
            check_content(quality)
            print("\n".join(outlook(store, with_proposals(store, ablation), place)))
            return 0
        check_devices(place, examples)
    place.check()
    if not force:
        check_fits(store, ablation, place)
    if isinstance(ablation.table, schema.Ablation) and (retrain or ablation.table.weights):
        from sana_lab.ablation import shipping

        print("\n".join(shipping.announce(ablation, records(store, ablation), place.slots)))
    check_folder(weights.HOME)
    check_folder(out or table_folder(ablation))
    with lock(ablation.name), terminable():
        run(store, ablation, place)
    trials = records(store, with_proposals(store, ablation))
    results.write(store, ablation.name, ablation.table, trials, out or table_folder(ablation))
    return 0 if all(record.complete for record in trials) else 1


def executor_of(ablation: Plan, executor: str | None, workers: int | None) -> schema.Config:
    """The spec of the executor: of the command line, else of the ablation's file. SpecError."""
    spec = ablation.table.executor if executor is None else read_value(executor)
    resolved = specs.resolve("executor", spec, "--executor" if executor else "executor")
    if workers is None:
        return resolved
    count = {"local": "workers", "ray": "jobs", "slurm": "jobs"}.get(resolved["name"])
    if count is None:
        raise specs.SpecError(f"--workers is for the lab's own executors, not for {resolved['name']!r}")
    return {**resolved, count: workers}


def check_fits(store: Store, ablation: Plan, place: Executor) -> None:
    """SpecError where the trainings that are missing clearly do not fit this machine and would be done on it."""
    from sana_lab.ablation import spending

    spending.check(store, with_proposals(store, ablation), place)


def check_devices(executor: Executor, trials: Sequence[schema.Trial]) -> None:
    """SpecError for a trial that asks for more devices than its slot has."""
    if (slot := executor.devices) is None:
        return
    for trial in trials:
        given = str(trial.config["trainer"]["devices"]) if trial.kind == "quality" else "auto"
        devices = len(given.split(",")) if "," in given else int(given) if given.isdigit() else 1
        if devices > slot:
            raise specs.SpecError(
                f"{trial.label!r} has trainer.devices {given}, and the executor gives a trial {slot}; "
                "expected trainer.devices auto, or more devices of the executor"
            )


def check_content(configs: Sequence[schema.Config]) -> None:
    """Read the headers of each data set's pictures, once, and warn of what is left out."""
    for data in {json.dumps(config["data"]): config["data"] for config in configs}.values():
        data_module: DataModule = specs.build("data", data)
        data_module.check_content()


def write_table(
    recipe: str,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    scale: str | None = None,
    retrain: bool = False,
    seeds: str | None = None,
) -> None:
    """Table, plots and samples of what has finished, from the runs in MLflow."""
    ablation = plan.load(recipe, overrides, scale, retrain=retrain, seeds=plan.parse_seeds(seeds))
    check_folder(out or table_folder(ablation))
    store = Store(weights.HOME)
    deliver_all(store)
    trials = generations.refresh(store, ablation := as_timed(store, with_proposals(store, ablation)))
    if not trials:
        raise specs.SpecError(f"{ablation.name} has no trial yet; run: sana-lab ablate {recipe}")
    results.write(store, ablation.name, ablation.table, trials, out or table_folder(ablation))


def table_folder(ablation: Plan) -> Path:
    return weights.HOME / "tables" / ablation.name


def outlook(store: Store, ablation: Plan, place: Executor) -> list[str]:
    """The lines of the dry run, with the cost of what is missing."""
    from sana_lab.ablation import spending

    trials = records(store, ablation)
    more, remaining = describing.samples_of(ablation, len(trials))
    costs = spending.estimate([*trials, *more], place, remaining - len(more))
    return [*describing.head(ablation, trials), *describe(ablation, trials), *costs]


def describe(ablation: Plan, trials: Sequence[TrialRecord]) -> list[str]:
    """The lines of the dry run: what the ablation is, then each trial and its state."""
    if isinstance(ablation.table, schema.EfficiencyTable):
        target = efficiency.target_of(ablation.table, ablation.elsewhere)
        head = f"{len(trials)} rows, {efficiency.device_words(target)}"
        return [
            f"{ablation.table.title}: {head}",
            *(f"  {r.key}  {r.trial.label:<40} {state(r)}" for r in trials),
            *equal_rows(trials),
        ]
    models = len({r.model for r in trials})
    search = settings.search_of(ablation.table)
    what = (
        f"{len(trials)} trials" if search is None else f"search of up to {search.trials} trials, so far {len(trials)}"
    )
    head = f"{ablation.table.title}: {what} of {models} trained models"
    return [
        head,
        *(f"  {r.key}  model {r.model}  seed {r.trial.seed}  {r.trial.label:<40} {state(r)}" for r in trials),
        *equal_rows(trials),
    ]


def run(store: Store, ablation: Plan, executor: Executor) -> None:
    """Train and evaluate what is missing, several at a time; then measure costs one at a time on a quiet machine."""
    deliver_all(store)
    check_alone(store, ablation.name)
    trials = generations.refresh(store, ablation := with_proposals(store, ablation))
    print("".join(f"{line}\n" for line in equal_rows(trials)), end="")
    missing = list({r.key: r for r in trials if not r.complete}.values())
    search = settings.search_of(ablation.table)
    if not missing and (search is None or search.trials <= len(trials)):
        print(f"{ablation.name}: all {len(ablation.trials)} trials are done")
        end_open_sweep(store, ablation.name)
        return
    check_data([*missing, *without_runs(ablation.examples)])
    store.create(ablation.name)
    parent = sweep_run(store, ablation)
    check_alone(store, ablation.name)  # two may have begun at the same time
    with Heartbeat(store, [] if store.server is None else [parent]):  # on which trials wait
        work_on(store, ablation, missing, parent, executor)


def work_on(store: Store, ablation: Plan, missing: Sequence[TrialRecord], parent: str, executor: Executor) -> None:
    """Work off the missing trials under the run of the sweep, which ends as they do."""
    try:
        about, keys = environment.environment(), parameters.differing(ablation.examples)
        begin = partial(trial_run, store, ablation.name, parent, keys=keys, about=about)
        missing = [r._replace(run=begin(r)) for r in missing]
        end_open_runs(store, ablation.name, keep=missing)  # left open by a kill, and no trials of this plan any more
        searches = settings.search_of(ablation.table) is not None
        explorer = Explorer(store, ablation, lambda record, tags: begin(record, tags=tags)) if searches else None
        work_off(store, ablation, missing, executor, explorer)
    except BaseException as error:
        end_open_runs(store, ablation.name)
        store.finish(parent, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    trials = records(store, with_proposals(store, ablation))
    store.finish(parent, "FINISHED" if all(r.complete for r in trials) else "FAILED")


def check_data(missing: Sequence[TrialRecord]) -> None:
    """ValueError for data that cannot be used, such as a missing archive, before any work."""
    sources: list[schema.Config] = []
    for record in missing:
        if record.trial.kind == "quality" and record.trial.config["data"] not in sources:
            sources.append(record.trial.config["data"])
    for source in sources:
        specs.build("data", source).check_content()


def work_off(
    store: Store,
    ablation: Plan,
    missing: Sequence[TrialRecord],
    executor: Executor,
    explorer: Explorer | None = None,
) -> None:
    """All stages of the missing trials, then of those that a search proposes. Any error, and Ctrl-C, kills the workers;
    SIGTERM gives them time for a checkpoint.

    What is trained within a time comes last, alone and with all cores, so that its time is that of a quiet machine.
    """
    lacking = [r for r in missing if r.lacks_measures]
    missing = [r for r in missing if not r.lacks_measures]
    unevaluated = [r for r in missing if r.trial.kind == "quality" and not r.evaluated]
    needed = untrained([*unevaluated, *lacking, *(without_runs(ablation.examples) if explorer else [])])
    with (
        progress(ablation.name, missing, [*unevaluated, *lacking], needed, explorer) as bar,
        ThreadPoolExecutor(executor.slots) as threads,
    ):
        pool = WorkerPool(weights.HOME / "sweeps" / ablation.name, bar, executor)
        pruning = settings.for_worker(ablation.name, ablation.table)
        target = efficiency.target_of(ablation.table, ablation.elsewhere)
        jobs = Jobs(store, pool, None if target is None else target.device, pruning)
        try:
            for group in in_order(needed):
                list(threads.map(jobs.train, group))
            list(threads.map(jobs.append, by_model(lacking)))
            able = [r for r in unevaluated if not jobs.blocked(r)]
            list(threads.map(jobs.evaluate, by_model([r for r in able if not within_time(r.trial)])))
            missing += [] if explorer is None else explore(explorer, jobs, threads, executor.slots)
            jobs.measure([r for r in missing if measurable(store, r)])
            for alone in by_model([r for r in able if within_time(r.trial)]):
                jobs.evaluate_alone(alone)
                jobs.measure([r for r in alone if measurable(store, r)])
        except Terminated:
            bar.print(f"SIGTERM: trainings end after their step, with a checkpoint; {SAVING:.0f} s at most")
            pool.terminate()
            raise
        except BaseException:
            pool.stop()
            raise
        finally:
            executor.close()


def without_runs(trials: Sequence[schema.Trial]) -> list[TrialRecord]:
    """Records of trials before any run, for what they need."""
    return [TrialRecord(trial, "", "", None) for trial in trials]


def explore(explorer: Explorer, jobs: Jobs, threads: ThreadPoolExecutor, slots: int) -> list[TrialRecord]:
    """Train and evaluate what a search proposes, so many at a time; what is trained within a time alone."""
    proposed: list[TrialRecord] = []

    def work(_: int) -> None:
        while not jobs.pool.stopped and (record := explorer.next()) is not None:
            proposed.append(record)
            if record.lacks_measures:  # a grid of the same name finished it with fewer
                jobs.append([record])
            elif not jobs.blocked(record):
                (jobs.evaluate_alone if within_time(record.trial) else jobs.evaluate)([record])

    alone = any(map(within_time, explorer.plan.examples))
    list(threads.map(work, range(1 if alone else slots)))
    return proposed


def measurable(store: Store, record: TrialRecord) -> bool:
    """Whether a trial's costs can be measured now: a probe's always, an experiment's once it has been evaluated."""
    run = store.run(record.run_id)
    return run.status == "RUNNING" and (record.trial.kind == "efficiency" or record._replace(run=run).evaluated)


def sweep_run(store: Store, ablation: Plan) -> str:
    """The id of the sweep's own run, the same one when a sweep is continued."""
    runs = store.find(ablation.name, {"sana.kind": "sweep"})
    mine = {} if store.server is None else signs(store)
    if runs:
        store.set_tags(runs[0].id, mine)
        store.resume(runs[0].id)
        return runs[0].id
    tags = {"sana.kind": "sweep", "sana.sweep": ablation.name, **mine, **sweep_page.tags_of(ablation.table)}
    run = store.start_run(ablation.name, sweep_page.heading(ablation.table), tags)
    write_view(store, store.run(run).experiment)
    return run


def trial_run(
    store: Store,
    name: str,
    parent: str,
    record: TrialRecord,
    keys: Sequence[str],
    about: Mapping[str, object] | None = None,
    tags: Mapping[str, object] = {},  # of a search
) -> Run:
    """A trial's run: its failed or interrupted run if there is one, else a new one with its labels, its seed and these
    options as parameters and a link to the whole configuration; `about` is the environment."""
    if record.run is not None:
        store.set_tags(record.run.id, tags)
        if not record.done and not record.pruned:  # one that lacks measures stays finished, also if they fail
            store.resume(record.run.id)
            store.set_tags(record.run.id, {PRUNED: ""} if PRUNED in record.run.tags else {})  # by a pruner that is gone
        return store.run(record.run.id)
    trial = record.trial
    tags = {
        **tags,
        "sana.kind": "trial",
        "sana.sweep": name,
        TRIAL: record.key,
        "sana.model": record.model,
        "sana.label": trial.label,
        "sana.seed": trial.seed,
        STATE: CURRENT,
        **measure_tags(trial),
        **{f"label.{axis}": label for axis, label in trial.labels.items()},
        **(environment.environment() if about is None else about),
    }
    run_id = store.start_run(name, generations.run_name(trial), tags, parent)
    store.log_params(run_id, interpolation.as_written(trial.config), parameters.of_trial(trial, keys))
    run = store.run(run_id)
    store.set_tags(run_id, {"mlflow.note.content": f"[Configuration]({artifact_link(run.experiment, run_id, CONFIG)})"})
    return run


def end_open_sweep(store: Store, name: str) -> None:
    """Finish the sweep's run where a kill came between its last trial and its end."""
    for run in store.find(name, {"sana.kind": "sweep"}):
        if run.status == "RUNNING":
            store.finish(run.id)


def end_open_runs(store: Store, name: str, keep: Sequence[TrialRecord] = ()) -> None:
    """End the runs of trials that are open as KILLED, but for those to keep."""
    ids = {record.run_id for record in keep}
    for run in store.find(name, {"sana.kind": "trial"}):
        if run.status == "RUNNING" and run.id not in ids and not works_elsewhere(store, run):
            store.finish(run.id, "KILLED")


@contextmanager
def progress(
    name: str,
    missing: Sequence[TrialRecord],
    unevaluated: Sequence[TrialRecord],
    needed: Sequence[str],
    explorer: Explorer | None = None,
) -> Iterator[ProgressBar]:
    """A bar over all training steps to do, and evaluations and measurements at their weights; those of trials that are
    not proposed yet are taken to be as long as the first corner's."""
    models = {r.model: r.trial.config for r in unevaluated if weights_of(r.trial) is None}
    models |= {f"needed {n}": experiments.load(n) for n in needed}
    steps = sum(training_work(e["trainer"]) for e in models.values())
    if explorer is not None:
        each = training_work(explorer.plan.examples[0].config["trainer"]) + EVALUATION + MEASUREMENT
        steps += explorer.remaining * each
    with ProgressBar(name, steps + EVALUATION * len(unevaluated) + MEASUREMENT * len(missing)) as bar:
        yield bar


def training_work(options: schema.Config) -> int:
    """Units of progress of a training: its steps, or the tenths of seconds that end it."""
    seconds, steps = options["max_seconds"], options["max_steps"]
    return tenths(seconds) if seconds and steps else steps


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Let one process at a time run a sweep of this name in this folder. ValueError for a second one."""
    file = FileLock(weights.HOME / f"{name}.sweep.lock")
    try:
        file.acquire(timeout=0.1)
    except Timeout as error:
        raise ValueError(f"another process is running the ablation {name!r} in {weights.HOME.absolute()}") from error
    try:
        yield
    finally:
        file.release()


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM and a closed terminal stop a sweep as Ctrl-C does: workers end, and so do the runs in MLflow.

    On SIGTERM trainings write a checkpoint first. The first signal counts, so that what ends the runs is not
    interrupted; `nohup` is respected.
    """

    def stop(number: int, _: FrameType | None) -> None:
        for other in signals:
            signal.signal(other, signal.SIG_IGN)
        raise (Terminated if number == signal.SIGTERM else KeyboardInterrupt)(signal.Signals(number).name)

    signals = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        signals = []
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
