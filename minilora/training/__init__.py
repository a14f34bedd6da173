"""Training: optimisers, schedules, the loop with its checkpoints, and sweeps of many adapters side by side."""

from .loop import History, TrainConfig, mean_loss, train
from .optim import SGD, AdamW, Optimizer, clip_grad_norm
from .schedule import schedule
from .sweep import SweepResult, TrainedAdapter, sweep, task_batches

__all__ = ["AdamW", "History", "Optimizer", "SGD", "SweepResult", "TrainConfig", "TrainedAdapter", "clip_grad_norm",
           "mean_loss", "schedule", "sweep", "task_batches", "train"]
