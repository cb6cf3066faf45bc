"""What is refused with 415, 413 and 422, and what is just within the limits."""

import gzip
import json
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from todo_tests.support import (
    COMPLETED,
    DESCRIPTION_LENGTH,
    DESCRIPTION_NUL,
    DESCRIPTION_TYPE,
    NOT_JSON,
    NOT_OBJECT,
    NOT_UTF_8,
    TASK_ID,
    TITLE_LENGTH,
    TITLE_NUL,
    TITLE_REQUIRED,
    TITLE_TYPE,
    USER_ID,
    Account,
    Server,
    assert_error,
    assert_task,
    bearer,
)

JSON = {"Content-Type": "application/json"}
KIB_64 = 64 * 1024
GRIN = "😀"  # one code point, two UTF-16 units, four bytes

# Bodies that both POST and PUT refuse: what is wrong with which field.
Faults = dict[str, str]
FAULTY: dict[str, tuple[Any, Faults]] = {
    "US2-AS2 title missing": ({}, {"title": TITLE_REQUIRED}),
    "FR-013 title null": ({"title": None}, {"title": TITLE_REQUIRED}),
    "FR-013 title empty": ({"title": ""}, {"title": TITLE_REQUIRED}),
    "title of spaces": ({"title": "   "}, {"title": TITLE_REQUIRED}),
    "title of ASCII white space": ({"title": "\t\n\v\f\r"}, {"title": TITLE_REQUIRED}),
    "title of no-break spaces": ({"title": "\xa0\u202f"}, {"title": TITLE_REQUIRED}),
    "title of Unicode white space": (
        {"title": "\u1680\u2000\u2003\u200a\u205f\u3000\u2028\u2029\x85"},
        {"title": TITLE_REQUIRED},
    ),
    "US2-AS4 FR-014 title of 201": ({"title": "x" * 201}, {"title": TITLE_LENGTH}),
    "FR-014 title of 201 astral": ({"title": GRIN * 201}, {"title": TITLE_LENGTH}),
    "title of 201 with spaces around": ({"title": f"{'x':^201}"}, {"title": TITLE_LENGTH}),
    "title a number": ({"title": 5}, {"title": TITLE_TYPE}),
    "title a boolean": ({"title": True}, {"title": TITLE_TYPE}),
    "title a list": ({"title": ["x"]}, {"title": TITLE_TYPE}),
    "title an object": ({"title": {"a": "b"}}, {"title": TITLE_TYPE}),
    "title with NUL": ({"title": "a\0b"}, {"title": TITLE_NUL}),
    "FR-015 description of 1001; Edge case: Very Long Task Descriptions": (
        {"title": "x", "description": "x" * 1001},
        {"description": DESCRIPTION_LENGTH},
    ),
    "FR-015 description of 1001 astral": (
        {"title": "x", "description": GRIN * 1001},
        {"description": DESCRIPTION_LENGTH},
    ),
    "description a number": ({"title": "x", "description": 5}, {"description": DESCRIPTION_TYPE}),
    "description a list": ({"title": "x", "description": []}, {"description": DESCRIPTION_TYPE}),
    "description false": ({"title": "x", "description": False}, {"description": DESCRIPTION_TYPE}),
    "description with NUL": (
        {"title": "x", "description": "\0"},
        {"description": DESCRIPTION_NUL},
    ),
    "FR-017 all faults at once": (
        {"description": "x" * 1001},
        {"title": TITLE_REQUIRED, "description": DESCRIPTION_LENGTH},
    ),
    "all faults at once, of type": (
        {"title": 1, "description": 1},
        {"title": TITLE_TYPE, "description": DESCRIPTION_TYPE},
    ),
    "null": (None, {"body": NOT_OBJECT}),
    "an array": ([{"title": "x"}], {"body": NOT_OBJECT}),
    "a string": ("title", {"body": NOT_OBJECT}),
    "a number": (1, {"body": NOT_OBJECT}),
    "true": (True, {"body": NOT_OBJECT}),
}
NOT_A_JSON_TEXT = {
    "empty": b"",
    "only white space": b" \n",
    "no JSON": b"title=x",
    "cut short": b'{"title": "x"',
    "trailing text": b'{"title": "x"} {}',
    "trailing comma": b'{"title": "x",}',
    "single quotes": b"{'title': 'x'}",
    "comment": b'{"title": "x"} // x',
    "UTF-16 without a mark": '{"title": "x"}'.encode("utf-16-le"),
    "two byte order marks": b'\xef\xbb\xbf\xef\xbb\xbf{"title": "x"}',
    "a byte order mark alone": b"\xef\xbb\xbf",
    "a byte order mark behind": b'{"title": "x"}\xef\xbb\xbf',
    "half a byte order mark, percent-encoded": b'%EF%BB{"title": "x"}',
    "raw control character": b'{"title": "a\nb"}',
    "raw NUL": b'{"title": "x"}\0',
    "lone high surrogate": rb'{"title": "\ud83d"}',
    "lone low surrogate": rb'{"title": "x", "description": "\ude00"}',
    "lone surrogate in an unknown member": rb'{"title": "x", "y": "\ud83d"}',
    "lone surrogate in a name": rb'{"title": "x", "\ud83d": 1}',
    "NaN": b'{"title": "x", "y": NaN}',
    "Infinity": b'{"title": "x", "y": -Infinity}',
    "nesting bomb of arrays": b'{"title": "x", "y": ' + b"[" * 60_000,
    "nesting bomb of objects": b'{"title": "x", "y": ' + b'{"y": ' * 10_000,
    "closed nesting bomb": b'{"title": "x", "y": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
}
NOT_UTF_8_TEXT = {
    "bad UTF-8": b'{"title": "\xff"}',
    "overlong UTF-8": b'{"title": "\xc0\xaf"}',
    "surrogate in UTF-8": b'{"title": "\xed\xa0\x80"}',
    "cut within a character": '{"title": "é'.encode()[:-1],
    "ISO 8859-1": '{"title": "Zoë"}'.encode("latin-1"),
    "UTF-16": '{"title": "x"}'.encode("utf-16"),
    "UTF-32": '{"title": "x"}'.encode("utf-32"),
    "gzip": b"\x1f\x8b\x08\x00",
    "half a byte order mark": b'\xef\xbb{"title": "x"}',
    "no JSON either": b"title=\xff",
}
FAULTY_UPDATES: dict[str, tuple[Any, Faults]] = {
    "completed a string": ({"title": "x", "completed": "true"}, {"completed": COMPLETED}),
    "completed a number": ({"title": "x", "completed": 1}, {"completed": COMPLETED}),
    "completed null": ({"title": "x", "completed": None}, {"completed": COMPLETED}),
    "completed a list": ({"title": "x", "completed": [True]}, {"completed": COMPLETED}),
    "three faults at once": (
        {"title": " ", "description": 0, "completed": 0},
        {"title": TITLE_REQUIRED, "description": DESCRIPTION_TYPE, "completed": COMPLETED},
    ),
}


