"""What `check` and the other commands say of settings, keys, clocks and sockets."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

import todo
from todo_tests.damage import answering, certificate
from todo_tests.support import (
    NO_SETTINGS,
    SECRET,
    Serve,
    assert_refused,
    bearer,
    free_port,
    interrupt,
    path_of,
    plain_environment,
)

MakeSettings = Callable[..., todo.Settings]


# Better Auth


def key(**members: object) -> dict[str, object]:
    found = {"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "kid": "a-key", "x": "A" * 43}
    return {name: value for name, value in {**found, **members}.items() if value is not None}


def findings(settings: todo.Settings, url: str) -> list[str]:
    return [f"{level} {subject}: {text}" for level, subject, text in todo.check_keys(settings, url)]


def test_a_jwks_that_is_not_there_is_said_with_both_places_and_the_variable(
    make_settings: MakeSettings,
) -> None:
    """And nothing of its query."""
    with answering(404) as url:
        settings = make_settings(better_auth_url=f"{url}/base/")
        [line] = findings(settings, f"{url}/x/jwks?key=operators")
    assert line == (
        f"FAIL JWKS: {url}/x/jwks: status 404. BETTER_AUTH_URL must be reachable from here; its "
        f"keys are at {url}/api/auth/jwks, or {url}/base/jwks if that URL has a path. "
        "JWKS_URL names another place."
    )


def test_a_redirect_of_the_jwks_says_where_to(make_settings: MakeSettings) -> None:
    with answering(302, Location="https://there.example/jwks?a=b") as url:
        [line] = findings(make_settings(), url)
    assert "a redirect to 'https://there.example/jwks': set JWKS_URL to where the keys are" in line


@pytest.mark.slow
def test_a_slow_jwks_is_said_with_the_seconds(make_settings: MakeSettings) -> None:
    with answering(body={"keys": [key()]}, seconds=todo.JWKS_TIMEOUT + 0.5) as url:
        [line] = findings(make_settings(), url)
    assert f"{url}: no whole answer within 2 s. " in line


def test_keys_that_are_not_used_are_named(make_settings: MakeSettings) -> None:
    keys = [key(), key(kid=None), key(kid="other", alg="ES384"), "odd"]
    with answering(body={"keys": keys}) as url:
        first, *notes = findings(make_settings(), url)
    assert first == f"ok JWKS: 1 usable keys EdDSA at {url}"
    needed = "; needed are a kid and an alg of EdDSA, ES256, ES512, RS256, PS256"
    assert [note.endswith(needed) and note.startswith("note JWKS: ") for note in notes] == [
        True
    ] * 3
    assert "kid" in notes[0].removesuffix(needed)
    assert "'other'" in notes[1]
    assert "ES384" in notes[1]


def test_keys_come_over_https_from_whom_the_certificates_of_the_system_prove(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are read once a process."""
    chain, private = certificate(tmp_path, "localhost")
    with answering(body={"keys": [key()]}, tls=(chain, private)) as url:
        todo._tls.cache_clear()
        [line] = findings(make_settings(), url)
        assert "certificate verify failed" in line
        monkeypatch.setenv("SSL_CERT_FILE", str(chain))
        assert findings(make_settings(), url) == [line]
        todo._tls.cache_clear()
        assert findings(make_settings(), url) == [f"ok JWKS: 1 usable keys EdDSA at {url}"]
        other = url.replace("localhost", "127.0.0.1")
        assert "IP address mismatch" in findings(make_settings(), other)[0]
    todo._tls.cache_clear()


def test_without_a_usable_key_is_a_note_where_dev_proposes_the_place(
    make_settings: MakeSettings,
) -> None:
    """A new Better Auth makes its first key with its first token."""
    settings = make_settings()
    of_dev = todo.Settings.model_construct(
        settings.model_fields_set - {"better_auth_url"}, **dict(settings)
    )
    with answering(body={"keys": []}) as url:
        assert findings(settings, url) == [f"FAIL JWKS: 0 usable keys  at {url}"]
        assert findings(of_dev, url) == [f"note JWKS: 0 usable keys  at {url}"]


