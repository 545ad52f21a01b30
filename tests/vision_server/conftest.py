"""The shipped models, loaded once for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from vision_server.describer import Describer
from vision_server.detector import Detector
from vision_server.network import set_environment
from vision_server.weights import SHIPPED, SHIPPED_DESCRIBER, SHIPPED_DETECTOR


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory of the tests' own; the model libraries keep their settings in it."""
    folder = tmp_path_factory.mktemp("data")
    set_environment(folder, fetch_describer=False)
    return folder


@pytest.fixture(scope="session")
def detector(data_dir: Path) -> Detector:
    """The shipped detector."""
    loaded = Detector(SHIPPED[SHIPPED_DETECTOR], "cpu", input_px=0, torch_threads=1)
    loaded.load()
    return loaded


@pytest.fixture(scope="session")
def describer(data_dir: Path) -> Describer:
    """The shipped describer."""
    source = str(SHIPPED[SHIPPED_DESCRIBER])
    return Describer.load(SHIPPED_DESCRIBER, source, device="cpu", quantization="none", offline=True)