def table(*tables: dict[str, Any]) -> pytest.MarkDecorator:
    """Parametrize by the rows of tables, with their names as ids."""
    rows = [(name, row) for table in tables for name, row in table.items()]
    return pytest.mark.parametrize("row", [row for _, row in rows], ids=[name for name, _ in rows])


# Bodies


@table(FAULTY)
async def test_a_faulty_new_task_is_refused_by_field(
    account: Account, row: tuple[Any, Faults]
) -> None:
    """FR-017, SC-008; nothing is stored."""
    body, faults = row
    response = await account.send("POST", content=json.dumps(body), headers=JSON)
    assert_error(response, "VALIDATION_ERROR", **faults)
    assert await account.tasks() == []


@table(FAULTY, FAULTY_UPDATES)
async def test_a_faulty_update_is_refused_by_field(
    account: Account, row: tuple[Any, Faults]
) -> None:
    """US3-AS4, FR-017; nothing is changed."""
    body, faults = row
    task = await account.create()
    response = await account.send("PUT", task["id"], content=json.dumps(body), headers=JSON)
    assert_error(response, "VALIDATION_ERROR", **faults)
    assert await account.tasks() == [task]


@table(NOT_A_JSON_TEXT)
async def test_a_body_that_is_no_json_is_refused(account: Account, row: bytes) -> None:
    """Design 4, body: never 500, whatever the bytes."""
    task = await account.create()
    for method, rest in (("POST", ""), ("PUT", task["id"])):
        response = await account.send(method, rest, content=row, headers=JSON)
        assert_error(response, "VALIDATION_ERROR", body=NOT_JSON)
    assert await account.tasks() == [task]


