"""Start of a command: Lightning is imported without torchmetrics' metrics, which are there when they are asked for."""

import subprocess
import sys

LATER = """
import sys
from sana_lab.training.startup import defer_torchmetrics
defer_torchmetrics()
defer_torchmetrics()
import lightning.pytorch
heavy = {"torchmetrics.functional", "scipy.signal", "torchvision.models", "transformers"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
from torchmetrics import Metric
from lightning.pytorch.trainer.connectors.logger_connector import result
assert result.Metric is Metric
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", LATER + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_parts_names_and_errors_are_those_of_torchmetrics():
    run("""
import torch
from torchmetrics.functional.image import structural_similarity_index_measure as ssim
import torchmetrics
try:
    from torchmetrics import NoSuchMetric
except ImportError as error:
    assert "NoSuchMetric" in str(error)
else:
    raise AssertionError
from torchmetrics.image import StructuralSimilarityIndexMeasure
x = torch.rand(1, 3, 16, 16)
assert abs(ssim(x, x, data_range=1.0) - 1) < 1e-5
assert issubclass(StructuralSimilarityIndexMeasure, Metric)
mean = torchmetrics.MeanMetric()
assert isinstance(mean, Metric) and torchmetrics.Metric is Metric
mean.update(torch.tensor([1.0, 3.0]))
assert torchmetrics.MetricCollection({"mean": mean}).compute() == {"mean": 2}
assert torchmetrics.Accuracy is torchmetrics.classification.Accuracy
""")


def test_a_module_logs_metrics(tmp_path):
    run(f"""
import lightning as L, torch, torchmetrics
class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.mean = torch.nn.Linear(1, 1), torchmetrics.MeanMetric()
    def training_step(self, batch, index):
        loss = self.layer(batch[0]).square().mean()
        self.mean.update(loss)
        self.log("loss", self.mean, on_epoch=True, on_step=False)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 1)))
trainer = L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    accelerator="cpu", default_root_dir={str(tmp_path)!r})
trainer.fit(Module(), data)
assert "loss" in trainer.callback_metrics
""")
