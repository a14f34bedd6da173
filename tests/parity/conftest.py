"""Parity: minilora against PyTorch, transformers and PEFT, on random weights and small shapes.

Without those libraries the tests skip, unless MINILORA_REQUIRE_PARITY is set: then their absence is an error.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")               # PEFT would ask the hub about a base's vocabulary
MISSING = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
if MISSING and os.environ.get("MINILORA_REQUIRE_PARITY"):
    raise pytest.UsageError(f"MINILORA_REQUIRE_PARITY is set, but {', '.join(MISSING)} cannot be imported: "
                            'pip install "minilora[parity]"')
if not MISSING:
    with warnings.catch_warnings():                        # what these libraries say about each other while being imported
        warnings.simplefilter("ignore")
        import peft  # noqa: F401
        import torch
        import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.parity)
