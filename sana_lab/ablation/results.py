"""From the runs of an ablation to its table and plots, as files, on the sweep's run, and on the screen."""

from pathlib import Path

from sana_lab.ablation import efficiency_table, quality_table
from sana_lab.ablation.plan import Plan
from sana_lab.ablation.trials import records
from sana_lab.config.schema import EfficiencyTable
from sana_lab.report import render
from sana_lab.tracking.store import Store


def write(store: Store, ablation: Plan, folder: Path) -> None:
    """Write table.{md,tex,csv,json} and *.png to `folder`, attach them to the sweep's run; print the Markdown."""
    trials = records(store, ablation)
    if isinstance(ablation.table, EfficiencyTable):
        table = efficiency_table.build(ablation.table, trials)
        plots = efficiency_table.plot(ablation.table, table, folder)
    else:
        table = quality_table.build(store, ablation.table, trials)
        plots = quality_table.plot(store, ablation.table, trials, table, folder)
    paths = render.write(table, folder) + plots
    for sweep in store.find(ablation.name, {"sana.kind": "sweep"})[:1]:
        for path in paths:
            store.log_file(sweep.id, path, "table")
    print(render.to_markdown(table))
    print("\n".join(str(path) for path in paths))
