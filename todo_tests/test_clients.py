"""Clients generated from `openapi.yaml` in the run, compiled, and used on a live server."""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from todo_tests.better_auth import respond
from todo_tests.support import (
    ROOT,
    TITLE_REQUIRED,
    Server,
    node_packages,
    plain_environment,
    token,
)

pytestmark = pytest.mark.slow

TOOLS = Path(__file__).parent / "contract_tools"
USER = "auth0|é 1"  # clients encode it by themselves
# The type packages of the generators are none of a client's (`none` is no folder).
STRICT = "--strict --noUncheckedIndexedAccess --target es2022 --module nodenext --typeRoots none"
# hey-api's own client does not compile with exact optional members, and checking zod's takes long.
OPTIONS = {
    "client": "--exactOptionalPropertyTypes",
    "readme": "--exactOptionalPropertyTypes",
    "orval": "--exactOptionalPropertyTypes",
    "hey_api": "--skipLibCheck",
}


def run(*command: object, cwd: Path) -> str:
    """What it prints. All that it says, if it fails."""
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=plain_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def typescript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of generated clients, programs and the README's lines, compiled.

    Mistakes do not compile.
    """
    packages = node_packages(TOOLS)
    folder = tmp_path_factory.mktemp("typescript")
    (folder / "node_modules").symlink_to(packages)
    (folder / "package.json").write_text('{"type": "module"}')
    for file in (ROOT / "openapi.yaml", *TOOLS.glob("*.ts"), *TOOLS.glob("*.config.*")):
        shutil.copy(file, folder)
    readme = (ROOT / "README.md").read_text("utf-8")
    [lines] = re.findall(r"```ts\n(import createClient .*?)```", readme, re.DOTALL)
    given = "declare const process: { argv: [string, string, string, string, string] };\n"
    given += "const [, , url, kept, user] = process.argv;\nconst token = async () => kept;\n"
    (folder / "readme.ts").write_text(given + lines.replace('"http://127.0.0.1:8000"', "url"))
    [page] = re.findall(r"```js\n(.*?)```", readme, re.DOTALL)
    (folder / "page.ts").write_text(page)  # it is pasted into TypeScript too
    tools = packages / ".bin"
    run(tools / "openapi-typescript", "openapi.yaml", "-o", "todo-api.d.ts", cwd=folder)
    run(tools / "openapi-ts", "-f", "hey-api.config.js", "--no-log-file", cwd=folder)
    run(tools / "orval", "--config", "orval.config.cjs", cwd=folder)
    for options in sorted(set(OPTIONS.values())):
        files = [f"{program}.ts" for program, needed in OPTIONS.items() if needed == options]
        files += ["page.ts"] if "readme.ts" in files else []
        run(tools / "tsc", *STRICT.split(), options, *files, cwd=folder)
    return folder


@pytest.mark.parametrize("program", OPTIONS)
def test_a_typescript_client_works(typescript: Path, server: Server, program: str) -> None:
    """With openapi-typescript and openapi-fetch, hey-api with its zod schemas, and orval."""
    arguments = (server.url, token(USER), USER)
    said = run("node", f"{program}.js", *arguments, cwd=typescript)
    assert re.fullmatch(r"\d+ 20\d\d-[-:.\dT]+Z\n" if program == "readme" else "", said)


# The README's page, in Node

PAGE = (ROOT / "README.md").read_text("utf-8")


@contextmanager
def page_with_tokens(folder: Path, api: str, seconds: int) -> Iterator[list[str]]:
    """`page.mjs` in the folder, and the requests for tokens, each of which lives so many seconds.

    A second is left behind the minute for which `token()` asks early; without any, nobody is
    signed in.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            expiry = int(time.time()) + seconds
            signed = token(USER, exp=expiry, name="Zoë 柳")
            body = {"token": signed} if seconds else {"code": "UNAUTHORIZED"}
            respond(self, json.dumps(body).encode(), 200 if seconds else 401)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as better_auth:
        threading.Thread(target=better_auth.serve_forever, daemon=True).start()
        [lines] = re.findall(r"```js\n(.*?)```", PAGE, re.DOTALL)
        lines = lines.replace("http://127.0.0.1:8000", api)
        lines = lines.replace("localhost:3000", f"127.0.0.1:{better_auth.server_port}")
        later = "await token();\nawait new Promise((then) => setTimeout(then, 2100));\n"
        (folder / "page.mjs").write_text(
            f"{lines}{later}console.log(claims(await token()).name);\n"
        )
        try:
            yield asked
        finally:
            better_auth.shutdown()


def test_the_page_of_the_readme_renews_its_token(server: Server, tmp_path: Path) -> None:
    """Before it expires, and not with each request."""
    node_packages(TOOLS)
    with page_with_tokens(tmp_path, server.url, 62) as asked:
        said = run("node", "page.mjs", cwd=tmp_path)
    assert "title: 'Buy groceries'" in said
    assert said.endswith("\nZoë 柳\n")
    assert asked == ["/api/auth/token"] * 2


@pytest.mark.parametrize(
    ("seconds", "api", "said"),
    [
        pytest.param(0, "http://127.0.0.1:1", "Error: Nobody is signed in.", id="nobody"),
        pytest.param(62, "http://127.0.0.1:1", "TypeError: fetch failed", id="server down"),
    ],
)
def test_the_page_of_the_readme_says_what_is_missing(
    tmp_path: Path, seconds: int, api: str, said: str
) -> None:
    node_packages(TOOLS)
    with page_with_tokens(tmp_path, api, seconds):
        command = ["node", "page.mjs"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert said in done.stderr


def test_a_python_client_works(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With openapi-python-client."""
    generate = Path(sys.executable).parent / "openapi-python-client"
    arguments = ("--path", ROOT / "openapi.yaml", "--output-path", tmp_path / "todo_client")
    run(generate, "generate", *arguments, "--meta", "none", cwd=tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    from todo_client import AuthenticatedClient, models
    from todo_client.api.service import check_readiness
    from todo_client.api.tasks import (
        create_task,
        delete_task,
        get_task,
        list_tasks,
        toggle_task,
        update_task,
    )

    with AuthenticatedClient(server.url, token(USER)) as client:
        task = create_task.sync(USER, client=client, body=models.NewTask(title="Tea"))
        assert isinstance(task, models.Task)
        assert (task.user_id, task.title, task.description) == (USER, "Tea", None)
        body = models.TaskUpdate(title="Green tea", completed=True)
        changed = update_task.sync(USER, task.id, client=client, body=body)
        assert isinstance(changed, models.Task)
        assert (changed.created_at, changed.completed) == (task.created_at, True)
        assert changed.updated_at > task.updated_at
        assert changed in list_tasks.sync(USER, client=client, completed=True)
        assert changed not in list_tasks.sync(USER, client=client, completed=False)
        toggled = toggle_task.sync(USER, task.id, client=client)
        assert get_task.sync(USER, task.id, client=client) == toggled != changed
        assert delete_task.sync_detailed(USER, task.id, client=client).status_code == 204
        assert get_task.sync(USER, task.id, client=client) == models.ErrorBody(
            detail="Task not found.", error_code="TASK_NOT_FOUND"
        )
        refused = create_task.sync(USER, client=client, body=models.NewTask(title=" "))
        assert isinstance(refused, models.ValidationErrorBody)
        assert refused.field_errors.title == [TITLE_REQUIRED]
        assert check_readiness.sync(client=client) == models.Readiness("ready")