@table(NOT_UTF_8_TEXT)
async def test_a_body_in_another_encoding_is_refused_by_that_name(
    account: Account, row: bytes
) -> None:
    """Design 4, body."""
    task = await account.create()
    for method, rest in (("POST", ""), ("PUT", task["id"])):
        response = await account.send(method, rest, content=row, headers=JSON)
        assert_error(response, "VALIDATION_ERROR", body=NOT_UTF_8)
    assert await account.tasks() == [task]


async def test_a_byte_order_mark_in_front_is_skipped(account: Account) -> None:
    """Design 4, body; PowerShell and .NET write one. In a string it is a character."""
    body = '\ufeff{"title": "\ufeffx"}'.encode()
    created = await account.send("POST", content=body, headers=JSON)
    assert (created.status_code, created.json()["title"]) == (201, "\ufeffx")
    changed = await account.send("PUT", created.json()["id"], content=body, headers=JSON)
    assert (changed.status_code, changed.json()["title"]) == (200, "\ufeffx")


@pytest.mark.parametrize(
    ("title", "description"),
    [
        pytest.param("x", "x", id="one character"),
        pytest.param("x" * 200, "x" * 1000, id="FR-014 FR-015 exactly 200 and 1000"),
        pytest.param(GRIN * 200, GRIN * 1000, id="lengths in code points"),
        pytest.param("e\u0301" * 100, "e\u0301" * 500, id="combining characters count"),
        pytest.param("\u200b", "\u200b", id="zero-width space is no white space"),
        pytest.param("\x1c\x1d\x1e\x1f", "\x01", id="nor are separators that Python strips"),
        pytest.param(" x ", " ", id="white space around and in descriptions"),
    ],
)
async def test_what_is_just_within_the_limits_is_stored(
    account: Account, title: str, description: str
) -> None:
    """FR-014, FR-015; design 4, strings."""
    task = await account.create(title, description=description)
    assert_task(task, user_id=account.user, title=title, description=description)
    updated = await account.send("PUT", task["id"], json={"title": title})
    assert (updated.status_code, updated.json()["title"]) == (200, title)


@pytest.mark.parametrize(
    "member",
    [
        pytest.param('"y": {"title": null, "z": [1, {}]}', id="nested"),
        pytest.param('"y": 1e400', id="a number beyond doubles"),
        pytest.param('"y": ' + "9" * 4000, id="an integer of 4000 digits"),
        pytest.param('"Title": 5, "TITLE": null, " title": []', id="names that look alike"),
        pytest.param('"y": "\\u0000"', id="NUL where it is not stored"),
        pytest.param('"": 1, "__proto__": {}, "model_config": 1', id="odd names"),
    ],
)
async def test_unknown_members_are_ignored(account: Account, member: str) -> None:
    """Design 4, types."""
    content = f'{{"title": "x", {member}}}'
    response = await account.send("POST", content=content, headers=JSON)
    assert response.status_code == 201, response.text
    assert_task(response.json(), user_id=account.user, title="x")


