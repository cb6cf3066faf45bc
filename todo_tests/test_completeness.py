"""Two lists that must be one: contract and code, table and schema.sql, settings and their pages.

Each test compares two sets, so that neither side can grow alone.
"""

import ast
import itertools
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import jsonschema_rs
import pytest
import sqlalchemy

import todo
from todo_tests.contract import (
    CODES,
    COMPONENTS,
    CONTRACT,
    HEADERS,
    METHODS,
    OF_NO_OPERATION,
    OPERATIONS,
    errors_of,
    operations,
    resolved,
    table,
)
from todo_tests.support import ROOT, bearer


def walk(node: Any, place: str = "#") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of the document with its place, examples' own contents left out."""
    if isinstance(node, dict):
        yield place, node
        for key, value in node.items():
            if key not in {"example", "value"}:
                yield from walk(value, f"{place}/{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from walk(value, f"{place}/{index}")


def validator(schema: dict[str, Any]) -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator(
        {**schema, "components": COMPONENTS}, validate_formats=True
    )


def source() -> str:
    return (ROOT / "todo.py").read_text("utf-8")


# The contract in itself


@pytest.mark.slow
def test_the_contract_is_openapi_3_1() -> None:
    from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

    assert [error.message for error in OPENAPI_31_VALIDATOR.iter_errors(CONTRACT)] == []


def test_every_schema_is_json_schema() -> None:
    for name, schema in COMPONENTS["schemas"].items():
        assert jsonschema_rs.meta.is_valid(schema), name


def test_every_component_is_used_and_every_reference_resolves() -> None:
    used = {node["$ref"] for _, node in walk(CONTRACT) if isinstance(node.get("$ref"), str)}
    there = {
        f"#/components/{kind}/{name}"
        for kind, components in COMPONENTS.items()
        for name in components
        if kind != "securitySchemes"
    }
    assert used == there


def examples() -> Iterator[Any]:
    for place, node in walk(CONTRACT):
        schema = node.get("schema", node if re.search("/schemas/[^/]+$", place) else None)
        if schema is not None:
            named = {name: each["value"] for name, each in node.get("examples", {}).items()}
            single = {"example": node["example"]} if "example" in node else {}
            for name, value in {**named, **single}.items():
                yield pytest.param(schema, value, id=f"{place.removeprefix('#/')} {name}")


@pytest.mark.parametrize(("schema", "value"), list(examples()))
def test_every_example_is_valid(schema, value) -> None:
    assert [error.message for error in validator(schema).iter_errors(value)] == []


def test_whatever_has_a_schema_has_an_example() -> None:
    for place, node in walk(CONTRACT):
        # Swagger UI would send the example of an optional parameter unasked.
        optional = "in" in node and not node.get("required")
        if "schema" in node:
            assert ("example" in node or "examples" in node) != optional, place


@pytest.mark.parametrize("name", ["createTask", "updateTask"])
def test_an_example_is_answered_by_the_example_of_the_same_name(name) -> None:
    operation = OPERATIONS[name]
    success = min(operation["responses"])
    content = (operation["requestBody"], operation["responses"][success])
    sent, answered = (part["content"]["application/json"]["examples"] for part in content)
    assert sent.keys() == answered.keys()
    for key in sent:
        request, task = sent[key]["value"], answered[key]["value"]
        changeable = {"title", "description", "completed"} & request.keys()
        assert {member: task[member] for member in changeable} == {
            member: request[member] for member in changeable
        }
        assert task["user_id"] == "demo"


def test_keys_stand_in_one_order() -> None:
    def in_order(node: dict[str, Any], order: str) -> bool:
        return list(node) == [key for key in order.split() if key in node]

    assert in_order(CONTRACT, "openapi info servers security tags paths components")
    for item in CONTRACT["paths"].values():
        assert in_order(item, "parameters get post put patch delete")
    order = "tags summary description operationId security parameters requestBody responses"
    for name, operation in OPERATIONS.items():
        assert in_order(operation, order), name
        assert list(operation["responses"]) == sorted(operation["responses"]), name
    assert len(OPERATIONS) == len(list(operations()))
    assert {tag for each in OPERATIONS.values() for tag in each["tags"]} == {
        tag["name"] for tag in CONTRACT["tags"]
    }


# The contract and the design


@pytest.mark.parametrize(
    ("method", "path", "operation"),
    [pytest.param(*each, id=each[2]["operationId"]) for each in operations()],
)
def test_an_operation_has_every_status_of_the_design(method, path, operation) -> None:
    success = {"post": "201", "delete": "204"}.get(method, "200")
    if path.startswith("/api/"):
        expected = {success, "401", "403", "422", "500", "503"}
        expected |= {"404"} if "{id}" in path else set()
        expected |= {"413", "415"} if "requestBody" in operation else set()
        assert "security" not in operation
    else:
        failures = {"/readyz": {"503"}, "/openapi.yaml": {"404"}, "/docs": {"404"}}
        expected = {success} | failures.get(path, set())
        assert operation["security"] == []
    assert set(operation["responses"]) == expected
    assert ("requestBody" in operation) == (method in {"post", "put"})


def test_a_response_has_the_headers_of_its_errors_and_no_more() -> None:
    for name, operation in OPERATIONS.items():
        for status, response in operation["responses"].items():
            codes = [error["error_code"] for error in errors_of(resolved(response))]
            expected = set().union(*(todo._HEADERS.get(code, {}) for code in codes))
            expected |= {"Location"} if (name, status) == ("createTask", "201") else set()
            assert set(resolved(response).get("headers", {})) == expected, (name, status)


def test_the_change_log_ends_at_this_version() -> None:
    assert table("version", "change")[0][0] == CONTRACT["info"]["version"]


# The contract and the code


async def test_paths_and_methods_are_those_of_the_app(app, client) -> None:
    contract = {
        path: {method.upper() for method in METHODS if method in item}
        for path, item in CONTRACT["paths"].items()
    }
    assert contract.keys() == {re.sub(r":\w+}", "}", route.path) for route in app.routes}
    for path, methods in contract.items():
        response = await client.request(
            "TRACE", path.format(user_id="demo", id=1), headers=bearer("demo")
        )
        implied = {"HEAD"} if "GET" in methods else set()
        assert response.status_code == 405
        assert set(response.headers["Allow"].split(", ")) == methods | implied, path


def test_headers_are_those_of_the_code() -> None:
    listed = {header: value for header, (_, value) in HEADERS.items()}
    assert listed == {
        **{name.decode(): value.decode() for name, value in todo.COMMON_HEADERS},
        "x-request-id": None,
        "access-control-allow-origin": None,
        "access-control-allow-credentials": "true",
        "access-control-expose-headers": ", ".join(todo.EXPOSED_HEADERS),
        "access-control-allow-methods": ", ".join(todo.METHODS),
        "access-control-allow-headers": ", ".join(todo.REQUEST_HEADERS),
        "access-control-max-age": str(todo.PREFLIGHT_MAX_AGE),
        "allow": None,
        "content-security-policy": None,
    }


def test_errors_are_those_of_the_code() -> None:
    examples = [
        error for response in COMPONENTS["responses"].values() for error in errors_of(response)
    ]
    sentences = {code: {sentence} for code, (_, sentence) in todo.ERRORS.items()}
    sentences["DATABASE_UNAVAILABLE"].add(todo.FATE_UNKNOWN)
    sentences["DATABASE_TIMEOUT"].add(todo.FATE_UNKNOWN)
    sentences["NOT_READY"].add(todo.TABLE_UNUSABLE)
    contract: dict[str, set[str]] = {}
    for error in examples:
        contract.setdefault(error["error_code"], set()).add(error["detail"])
    assert contract == {code: sentences[code] for code in contract}
    assert contract.keys() | OF_NO_OPERATION == todo.ERRORS.keys()
    schemas = COMPONENTS["schemas"]
    assert {
        *schemas["ErrorBody"]["properties"]["error_code"]["examples"],
        schemas["ValidationErrorBody"]["properties"]["error_code"]["const"],
    } == set(todo.ERRORS)


def test_only_a_change_may_have_been_stored() -> None:
    """Both codes of the database say so of every change, and of no read."""
    said = {
        (name, error["error_code"])
        for name, operation in OPERATIONS.items()
        for response in operation["responses"].values()
        for error in errors_of(resolved(response))
        if error["detail"] == todo.FATE_UNKNOWN
    }
    changes = {operation["operationId"] for method, _, operation in operations() if method != "get"}
    codes = {"DATABASE_UNAVAILABLE", "DATABASE_TIMEOUT"}
    assert said == set(itertools.product(changes, codes))


def test_errors_have_the_statuses_of_the_code() -> None:
    assert {code: status for code, (status, _) in todo.ERRORS.items()} == CODES
    for name, operation in OPERATIONS.items():
        for status, response in operation["responses"].items():
            for error in errors_of(resolved(response)):
                assert todo.ERRORS[error["error_code"]][0] == int(status), name


def test_messages_are_those_of_the_code() -> None:
    """FR-017, SC-008."""
    body = COMPONENTS["schemas"]["ValidationErrorBody"]["properties"]
    fields = body["field_errors"]["properties"]
    contract = {message for schema in fields.values() for message in schema["items"]["examples"]}
    code = {message for messages in todo.MESSAGES.values() for message in messages.values()}
    assert contract == code | {
        *(todo.BAD_JSON, todo.BAD_ENCODING),
        *(todo.BAD_USER_ID, todo.BAD_TASK_ID),
    }
    assert todo.MESSAGES.keys() | {"user_id", "id"} == fields.keys()


def test_no_status_of_an_error_stands_outside_the_table_of_errors() -> None:
    tree = ast.parse(source())
    [table] = [
        node
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "ERRORS"
    ]
    compared = {
        id(each)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for each in ast.walk(node)
    }
    statuses = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and type(node.value) is int and 400 <= node.value < 600
    ]
    inside = [node for node in statuses if table.lineno <= node.lineno <= table.end_lineno]
    outside = {node.value for node in statuses if node not in inside and id(node) not in compared}
    assert sorted(node.value for node in inside) == sorted(s for s, _ in todo.ERRORS.values())
    assert outside <= {443}, "a port, and no status"


