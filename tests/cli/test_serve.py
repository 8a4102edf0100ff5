"""`afcache serve`: what is wrong is said in one line, before anything is started."""

import fcntl
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import afcache
from afcache.cli import serve
from afcache.cli.arguments import build_parser
from tests.cli.test_cli import fail
from tests.support.zoo import qwen_image

pytestmark = pytest.mark.host
WRONG: list[tuple[list[str], str]] = [
    (["--replicas", "0"], "argument --replicas: must be a whole number >= 1, got '0'"),
    (["--replicas", "3-2"], "argument --replicas: must be N, or from a number to one that is no less, such as 1-4, got '3-2'"),
    (["--replicas", "2-"], "argument --replicas: must be a whole number >= 1, got ''"),
    (["--port", "70000"], "argument --port: must be at most 65535, got '70000'"),
    (["--drain-seconds", "0"], "argument --drain-seconds: must be a number of seconds above 0 and at most a day, got '0'"),
    (["--checkpoint-seconds", "soon"], "argument --checkpoint-seconds: must be a number of seconds above 0"),
    (["--tolerance", "-1"], "tolerance must be"),
    (["--model", "nowhere"], "--model 'nowhere'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_wrong_options_give_one_clear_line(capsys, arguments: list[str], message: str):
    assert message in fail(capsys, "serve", *arguments)


def test_what_is_not_installed_is_named_with_the_extra(capsys, monkeypatch):
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name == "ray":
            raise ImportError(name)
        return real(name, package)

    monkeypatch.setattr(serve.importlib, "import_module", without)
    assert "needs ray, which is not installed: pip install 'afcache[serve]'" in fail(capsys, "serve")


def test_a_model_whose_requests_cannot_share_calls_is_refused(capsys, tmp_path):
    qwen_image.make("QwenImagePipeline").save_pretrained(tmp_path / "model")
    message = fail(capsys, "serve", "--model", str(tmp_path / "model"), "--folder", str(tmp_path / "served"))
    assert "requests of QwenImagePipeline with QwenImageTransformer2DModel cannot share calls" in message
    assert not (tmp_path / "served").exists()


def test_a_place_that_cannot_keep_requests_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--folder" in fail(capsys, "serve", "--folder", str(tmp_path / "file"))
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "requests.sqlite").write_bytes(b"something else, and long enough to be looked at" * 9)
    message = fail(capsys, "serve", "--folder", str(tmp_path / "served"))
    assert "must be a folder or a place for one, to write to: file is not a database" in message


def test_who_finds_a_folder_taken_has_not_written_into_it(capsys, tmp_path):
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "is served from by another process" in fail(capsys, "serve", "--folder", str(tmp_path))
    assert not (tmp_path / "requests.sqlite").exists()


def test_what_is_served_is_what_was_asked_for(monkeypatch, tmp_path):
    plans: list[Any] = []
    monkeypatch.setattr(serve, "_serve", lambda plan, arguments: plans.append(plan))
    words = ["serve", "--folder", str(tmp_path), "--replicas", "1-3", "--max-batch", "4", "--preset", "fast", "--compile"]
    serve.run(build_parser().parse_args(words))
    (plan,) = plans
    assert (plan.title, plan.replicas, plan.max_batch, plan.max_requests, plan.gpus) == ("mini-flux", (1, 3), 4, 16, 0.0)
    assert plan.settings == {"preset": "fast", "tolerance": None, "compile": True}
    assert plan.defaults == {
        "height": 32,
        "width": 32,
        "max_sequence_length": 16,
        "true_cfg_scale": 2.0,
        "negative_prompt": "",
    }
    assert plan.book == Path(tmp_path) / "requests.sqlite"
    assert plan.example == "a handwritten seven on a flower"
    pipe = plan.load()
    assert type(pipe).__name__ == "FluxPipeline"
    assert pipe.transformer.config.num_layers == afcache.load_mini_flux().transformer.config.num_layers


def test_the_port_that_is_taken_is_named(tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "afcache", "serve", "--port", port, "--folder", str(tmp_path)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert f"--port {port} is taken" in ended.stderr