@pytest.mark.parametrize(
    "escaped",
    [r"\u0078", r"\ud83d\ude00", r"\"\\\/\b\f\n\r\t", "\\u00e9\u00e9"],
    ids=ascii,
)
async def test_json_escapes_mean_what_they_say(account: Account, escaped: str) -> None:
    content = f'\r\n\t {{ "title" : "{escaped}" }} '
    response = await account.send("POST", content=content.encode(), headers=JSON)
    assert response.json()["title"] == json.loads(f'"{escaped}"')


# Media type and size


@pytest.mark.parametrize(
    "media_type",
    [
        None,
        "",
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonp",
        "application/json-patch+json",
        "application/problem+json",
        "application/xml; q=application/json",
        "json",
    ],
    ids=str,
)
async def test_another_media_type_is_refused(account: Account, media_type: str | None) -> None:
    """Design 4, body: 415."""
    task = await account.create()
    headers = {} if media_type is None else {"Content-Type": media_type}
    for method, rest in (("POST", ""), ("PUT", task["id"])):
        response = await account.send(method, rest, content=b'{"title": "x"}', headers=headers)
        assert_error(response, "UNSUPPORTED_MEDIA_TYPE")
    assert await account.tasks() == [task]


async def test_a_compressed_body_is_refused_and_says_why(account: Account) -> None:
    """It is no UTF-8, but that would help nobody (public report: Kludex/starlette 644)."""
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    content = gzip.compress(b'{"title": "x"}')
    response = await account.send("POST", content=content, headers=headers)
    assert_error(response, "UNSUPPORTED_MEDIA_TYPE")
    assert await account.tasks() == []


@pytest.mark.parametrize(
    "media_type",
    ["application/json", "application/json; charset=utf-8", "Application/JSON;charset=UTF-8"],
)
async def test_json_is_accepted_with_parameters_and_in_any_case(
    account: Account, media_type: str
) -> None:
    response = await account.send(
        "POST", content=b'{"title": "x"}', headers={"Content-Type": media_type}
    )
    assert response.status_code == 201


def padded(size: int) -> bytes:
    """A valid body of so many bytes."""
    return b'{"title": "x", "y": "%s"}' % (b"y" * (size - 23))


async def chunks(body: bytes) -> AsyncIterator[bytes]:
    """The body without a declared length."""
    for start in range(0, len(body), 4096):
        yield body[start : start + 4096]


@pytest.fixture
async def served(server: Server, user: str) -> AsyncIterator[Account]:
    """The user as a client of a real server, which raises the 413."""
    async with httpx.AsyncClient(base_url=server.url, verify=False) as client:
        yield Account(client, user)


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
async def test_a_body_may_have_64_kib_and_no_byte_more(served: Account, declared: bool) -> None:
    """Design 4, body: 413; the connection ends with it, and says so."""
    account = served
    assert len(padded(KIB_64)) == KIB_64

    async def post(body: bytes) -> httpx.Response:
        content: Any = body if declared else chunks(body)
        return await account.send("POST", content=content, headers=JSON)

    assert (await post(padded(KIB_64))).status_code == 201
    for size in (KIB_64 + 1, 50 * KIB_64):
        response = await post(padded(size))
        assert_error(response, "PAYLOAD_TOO_LARGE")
        assert response.headers["connection"] == "close"
    [task] = await account.tasks()
    response = await account.send("PUT", task["id"], content=padded(KIB_64 + 1), headers=JSON)
    assert_error(response, "PAYLOAD_TOO_LARGE")
    assert await account.tasks() == [task]


# Path and query