# Limits

TEXTS = {
    "absent": ...,
    "null": None,
    "empty": "",
    "one character": "x",
    "blank": " \t\n\r\v\f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000",
    "looks blank": "\u200b",
    "byte order mark": "\ufeff",
    "information separator": "\x1c",
    "blank around a letter": " x ",
    "NUL": "\0",
    "NUL in a text": "a\0b",
    "line break at the end": "x\n",
    "200 characters": "x" * 200,
    "201 characters": "x" * 201,
    "200 characters beyond the BMP": "\U0001f600" * 200,
    "201 characters beyond the BMP": "\U0001f600" * 201,
    "1000 characters": "x" * 1000,
    "1001 characters": "x" * 1001,
    "1001 blanks": " " * 1001,
    "number": 5,
    "boolean": True,
    "list": ["x"],
    "object": {"x": "x"},
}
BOOLEANS = {
    "absent": ...,
    "true": True,
    "false": False,
    "null": None,
    "text": "true",
    "one": 1,
    "nought": 0,
    "one point nought": 1.0,
    "empty list": [],
}
VALUES = {"title": TEXTS, "description": TEXTS, "completed": BOOLEANS, "id": TEXTS, "other": TEXTS}
MODELS = {"NewTask": todo.NewTask, "TaskUpdate": todo.TaskUpdate}


