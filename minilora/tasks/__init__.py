"""Fine-tuning presets: a base, a file and a task in; a measured adapter out; and the adapter at work on new texts."""

from .base import load_base, trained_on
from .finetune import Run, finetune, fit, prepare
from .predict import Prediction, Predictor, load, predict
from .presets import QUANTISED, TASKS, Settings
from .report import FinetuneReport
from .router import Router, embed_texts, keywords

__all__ = ["QUANTISED", "TASKS", "FinetuneReport", "Prediction", "Predictor", "Router", "Run", "Settings", "embed_texts",
           "finetune", "fit", "keywords", "load", "load_base", "predict", "prepare", "trained_on"]
