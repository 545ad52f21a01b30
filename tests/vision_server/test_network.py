"""Starting and predicting opens no connection and looks up no name, unless a model is to be fetched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vision_server.weights import WeightsMissing, find_detector, find_here

PROGRAM = """
import json, sys
from pathlib import Path

attempts = []
WATCHED = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "subprocess.Popen", "os.fork")
sys.addaudithook(lambda event, args: attempts.append(f"{event} {args[:2]}") if event in WATCHED else None)

from vision_server.network import set_environment
set_environment(Path(sys.argv[1]), fetch_describer=False)
from vision_server.describers.language_model import LanguageModel
from vision_server.detector import Detector
from vision_server.weights import SHIPPED
weights = SHIPPED["shapes-classifier"]
for engine in ("openvino", "pytorch"):
    detector = Detector(weights, "cpu", engine=engine)
    detector.load()
    detector.warm_up()
from vision_server.engines.conversion import convert
detector = Detector(convert(weights, Path(sys.argv[1]) / "a.onnx", "onnx"), "cpu", engine="onnxruntime")
detector.load()
detector.warm_up()
source = str(SHIPPED["shapes-describer"])
LanguageModel.load("shapes-describer", source, device="cpu", quantization="none", offline=True).warm_up()
import ultralytics.utils
left = [path.name for path in Path.home().iterdir()]
print(json.dumps({"attempts": attempts, "online": ultralytics.utils.ONLINE, "left": left}))
"""


def test_loading_and_answering_stay_off_the_network(tmp_path: Path) -> None:
    root, home = Path(__file__).parents[2], tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env={"PYTHONPATH": f"{root}:{root / 'clients'}", "PATH": "/usr/bin:/bin", "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert not [attempt for attempt in seen["attempts"] if attempt.startswith("socket.")], seen
    assert seen["online"] is False
    # OpenVINO's telemetry sends from a process that it forks, and leaves an identity in the home directory.
    assert not [attempt for attempt in seen["attempts"] if attempt.startswith("os.fork")], seen
    assert "intel" not in seen["left"]


@pytest.mark.parametrize("name", ["../evil.pt", "/etc/passwd", "a/../../evil.pt", "."])
def test_weights_are_taken_from_the_model_directory_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "evil.pt").write_bytes(b"pickle")
    with pytest.raises(WeightsMissing, match="model directory"):
        find_here(name, tmp_path / "models")


def test_a_link_out_of_the_model_directory_is_not_followed(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (tmp_path / "evil.pt").write_bytes(b"pickle")
    (models / "nice.pt").symlink_to(tmp_path / "evil.pt")
    with pytest.raises(WeightsMissing):
        find_here("nice.pt", models)


@pytest.mark.usefixtures("data_dir")
def test_offline_a_published_model_that_is_not_here_is_not_fetched(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match="VISION_OFFLINE"):
        find_detector("yolo11s.pt", tmp_path, offline=True)
    with pytest.raises(WeightsMissing, match="not shipped"):
        find_detector("no-such-model", tmp_path, offline=False)
