"""Short trainings on the embedded world, for its networks' tests."""

import lightning as L
from lightning.pytorch.callbacks import Callback

from sana_lab.shapes.data import Shapes

DATA = {"name": "shapes", "size": 64, "batch": 8}


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, *_):
        self.values.append(trainer.callback_metrics["train/loss"].item())


def fit(system, folder, steps: int, data=None, path=None, **options) -> tuple[L.Trainer, list[float]]:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    losses = Losses()
    options = {"limit_val_batches": 0, **options}
    run = L.Trainer(max_steps=steps, accelerator="cpu", default_root_dir=folder, callbacks=[losses], **quiet, **options)
    run.fit(system, datamodule=data or world_data(), ckpt_path=path, weights_only=True)
    return run, losses.values


def world_data() -> Shapes:
    return Shapes(batch=8, held_out=24, seed=5)
