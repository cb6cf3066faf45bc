"""Environment variables: what is refused by name, what is accepted, and where it is read."""

import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from todo_tests.support import (
    AUTH_URL,
    PASSWORD,
    ROOT,
    SECRET,
    Serve,
    Server,
    bearer,
    free_port,
    get,
    path_of,
    servers,
)

if TYPE_CHECKING:
    import todo

PLACEHOLDER = "the placeholder of .env.example"
URL = f"postgresql://user:{PASSWORD}@127.0.0.1:1/todo"
NAMES = {
    *("NEON_DB_URL", "BETTER_AUTH_SECRET", "BETTER_AUTH_URL", "ALLOWED_ORIGINS", "LOG_LEVEL"),
    *("PORT", "HOST", "WORKERS", "DB_POOL_SIZE", "DB_TIMEOUT"),
    *("JWT_ISSUER", "JWT_AUDIENCE", "JWKS_URL"),
}

Variables = dict[str, str | None]
REFUSED: dict[str, Variables] = {
    "NEON_DB_URL missing": {"NEON_DB_URL": None},
    "BETTER_AUTH_SECRET missing": {"BETTER_AUTH_SECRET": None},
    "BETTER_AUTH_URL missing": {"BETTER_AUTH_URL": None},
    "all three missing": dict.fromkeys(("NEON_DB_URL", "BETTER_AUTH_SECRET", "BETTER_AUTH_URL")),
    "NEON_DB_URL empty": {"NEON_DB_URL": ""},
    "BETTER_AUTH_SECRET empty": {"BETTER_AUTH_SECRET": ""},
    "NEON_DB_URL of MySQL; a wildcard origin": {
        "NEON_DB_URL": f"mysql://user:{PASSWORD}@localhost/todo",
        "ALLOWED_ORIGINS": "*",
    },
    "NEON_DB_URL of SQLAlchemy; a wildcard among origins": {
        "NEON_DB_URL": URL.replace("postgresql", "postgresql+psycopg"),
        "ALLOWED_ORIGINS": "http://localhost:3000,*",
    },
    "NEON_DB_URL without a scheme; an origin with a wildcard host": {
        "NEON_DB_URL": f"user:{PASSWORD}@localhost/todo",
        "ALLOWED_ORIGINS": "https://*.example.com",
    },
    "NEON_DB_URL of keywords; an origin with a path": {
        "NEON_DB_URL": f"host=localhost password={PASSWORD}",
        "ALLOWED_ORIGINS": "https://example.com/app",
    },
    "NEON_DB_URL with a bare @ in its password": {
        "NEON_DB_URL": f"postgresql://user:a@{PASSWORD}@127.0.0.1:1/todo",
    },
    "BETTER_AUTH_URL with a query; an origin with a space": {
        "BETTER_AUTH_URL": "http://localhost:3000/?x=1",
        "ALLOWED_ORIGINS": "https://a b.example",
    },
    "NEON_DB_URL with a bad port; an origin with a slash": {
        "NEON_DB_URL": URL.replace(":1/", ":port/"),
        "ALLOWED_ORIGINS": "https://example.com/",
    },
    "NEON_DB_URL with unknown options; an origin without a scheme": {
        "NEON_DB_URL": f"{URL}?no_such_option=1",
        "ALLOWED_ORIGINS": "example.com",
    },
    "BETTER_AUTH_SECRET of 31 bytes; an origin of a file": {
        "BETTER_AUTH_SECRET": "s3cret-s3cret-s3cret-s3cret-s3c",
        "ALLOWED_ORIGINS": "file://example.com",
    },
    "BETTER_AUTH_SECRET in quotes; an origin in quotes": {
        "BETTER_AUTH_SECRET": f'"{SECRET}"',
        "ALLOWED_ORIGINS": '"http://localhost:3000"',
    },
    "BETTER_AUTH_SECRET with a line end; an app's origin with a path": {
        "BETTER_AUTH_SECRET": f"{SECRET}\n",
        "ALLOWED_ORIGINS": "capacitor://localhost/app",
    },
    "BETTER_AUTH_SECRET with a space before; an app's wildcard origin": {
        "BETTER_AUTH_SECRET": f" {SECRET}",
        "ALLOWED_ORIGINS": "tauri://*",
    },
    "NEON_DB_URL in quotes; BETTER_AUTH_URL in quotes; JWKS_URL in quotes": {
        "NEON_DB_URL": f"'{URL}'",
        "BETTER_AUTH_URL": "'http://localhost:3000'",
        "JWKS_URL": '"http://localhost:3000/jwks"',
    },
    "NEON_DB_URL with a line end; BETTER_AUTH_URL with one; JWKS_URL with a space": {
        "NEON_DB_URL": f"{URL}\r",
        "BETTER_AUTH_URL": "http://localhost:3000\n",
        "JWKS_URL": "http://localhost:3000/jwks ",
    },
    "JWT_ISSUER with an empty item; JWT_AUDIENCE of empty ones": {
        "JWT_ISSUER": "https://a.example,,https://b.example",
        "JWT_AUDIENCE": " , ",
    },
    "BETTER_AUTH_SECRET Better Auth's default; the null origin": {
        "BETTER_AUTH_SECRET": "better-auth-secret-12345678901234567890",
        "ALLOWED_ORIGINS": "null",
    },
    "BETTER_AUTH_SECRET of .env.example; an origin with a user": {
        "BETTER_AUTH_SECRET": PLACEHOLDER,
        "ALLOWED_ORIGINS": "https://user:pw@example.com",
    },
    "BETTER_AUTH_URL of ftp; an origin with a bad port": {
        "BETTER_AUTH_URL": "ftp://localhost",
        "ALLOWED_ORIGINS": "https://example.com:port",
    },
    "BETTER_AUTH_URL without a scheme; PORT too high; DB_TIMEOUT 0": {
        "BETTER_AUTH_URL": "localhost:3000",
        "PORT": "65536",
        "DB_TIMEOUT": "0",
    },
    "BETTER_AUTH_URL without a host; PORT negative; DB_TIMEOUT nan": {
        "BETTER_AUTH_URL": "http://",
        "PORT": "-1",
        "DB_TIMEOUT": "nan",
    },
    "WORKERS 0; DB_POOL_SIZE 0; JWKS_URL without a scheme": {
        "WORKERS": "0",
        "DB_POOL_SIZE": "0",
        "JWKS_URL": "localhost/jwks",
    },
    "everything at once": {
        "NEON_DB_URL": f"mysql://user:{PASSWORD}@localhost/todo",
        "BETTER_AUTH_SECRET": "s3cret-s3cret-s3cret-s3cret-s3c",
        "BETTER_AUTH_URL": None,
        "ALLOWED_ORIGINS": "*",
        "LOG_LEVEL": "LOUD",
        "PORT": "http",
        "DB_POOL_SIZE": "many",
        "DB_TIMEOUT": "5 seconds",
    },
}