# Settings


def settings_findings(settings: todo.Settings) -> list[str]:
    return [f"{level} {subject}: {text}" for level, subject, text in todo.check_settings(settings)]


def test_a_variable_that_looks_like_ours_is_named(
    monkeypatch: pytest.MonkeyPatch, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """In the environment or in `.env`; its value never."""
    monkeypatch.chdir(tmp_path)
    for name in ("ALOWED_ORIGINS", "HOSTNAME", "DATABASE_URL"):
        monkeypatch.setenv(name, "a-value")
    (tmp_path / ".env").write_text(
        "# X=1\nexport LOGLEVEL=a-value\nBETTER_AUTH_SECRT = 'a-value'\n"
    )
    notes = [
        line for line in settings_findings(make_settings()) if line.startswith("note settings")
    ]
    assert notes == [
        f"note settings: {name} is no variable of this service: is it {meant}?"
        for name, meant in {
            "ALOWED_ORIGINS": "ALLOWED_ORIGINS",
            "BETTER_AUTH_SECRT": "BETTER_AUTH_SECRET",
            "LOGLEVEL": "LOG_LEVEL",
        }.items()
    ]


@pytest.mark.slow
def test_a_start_names_it_too(
    monkeypatch: pytest.MonkeyPatch, no_settings_from_outside: None, serve: Serve
) -> None:
    """In the refusal, if something is missing, and as a warning if not."""
    assert "ALOWED_ORIGINS is no variable of this service: is it ALLOWED_ORIGINS?" in (
        serve({"ALOWED_ORIGINS": "http://a.example"}).stderr()
    )
    monkeypatch.setenv("NEON_DBURL", "postgresql://u:hunter2@h/d")
    with pytest.raises(todo.StartupError) as refused:
        todo.Settings.load(env_file=None)
    assert "  NEON_DBURL is no variable of this service: is it NEON_DB_URL?\n" in str(refused.value)
    assert "hunter2" not in str(refused.value)


REMOTE = "postgresql://u:p@ep-cool.neon.tech/x"
SOCKET = "postgresql://u@/x?host=/run/postgresql"


@pytest.mark.parametrize(
    ("url", "origins", "level"),
    [
        (REMOTE, "http://localhost:3000,http://127.0.0.1:3000", "note"),
        (REMOTE, "http://localhost:3000,https://todo.example", "ok"),
        (SOCKET, "http://localhost:3000", "ok"),
        ("postgresql://u@localhost/x", "http://[::1]:3000", "ok"),
    ],
)
def test_origins_that_leave_a_real_frontend_out_are_remarked(
    make_settings: MakeSettings, url: str, origins: str, level: str
) -> None:
    lines = settings_findings(make_settings(neon_db_url=url, allowed_origins=origins))
    [line] = [line for line in lines if " origins: " in line]
    assert line.startswith(level)
    assert all(origin in line for origin in origins.split(","))


# Where nothing is configured but `dev`


def run(folder: Path, *arguments: str, said: str = "", **given: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command there."""
    done = subprocess.run(
        [sys.executable, "todo.py", *arguments],
        cwd=folder,
        env=plain_environment(**given),
        input=said,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_check_and_token_work_in_the_folder_of_dev(serve: Serve) -> None:
    """`todo.py token demo | todo.py check`; a Better Auth is not needed."""
    better_auth = f"http://localhost:{free_port()}"
    given = {**NO_SETTINGS, "BETTER_AUTH_URL": better_auth}  # known to `dev` alone
    server = serve(given, args=("dev",), files=("todo.py", "schema.sql"), wait=False)
    server.wait_until_it_serves()
    code, token, said = run(server.folder, "token", "demo")
    assert (code, said) == (0, "")
    code, out, said = run(server.folder, "check", said=token)
    assert (code, said) == (0, ""), out
    assert "ok    trial: " in out
    place = f"{better_auth}/api/auth/jwks"
    assert f"note  JWKS: no Better Auth at {place}: fine until your frontend uses one\n" in out
    assert "ok    token: of user 'demo'\n" in out
    assert out.endswith("ok    check: all is well, but read the notes\n")
    (server.folder / ".env").write_text(f"BETTER_AUTH_SECRET={SECRET}\n")
    code, token, said = run(server.folder, "token", "demo")
    assert said == "signed with the BETTER_AUTH_SECRET of .env, so `todo.py dev` refuses it\n"
    code, out, said = run(server.folder, "check")
    assert said.startswith("`todo.py dev` runs here too; what follows is about .env")
    answer = httpx.get(
        server.url + path_of("demo"), headers={"Authorization": f"Bearer {token[:-1]}"}
    )
    assert answer.status_code == 401
    (server.folder / ".env").unlink()
    assert interrupt(server) == 0
    code, out, said = run(server.folder, "check")
    assert (code, out) == (1, "")
    assert said.startswith("`todo.py dev` does not run in this folder: start it, and check beside")


# Sockets


@pytest.mark.slow
def test_the_unspecified_ipv6_address_listens_on_ipv4_too(serve: Serve) -> None:
    server = serve({"HOST": "::"})
    for address in ("127.0.0.1", "[::1]"):
        answer = httpx.get(f"http://{address}:{server.port}/healthz")
        assert answer.status_code == 200
    assert f"listening on http://[::]:{server.port}\n" in server.stderr()


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_all_sockets_that_systemd_passes_are_listened_on(
    serve: Serve, tmp_path: Path, workers: str
) -> None:
    """sd_listen_fds(3): from descriptor 3 on; a Unix socket is named by its path."""
    path = str(tmp_path / "todo.sock")
    port = free_port()
    pass_them = (
        "import os, socket, sys\n"
        f"inet = socket.create_server(('127.0.0.1', {port}))\n"
        f"unix = socket.socket(socket.AF_UNIX); unix.bind({path!r}); unix.listen()\n"
        "high = [os.dup2(each.fileno(), 100 + n) for n, each in enumerate((inet, unix))]\n"
        "[os.dup2(each, 3 + n) for n, each in enumerate(high)]\n"
        "os.environ['LISTEN_FDS'] = '2'\n"
        f"os.execv(sys.executable, [sys.executable, 'todo.py'])\n"
    )
    server = serve({"WORKERS": workers}, command=(sys.executable, "-c", pass_them), wait=False)
    server.wait_for(f"listening on unix:{path}\n")
    assert f"listening on http://127.0.0.1:{port}\n" in server.stderr()
    transports = (httpx.HTTPTransport(uds=path), httpx.HTTPTransport())
    for transport in transports:
        with httpx.Client(
            transport=transport, base_url=f"http://127.0.0.1:{port}", timeout=30
        ) as client:
            answer = client.get(path_of("demo"), headers=bearer("demo"))
            assert (answer.status_code, answer.json()) == (200, [])
    assert server.stop() == 0


@pytest.mark.slow
def test_a_host_of_another_machine_is_refused_with_what_to_set(serve: Serve) -> None:
    server = serve({"HOST": "203.0.113.1"}, wait=False)
    assert_refused(server, "HOST must be an address of this machine", "0.0.0.0")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["check", "token demo"])
def test_a_command_whose_reader_has_left_ends_quietly(
    serve: Serve, tmp_path: Path, command: str
) -> None:
    shell = f"{sys.executable} todo.py {command} | head -0; exit ${{PIPESTATUS[0]}}"
    server = serve(
        {"BETTER_AUTH_URL": "http://127.0.0.1:1"}, command=("bash", "-c", shell), wait=False
    )
    server.wait()
    assert "Traceback" not in server.stderr()
    assert "BrokenPipe" not in server.stderr()
