"""A fake of the part of Elasticsearch that the sink speaks with: `_bulk`, settings, rights.

Answers and errors are those of Elasticsearch 8, as far as its reference and its source tell them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from tests.sinks.http_server import Answer, Asked, FakeServer

if TYPE_CHECKING:
    import ssl


class FakeElasticsearch(FakeServer):
    """Indices in memory; `n` is mapped as a long.

    Attributes:
        indices: documents by index and id.
        item_script: what becomes of the next documents: `(status, error)` instead of the work.
    """

    def __init__(self, *, password: str = "", tls: ssl.SSLContext | None = None) -> None:
        self.indices: dict[str, dict[str, Any]] = {}
        self.settings: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self.auto_create = True
        self.body_bytes_max = 100 * 1024 * 1024
        self.item_script: list[tuple[int, dict[str, Any]] | None] = []
        self.rights = {"create_doc", "auto_configure"}
        self.distribution = ""
        self.authorization = password
        super().__init__(tls)

    @property
    def documents(self) -> list[Any]:
        return [one for index in self.indices.values() for one in index.values()]

    def answer(self, asked: Asked) -> Answer:
        if self.authorization and asked.headers.get("authorization") != self.authorization:
            return _answer({"error": _error("security_exception", "missing credentials")}, 401)
        path = unquote(urlsplit(asked.path).path)
        if path == "/":
            version = {"number": "8.19.0"}
            if self.distribution:
                version = {"number": "3.1.0", "distribution": self.distribution}
            return _answer({"version": version, "tagline": "You Know, for Search"})
        if path.endswith("/_bulk"):
            return self._bulk(path.split("/")[1], asked)
        if path == "/_cluster/settings":
            return _answer(
                {"defaults": {"action.auto_create_index": str(self.auto_create).lower()}}
            )
        if path.endswith("/_settings"):
            return self._settings(path.split("/")[1])
        if path == "/_security/user/_has_privileges" and not self.distribution:
            (one,) = json.loads(asked.body)["index"]
            has = {name: name in self.rights for name in one["privileges"]}
            return _answer({"index": {one["names"][0]: has}})
        return _answer({"error": "no handler found"}, 400)

    def _settings(self, index: str) -> Answer:
        name = self.aliases.get(index, index)
        if name not in self.indices:
            error = _error("index_not_found_exception", f"no such index [{index}]")
            return _answer({"error": error}, 404)
        return _answer({name: {"settings": self.settings}})

    def _bulk(self, index: str, asked: Asked) -> Answer:
        if len(asked.body) > self.body_bytes_max:
            return Answer(413)
        assert asked.body.endswith(b"\n")
        lines = asked.body.split(b"\n")[:-1]
        items = [
            {"create": self._create(index, json.loads(action)["create"]["_id"], source)}
            for action, source in zip(lines[::2], lines[1::2], strict=True)
        ]
        return _answer({"items": items})

    def _create(self, index: str, name: str, source: bytes) -> dict[str, Any]:
        if self.item_script and (said := self.item_script.pop(0)) is not None:
            return {"status": said[0], "error": said[1]}
        if index not in self.indices and not self.auto_create:
            return {"status": 404, "error": _error(
                "index_not_found_exception", f"no such index [{index}] and"
                " [action.auto_create_index] is [false]")}  # fmt: skip
        if self.settings.get("index.blocks.write") == "true":
            return {"status": 403, "error": _error(
                "cluster_block_exception", f"index [{index}] blocked by: [FORBIDDEN/8/index write"
                " (api)];")}  # fmt: skip
        there = self.indices.setdefault(index, {})
        if name in there:
            return {"status": 409, "error": _error(
                "version_conflict_engine_exception", f"[{name}]: version conflict, document already"
                " exists (current version [1])")}  # fmt: skip
        document = json.loads(source)
        if not isinstance(document.get("n", 0), int):
            return {"status": 400, "error": {
                **_error("document_parsing_exception", "[1:5] failed to parse field [n] of type"
                         f" [long] in document with id '{name}'. Preview of field's value:"
                         f" '{document['n']}'"),
                "caused_by": _error("illegal_argument_exception", "For input string"),
            }}  # fmt: skip
        there[name] = document
        return {"status": 201}


def _error(kind: str, reason: str) -> dict[str, Any]:
    return {"type": kind, "reason": reason}


def _answer(body: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(body).encode(), (("Content-Type", "application/json"),))