@pytest.mark.parametrize(
    ("schema", "member", "value"),
    [
        pytest.param(schema, member, value, id=f"{schema} {member} {name}")
        for schema, (member, values) in itertools.product(MODELS, VALUES.items())
        for name, value in values.items()
    ],
)
def test_model_and_contract_refuse_the_same(schema, member, value) -> None:
    """FR-013 to FR-017."""
    body = {"title": "x"} | {member: value}
    body = {name: value for name, value in body.items() if value is not ...}
    try:
        todo.parse_body(MODELS[schema], json.dumps(body).encode())
        accepted = True
    except todo.Problem:
        accepted = False
    # The pattern's \s has U+FEFF too, so the contract is stricter with a title of nothing else.
    stricter = member == "title" and value == "\ufeff"
    valid = validator({"$ref": f"#/components/schemas/{schema}"}).is_valid(body)
    assert valid == (accepted and not stricter)


@pytest.mark.parametrize("schema", MODELS)
def test_members_of_a_body_are_those_of_the_contract(schema) -> None:
    contract, model = COMPONENTS["schemas"][schema], MODELS[schema].model_json_schema()
    assert set(contract["properties"]) == set(model["properties"])
    assert set(contract["required"]) == set(model["required"])


def test_members_and_limits_of_a_task_are_those_of_the_table() -> None:
    task = COMPONENTS["schemas"]["Task"]
    properties, columns = task["properties"], todo.tasks.columns
    assert list(properties) == task["required"] == columns.keys()
    nullable = {name for name, schema in properties.items() if "null" in schema.get("type", "")}
    assert nullable == {column.name for column in columns if column.nullable}
    lengths = {
        name: schema["maxLength"] for name, schema in properties.items() if "maxLength" in schema
    }
    assert lengths == {
        "user_id": columns["user_id"].type.length,
        "title": columns["title"].type.length,
        "description": todo.DESCRIPTION_MAX,
    }
    schemas = COMPONENTS["schemas"]
    assert lengths["title"] == schemas["Title"]["maxLength"] == 200
    assert lengths["description"] == schemas["Description"]["maxLength"] == 1000


