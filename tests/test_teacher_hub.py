"""Checkpoints from a hub: a small real server answers as the hub does, in a process of its own."""

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from teacher.errors import UsageError
from teacher.generators.hub import open_checkpoint

UNKNOWN = "not known: see the checkpoint's card"
SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b'{"model_type": "x"}', "model.safetensors": b"weights", "x.bin": b"no"}
FILES["model.fp16.safetensors"] = b"half"
CALL = """
import json, sys
from teacher.generators.hub import open_checkpoint
try:
    found = open_checkpoint(sys.argv[1], key="teacher.depth", licences={"open/": "CC0"})
    about = found.describe() | {"files": sorted(p.name for p in found.folder.iterdir())}
    print(json.dumps(about | {"torch": "torch" in sys.modules}))
except Exception as error:
    print(json.dumps({"error": str(error), "exit": getattr(error, "exit_code", None)}))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's answers for one open, one gated and no other repository."""

    def say(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        repo = "/".join(self.path.removeprefix("/api/models").strip("/").split("/")[:2])
        gated = {"X_Error_Code": "GatedRepo", "X_Error_Message": "Access is restricted"}
        if "no-such-branch" in self.path:
            self.say(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        elif repo.startswith("broken/"):
            self.say(500)
        elif repo not in ("open/model", "gated/model"):
            self.say(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif "/resolve/" in self.path and repo == "gated/model":
            self.say(403, **gated)
        elif "/resolve/" in self.path:
            name = self.path.split("?")[0].rsplit("/", 1)[1]
            self.server.fetched.append(name)
            self.say(200, FILES[name], X_Repo_Commit=SHA, ETag=f'"{name}"')
        elif "/tree/" in self.path:
            rows = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in FILES.items()]
            self.say(200, json.dumps(rows).encode(), Content_Type="application/json")
        else:
            siblings = [{"rfilename": name} for name in FILES]
            body = {"id": repo, "modelId": repo, "sha": SHA, "siblings": siblings, "tags": []}
            self.say(200, json.dumps(body).encode(), Content_Type="application/json")

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.fetched = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def ask(hub, tmp_path):
    def run(spec, **env):
        endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
        changes = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
        changes |= {"HF_HUB_DISABLE_XET": "1"} | env
        kept = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
        done = subprocess.run(
            [sys.executable, "-c", CALL, spec],
            env=kept | changes,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.stdout, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_a_repository_is_fetched_once_and_then_found_offline(ask, hub):
    missing = ask("open/model", HF_HUB_OFFLINE="1")
    assert missing["exit"] == 3 and "HF_HUB_OFFLINE is set" in missing["error"]
    found = ask("open/model@main")
    assert found["revision"] == SHA and found["repo"] == "open/model" and found["licence"] == "CC0"
    assert found["files"] == ["config.json", "model.safetensors"]  # no pickle, no second precision
    assert found["torch"] is False
    fetched = list(hub.fetched)
    again = ask("open/model@main", HF_HUB_OFFLINE="1")
    assert again == found and hub.fetched == fetched


@pytest.mark.parametrize(
    ("spec", "exit_code", "message"),
    [
        ("gated/model", 3, "is gated. Accept its licence"),
        ("nobody/model", 2, "no such repository on the hub"),
        ("open/model@no-such-branch", 2, "has no revision 'no-such-branch'"),
        ("broken/model", 3, "the hub cannot be reached|the download failed"),
        ("a b/model", 2, "not a repository name"),
        ("just-a-name", 2, "no such folder"),
    ],
)
def test_what_goes_wrong_is_said(ask, spec, exit_code, message):
    import re

    found = ask(spec)
    assert found.get("exit") == exit_code and re.search(message, found["error"]), found


def test_a_dead_endpoint_is_the_environments_fault(ask):
    found = ask("open/model", HF_ENDPOINT="http://127.0.0.1:9")
    assert found["exit"] == 3 and "hub cannot be reached" in found["error"]


def test_remote_code_is_off_before_diffusers_is_imported():
    from diffusers.utils.constants import DIFFUSERS_DISABLE_REMOTE_CODE

    assert DIFFUSERS_DISABLE_REMOTE_CODE is True


def test_adapters_equal_peft():
    """Ours against peft's own layers, on a network with the same names."""
    peft = pytest.importorskip("peft", reason="peft is not installed; it is only the oracle here")
    from teacher.generators.adapters import attach, use_adapter

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_out = torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)

        def forward(self, x):
            return self.to_out(self.to_q(x).relu())

    torch.manual_seed(0)
    ours, x = Net(), torch.randn(3, 6)
    oracle_base = Net()
    oracle_base.load_state_dict(ours.state_dict())
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_out"])
    oracle = peft.inject_adapter_in_model(config, oracle_base, adapter_name="a").eval()
    tensors = {}
    for path in ("to_q", "to_out"):
        layer = oracle.get_submodule(path)
        torch.nn.init.normal_(layer.lora_B["a"].weight)
        tensors[f"transformer.{path}.lora_A.weight"] = layer.lora_A["a"].weight.data
        tensors[f"transformer.{path}.lora_B.weight"] = layer.lora_B["a"].weight.data
    plain = ours(x)
    attach(ours, tensors, name="a")
    attach(ours, {k: v * 2 for k, v in tensors.items()}, name="b")
    assert torch.equal(ours(x), plain)
    use_adapter(ours, "a")
    torch.testing.assert_close(ours(x), oracle(x))
    use_adapter(ours, "b")
    assert (ours(x) - oracle(x)).abs().max() > 0.1
    use_adapter(ours, "")
    assert torch.equal(ours(x), plain)


def test_half_an_adapter_is_refused():
    from teacher.generators.adapters import attach

    with pytest.raises(UsageError, match="needs a linear layer and two halves"):
        attach(torch.nn.Sequential(torch.nn.Linear(2, 2)), {"0.lora_A.weight": torch.ones(1, 2)},
               name="a")  # fmt: skip
    with pytest.raises(UsageError, match="holds no weights"):
        attach(torch.nn.Linear(2, 2), {}, name="a")


def test_a_users_folder_is_named_without_its_path(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"abc")
    about = open_checkpoint(str(folder), key="k").describe()
    assert about["repo"] == "mine" and about["revision"] is None
    # SHA-256 of "abc", FIPS 180-2 appendix B.1
    assert about["weights_sha256"]["model.safetensors"] == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


@pytest.mark.parametrize(
    ("name", "files", "licence"),
    [
        ("Depth-Anything-V2-Large-hf", {}, "CC-BY-NC-4.0"),
        ("DepthPro-hf", {}, "Apple AMLR (research only)"),
        ("radiology", {}, UNKNOWN),
        ("models--ruicheng--moge-2/snapshots/abc", {}, "MIT"),
        ("a", {"config.json": '{"_name_or_path": "depth-anything/DA3-LARGE"}'}, "CC-BY-NC-4.0"),
        ("a", {"config.json": '{"_name_or_path": "/home/me/DA3-LARGE"}'}, "CC-BY-NC-4.0"),
        ("a", {"config.json": "[]"}, UNKNOWN),
        ("a", {"README.md": "---\ntags: [x]\nlicense: mit\n---\nlicense: gpl\n"}, "mit"),
        ("a", {"README.md": "---\nlicense:\n- cc-by-nc-4.0\n---\n"}, "cc-by-nc-4.0"),
        ("a", {"README.md": "---\nlicense: other\nlicense_name: acme-nc\n---\n"}, "acme-nc"),
        ("a", {"README.md": "no front matter\nlicense: mit\n"}, UNKNOWN),
        # a mild card does not hide what is known of the name
        ("DA3-LARGE", {"README.md": "---\nlicense: mit\n---\n"}, "mit; CC-BY-NC-4.0"),
    ],
)
def test_a_local_folder_tells_of_its_licence(tmp_path, name, files, licence):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"abc")
    for file, text in files.items():
        (folder / file).write_text(text)
    assert open_checkpoint(str(folder), key="k").licence == licence