def placeholder(name: str = "BETTER_AUTH_SECRET") -> str:
    """What `.env.example` proposes for a variable."""
    example = (ROOT / ".env.example").read_text("utf-8")
    found = re.search(rf"^{name}=(.+)$", example, re.MULTILINE)
    assert found, f"no {name} in .env.example"
    return found[1].strip().strip("\"'")


@pytest.fixture(scope="module")
def refused_starts() -> Iterator[dict[str, Server]]:
    """A start with each faulty environment, all at once."""
    with servers(URL) as serve:
        started = {}
        for name, variables in REFUSED.items():
            known = {PLACEHOLDER: placeholder()}
            given = {key: known.get(value or "", value) for key, value in variables.items()}
            started[name] = serve(given, wait=False)
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_a_start_with_faulty_variables_is_refused_by_name(
    refused_starts: dict[str, Server], case: str
) -> None:
    """Edge case: Missing Environment Variables. All faults in one message, and no secret."""
    server = refused_starts[case]
    assert server.wait() == 1
    message = server.stderr()
    assert set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)*\b", message)) & NAMES == set(REFUSED[case])
    assert server.stdout() == ""
    assert "Traceback" not in message
    assert "pydantic" not in message
    secrets = [PASSWORD, SECRET, server.environment.get("BETTER_AUTH_SECRET") or SECRET]
    assert not [secret for secret in secrets if secret in message]