USER_IDS = {
    "empty": "",
    "one character": "x",
    "255 characters": "x" * 255,
    "256 characters": "x" * 256,
    "255 characters beyond the BMP": "\U0001f600" * 255,
    "256 characters beyond the BMP": "\U0001f600" * 256,
    "pipe, at, space": "auth0|1 a@b.c",
    "slash": "a/b",
    "NUL": "\0",
    "escape": "a\x1b",
    "line break at the end": "a\n",
    "space": " ",
    "delete": "\x7f",
    "C1 control": "\x85",
    "last C1 control": "\x9f",
    "no-break space": "\xa0",
    "line separator": "\u2028",
}


@pytest.mark.parametrize("user", USER_IDS.values(), ids=USER_IDS)
def test_path_and_contract_refuse_the_same_user_ids(user) -> None:
    schema = COMPONENTS["parameters"]["UserId"]["schema"]
    assert validator(schema).is_valid(user) == bool(todo.USER_ID.fullmatch(user))


def test_the_largest_task_id_is_that_of_the_column() -> None:
    schema = COMPONENTS["parameters"]["TaskId"]["schema"]
    assert schema == {key: COMPONENTS["schemas"]["Task"]["properties"]["id"][key] for key in schema}
    assert schema["maximum"] == todo.TASK_ID_MAX == 2**63 - 1
    assert isinstance(todo.tasks.c.id.type, sqlalchemy.BigInteger)


# schema.sql


@pytest.fixture
def connect(postgres) -> Iterator[Callable[..., sqlalchemy.Connection]]:
    """A factory of connections, each to a database of its own."""
    with ExitStack() as stack:

        def connect(*, schema: bool) -> sqlalchemy.Connection:
            url = stack.enter_context(postgres.new_database(schema=schema))
            dialect = re.sub("^postgres(ql)?:", "postgresql+psycopg:", url)
            engine = sqlalchemy.create_engine(dialect, poolclass=sqlalchemy.NullPool)
            return stack.enter_context(engine.connect())

        yield connect


