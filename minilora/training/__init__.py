"""Training: optimisers, schedules, the loop with its checkpoints, and sweeps of many adapters side by side."""

from .loop import History, TrainConfig, mean_loss, train
from .optim import SGD, AdamW, Optimizer, clip_grad_norm
from .schedule import schedule

__all__ = ["AdamW", "History", "Optimizer", "SGD", "TrainConfig", "clip_grad_norm", "mean_loss", "schedule", "train"]
