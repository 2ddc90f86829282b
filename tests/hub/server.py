"""
A Hub on localhost that speaks the HTTP protocol of `huggingface_hub`: repositories, regular and LFS uploads (in one piece or in
parts), commits, the card check and downloads. It keeps everything in memory, counts what it is sent and fails on demand.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from unittest.mock import patch
from urllib.parse import unquote, urlparse

import yaml
from huggingface_hub import constants, repocard


LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".pt")
REPO = r"(?P<id>[^/]+/[^/]+)"
TYPE = r"(?P<type>models|datasets)"


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: [secrets.token_hex(20)])
    messages: list[str] = field(default_factory=list)


@dataclass
class Failure:
    """What a kind of request is answered with: a status and a message, or, if `status` is 0, a connection that drops."""

    status: int = 0
    message: str = ""
    times: int = 1_000


class Hub(ThreadingHTTPServer):
    """State of the Hub. `tokens` maps a token to its rights, `"write"` or `"read"`."""

    daemon_threads = True

    def __init__(self, tokens: dict[str, str], user: str = "me", part_size: int | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.tokens = tokens
        self.user = user
        self.part_size = part_size  # larger LFS files come in parts
        self.repos: dict[tuple[str, str], Repo] = {}  # ("models", "me/name")
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.uploads: Counter = Counter()  # complete PUTs of an object or part
        self.requests: list[tuple[str, str]] = []
        self.created: list[dict] = []  # bodies of the requests that make a repository
        self.checked: list[str] = []  # cards
        self.failures: dict[str, Failure] = {}  # "create", "preupload", "batch", "put", "commit"
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        pass  # a client that goes away is no news


class Dropped(Exception):
    pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    # -- helpers --

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, content, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer(status, {"error": message}, headers)

    def fails(self, kind: str) -> bool:
        """Fails where that was asked for. Of an upload, half is read first."""
        with self.server.lock:
            failure = self.server.failures.get(kind)
            if failure is None or failure.times == 0:
                return False
            failure.times -= 1
        if failure.status == 0:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            raise Dropped
        self.body()
        self.refuse(failure.status, failure.message)
        return True

    def rights(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.server.tokens.get(token)

    def may_write(self) -> bool:
        if self.rights() == "write":
            return True
        self.body()
        if self.rights() is None:
            self.refuse(401, "Invalid credentials in Authorization header")
        else:
            self.refuse(403, "You don't have the rights to write to this namespace")
        return False

    def repo(self, match) -> Repo | None:
        """The repository, unless it is not there or this token may not see it, which look the same."""
        repo = self.server.repos.get((match["type"] or "models", match["id"]))
        if repo is None or (repo.private and self.rights() is None):
            self.body()
            self.refuse(401 if self.rights() is None else 404, "Repository not found", "RepoNotFound")
            return None
        return repo

    def route(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.server.requests.append((self.command, path))
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                try:
                    function(self, match)
                except Dropped:
                    self.close_connection = True
                    self.connection.close()
                return
        self.body()
        self.refuse(404, f"No such page: {path}", "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = route

    # -- repositories --

    def create(self, match) -> None:
        if self.fails("create") or not self.may_write():
            return
        body = json.loads(self.body())
        self.server.created.append(body)
        kind = f"{body.get('type') or 'model'}s"
        repo_id = f"{body['organization'] or self.server.user}/{body['name']}"
        url = f"{self.server.url}/{'' if kind == 'models' else 'datasets/'}{repo_id}"
        if (kind, repo_id) in self.server.repos:
            return self.answer(409, {"error": "You already created this repo", "url": url})
        self.server.repos[kind, repo_id] = Repo(private=body.get("visibility") == "private")
        self.answer(200, {"url": url, "id": repo_id})

    def validate_yaml(self, match) -> None:
        body = json.loads(self.body())
        self.server.checked.append(body["content"])
        errors = check_card(body["content"], body["repoType"])
        messages = [{"message": error} for error in errors]
        self.answer(400 if errors else 200, {"errors": messages, "warnings": []})

    def info(self, match) -> None:
        repo = self.repo(match)
        if repo is not None:
            siblings = [{"rfilename": name} for name in repo.files]
            info = {
                "id": match["id"],
                "sha": repo.commits[-1],
                "private": repo.private,
                "siblings": siblings,
                "tags": [],
            }
            if "README.md" in repo.files:
                info["cardData"] = yaml.safe_load(repo.files["README.md"].decode().split("---")[1])
            self.answer(200, info)

    def tree(self, match) -> None:
        repo = self.repo(match)
        if repo is None:
            return
        folder = f"{match['path']}/" if match["path"] else ""
        inside = [name for name in repo.files if name.startswith(folder)]
        if folder and not inside:
            return self.refuse(404, "Not found", "EntryNotFound")
        entries = []
        if "recursive=true" not in self.path.lower():
            folders = {
                folder + name.removeprefix(folder).split("/")[0] for name in inside if "/" in name.removeprefix(folder)
            }
            entries += [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
            inside = [name for name in inside if "/" not in name.removeprefix(folder)]
        self.answer(200, entries + [describe(name, repo.files[name]) for name in inside])

    def paths_info(self, match) -> None:
        body = self.body()
        repo = self.repo(match)
        if repo is not None:
            form = (
                json.loads(body)
                if body.startswith(b"{")
                else {"paths": [unquote(p[6:]) for p in body.decode().split("&")]}
            )
            found = [describe(name, repo.files[name]) for name in form["paths"] if name in repo.files]
            self.answer(200, found)

    def resolve(self, match) -> None:
        repo = self.repo(match)
        if repo is None:
            return
        if match["path"] not in repo.files:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        data = repo.files[match["path"]]
        headers = {"ETag": f'"{etag(match["path"], data)}"', "X-Repo-Commit": repo.commits[-1]}
        headers["Content-Type"] = "application/octet-stream"
        if self.command == "HEAD":
            headers["Content-Length"] = str(len(data))
        range_ = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if range_:
            start, end = int(range_[1]), int(range_[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self.answer(206, data[start : end + 1], headers)
        self.answer(200, data, headers)

    # -- uploads --

    def preupload(self, match) -> None:
        if self.fails("preupload") or not self.may_write():
            return
        body = json.loads(self.body())
        repo = self.repo(match)
        if repo is None:
            return
        files = []
        for file in body["files"]:
            held = repo.files.get(file["path"])
            files.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_lfs(file["path"]) else "regular",
                    "shouldIgnore": False,
                    "oid": None if held is None else etag(file["path"], held),
                }
            )
        self.answer(200, {"files": files})

    def lfs_batch(self, match) -> None:
        if self.fails("batch") or not self.may_write():
            return
        objects = []
        for item in json.loads(self.body())["objects"]:
            oid, size, answer = item["oid"], item["size"], dict(item)
            if oid not in self.server.objects:
                href = f"{self.server.url}/lfs/{oid}"
                upload: dict = {"href": href, "header": {}}
                part_size = self.server.part_size
                if part_size is not None and size > part_size:
                    numbers = range(1, -(-size // part_size) + 1)
                    upload["header"] = {"chunk_size": str(part_size), **{f"{n:05d}": f"{href}/{n}" for n in numbers}}
                verify = {"href": f"{self.server.url}/{match['id']}.git/info/lfs/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, match) -> None:
        oid = match["oid"]
        if self.fails("put"):
            return
        data = self.body()
        if match["part"] is None:
            if hashlib.sha256(data).hexdigest() != oid:
                return self.refuse(400, "The content does not have this SHA-256")
            self.server.objects[oid] = data
        else:
            self.server.parts[oid, int(match["part"])] = data
        self.server.uploads[self.path] += 1
        self.answer(200, b"", {"ETag": hashlib.md5(data).hexdigest()})

    def lfs_complete(self, match) -> None:
        body = json.loads(self.body())
        data = b"".join(self.server.parts[match["oid"], part["partNumber"]] for part in body["parts"])
        if hashlib.sha256(data).hexdigest() != match["oid"]:
            return self.refuse(400, "The parts do not have this SHA-256")
        self.server.objects[match["oid"]] = data
        self.answer(200, {})

    def lfs_verify(self, match) -> None:
        if self.may_write():
            body = json.loads(self.body())
            held = self.server.objects.get(body["oid"])
            if held is None or len(held) != body["size"]:
                return self.refuse(404, "No such object", "EntryNotFound")
            self.answer(200, {})

    def commit(self, match) -> None:
        if self.fails("commit") or not self.may_write():
            return
        lines = [json.loads(line) for line in self.body().splitlines()]
        repo = self.repo(match)
        if repo is None:
            return
        changed = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    return self.refuse(400, f"LFS object {value['oid']} was not uploaded")
                changed[value["path"]] = self.server.objects[value["oid"]]
        repo.files.update(changed)
        repo.commits.append(secrets.token_hex(20))
        repo.messages.append(lines[0]["value"]["summary"])
        url = f"{self.server.url}/{match['id']}/commit/{repo.commits[-1]}"
        self.answer(200, {"commitUrl": url, "commitOid": repo.commits[-1], "pullRequestUrl": None})


ROUTES = [
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"/api/{TYPE}/{REPO}/preupload/[^/]+", Handler.preupload),
    ("POST", rf"/api/{TYPE}/{REPO}/commit/[^/]+", Handler.commit),
    ("POST", rf"/api/{TYPE}/{REPO}/paths-info/[^/]+", Handler.paths_info),
    ("GET", rf"/api/{TYPE}/{REPO}/tree/[^/]+(/(?P<path>.+))?", Handler.tree),
    ("GET", rf"/api/{TYPE}/{REPO}(/revision/[^/]+)?", Handler.info),
    ("POST", rf"/((?P<type>datasets)/)?{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", rf"/((?P<type>datasets)/)?{REPO}\.git/info/lfs/verify", Handler.lfs_verify),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})(/(?P<part>\d+))?", Handler.lfs_put),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_complete),
    ("GET HEAD", rf"/((?P<type>datasets)/)?{REPO}/resolve/[^/]+/(?P<path>.+)", Handler.resolve),
]


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def etag(path: str, data: bytes) -> str:
    """SHA-256 of an LFS file, git's SHA-1 of another."""
    if is_lfs(path):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def describe(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if is_lfs(path):
        entry["lfs"] = {"oid": etag(path, data), "size": len(data), "pointerSize": 134}
    return entry


def check_card(content: str, repo_type: str) -> list[str]:
    """The rules of the Hub's metadata that a card of ours could break."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if not match:
        return ["metadata is missing"]
    data = yaml.safe_load(match[1])
    errors = []
    repo_id = re.compile(r"[\w.-]+(/[\w.-]+)?")
    for key in ("base_model", "datasets", "source_datasets"):
        values = data.get(key, [])
        for value in [values] if isinstance(values, str) else values:
            if not repo_id.fullmatch(value):
                errors.append(f'"{key}" with value "{value}" is not valid')
    if "license" in data and not re.fullmatch(r"[a-z0-9.-]+", data["license"]):
        errors.append('"license" must be one of the known licenses')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be strings')
    for number, model in enumerate(data.get("model-index", [])):
        if not model.get("name"):
            errors.append(f'"model-index[{number}].name" is required')
        for result in model.get("results", []):
            for part, names in {"task": ["type"], "dataset": ["type", "name"]}.items():
                errors += [f'"{part}.{name}" is required' for name in names if not result.get(part, {}).get(name)]
            for metric in result.get("metrics", []):
                if not metric.get("type") or not isinstance(metric.get("value"), (int, float)):
                    errors.append(f"metric {metric} needs a type and a number")
    if repo_type == "dataset" and any("data_files" not in config for config in data.get("configs", [])):
        errors.append('"configs[].data_files" is required')
    return errors


def validate(card) -> None:
    """`card.validate()` by the Hub of `HF_ENDPOINT`: before version 2, `huggingface_hub` asks huggingface.co whatever it says."""
    post = repocard.get_session().post

    def post_here(url, **kwargs):
        return post(url.replace("https://huggingface.co", constants.ENDPOINT), **kwargs)

    with patch.object(repocard, "get_session", return_value=SimpleNamespace(post=post_here)):
        card.validate()


@contextmanager
def serve(**kwargs):
    """A running Hub."""
    hub = Hub(**kwargs)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
