"""What happens around the loop: the finite check, the records of each epoch, the progress bar."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from torch.utils.tensorboard import SummaryWriter

from lowbit.errors import LowbitError
from lowbit.files import write_whole
from lowbit.runs import Run
from lowbit.training.checkpoints import Checkpoint, save_weights
from lowbit.training.module import TrainingModule, find_not_finite

Row = dict[str, float]

COLUMNS = (
    "epoch",
    "learning_rate",
    "train_loss",
    "val_loss",
    "val_accuracy",
    "test_loss",
    "test_accuracy",
    "seconds",
)


class FiniteCheck(Callback):
    """Stop at a loss or gradient that is not finite, and name the layer it came from.

    On a CPU every step is checked, so that none reaches the weights. Elsewhere reading the result would stall the
    device: every ``interval``-th step is checked, and the last of each epoch, so that none reaches a checkpoint.
    """

    def __init__(self, interval: int = 32) -> None:
        self.interval = interval

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        if pl_module.device.type != "cpu" and trainer.global_step % self.interval and not trainer.is_last_batch:
            return
        gradients = [parameter.grad for parameter in pl_module.model.parameters() if parameter.grad is not None]
        largest = torch.nn.utils.get_total_norm(gradients, torch.inf)
        if bool(torch.isfinite(largest) & torch.isfinite(pl_module.step_loss)):
            return
        assert pl_module.step_batch is not None
        with trainer.precision_plugin.forward_context():
            where = find_not_finite(pl_module.model, pl_module.step_batch[0])
        raise LowbitError(
            f"in epoch {trainer.current_epoch + 1}, step {trainer.fit_loop.batch_idx + 1}, {where} is not finite; "
            "train again with a lower learning rate, a warm-up or --precision float32"
        )


class Recorder(Callback):
    """Ends each epoch: weights, then checkpoint, then metrics.csv and TensorBoard, each written whole.

    The rows of metrics live in the checkpoint, and metrics.csv is made from them, as diagnostics.json is; so a process
    killed between two of the files leaves nothing that the resumed run does not make again, the same.

    Args:
        run: the run folder.
        rows: rows of the epochs that a checkpoint already holds.
        validated: whether the best epoch on the validation images gives the weights; otherwise the last epoch does.
        say: prints a line per epoch.
        diagnostics: rows of diagnostics, which a callback ahead of this one adds to.
    """

    def __init__(
        self,
        run: Run,
        rows: list[Row],
        validated: bool,
        say: Callable[[str], None],
        diagnostics: list[dict[str, Any]],
    ) -> None:
        self.run = run
        self.rows = rows
        self.validated = validated
        self.say = say
        self.diagnostics = diagnostics

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.board = SummaryWriter(str(self.run.path / "tensorboard"), purge_step=len(self.rows) + 1)
        write_metrics(self.run, self.rows)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        row = self.row(pl_module)
        self.rows.append(row)
        if not self.validated or best(self.rows, "val_accuracy") is row:
            save_weights(pl_module.measured, self.run.weights_path)
        Checkpoint(
            pl_module.model.state_dict(),
            pl_module.optimizer.state_dict(),
            self.rows,
            self.diagnostics,
            {} if pl_module.averaged is None else pl_module.averaged.state_dict(),
        ).save(self.run.checkpoint_path)
        write_metrics(self.run, self.rows)
        for name, value in row.items():
            if name != "epoch":
                self.board.add_scalar(name, value, int(row["epoch"]))
        self.board.flush()
        self.say(self.line(row, trainer.max_epochs))

    def row(self, module: TrainingModule) -> Row:
        """Figures of the epoch that just ended: a row of metrics.csv.

        ``learning_rate``: of the last step. ``train_loss``: of what was minimised, smoothed labels and a teacher among
        it, the mean over the images of the epoch's steps. ``val_loss``, ``test_loss``: of the labels alone, by the
        weights after the epoch or by their average. ``val_accuracy``, ``test_accuracy``: 0 to 1. ``seconds``: of
        steps and measuring.
        """
        row: Row = {"epoch": module.current_epoch + 1, "learning_rate": module.learning_rate}
        row["train_loss"] = module.tallies["train"].mean_loss
        for name in module.sets:
            row[f"{name}_loss"] = module.tallies[name].mean_loss
            row[f"{name}_accuracy"] = module.tallies[name].accuracy
        row["seconds"] = round(time.monotonic() - self.started, 3)
        return row

    @staticmethod
    def line(row: Row, epochs: int | None) -> str:
        """One epoch in words."""
        parts = [f"train loss {row['train_loss']:.4f}"]
        if "val_accuracy" in row:
            parts.append(f"val accuracy {100 * row['val_accuracy']:.2f} %")
        parts.append(f"test loss {row['test_loss']:.4f}, test accuracy {100 * row['test_accuracy']:.2f} %")
        return f"epoch {row['epoch']:.0f}/{epochs}: {', '.join(parts)}, {row['seconds']:.1f} s"

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        """Close the event file: when training ends, and when it fails, after which Lightning calls no teardown."""
        if hasattr(self, "board"):
            self.board.close()


def best(rows: list[Row], column: str) -> Row:
    """The first row with the highest value of ``column``."""
    return max(rows, key=lambda row: row[column])


def write_metrics(run: Run, rows: list[Row]) -> None:
    """Write metrics.csv, whole or not at all; a column that no row has is left out."""
    present = set().union(*rows) if rows else set(COLUMNS)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [name for name in COLUMNS if name in present], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with write_whole(run.metrics_path) as file:
        file.write(text.getvalue().encode())


class ProgressBar(RichProgressBar):
    """Lightning's bar on standard error, with the loss of a recent step."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10, leave=False, console_kwargs={"stderr": True})

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        assert isinstance(pl_module, TrainingModule)
        return {"loss": f"{float(pl_module.step_loss):.3f}"}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch + 1}/{self.trainer.max_epochs}"