@pytest.mark.parametrize("case", REFUSED)
def test_faulty_variables_are_named_and_no_others(
    no_settings_from_outside: None, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """In process; as the operator sees it above."""
    good: Variables = {
        "NEON_DB_URL": URL,
        "BETTER_AUTH_SECRET": SECRET,
        "BETTER_AUTH_URL": AUTH_URL,
    }
    for name, value in {**good, **REFUSED[case]}.items():
        if value is not None:
            monkeypatch.setenv(name, placeholder() if value == PLACEHOLDER else value)
    import todo

    with pytest.raises(todo.StartupError) as refusal:
        todo.Settings.load(env_file=None)
    assert set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)*\b", str(refusal.value))) & NAMES == set(
        REFUSED[case]
    )


ACCEPTED: dict[str, dict[str, object]] = {
    "postgres://": {"neon_db_url": URL.replace("postgresql", "postgres")},
    "Neon's own": {
        "neon_db_url": "postgresql://u:p@ep-cool-name-123456.us-east-2.aws.neon.tech/neondb"
        "?sslmode=require&channel_binding=require"
    },
    "a password with # and ?": {"neon_db_url": URL.replace("hunter2", "hunter#2?")},
    "a socket": {"neon_db_url": "postgresql://postgres:@/postgres?host=/tmp"},
    "a secret of 32 bytes": {"better_auth_secret": "0123456789abcdef0123456789abcdeF"},
    "a secret of 16 two-byte characters": {"better_auth_secret": "é" * 16},
    "https": {"better_auth_url": "https://auth.example.com"},
    "a slash at the end": {"better_auth_url": "http://localhost:3000/"},
    "IPv6 origins": {"allowed_origins": "http://[::1]:3000"},
    "origins with white space": {"allowed_origins": " http://a.example , https://b.example:8443 "},
    "the lowest port": {"port": 1},
    "the highest port": {"port": 65535},
    "a fractional time-out": {"db_timeout": 0.25},
    "every log level": {"log_level": "DEBUG"},
    "a log level in lower case": {"log_level": "warning"},
    "a secret with a quote at one end": {"better_auth_secret": f"'{SECRET}"},
    "a secret with different quotes": {"better_auth_secret": f"'{SECRET}\""},
    "a secret with white space inside": {"better_auth_secret": f"{SECRET} {SECRET}"},
    "issuers and audiences": {"jwt_issuer": "https://a, https://b", "jwt_audience": "a b,c"},
}


@pytest.mark.parametrize("overrides", ACCEPTED.values(), ids=ACCEPTED)
def test_good_values_are_accepted(
    make_settings: "Callable[..., todo.Settings]", overrides: dict[str, object]
) -> None:
    make_settings(**overrides)


_PASSWORD = "percent-encoded: %40 for @, %2F for /, %23 for #, %25 for %"
_PARAMETER = "a parameter that PostgreSQL does not know"
_PSQL = "what stands between the quotes of a psql command"
MISTAKES = {
    "a psql command": (f"psql '{URL}'", _PSQL),
    "its quotes": (f"'{URL}'", "quotes around it"),
    "a line end": (f"{URL}\n", "white space or a line end"),
    "a bare @": (URL.replace("hunter2", "hunter@2"), _PASSWORD),
    "a bare /": (URL.replace("hunter2", "hunter/2"), _PASSWORD),
    "a bare / behind digits": (URL.replace("hunter2-is-the-", "1/hunter2-is-the-"), _PASSWORD),
    "a bare %": (URL.replace("hunter2", "hunter%2"), _PASSWORD),
    "a bare ? behind a bare /": (URL.replace("hunter2", "hunter/2?x"), _PASSWORD),
    "Prisma's parameter": (f"{URL}?sslmode=require&pgbouncer=true", _PARAMETER),
    "two dots in its host": (
        URL.replace("127.0.0.1", "ep-cool..neon.tech"),
        "must be a database URL",
    ),
    "another database": (URL.replace("postgresql", "mysql"), "must be a database URL"),
}


