"""A small server that speaks the Hub's protocol, for the real client: repositories of models, commits, large files, validation of cards."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

USER, TOKEN = "someone", "hf_" + "a" * 34
LARGE = (".safetensors", ".bin", ".png", ".parquet", ".pt", ".pth")  # what the Hub stores beside git
# Some of https://huggingface.co/docs/hub/repositories-licenses.
LICENSES = {
    "apache-2.0",
    "mit",
    "bsd-3-clause",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "openrail",
    "llama3.1",
    "other",
    "unknown",
}
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
BLOCK = re.compile(r"^\s*---\n(.*?)\n---", re.DOTALL)


def problems_of_card(content: str) -> list[str]:
    """What the Hub would refuse in a card's metadata, as far as github.com/huggingface/hub-docs/blob/main/modelcard.md tells."""
    match = BLOCK.match(content)
    if match is None:
        return []  # no metadata: a warning
    try:
        data = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if not isinstance(data, dict):
        return ["metadata must be an object"]
    found = [f"license {data['license']!r} is not known"] if data.get("license", "mit") not in LICENSES else []
    languages = data.get("language", [])
    for language in [languages] if isinstance(languages, str) else languages:
        found += [] if re.fullmatch(r"[a-z]{2,3}", language) else [f"language {language!r} is no ISO 639 code"]
    for key in ("datasets", "base_model"):
        names = data.get(key, [])
        for name in [names] if isinstance(names, str) else names:
            found += [] if REPO_ID.fullmatch(name) else [f"{key} {name!r} is no id of the Hub"]
    return found + problems_of_index(data.get("model-index", []))


def problems_of_index(index) -> list[str]:
    """Required: the model's name; the type of each task; type and name of each dataset; type and value of each metric."""
    if not isinstance(index, list):
        return ["model-index must be a list"]
    found = []
    for model in index:
        found += missing("model-index", model, "name", "results")
        for result in model.get("results", []):
            found += missing("results", result, "task", "dataset", "metrics")
            found += missing("task", result.get("task", {}), "type")
            found += missing("dataset", result.get("dataset", {}), "type", "name")
            for metric in result.get("metrics", []):
                found += missing("metrics", metric, "type", "value")
    return found


def missing(where: str, found: dict, *keys: str) -> list[str]:
    return [f"{where}.{key} is required" for key in keys if found.get(key) in (None, "", [])]


class Hub:
    """A server on this machine, while the context lasts.

    Attributes:
        url: what HF_ENDPOINT has to be.
        repos: files by repository, as the last commit left them.
        commits: (repository, message, files in it), in order.
        requests: method and path of each, in order.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str, dict[str, bytes]]] = []
        self.requests: list[tuple[str, str]] = []
        self.large: dict[str, bytes] = {}
        self.lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer()

            do_POST = do_PUT = do_HEAD = do_GET

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b"".join(iter(self.read_chunk, b""))
                path = unquote(urlsplit(self.path).path)
                is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                with hub.lock:
                    hub.requests.append((self.command, path))
                    status, headers, answer = hub.reply(self.command, path, body, is_known)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(answer)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer)

            def read_chunk(self) -> bytes:
                chunk = self.rfile.read(int(self.rfile.readline(), 16))
                self.rfile.readline()
                return chunk

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def reply(self, method: str, path: str, body: bytes, is_known: bool) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        if file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.resolve(*file.groups())
        if method == "PUT":  # a large file; its address is its key
            key = path.removeprefix("/large/")
            if hashlib.sha256(body).hexdigest() != key:
                return as_json(400, {"error": "the file has changed since it was announced"})
            self.large[key] = body
            return 200, {}, b""
        if path == "/api/validate-yaml":
            found = problems_of_card(json.loads(body)["content"])
            return as_json(400 if found else 200, {"errors": [{"message": text} for text in found], "warnings": []})
        if method != "GET" and not is_known:
            return as_json(401, {"error": "Invalid username or password."})
        for pattern, handle in {
            r"/api/whoami-v2": lambda: as_json(200, {"name": USER, "type": "user", "orgs": []}),
            r"/api/repos/create": lambda: self.create(json.loads(body)),
            r"/api/models/([^/]+/[^/]+)/preupload/.+": lambda *_: preupload(json.loads(body)),
            r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": lambda *_: self.batch(json.loads(body)),
            r"/api/models/([^/]+/[^/]+)/commit/.+": lambda repo: self.commit(repo, body),
            r"/api/models/([^/]+/[^/]+)(?:/revision/.+)?": self.info,
        }.items():
            if match := re.fullmatch(pattern, path):
                return handle(*match.groups())
        return as_json(404, {"error": f"no {path} here"})

    def create(self, wanted: dict):
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        status = 409 if repo in self.repos else 200
        self.repos.setdefault(repo, {})
        return as_json(status, {"url": f"{self.url}/{repo}", "name": repo})

    def batch(self, wanted: dict):
        """Where to put large files that are not here yet."""
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.url}/large/{entry['oid']}"}}}
            if entry["oid"] not in self.large
            else entry
            for entry in wanted["objects"]
        ]
        return as_json(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo: str, body: bytes):
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
        self.repos[repo] |= files
        self.commits.append((repo, header["summary"], files))
        return as_json(
            200, {"commitUrl": f"{self.url}/{repo}/commit/{self.oid}", "commitOid": self.oid, "success": True}
        )

    @property
    def oid(self) -> str:
        return f"{len(self.commits):040x}"

    def info(self, repo: str):
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        siblings = [{"rfilename": name} for name in self.repos[repo]]
        return as_json(200, {"id": repo, "modelId": repo, "sha": self.oid, "siblings": siblings})

    def resolve(self, repo: str, name: str):
        if name not in self.repos.get(repo, {}):
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        content = self.repos[repo][name]
        return 200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": self.oid}, content

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


def as_json(status: int, content: dict) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def preupload(wanted: dict):
    """Which files go into git, and which beside it."""
    files = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
            "shouldIgnore": False,
        }
        for file in wanted["files"]
    ]
    return as_json(200, {"files": files})