def reflection(connection: sqlalchemy.Connection) -> dict[str, Any]:
    """All that PostgreSQL knows of the table."""
    inspector = sqlalchemy.inspect(connection)
    table = sqlalchemy.Table("tasks", sqlalchemy.MetaData(), autoload_with=connection)
    of_table = {
        kind: {each["name"]: each for each in getattr(inspector, f"get_{kind}")("tasks")}
        for kind in ("columns", "check_constraints", "indexes", "unique_constraints")
    }
    for column in of_table["columns"].values():
        column["type"] = repr(column["type"])
    return of_table | {
        "order": table.columns.keys(),
        "primary key": inspector.get_pk_constraint("tasks"),
        "foreign keys": inspector.get_foreign_keys("tasks"),
        "tables": inspector.get_table_names(),
    }


def test_schema_sql_makes_the_table_of_the_code(connect) -> None:
    """FR-018 to FR-020: the server says of both what they are."""
    by_schema, by_code = connect(schema=True), connect(schema=False)
    todo.tasks.metadata.create_all(by_code)
    reflected = reflection(by_schema)
    assert reflected == reflection(by_code)
    assert all(reflected[kind] for kind in ("columns", "check_constraints", "indexes"))


# Settings and dependencies


def test_env_example_names_every_variable_with_its_default() -> None:
    lines = (ROOT / ".env.example").read_text("utf-8").splitlines()
    set_, commented = (
        dict(match.groups() for line in lines if (match := re.fullmatch(pattern, line)))
        for pattern in (r"([A-Z_]+)=(.*)", r"# ?([A-Z_]+)=(.*)")
    )
    fields = {name.upper(): field for name, field in todo.Settings.model_fields.items()}
    assert set_.keys() == {name for name, field in fields.items() if field.is_required()}
    assert commented.keys() == {name for name, field in fields.items() if not field.is_required()}
    for name, text in commented.items():
        default = fields[name].default
        shown = ",".join(default) if isinstance(default, tuple) else default
        assert text == "" if default is None else type(shown)(text) == shown, name


# The pages

PAGES = {
    name: (ROOT / name).read_text("utf-8")
    for name in ("README.md", ".deploy/README.md", "todo_tests/README.md")
}


def rows_of(page: str, first: str) -> list[list[str]]:
    """The cells of the page's only table whose head begins with this cell."""
    head = rf"^\| {first} \|.*\n\|[-|]+\n((?:\|.*\n)+)"
    [table] = re.findall(head, PAGES[page], re.MULTILINE)
    return [line.strip("| ").split(" | ") for line in table.splitlines()]


def test_readme_is_short_enough_to_be_read() -> None:
    assert len(PAGES["README.md"]) <= 9000


def headings(text: str) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page) -> None:
    """Files and headings; another site is not asked."""
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in headings(target.read_text("utf-8")), link


def test_readme_names_every_variable_and_which_are_required() -> None:
    rows = {name.strip("`"): default for name, default, *_ in rows_of("README.md", "variable")}
    fields = {name.upper(): field for name, field in todo.Settings.model_fields.items()}
    assert rows.keys() == fields.keys()
    assert {name for name, default in rows.items() if default == "required"} == {
        name for name, field in fields.items() if field.is_required()
    }


