"""Fine-tuning presets: a base, a file and a task in; a measured adapter out; and the adapter at work on new texts."""

from .finetune import Run, finetune, fit, prepare
from .predict import Prediction, Predictor, load, predict
from .presets import TASKS, Settings
from .report import FinetuneReport

__all__ = ["TASKS", "FinetuneReport", "Prediction", "Predictor", "Run", "Settings", "finetune", "fit", "load", "predict",
           "prepare"]
