"""A W&B server that stands in on loopback: what runs, artifacts and Reports ask of one, kept to be looked at.

It answers wandb 0.31 and wandb-workspaces 0.4.13 as far as steerfm uses them: who the key belongs to, runs and their
file stream, files, artifacts (the same content is the same version) there and back, and Reports. Not stood in for:
permissions, rate limits, multipart uploads, checks of what is sent, and how W&B draws any of it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import pytest
import wandb

KEY = "0" * 40
ENTITY = "tester"
DAY = "2026-11-21T00:00:00"
Mood = Literal["well", "unauthorised", "silent"]


class StandIn:
    """Hold what the server was told: runs, artifacts, uploaded bytes, Reports, and every operation's name in turn.

    mood: "well"; "unauthorised" refuses every request with 401; "silent" takes requests and never answers.
    """

    def __init__(self) -> None:
        self.mood: Mood = "well"
        self.asked: list[str] = []
        self.unknown: list[str] = []  # operations that it does not answer
        self.bodies: list[bytes] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self.streams: dict[str, list[dict[str, Any]]] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.used: list[tuple[str, str]] = []  # (run, artifact id)
        self.uploads: dict[str, bytes] = {}
        self.views: list[dict[str, Any]] = []
        self.project = "steerfm"
        self.over = threading.Event()
        self.http = Server(("127.0.0.1", 0), Handler)
        self.http.standing = self

    @property
    def url(self) -> str:
        """Return the address, for WANDB_BASE_URL."""
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def start(self) -> None:
        """Serve from a thread of its own."""
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Close the port; requests that wait for an answer end."""
        if not self.over.is_set():
            self.over.set()
            self.http.shutdown()
            self.http.server_close()

    def history(self, run: str) -> list[dict[str, Any]]:
        """Return the rows that were streamed for a run, in order."""
        return [json.loads(line) for line in self._streamed(run, "wandb-history.jsonl")]

    def summary(self, run: str) -> dict[str, Any]:
        """Return the last summary that was streamed for a run."""
        return json.loads(self._streamed(run, "wandb-summary.json")[-1])

    def config(self, run: str) -> dict[str, Any]:
        """Return the config that a run was last told of, without wandb's own part."""
        found = json.loads(self.runs[run]["config"])
        return {key: each["value"] for key, each in found.items() if key != "_wandb"}

    def files(self, artifact: dict[str, Any]) -> dict[str, bytes]:
        """Return the bytes of every file in an artifact, by name."""
        entries = json.loads(self.uploads[f"{artifact['id']}/wandb_manifest.json"])["contents"]
        return {name: self.blob(entry) for name, entry in entries.items()}

    def blob(self, entry: dict[str, Any]) -> bytes:
        """Return the bytes that a manifest's entry stands for."""
        return self.uploads[f"blob/{_hex(entry['digest'])}"]

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        """Return the committed artifacts of a type, oldest first."""
        return [each for each in self.artifacts.values() if each["type"] == kind and each["state"] == "COMMITTED"]

    def _streamed(self, run: str, file: str) -> list[str]:
        return [line for told in self.streams.get(run, []) for line in told.get(file, {}).get("content", [])]

    # What GraphQL operations answer, by name.

    def answer(self, operation: str, variables: dict[str, Any]) -> Any:
        """Return the data that an operation gets; None where this server knows no such operation."""
        method = getattr(self, f"on_{operation}", None)
        return None if method is None else method(variables)

    def on_Viewer(self, _: dict[str, Any]) -> Any:
        teams = {"edges": [{"node": {"name": ENTITY, "id": "t"}}]}
        user = {"id": "u", "entity": ENTITY, "username": ENTITY, "email": "t@example.org", "name": ENTITY}
        return {"viewer": {**user, "flags": "{}", "admin": False, "teams": teams, "apiKeys": {"edges": []}}}

    def on_GetDefaultEntity(self, variables: dict[str, Any]) -> Any:
        return self.on_Viewer(variables)

    def on_ServerFeaturesQuery(self, _: dict[str, Any]) -> Any:
        return {"serverInfo": {"features": []}}

    def on_OrganizationCoreWeaveOrganizationID(self, _: dict[str, Any]) -> Any:
        return {"entity": {"organization": None}}

    def on_UpsertBucket(self, variables: dict[str, Any]) -> Any:
        name = variables.get("name") or _decoded(variables["id"])
        known = name in self.runs
        told = {key: value for key, value in variables.items() if value is not None}
        self.runs[name] = {**self.runs.get(name, {}), **told}
        return {"upsertBucket": {"bucket": self._bucket(name), "inserted": not known}}

    def _bucket(self, name: str) -> dict[str, Any]:
        run = self.runs[name]
        entity = {"id": "e", "name": ENTITY}
        return {
            "id": _encoded(name),
            "name": name,
            "displayName": run.get("displayName") or name,
            "description": "",
            "config": run.get("config", "{}"),
            "sweepName": None,
            "project": {"id": "p", "internalId": "p", "name": run["project"], "entity": entity},
            "historyLineCount": len(self._streamed(name, "wandb-history.jsonl")),
        }

    def on_RunResumeStatus(self, variables: dict[str, Any]) -> Any:
        name = variables["name"]
        if name not in self.runs:
            return {"model": None}
        history = self._streamed(name, "wandb-history.jsonl")
        bucket = self._bucket(name) | {
            "summaryMetrics": (self._streamed(name, "wandb-summary.json") or ["{}"])[-1],
            "historyLineCount": len(history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps(history[-1:]),
            "eventsTail": "[]",
            "tags": [],
            "wandbConfig": "{}",
        }
        return {"model": {"id": "p", "name": variables.get("project"), "entity": {"id": "e"}, "bucket": bucket}}

    def on_CreateRunFiles(self, variables: dict[str, Any]) -> Any:
        run = variables["run"]
        files = [{"name": name, "uploadUrl": f"{self.url}/put/run/{run}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": _encoded(run), "uploadHeaders": [], "files": files}}

    def on_CreateArtifact(self, variables: dict[str, Any]) -> Any:
        given = variables.get("input", variables)
        name = (
            given["artifactCollectionName"]
            if "artifactCollectionName" in given
            else given["artifactCollectionNames"][0]
        )
        same = [a for a in self.artifacts.values() if a["name"] == name and a["told"]["digest"] == given["digest"]]
        if same and same[0]["state"] == "COMMITTED":
            return {"createArtifact": {"artifact": {**same[0], "told": None, "artifactSequence": _sequence(name)}}}
        identity = _encoded(f"artifact{len(self.artifacts)}")
        version = sum(each["name"] == name for each in self.artifacts.values())
        kept = {"id": identity, "name": name, "type": given["artifactTypeName"], "version": version}
        self.artifacts[identity] = kept | {"state": "PENDING", "run": given.get("runName"), "told": given}
        return {"createArtifact": {"artifact": {**kept, "state": "PENDING", "artifactSequence": _sequence(name)}}}

    def on_CreateArtifactManifest(self, variables: dict[str, Any]) -> Any:
        given = variables.get("input", variables)
        return {"createArtifactManifest": {"artifactManifest": self._manifest(given["artifactID"])}}

    def on_UpdateArtifactManifest(self, variables: dict[str, Any]) -> Any:
        given = variables.get("input", variables)
        return {"updateArtifactManifest": {"artifactManifest": self._manifest(_decoded(given["artifactManifestID"]))}}

    def _manifest(self, artifact: str) -> dict[str, Any]:
        place = f"{self.url}/put/{artifact}/wandb_manifest.json"
        file = {"id": "f", "name": "wandb_manifest.json", "displayName": "wandb_manifest.json"}
        return {"id": _encoded(artifact), "file": {**file, "uploadUrl": place, "uploadHeaders": []}}

    def on_CreateArtifactFiles(self, variables: dict[str, Any]) -> Any:
        edges = []
        for spec in (variables.get("input") or {}).get("artifactFiles") or variables["artifactFiles"]:
            place = f"{self.url}/put/blob/{_hex(spec['md5'])}"
            node = {"id": "f", "name": spec["name"], "displayName": spec["name"], "uploadUrl": place}
            node |= {"uploadHeaders": [], "storagePath": spec["name"], "artifact": {"id": spec["artifactID"]}}
            edges.append({"node": {**node, "uploadMultipartUrls": None}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def on_CommitArtifact(self, variables: dict[str, Any]) -> Any:
        identity = (variables.get("input") or variables)["artifactID"]
        self.artifacts[identity]["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": identity, "digest": ""}}}

    def on_UseArtifact(self, variables: dict[str, Any]) -> Any:
        given = variables.get("input", variables)
        self.used.append((given["runName"], given["artifactID"]))
        empty = dict.fromkeys(("digest", "description", "state", "createdAt"), "")
        return {"useArtifact": {"artifact": {"id": given["artifactID"], "metadata": None, **empty}}}

    def on_ArtifactType(self, variables: dict[str, Any]) -> Any:
        known = self._newest(variables["name"])
        return {"project": {"artifact": None if known is None else {"artifactType": {"name": known["type"]}}}}

    def on_ArtifactMembershipByName(self, variables: dict[str, Any]) -> Any:
        known = self._newest(variables["name"])
        if known is None:
            return {"project": {"artifactCollectionMembership": None}}
        collection = self._collection(known["name"])
        membership = {"__typename": "ArtifactCollectionMembership", "id": "m", "versionIndex": known["version"]}
        membership |= {"createdAt": DAY, "aliases": [{"__typename": "ArtifactAlias", "id": "l", "alias": "latest"}]}
        membership |= {"artifactCollection": collection, "artifact": self._artifact(known)}
        return {"project": {"artifactCollectionMembership": membership}}

    def on_ArtifactByID(self, variables: dict[str, Any]) -> Any:
        return {"artifact": self._artifact(self.artifacts[variables["id"]])}

    def on_FetchArtifactManifest(self, variables: dict[str, Any]) -> Any:
        place = {"directUrl": f"{self.url}/get/{variables['id']}/wandb_manifest.json"}
        return {"artifact": {"currentManifest": {"file": place}}}

    def on_GetArtifactMembershipFileUrls(self, variables: dict[str, Any]) -> Any:
        known = self._newest(variables["collection"])
        assert known is not None
        entries = json.loads(self.uploads[f"{known['id']}/wandb_manifest.json"])["contents"]
        nodes = [
            {"__typename": "File", "name": name, "directUrl": f"{self.url}/get/blob/{_hex(entry['digest'])}"}
            for name, entry in entries.items()
        ]
        files = {"pageInfo": {"endCursor": None, "hasNextPage": False}, "edges": [{"node": node} for node in nodes]}
        collection = {"__typename": "ArtifactSequence", "artifactMembership": {"files": files}}
        return {"project": {"artifactCollection": collection}}

    def _newest(self, name: str) -> dict[str, Any] | None:
        found = [each for each in self.artifacts.values() if each["name"] == name.split(":")[0]]
        return next((each for each in reversed(found) if each["state"] == "COMMITTED"), None)

    def _collection(self, name: str) -> dict[str, Any]:
        project = {"id": "p", "internalId": "p", "name": self.project, "entity": {"id": "e", "name": ENTITY}}
        return {"__typename": "ArtifactSequence", "id": _encoded(name), "name": name, "project": project}

    def _artifact(self, known: dict[str, Any]) -> dict[str, Any]:
        return {
            "__typename": "Artifact",
            "id": known["id"],
            "artifactSequence": self._collection(known["name"]),
            "versionIndex": known["version"],
            "artifactType": {"name": known["type"]},
            "description": None,
            "metadata": "{}",
            "ttlDurationSeconds": -2,
            "ttlIsInherited": False,
            "tags": [],
            "historyStep": None,
            "state": known["state"],
            "size": 1,
            "digest": known["told"]["digest"],
            "commitHash": "c",
            "fileCount": 1,
            "createdAt": DAY,
            "updatedAt": DAY,
            "aliases": [],
        }

    def on_ProjectInternalId(self, variables: dict[str, Any]) -> Any:
        return {"project": {"id": "p", "internalId": "p"}}

    def on_GetProjects(self, _: dict[str, Any]) -> Any:
        return {"models": {"totalCount": 0, "edges": [], "pageInfo": {"endCursor": None, "hasNextPage": False}}}

    def on_CreateProject(self, variables: dict[str, Any]) -> Any:
        given = variables.get("input", variables)
        return {"upsertModel": {"project": {"id": "p", **given}, "model": {"id": "p", "name": self.project}}}

    def on_upsertView(self, variables: dict[str, Any]) -> Any:
        self.views.append(variables)
        known = variables.get("id") or _encoded(f"View:{len(self.views)}")
        view = {"id": known, "name": variables.get("name"), "type": variables.get("type")}
        view |= {"displayName": variables.get("displayName"), "description": "", "spec": variables.get("spec")}
        view |= {"project": {"id": "p", "name": variables.get("projectName"), "entityName": ENTITY}, "updatedAt": DAY}
        return {"upsertView": {"view": view, "inserted": True}}


def _encoded(name: str) -> str:
    return base64.b64encode(name.encode()).decode()


def _decoded(identity: str) -> str:
    return base64.b64decode(identity).decode()


def _hex(digest: str) -> str:
    return base64.b64decode(digest).hex()


def _sequence(name: str) -> dict[str, Any]:
    return {"id": _encoded(name), "name": name, "latestArtifact": None}


class Server(ThreadingHTTPServer):
    """Serve each connection in a thread that ends with the process."""

    daemon_threads = True
    standing: StandIn

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that ends closes its connections."""


class Handler(BaseHTTPRequestHandler):
    """Answer the requests of one connection for the StandIn that its HTTP server holds."""

    protocol_version = "HTTP/1.1"

    @property
    def standing(self) -> StandIn:
        return self.server.standing  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body, path = self._body(), urlsplit(self.path).path
        if self.standing.mood == "silent":
            self.standing.over.wait()
        elif self.standing.mood == "unauthorised":
            self._send(401, {"errors": [{"message": "user is not logged in"}]})
        elif path.endswith("/file_stream"):
            self.standing.streams.setdefault(path.split("/")[-2], []).append(json.loads(body).get("files") or {})
            self._send(200, {})
        elif path == "/graphql":
            self._ask(json.loads(body))
        else:
            self._send(200, {})  # telemetry

    def _ask(self, asked: dict[str, Any]) -> None:
        name = asked.get("operationName") or asked["query"].split("(")[0].split("{")[0].split()[1]
        self.standing.asked.append(name)
        found = self.standing.answer(name, asked.get("variables") or {})
        if found is None:
            self.standing.unknown.append(name)
            self._send(400, {"errors": [{"message": f"this server knows no {name}"}]})
        else:
            self._send(200, {"data": found})

    def do_PUT(self) -> None:
        self.standing.uploads[unquote(urlsplit(self.path).path).removeprefix("/put/")] = self._body()
        self._send(200, {})

    def do_GET(self) -> None:
        kept = self.standing.uploads.get(unquote(urlsplit(self.path).path).removeprefix("/get/"))
        self._send(404, {}) if kept is None else self._send(200, kept)

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.standing.bodies.append(body)
        return body

    def _send(self, status: int, answer: Any) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(data)


@contextlib.contextmanager
def stand_in(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[StandIn]:
    """Serve inside the block, with wandb's variables pointing there and its files in `home`."""
    server = StandIn()
    server.start()
    home.mkdir(parents=True, exist_ok=True)
    for name, value in {
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": KEY,
        "HOME": str(home),
        "WANDB_CONFIG_DIR": str(home),
        "WANDB_CACHE_DIR": str(home / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.teardown()  # it remembers what it was told of a server before
    try:
        yield server
    finally:
        server.stop()
        with contextlib.suppress(Exception):
            wandb.teardown()
