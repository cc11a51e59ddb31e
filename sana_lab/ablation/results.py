"""From the runs of an ablation to its table and plots, as files, on the sweep's run, and on the screen."""

from collections.abc import Sequence
from pathlib import Path

from sana_lab.ablation import efficiency_table, quality_table, report_page, sweep_page
from sana_lab.ablation.record import TrialRecord
from sana_lab.config.schema import Ablation, EfficiencyTable
from sana_lab.report import page, render
from sana_lab.tracking.store import Store
from sana_lab.tracking.view import write_view


def write(
    store: Store, name: str, options: Ablation | EfficiencyTable, trials: Sequence[TrialRecord], folder: Path
) -> None:
    """Write table.{md,tex,csv,json}, *.png and report.html to `folder`; attach them to the sweep's run; print the
    Markdown."""
    if isinstance(options, EfficiencyTable):
        table = efficiency_table.build(options, trials)
        plots = efficiency_table.plot(options, table, folder)
    else:
        table = quality_table.build(store, options, trials)
        trials = [record for record in trials if not record.pruned]  # which have no row
        plots = quality_table.plot(store, options, trials, table, folder)
    paths = [
        *render.write(table, folder),
        *plots,
        page.write(table, plots, folder, report_page.content(store, options, trials, table)),
    ]
    for sweep in store.find(name, {"sana.kind": "sweep"})[:1]:
        for path in paths:
            store.log_file(sweep.id, path, "table")
        sweep_page.write(store, sweep.id, options, trials, table, plots)
        write_view(store, sweep.experiment)
    print(render.to_markdown(table))
    print("\n".join(str(path) for path in paths))
