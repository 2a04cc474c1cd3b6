"""An export with ONNX beside it, and on the Hub: a stub of it on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub.constants as hub_constants
import numpy as np
import pytest

import depthprobe as dp
from depthprobe.errors import BadInput
from depthprobe.models.onnx import open_session, padded
from depthprobe.runs import export as exports
from depthprobe.runs.context import Context
from depthprobe.runs.export import check_hub, export_trial, push_to_hub
from depthprobe.runs.store import Run

ROUNDS = 5


@pytest.mark.parametrize(
    "trial", ["sasrec-s0", pytest.param("distill-d02-s1", marks=pytest.mark.slow)]
)
def test_the_onnx_file_answers_as_the_export_does(
    trial: str, small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript", reason="in the extra dev")
    monkeypatch.setattr(exports, "ROUNDS", ROUNDS)
    folder = export_trial(small_run.path, trial, tmp_path / "model", onnx=True)
    loaded, session = dp.load_recommender(folder), open_session(folder / "recommender.onnx")
    split = Context(small_run.path, small_run.study).split
    users = [split.history("test", place) for place in range(len(split.test.users))]
    items, _ = session.run(None, {"histories": padded(users), "top": np.array([5])})
    answers = loaded.recommend([[loaded.item_ids[row - 1] for row in each] for each in users], 5)
    for rows, answer in zip(items, answers, strict=True):
        assert [loaded.item_ids[row - 1] for row in rows] == [one.item for one in answer]
    facts = json.loads((folder / "onnx.json").read_text())
    assert facts["test_users"] == len(users) == 60
    assert facts["largest_difference"] < 1e-5
    assert [(one["users"], one["rounds"]) for one in facts["latencies"]] == [(1, 5), (60, 5)]
    assert all(one["torch"] > 0 < one["onnxruntime"] for one in facts["latencies"])
    card = (folder / "README.md").read_text()
    assert "Its ten best items are those of this model for all 60 test users" in card
    # only where others than ours come out
    monkeypatch.setattr("depthprobe.models.onnx.TOLERANCE", 0.0)
    monkeypatch.setattr(exports, "write_onnx", lambda *_: None)
    monkeypatch.setattr(exports, "open_session", lambda _: session)
    with pytest.raises(BadInput, match="histories get other items than ours"):
        export_trial(small_run.path, trial, tmp_path / "other", onnx=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class Hub(BaseHTTPRequestHandler):
    """What an upload needs of the Hub; a wrong token is refused."""

    asked: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        """Note what came, and answer."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, content))
        place = f"http://{self.headers['Host']}/me/small"
        answer: dict[str, object] = {"url": place}
        if self.headers["Authorization"] != "Bearer hf_right":
            answer = {"error": "Invalid username or password."}
        elif self.path.endswith("/preupload/main"):
            files = [each["path"] for each in json.loads(content)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": path, **regular} for path in files]}
        elif self.path.endswith("/commit/main"):
            answer = {"commitUrl": f"{place}/commit/1", "commitOid": "1"}
        body = json.dumps(answer).encode()
        self.send_response(401 if "error" in answer else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    monkeypatch.setattr(Hub, "asked", [], raising=False)
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(hub_constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "small"
    made.mkdir()
    (made / "README.md").write_text("---\nlicense: other\n---\n# small\n")
    (made / "recommender.json").write_text("{}")
    return made


def test_a_folder_goes_to_a_private_repository(hub: HTTPServer, folder: Path) -> None:
    check_hub("me/small")
    assert str(push_to_hub(folder, "me/small")).endswith("/me/small")
    paths = [path for path, _ in Hub.asked]
    assert paths[0] == "/api/repos/create"
    created = json.loads(Hub.asked[0][1])
    assert (created["name"], created["organization"]) == ("small", "me")
    assert created.get("visibility") == "private" or created.get("private")
    assert paths[-1] == "/api/models/me/small/commit/main"
    for name in ("README.md", "recommender.json"):
        assert name.encode() in Hub.asked[-1][1]


@pytest.mark.parametrize("case", ["wrong token", "nobody listens", "offline"])
def test_what_the_hub_refuses_is_one_line_and_the_folder_stays(
    case: str, hub: HTTPServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"wrong token": "401", "nobody listens": "refused", "offline": "[Oo]ffline"}[case]
    if case == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    elif case == "offline":
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match=f"--push-to-hub: 'me/small': not pushed .*{said}") as caught:
        push_to_hub(folder, "me/small")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(f"{folder} is complete: hf upload me/small {folder}")
    assert {path.name for path in folder.iterdir()} == {"README.md", "recommender.json"}


def test_a_name_and_a_token_are_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("me/small/er", "a b", "-x"):
        with pytest.raises(BadInput, match="--push-to-hub: expected a name such as me/small"):
            check_hub(name)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(BadInput, match="no token for the Hub; run hf auth login, or set HF_TOKEN"):
        check_hub("me/small")
