"""The shipped models, loaded once for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from vision_server.describers.language_model import LanguageModel
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
def engine_cache(data_dir: Path) -> Path:
    """Where what OpenVINO reads is kept, so that a model is converted once for all tests."""
    return data_dir / "cache" / "openvino"


@pytest.fixture(scope="session")
def detector(engine_cache: Path) -> Detector:
    """The shipped detector, on the engine that a CPU gets by default."""
    loaded = Detector(SHIPPED[SHIPPED_DETECTOR], "cpu", cache_dir=engine_cache)
    loaded.load()
    return loaded


@pytest.fixture(scope="session")
def describer(data_dir: Path) -> LanguageModel:
    """The shipped describer."""
    source = str(SHIPPED[SHIPPED_DESCRIBER])
    model = LanguageModel.load(SHIPPED_DESCRIBER, source, device="cpu", quantization="none", offline=True)
    model.warm_up()
    return model
