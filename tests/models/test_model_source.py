"""A model is found, or what is wrong with its name is said in one line, before anything is loaded and within one request."""

import http.server
import json
import threading
from pathlib import Path

import pytest

from synpo_fast.errors import UserError
from synpo_fast.models import load_policy, model_source
from synpo_fast.models.model_source import find_model


def model_folder(folder: Path, model_type: str = "qwen2_5_vl") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "model.safetensors").write_bytes(b"0")
    return folder


def live_at(monkeypatch, endpoint):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine: what it answers is set by the test, what it was asked is kept."""
    from huggingface_hub import constants

    answer: dict[str, object] = {"status": 200, "error": None, "asked": []}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            answer["asked"].append(self.path)
            self.send_response(answer["status"])
            if answer["error"]:
                self.send_header("X-Error-Code", answer["error"])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    live_at(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    model_source._find_on_hub.cache_clear()
    yield answer
    model_source._find_on_hub.cache_clear()
    server.shutdown()
    server.server_close()


def put_in_cache(tmp_path, name="someone/model"):
    repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    return model_folder(repository / "snapshots" / "abc")


def refusal(name):
    with pytest.raises(UserError) as caught:
        find_model(str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_with_a_model_is_taken_as_it_is(tmp_path):
    folder = str(model_folder(tmp_path / "model"))
    assert find_model(folder) == folder


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "../model", "~/model", "a/b/c", "runs/first/"])
def test_a_path_that_is_no_folder_never_reaches_the_hub(name, hub):
    assert f"model_name_or_path={name!r}: there is no such folder (looked for /" in refusal(name)
    assert not hub["asked"]


def test_what_a_folder_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoint-000007").mkdir(parents=True)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    model_folder(tmp_path / "other", "mamba")
    (model_folder(tmp_path / "bare") / "model.safetensors").unlink()
    (model_folder(tmp_path / "broken") / "config.json").write_text("{")
    (model_folder(tmp_path / "untyped") / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    assert "holds no config.json" in refusal("empty")
    assert "did you mean its checkpoint-000007?" in refusal("run")
    assert "is an adapter: merge it into a model with `synpo-fast merge adapter OUT`" in refusal("adapter")
    assert "model_type 'mamba' is not supported. Supported are" in refusal("other")
    assert "holds a config.json but no weights" in refusal("bare")
    assert "cannot be read as JSON" in refusal("broken")
    assert "names no model_type" in refusal("untyped")
    assert "is a file: give the folder" in refusal("file")
    assert "is not a folder, and not a valid name on the hub" in refusal("two words")
    assert "expected tiny: and one of qwen2_5_vl" in refusal("tiny:gpt")


@pytest.mark.parametrize(
    ("status", "error", "told"),
    [
        (401, "GatedRepo", "is gated: accept its conditions at http://127.0.0.1"),
        (403, "GatedRepo", "log in (`hf auth login`, or set HF_TOKEN)"),
        (401, "RepoNotFound", "there is no such folder (looked for /"),
        (404, "RepoNotFound", "if it is private, log in"),
        (404, "EntryNotFound", "holds no config.json"),
        (503, None, "cannot be reached"),
    ],
)
def test_the_hubs_refusals_are_one_line_after_one_request(hub, status, error, told):
    hub |= {"status": status, "error": error}
    assert told in refusal("someone/model")
    assert [path for path in hub["asked"] if "someone" in path] == ["/someone/model/resolve/main/config.json"]


def test_without_a_network_the_way_out_is_said_and_nothing_is_tried_again(hub, monkeypatch):
    live_at(monkeypatch, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waited {seconds} s to try again"))
    told = refusal("someone/model")
    assert "cannot be reached" in told
    assert "give the folder of a downloaded model, or set HF_HUB_OFFLINE=1 and HF_HOME" in told


def test_without_a_network_a_cached_copy_is_taken(hub, tmp_path, caplog):
    folder = put_in_cache(tmp_path)
    hub |= {"status": 503}
    assert find_model("someone/model") == str(folder)
    assert "using the cached copy" in caplog.text


def test_offline_mode_asks_nobody(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, and" in refusal("someone/model")
    put_in_cache(tmp_path, "someone/other")
    assert find_model("someone/other") == "someone/other"
    assert not hub["asked"]


def test_a_model_that_was_downloaded_in_part_is_one_line(tmp_path):
    policy = load_policy("tiny:text", device="cpu")
    policy.model.save_pretrained(str(tmp_path / "model"))
    policy.tokenizer.save_pretrained(str(tmp_path / "model"))
    whole = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model_name_or_path=.* cannot be loaded: ") as caught:
        load_policy(str(tmp_path / "model"), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_model_from_the_cache_goes_by_its_name(hub, tmp_path):
    policy = load_policy("tiny:text", device="cpu")
    folder = put_in_cache(tmp_path)
    for path in folder.iterdir():
        path.unlink()
    policy.model.save_pretrained(str(folder))
    policy.tokenizer.save_pretrained(str(folder))
    hub |= {"status": 503}
    loaded = load_policy("someone/model", device="cpu")
    assert loaded.base.name_or_path == loaded.base.config.name_or_path == "someone/model"
