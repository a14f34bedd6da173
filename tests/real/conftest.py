"""Real models and data sets from the package index; nothing is downloaded here.

Without the packages the tests skip, unless MINILORA_REQUIRE_REAL is set: then their absence is an error.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import pytest


def require(package: str) -> None:
    """Skip the calling test without the package, or fail it with MINILORA_REQUIRE_REAL."""
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        message = f"{package} is not installed: pip install --no-deps {package}"
        if os.environ.get("MINILORA_REQUIRE_REAL"):
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="session")
def needs():
    """needs("package"): as `require`."""
    return require


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.real)