@pytest.mark.parametrize("page", PAGES)
def test_codes_of_a_page_are_those_of_the_code(page) -> None:
    """With their status where one stands before them; what each means stands in openapi.yaml."""
    # It is named because it is gone.
    text = PAGES[page].replace("`CORS_REFUSED` is gone", "")
    named = re.findall(r"(?:\b([45]\d\d) )?`([A-Z]+_[A-Z_]+)`", text)
    ours = {*todo.ERRORS, *(name.upper() for name in todo.Settings.model_fields)}
    other = {"FORWARDED_ALLOW_IPS", "TEST_DATABASE_URL"}
    assert {code for _, code in named} <= ours | other
    for status, code in named:
        assert not status or todo.ERRORS[code][0] == int(status), code


def test_the_map_of_the_tests_names_every_file() -> None:
    named = re.findall(
        r"`(test_\w+)`", "".join(map("".join, rows_of("todo_tests/README.md", "file")))
    )
    assert sorted(named) == sorted(path.stem for path in (ROOT / "todo_tests").glob("test_*.py"))


def test_readme_quotes_messages_that_the_code_has() -> None:
    """The table of what one sees, but for names and places."""
    seen = [row[0] for row in rows_of("README.md", "what you see")]
    quoted = [text for cell in seen for text in re.findall(r"`(.+?)`", cell)]
    assert len(quoted) > 5
    joined = re.sub(r'"\s+f?"', "", source())
    for text in quoted:
        for part in re.split(r" *\.\.\. *|(?:NEON_DB_URL|HOST|PORT|\{\w+\})\b,? ?", text):
            assert part.removeprefix("is ") in joined, text
    assert "a browser will refuse" in joined


def test_the_vm_page_has_every_setting_of_the_units_with_its_reason() -> None:
    named = {
        name
        for setting, _ in rows_of(".deploy/README.md", "setting")
        for name in re.findall(r"`([A-Z]\w+)=", setting)
    }
    units = "".join(
        (ROOT / ".deploy" / f"todo.{kind}").read_text() for kind in ("service", "socket")
    )
    in_units = set(re.findall(r"^(\w+)=", units, re.MULTILINE)) - {"Description", "WantedBy"}
    assert named == in_units


def test_the_vm_page_knows_this_version() -> None:
    assert rows_of(".deploy/README.md", "version")[0][0] == CONTRACT["info"]["version"]


def test_both_pages_install_the_same_way() -> None:
    """So whichever is read, it is the way that test_vm walks."""
    blocks = [
        block
        for page in ("README.md", ".deploy/README.md")
        for block in re.findall(r"```sh\n(.*?)```", PAGES[page], re.DOTALL)
        if "mkdir -p /srv" in block or "todo.py init-db" in block
    ]
    assert len(blocks) == 4
    assert blocks[:2] == blocks[2:]


def test_uv_is_given_the_postgres_that_pip_installs() -> None:
    [version] = re.findall(r"`uv run --with (\S+) todo.py dev`", PAGES["README.md"])
    assert version in requirements()[1]


REQUIREMENTS = (".requirements-run.txt", ".requirements-dev-run.txt", "requirements.txt")


def requirements() -> list[list[str]]:
    """The lines of each file, but for its first one: with that it includes the one before."""
    run, *others = [
        re.sub("^#.*\n", "", (ROOT / name).read_text("utf-8"), flags=re.MULTILINE).split()
        for name in REQUIREMENTS
    ]
    assert [lines[:2] for lines in others] == [["-r", name] for name in REQUIREMENTS[:2]]
    return [run, *(lines[2:] for lines in others)]


def test_todo_py_names_the_run_time_requirements() -> None:
    [block] = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", source(), re.MULTILINE)
    metadata = tomllib.loads(re.sub("^# ?", "", block, flags=re.MULTILINE))
    assert metadata["dependencies"] == requirements()[0]
    assert metadata["requires-python"] == ">=3.11"


def test_every_requirement_is_pinned_exactly_and_once() -> None:
    lines = [line for group in requirements() for line in group]
    assert [
        line for line in lines if not re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?==[\w.]+", line)
    ] == []
    names = [re.split(r"[\[=]", line)[0].lower() for line in lines]
    assert len(names) == len(set(names))
