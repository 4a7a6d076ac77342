"""RUN/model to the Hugging Face Hub, which a server on this machine stands for."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from bert_fast.run.checkpoint import newest
from bert_fast.run.config import ConfigError, resolve
from tests.support.training_runs import train

NAME = "someone/a-bert"


class Hub:
    """Keeps what is uploaded; ``answers`` are the status codes of requests whose path has that part."""

    def __init__(self):
        self.repositories, self.files, self.answers, self.tokens = {}, {}, {}, set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hub.tokens.add(self.headers["Authorization"])
                refused = [code for part, code in hub.answers.items() if part in self.path]
                answer = {"error": "made to fail"} if refused else hub.answer(self.path, body)
                status = refused[0] if refused else 404 if answer is None else 200
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: bytes) -> dict | None:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(name, asked)
            return {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == f"/api/models/{NAME}/preupload/main":
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if path == f"/api/models/{NAME}/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"commitUrl": f"{self.url}/{NAME}/commit/1", "commitOid": "1", "success": True}
        return None


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_made")
    yield server
    server.close()


@pytest.fixture
def quick(configure):
    return configure(steps=2, checkpoint_every=2, push_to_hub=NAME)


@pytest.mark.parametrize("private", [True, False])
def test_the_model_is_uploaded_whole(configure, hub, capsys, private):
    config = configure(steps=2, checkpoint_every=2, push_to_hub=NAME, hub_private=private)
    assert train(config) == 0
    folder = Path(config.out) / "model"
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert b"a-bert" in hub.files["README.md"]
    asked = hub.repositories[NAME]
    assert (asked.get("private") or asked.get("visibility") == "private") is private
    assert hub.tokens == {"Bearer hf_made"}


def test_a_failed_upload_leaves_the_model_and_is_repeated_by_the_same_command(quick, hub, capsys):
    hub.answers = {"/commit/": 403}
    assert train(quick) == 1
    told = capsys.readouterr().err
    folder = Path(quick.out) / "model"
    assert f"hf upload {NAME} {folder} --private" in told
    assert "made to fail" in told
    assert not hub.files
    before = (folder / "model.safetensors").read_bytes()
    hub.answers = {}
    assert train(quick) == 0
    assert hub.files["model.safetensors"] == before
    assert newest(Path(quick.out))[0].step == 2


@pytest.mark.parametrize(
    ("token", "name", "answers", "message"),
    [
        (None, NAME, {}, "needs a login"),
        ("hf_made", "not/a/name", {}, "--push-to-hub not/a/name: Repo id must"),
        ("hf_made", NAME, {"/create": 403}, "the Hub refuses it: .*made to fail"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_the_run(
    configure, hub, monkeypatch, tmp_path, token, name, answers, message
):
    monkeypatch.setattr("bert_fast.run.hub.get_token", lambda: token)
    hub.answers = answers
    config = configure(push_to_hub=name)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        train(config)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_hub_that_is_not_reached_stops_no_run(quick, hub, capsys):
    hub.close()
    assert train(quick) == 1
    told = capsys.readouterr().err
    assert "the Hub is not reached" in told
    assert "hf upload" in told
    assert (Path(quick.out) / "model" / "model.safetensors").exists()


def test_a_run_that_is_stopped_uploads_nothing(quick, hub, monkeypatch):
    monkeypatch.setattr("bert_fast.run.pretrain.Run.train", lambda *_: 143)
    assert train(quick) == 143
    assert not hub.files


def test_a_branch_does_not_overwrite_its_runs_model(configure, tmp_path):
    config = configure(push_to_hub=NAME, schedule="constant")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"options": config.as_dict()}))
    branch = resolve({"decay_from": str(checkpoint), "decay_steps": 2.0, "out": str(tmp_path / "branch")})
    assert (branch.push_to_hub, branch.seq) == (None, 32)