TASK_IDS = {
    "zero": "0",
    "negative": "-1",
    "signed": "+1",
    "leading zero": "01",
    "underscore": "1_0",
    "decimal": "1.0",
    "exponent": "1e3",
    "hexadecimal": "0x1",
    "a word": "abc",
    "null": "null",
    "white space before": "%201",
    "white space after": "1%20",
    "line break after": "1%0A",
    "NUL": "1%00",
    "Arabic digits": urllib.parse.quote("\u0661\u0662"),
    "full-width digits": urllib.parse.quote("\uff11"),
    "superscript": urllib.parse.quote("²"),
    "bad UTF-8": "%FF",
    "2^63": str(2**63),
    "5000 digits": "9" * 5000,
    "a list": "1,2",
    "SQL injection": urllib.parse.quote("1 or 1=1"),
}
ACTIONS = (("GET", ""), ("PUT", ""), ("DELETE", ""), ("PATCH", "/complete"))


@table(TASK_IDS)
async def test_a_task_id_that_is_no_canonical_number_is_refused(account: Account, row: str) -> None:
    """Design 4, task id; for every method."""
    task = await account.create()
    for method, action in ACTIONS:
        response = await account.send(method, row + action)
        assert_error(response, "VALIDATION_ERROR", id=TASK_ID)
    assert await account.tasks() == [task]


USER_IDS = {
    "empty": "",
    "256 characters": "x" * 256,
    "256 code points": urllib.parse.quote(GRIN * 256),
    "NUL": "a%00",
    "line feed": "a%0Ab",
    "carriage return": "%0D",
    "unit separator": "%1F",
    "delete": "%7F",
    "next line (C1)": "%C2%85",
}


@table(USER_IDS)
async def test_an_invalid_user_id_in_the_path_is_refused(account: Account, row: str) -> None:
    """Edge case: Invalid user_id Format; even when the token says the same."""
    for user in (account.user, urllib.parse.unquote(row) or None):
        if user is None:
            continue
        headers = bearer(user)
        for method, rest in (("GET", ""), ("POST", ""), *((m, f"/1{a}") for m, a in ACTIONS)):
            response = await account.client.request(
                method, f"/api/{row}/tasks{rest}", headers=headers, json={"title": "x"}
            )
            assert_error(response, "VALIDATION_ERROR", user_id=USER_ID)


async def test_faults_of_both_path_parameters_are_named_at_once(account: Account) -> None:
    response = await account.client.get("/api/%00/tasks/0", headers=bearer(account.user))
    assert_error(response, "VALIDATION_ERROR", user_id=USER_ID, id=TASK_ID)


async def test_an_encoded_slash_belongs_to_the_user_id_which_it_spoils(account: Account) -> None:
    """Design 4, user id: no `/`; Invalid user_id Format."""
    for method, path in (
        ("GET", "/api/a%2Fb/tasks"),
        ("POST", "/api/a%2fb/tasks"),
        ("GET", "/api/a%2Fb/tasks/1"),
        ("PATCH", "/api/a%2Ftasks/tasks/1/complete"),
    ):
        response = await account.client.request(method, path, headers=bearer("a/b"))
        assert_error(response, "VALIDATION_ERROR", user_id=USER_ID)


async def test_a_slash_in_a_user_id_reaches_nobody(account: Account) -> None:
    path = f"/api/{account.user}/x/tasks"
    response = await account.client.get(path, headers=bearer(f"{account.user}/x"))
    assert_error(response, "NOT_FOUND")


@pytest.mark.parametrize(
    "query",
    ["", "1", "0", "TRUE", "True", "yes", "null", "true%20", "true,false", "%00", "%FF"],
    ids=lambda query: query or "empty",
)
async def test_a_status_filter_is_true_or_false(account: Account, query: str) -> None:
    """Design 4, list."""
    path = f"/api/{account.user}/tasks?completed={query}"
    response = await account.client.get(path, headers=bearer(account.user))
    assert_error(response, "VALIDATION_ERROR", completed=COMPLETED)


async def test_a_status_filter_is_given_once(account: Account) -> None:
    path = f"/api/{account.user}/tasks?completed=true&completed=true"
    response = await account.client.get(path, headers=bearer(account.user))
    assert_error(response, "VALIDATION_ERROR", completed=COMPLETED)