@pytest.mark.parametrize(("value", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_database_url_has_its_own_sentence(
    monkeypatch: pytest.MonkeyPatch, make_settings: object, value: str, sentence: str
) -> None:
    """It shows nothing of the value, which may hold a password in any place."""
    import todo

    monkeypatch.setenv("NEON_DB_URL", value)
    monkeypatch.setenv("BETTER_AUTH_SECRET", SECRET)
    monkeypatch.setenv("BETTER_AUTH_URL", AUTH_URL)
    with pytest.raises(todo.StartupError) as refused:
        todo.Settings.load(env_file=None)
    lines = str(refused.value).split("\n")
    assert lines[1].startswith("  NEON_DB_URL is not valid: it ")
    assert sentence in lines[1]
    assert not re.search("hunter|password@|127", lines[1].replace("user:password@host", ""))


@pytest.mark.parametrize("url", ["http://a.example:port", "http://a.example:65536", "http://[::1"])
def test_a_bad_url_is_refused_in_our_words(
    monkeypatch: pytest.MonkeyPatch, make_settings: object, url: str
) -> None:
    """Not in those of a library, which quote the value; and once for each variable."""
    import todo

    monkeypatch.setenv("NEON_DB_URL", URL)
    monkeypatch.setenv("BETTER_AUTH_SECRET", SECRET)
    monkeypatch.setenv("BETTER_AUTH_URL", url)
    monkeypatch.setenv("ALLOWED_ORIGINS", f"{url},https://{'x' * 64}é.example")
    with pytest.raises(todo.StartupError) as refused:
        todo.Settings.load(env_file=None)
    assert str(refused.value).split("\n")[1:3] == [
        f"  {name.upper()} is not valid{shown}: it must be "
        f"{todo.Settings.model_fields[name].description}"
        for name, shown in (("better_auth_url", ""), ("allowed_origins", f" ({url!r})"))
    ]


SHOWN: dict[str, tuple[str, str, str]] = {
    # Variable, value, what its line says of it.
    "port": ("PORT", "http", "('http')"),
    "pool": ("DB_POOL_SIZE", "many", "('many')"),
    "time-out": ("DB_TIMEOUT", "5 seconds", "('5 seconds')"),
    "level": ("LOG_LEVEL", "Loud", "('Loud')"),
    "origin": ("ALLOWED_ORIGINS", "http://a.example,example.com", "('example.com')"),
    "origin in quotes": ("ALLOWED_ORIGINS", "'http://a.example'", "'http://a.example'"),
    "null origin": ("ALLOWED_ORIGINS", "null", "('null'): it must be origins"),
    "origin of a file": ("ALLOWED_ORIGINS", "file://x", "('file://x'): it must be origins"),
    "every origin": ("ALLOWED_ORIGINS", "*", "('*'): it must be origins"),
    "origin with a slash": (
        "ALLOWED_ORIGINS",
        "http://a.example,https://b.example/",
        "'https://b.example/' has a slash at its end",
    ),
    "app's origin with a slash": (
        "ALLOWED_ORIGINS",
        "capacitor://localhost/",
        "'capacitor://localhost/' has a slash at its end",
    ),
    "empty issuer": ("JWT_ISSUER", "https://a.example,", "('')"),
    "hostile": ("ALLOWED_ORIGINS", "a\n  forged\u2028\x1b[31m", r"a\n  forged\u2028\x1b[31m"),
    "long": ("LOG_LEVEL", "X" * 5000, "('XXXX"),
    "secret": ("BETTER_AUTH_SECRET", "s3cret-too-short", "is not valid: it must be Better Auth's"),
    "secret in quotes": ("BETTER_AUTH_SECRET", f'"{SECRET}"', "is not valid: it has quotes"),
    "secret with a line end": (
        "BETTER_AUTH_SECRET",
        f"{SECRET}\n",
        "is not valid: it has white space or a line end at one of its ends",
    ),
    "example's database": (
        "NEON_DB_URL",
        placeholder("NEON_DB_URL"),
        "it is the example of",
    ),
    "database in quotes": ("NEON_DB_URL", f'"{URL}"', "is not valid: it has quotes around it"),
    "Better Auth in quotes": (
        "BETTER_AUTH_URL",
        "'http://hunter2.example'",
        "is not valid: it has quotes around it",
    ),
    "Better Auth with a user": ("BETTER_AUTH_URL", "http://u:hunter2@x.example", "is not valid: "),
    "JWKS with a line end": (
        "JWKS_URL",
        "http://x.example/?key=hunter2\r\n",
        "is not valid: it has white space or a line end",
    ),
}
HIDDEN = ("s3cret", SECRET[:10], "hunter2")


@pytest.mark.parametrize(("name", "value", "words"), SHOWN.values(), ids=SHOWN)
def test_a_refused_value_is_quoted_where_it_is_no_secret(
    no_settings_from_outside: None,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    words: str,
) -> None:
    """In one line, whatever is in it."""
    import todo

    good = {"NEON_DB_URL": URL, "BETTER_AUTH_SECRET": SECRET, "BETTER_AUTH_URL": AUTH_URL}
    for variable, given in {**good, name: value}.items():
        monkeypatch.setenv(variable, given)
    with pytest.raises(todo.StartupError) as refused:
        todo.Settings.load(env_file=None)
    _, line, _ = str(refused.value).split("\n")
    assert line.startswith(f"  {name} is not valid")
    assert words in line
    assert line.isprintable()
    assert len(line) < 300
    assert [hidden for hidden in HIDDEN if hidden in str(refused.value)] == []


def test_settings_show_no_secret(make_settings: "Callable[..., todo.Settings]") -> None:
    settings = make_settings(neon_db_url=URL)
    for text in (repr(settings), str(settings), f"{settings.model_dump()}"):
        assert PASSWORD not in text
        assert SECRET not in text


def test_optional_variables_have_the_documented_defaults(
    make_settings: "Callable[..., todo.Settings]",
) -> None:
    """Specification, Optional Variables; design 3."""
    settings = make_settings()
    assert (settings.log_level, settings.port, settings.host) == ("INFO", 8000, "127.0.0.1")
    assert (settings.workers, settings.db_pool_size, settings.db_timeout) == (1, 10, 5)
    assert {settings.jwt_issuer, settings.jwt_audience, settings.jwks_url} == {None}
    assert tuple(settings.allowed_origins) == ("http://localhost:3000", "http://127.0.0.1:3000")


def test_the_settings_are_these_and_no_others() -> None:
    import todo

    assert {name.upper() for name in todo.Settings.model_fields} == NAMES


@pytest.mark.slow
def test_variables_are_read_from_a_dotenv_file_and_the_environment_wins(
    serve: Serve, database_url: str, user: str
) -> None:
    """Design 2: "from the environment (or `.env`)"."""
    port = free_port()
    server = serve(
        {"BETTER_AUTH_SECRET": None, "BETTER_AUTH_URL": None, "PORT": None},
        dotenv=f"# A comment\nBETTER_AUTH_SECRET='{SECRET}'\nBETTER_AUTH_URL={AUTH_URL}\n"
        f"PORT={port}\nNEON_DB_URL=postgresql://nobody@127.0.0.1:1/nothing\nUNKNOWN=1\n",
    )
    response = get(f"http://127.0.0.1:{port}{path_of(user)}", headers=bearer(user))
    assert (response.status_code, response.json()) == (200, [])
    [loaded] = server.log_lines("BETTER_AUTH_SECRET")
    assert " INFO " in loaded
    assert "UNKNOWN" not in loaded
    assert SECRET not in server.stderr()


@pytest.mark.slow
def test_a_dotenv_file_that_cannot_be_read_is_named(serve: Serve) -> None:
    server = serve(dotenv="PORT=8000", wait=False, args=("check",))
    server.wait()
    (server.folder / ".env").write_bytes(b"PORT=\xff")
    refused = subprocess.run(
        [sys.executable, "todo.py"],
        cwd=server.folder,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert refused.returncode == 1
    assert refused.stderr == "todo.py cannot read .env (it is not UTF-8)\n"


def test_the_jwks_url_is_taken_to_the_letter(make_settings: "Callable[..., todo.Settings]") -> None:
    import todo

    url = "http://keys.example/of/it/?all=1"
    assert todo.TokenVerifier(make_settings(jwks_url=url)).keys.url == url
    base = todo.TokenVerifier(make_settings(better_auth_url="http://auth.example/"))
    assert base.keys.url == "http://auth.example/api/auth/jwks"


@pytest.mark.parametrize("level", ["debug", "Info", "wArNiNg", "ERROR"])
def test_a_log_level_may_be_in_any_case(
    make_settings: "Callable[..., todo.Settings]", level: str
) -> None:
    assert make_settings(log_level=level).log_level == level.upper()


LISTS = {
    "https://a.example": ("https://a.example",),
    "https://a.example,https://b.example": ("https://a.example", "https://b.example"),
    " one , two words ,three ": ("one", "two words", "three"),
}


@pytest.mark.parametrize("text", LISTS)
def test_issuers_and_audiences_are_lists_between_commas(
    make_settings: "Callable[..., todo.Settings]", text: str
) -> None:
    settings = make_settings(jwt_issuer=text, jwt_audience=text)
    assert (settings.jwt_issuer, settings.jwt_audience) == (LISTS[text], LISTS[text])


ORIGINS = {
    "capacitor://localhost": "capacitor://localhost",
    "Tauri://LocalHost": "tauri://localhost",
    "ionic://localhost:8080": "ionic://localhost:8080",
    "http://münchen.example": "http://xn--mnchen-3ya.example",
    "http://MÜNCHEN.example:81": "http://xn--mnchen-3ya.example:81",
    "https://例え.テスト": "https://xn--r8jz45g.xn--zckzah",
    "http://xn--mnchen-3ya.example": "http://xn--mnchen-3ya.example",
    "https://straße.example": "https://xn--strae-oqa.example",
    "http://127.1:81": "http://127.0.0.1:81",
    "http://[0:0:0:0:0:0:0:1]:80": "http://[::1]",
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_an_origin_is_taken_as_browsers_send_it(
    make_settings: "Callable[..., todo.Settings]", origin: str
) -> None:
    """RFC 6454 section 6.2, and the URL standard for names that are not ASCII."""
    assert make_settings(allowed_origins=origin).allowed_origins == (ORIGINS[origin],)


@pytest.mark.slow
def test_a_port_in_use_is_named(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = serve({"PORT": str(taken.getsockname()[1])}, wait=False)
        assert server.wait() == 1
    assert "PORT" in server.stderr()
    assert "Traceback" not in server.stderr()


@pytest.mark.slow
def test_the_port_proposed_in_place_of_the_last_one_exists(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 65535)):
        server = serve({"PORT": "65535"}, wait=False)
        assert server.wait() == 1
    assert server.stderr().endswith("PORT=65534\n")


HOSTS = {
    "of others": "203.0.113.1",
    "unknown": "nobody.invalid",
    "with a port": "127.0.0.1:8000",
    "in brackets": "[::1]",
    "with an empty label": "é..x",
    "with a long label": "x" * 64,
    "of another script": "☃.invalid",
    "no UTF-8": "\udcff",
}


@pytest.fixture(scope="module")
def starts_on_bad_hosts(database_url: str) -> Iterator[dict[str, Server]]:
    """A start on each impossible host, all at once."""
    with servers(database_url) as serve:
        yield {case: serve({"HOST": host}, wait=False) for case, host in HOSTS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", HOSTS)
def test_a_host_that_cannot_be_listened_on_is_named(
    starts_on_bad_hosts: dict[str, Server], case: str
) -> None:
    server = starts_on_bad_hosts[case]
    assert server.wait() == 1
    message, hint = server.stderr().splitlines()
    assert message.startswith("todo.py cannot start: ")
    assert "HOST" in message
    assert hint.startswith("HOST must be an address of this machine: 127.0.0.1, ")
