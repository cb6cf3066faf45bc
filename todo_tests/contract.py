"""The contract as facts: what `openapi.yaml` declares, and what an answer shows of it.

A fact is a line of text, so that a set of them reads as a report. Of an operation it is a status
with the error's code and sentence, or a header ("createTask 404 TASK_NOT_FOUND Task not found.",
"createTask 201 location"); of the table of headers one with its value, if that is fixed ("every
answer: vary Origin"); of a schema a member, or one of its sentences ("Task.title").
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml

CONTRACT: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parent.parent / "openapi.yaml").read_text("utf-8")
)
COMPONENTS = CONTRACT["components"]
METHODS = ("get", "post", "put", "patch", "delete")
OF_HTTP_ITSELF = {"content-type", "content-length", "date", "connection", "transfer-encoding"}
NO_OPERATION = "no operation"
# The errors of requests that are none.
OF_NO_OPERATION = {
    *("BAD_REQUEST", "HEADERS_TOO_LARGE"),
    *("AUTHENTICATION_REQUIRED", "INVALID_TOKEN", "TOKEN_EXPIRED", "AUTH_KEYS_UNAVAILABLE"),
    *("NOT_FOUND", "METHOD_NOT_ALLOWED"),
}


def resolved(node: Any) -> Any:
    """What a reference stands for."""
    while "$ref" in node:
        target: Any = CONTRACT
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        node = target
    return node


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in CONTRACT["paths"].items():
        for method in METHODS:
            if method in item:
                yield method, path, item[method]


OPERATIONS = {operation["operationId"]: operation for _, _, operation in operations()}

# Where the tables stand: that of errors, and those of headers and of versions.
WITH_TABLES = (COMPONENTS["schemas"]["ErrorBody"], OPERATIONS["getContract"])


def table(*columns: str) -> list[list[str]]:
    """The rows of the table with these columns, which is in a description of the contract."""
    head = "| " + " | ".join(columns) + " |"
    texts = "".join(each["description"] for each in WITH_TABLES)
    text = texts.partition(f"{head}\n")[2]
    [lines] = re.findall(r"\A\|[-|]+\|\n((?:\|.*\n)+)", text)
    return [line.strip("| ").split(" | ") for line in lines.splitlines()]


# Error code to status, and header to where it stands and its value, None if that varies.
CODES = {
    code.strip("`"): int(status)
    for status, code, _ in table("status", "error_code", "what happened, and what to do")
}
HEADERS = {
    header.strip("`").lower(): (of, match[1] if (match := re.fullmatch("`(.*)`", value)) else None)
    for header, of, value in table("header", "of", "value")
}


def examples_of(content: Mapping[str, Any]) -> list[Any]:
    """The examples of a media type, be they one or many."""
    single = [content["example"]] if "example" in content else []
    return single + [example["value"] for example in content.get("examples", {}).values()]


def errors_of(response: Mapping[str, Any]) -> list[dict[str, Any]]:
    values = examples_of(response.get("content", {}).get("application/json", {}))
    return [value for value in values if isinstance(value, dict) and "error_code" in value]


def _status_fact(name: str, status: object, error: Mapping[str, Any]) -> str:
    """With the sentence, if an operation gives the error; the contract has none for the rest."""
    sentence = "" if name == NO_OPERATION else error.get("detail", "")
    return f"{name} {status} {error.get('error_code', '')} {sentence}".strip()


def _header_fact(header: str, value: str | None = None) -> str:
    of, fixed = HEADERS[header]
    return f"{of}: {header}" + ("" if fixed is None else f" {fixed if value is None else value}")


def _named(schema: Mapping[str, Any], place: str) -> tuple[str, Any]:
    return (schema["$ref"].rpartition("/")[2] if "$ref" in schema else place), resolved(schema)


def _declared_members(schema: Mapping[str, Any], place: str = "") -> Iterator[str]:
    place, schema = _named(schema, place)
    if "items" in schema:
        yield from _declared_members(schema["items"], place)
        yield from (f"{place}: {text}" for text in schema["items"].get("examples", []))
    for name, member in schema.get("properties", {}).items():
        yield f"{place}.{name}"
        yield from _declared_members(member, f"{place}.{name}")


def _seen_members(schema: Mapping[str, Any], value: Any, place: str = "") -> Iterator[str]:
    place, schema = _named(schema, place)
    if isinstance(value, list):
        for item in value:
            yield from _seen_members(schema.get("items", {}), item, place)
            yield from [f"{place}: {item}"] if isinstance(item, str) else []
    if isinstance(value, dict):
        for name, member in value.items():
            yield f"{place}.{name}"
            known = schema.get("properties", {}).get(name, {})
            yield from _seen_members(known, member, f"{place}.{name}")


def _of_no_operation() -> dict[str, Any]:
    """Responses, by status, to requests that are no operation."""
    responses: dict[str, Any] = {"204": {}}
    for code in sorted(OF_NO_OPERATION):
        examples = {code: {"value": {"error_code": code}}}
        schema = {"$ref": "#/components/schemas/ErrorBody"}
        new = {"headers": {}, "content": {"application/json": {"schema": schema, "examples": {}}}}
        response = responses.setdefault(str(CODES[code]), new)
        response["content"]["application/json"]["examples"] |= examples
        for known in COMPONENTS["responses"].values():
            if code in [error["error_code"] for error in errors_of(known)]:
                response["headers"] |= known.get("headers", {})
    return responses


# Operation to status to response.
RESPONSES = {
    name: {status: resolved(response) for status, response in operation["responses"].items()}
    for name, operation in OPERATIONS.items()
} | {NO_OPERATION: _of_no_operation()}


def _declared() -> Iterator[str]:
    yield from (_header_fact(header) for header in HEADERS)
    for name, responses in RESPONSES.items():
        for status, response in responses.items():
            for error in errors_of(response) or [{}]:
                yield _status_fact(name, status, error)
            yield from (
                f"{name} {status} {header.lower()}" for header in response.get("headers", {})
            )
            for content in response.get("content", {}).values():
                yield from _declared_members(content.get("schema", {}))


DECLARED = set(_declared())


def operation_of(method: str, path: str) -> str:
    """The operation that a request is, by its path as it was sent."""
    for known, template, operation in operations():
        methods = {known.upper(), "HEAD"} if known == "get" else {known.upper()}
        # An empty user is a faulty one, an empty task none.
        pattern = template.format(user_id="[^/]*", id="[^/]+")
        if method in methods and re.fullmatch(pattern, path):
            return str(operation["operationId"])
    return NO_OPERATION


class AnsweredRequest(NamedTuple):
    """What was asked, and what came back."""

    method: str
    path: str  # as it was sent
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @classmethod
    def of(cls, response: httpx.Response) -> "AnsweredRequest":
        """That of httpx, read to its end."""
        path = response.request.url.raw_path.decode().partition("?")[0]
        method = response.request.method
        return cls(method, path, response.status_code, response.headers, response.content)

    def facts(self) -> Iterator[str]:
        """What it shows. A fact that is not declared says itself what it is."""
        name = operation_of(self.method, self.path)
        response = RESPONSES[name].get(str(self.status), {})
        own = {header.lower() for header in response.get("headers", {})}
        where = {"every answer", "every answer to an allowed page"}
        where |= {str(self.status), f"`{self.path}`"}
        if self.method == "OPTIONS" and self.status == 204:
            where.add("a preflight's 204 to an allowed page")
        for header in set(self.headers) - OF_HTTP_ITSELF:
            if header in HEADERS and HEADERS[header][0] in where:
                yield _header_fact(header, self.headers[header])
            elif header in own:
                yield f"{name} {self.status} {header}"
            else:
                yield f"{self.method} {self.path} {self.status} {header}"
        if self.method == "HEAD":
            return
        json_sent = self.headers.get("content-type") == "application/json"
        value = json.loads(self.body) if json_sent else None
        yield _status_fact(name, self.status, value if isinstance(value, dict) else {})
        schema = response.get("content", {}).get("application/json", {}).get("schema", {})
        yield from _seen_members(schema, value)

    def faults(self) -> list[str]:
        """What it has and the contract has not, and what it lacks of every answer."""
        facts = set(self.facts())
        needed = {_header_fact(name) for name, (of, _) in HEADERS.items() if of == "every answer"}
        return sorted(facts - DECLARED) + [f"lacks {fact}" for fact in sorted(needed - facts)]
