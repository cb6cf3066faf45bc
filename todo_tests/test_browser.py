"""What a browser makes of it: CORS, a frontend with Better Auth, and /docs (SC-006, FR-030 ff.)."""

import json
import os
import shutil
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
import pytest

from todo_tests.better_auth import HERE, BetterAuth, better_auth_servers
from todo_tests.support import (
    ERRORS,
    Postgres,
    Serve,
    Server,
    assert_task,
    bearer,
    error,
    eventually,
    missing,
    new_user,
    path_of,
    servers,
)

pytestmark = pytest.mark.slow

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)
DEPLOYED = "todo.example.test"  # a name that is not localhost, for the API on this machine
PASSWORD = "correct horse battery staple"

Json = dict[str, Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed")
    if not os.access(CHROMIUM, os.X_OK):
        missing("chromium is not installed")
    names = f"--host-resolver-rules=MAP {DEPLOYED} 127.0.0.1"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=[*FLAGS.split(), names], timeout=60_000
        )
        yield browser
        browser.close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def frontends() -> Iterator[list[str]]:
    """Two origins that serve the same page; the API allows the first."""
    listeners = [
        ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=HERE)) for _ in range(2)
    ]
    for listener in listeners:
        Thread(target=listener.serve_forever, daemon=True).start()
    yield [f"http://localhost:{listener.server_port}" for listener in listeners]
    for listener in listeners:
        listener.shutdown()
        listener.server_close()


@pytest.fixture(scope="module")
def auth(frontends: list[str]) -> Iterator[BetterAuth]:
    """A Better Auth server that both frontends may sign in at."""
    with better_auth_servers() as start:
        yield start({"trustedOrigins": frontends})


@pytest.fixture(scope="module")
def serve_all(database_url: str) -> Iterator[Serve]:
    with servers(database_url) as factory:
        yield factory


@pytest.fixture(scope="module")
def api(serve_all: Serve, auth: BetterAuth, frontends: list[str]) -> Server:
    """The API, a process of its own, with its contract."""
    variables = {"BETTER_AUTH_URL": auth.url, "ALLOWED_ORIGINS": frontends[0]}
    return serve_all(variables, files=("todo.py", "openapi.yaml"))


@pytest.fixture(scope="module")
def broken_api(
    serve_all: Serve, postgres: Postgres, auth: BetterAuth, frontends: list[str]
) -> Iterator[Server]:
    """Another, whose table is lost."""
    with postgres.new_database(schema=True) as url:
        variables = {"BETTER_AUTH_URL": auth.url, "ALLOWED_ORIGINS": frontends[0]}
        server = serve_all(variables, database_url=url)
        postgres.execute("drop table tasks", database_url=url)
        yield server
        server.stop()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[[str], Any]]:
    """A page at a URL, in a fresh profile."""
    contexts = []

    def open_page(url: str) -> Any:
        contexts.append(browser.new_context())
        page = contexts[-1].new_page()
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()


class Frontend:
    """The page of a frontend, and what it sees when it calls the API."""

    def __init__(self, page: Any, api: Server, auth: BetterAuth) -> None:
        self.page, self.api, self.auth = page, api, auth
        self.token: str | None = None
        self.user = ""

    def sign_in(self) -> None:
        """As a user who signed up before; tokens come from the page."""
        email = f"{uuid.uuid4().hex}@example.com"
        account = {"name": "Ann", "email": email, "password": PASSWORD}
        headers = {"Origin": self.auth.url}
        httpx.post(f"{self.auth.base}/sign-up/email", json=account, headers=headers)
        credentials = {"auth": self.auth.base, "email": email, "password": PASSWORD}
        seen = self.page.evaluate("(given) => signIn(given)", credentials)
        self.user, self.token = seen["user"], seen["token"]

    def call(self, method: str, path: str, body: object = None, **rest: Any) -> Json:
        given = {"api": self.api.url, "token": self.token, "method": method, "path": path, **rest}
        given |= {} if body is None else {"body": body}
        given = {name: value for name, value in given.items() if value is not None}
        return dict(self.page.evaluate("(given) => call(given)", given))


@pytest.fixture
def frontend(
    open_page: Callable[[str], Any], frontends: list[str], api: Server, auth: BetterAuth
) -> Frontend:
    """A user signed in on the page of the allowed origin."""
    frontend = Frontend(open_page(f"{frontends[0]}/page.html"), api, auth)
    frontend.sign_in()
    return frontend


def is_error(answer: Json, code: str) -> None:
    assert (answer["status"], answer["body"]) == (ERRORS[code][0], error(code))


def test_a_page_signs_in_and_works_with_its_tasks(frontend: Frontend) -> None:
    """SC-006, US1-AS1, US1-AS4, US2-AS1, US3-AS1, US4-AS1, US5-AS1, US5-AS2."""
    tasks = path_of(frontend.user)
    assert frontend.call("GET", tasks)["body"] == []
    created = frontend.call("POST", tasks, {"title": "Buy groceries"})
    assert created["status"] == 201
    assert_task(created["body"], user_id=frontend.user, title="Buy groceries")
    path = created["headers"]["location"]
    assert path == f"{tasks}/{created['body']['id']}"
    assert frontend.call("GET", path)["body"] == created["body"]
    assert frontend.call("GET", tasks)["body"] == [created["body"]]
    changed = frontend.call("PUT", path, {"title": "Buy milk", "description": "Two"})
    assert changed["status"] == 200
    for completed in (True, False):
        toggled = frontend.call("PATCH", f"{path}/complete")
        assert_task(
            toggled["body"],
            user_id=frontend.user,
            title="Buy milk",
            description="Two",
            completed=completed,
        )
    assert frontend.call("GET", f"{tasks}?completed=false")["body"] == [toggled["body"]]
    deleted = frontend.call("DELETE", path)
    assert (deleted["status"], deleted["body"]) == (204, None)
    assert frontend.call("GET", tasks)["body"] == []


def test_the_page_reads_the_headers_that_are_meant_for_it(frontend: Frontend) -> None:
    headers = {"X-Request-ID": "from-the-page"}
    answer = frontend.call("GET", path_of(frontend.user), headers=headers)
    assert answer["headers"]["x-request-id"] == "from-the-page"
    refused = frontend.call("GET", path_of(frontend.user), token="x.y.z")
    assert refused["headers"]["www-authenticate"] == 'Bearer error="invalid_token"'
    wrong = frontend.call("PATCH", path_of(frontend.user))
    assert wrong["headers"]["allow"] == "GET, HEAD, POST"


MISSED: dict[str, tuple[str, Json, list[str], str]] = {
    # The method, headers, words in Chromium's complaint, and words in the API's log.
    "header": (
        "GET",
        {"X-Evil": "1"},
        ["Request header field x-evil is not allowed by Access-Control-Allow-Headers"],
        "the header x-evil: ",
    ),
    "method": (
        "BREW",
        {},
        ["Method BREW is not allowed by Access-Control-Allow-Methods"],
        "the method BREW: ",
    ),
    "method in lower case": (
        "patch",
        {},
        ["Method patch is not allowed by Access-Control-Allow-Methods"],
        "the method patch: ",
    ),
}


@pytest.mark.parametrize(("method", "headers", "complaint", "warning"), MISSED.values(), ids=MISSED)
def test_the_browser_names_what_it_misses_in_a_preflight(
    frontend: Frontend, method: str, headers: Json, complaint: list[str], warning: str
) -> None:
    """Which it does only where the status is fine; the log names it too."""
    complaints: list[str] = []
    frontend.page.on("console", lambda message: complaints.append(message.text))
    answer = frontend.call(method, path_of(frontend.user), headers=headers)
    assert answer == {"error": "TypeError: Failed to fetch"}
    frontend.page.wait_for_timeout(100)
    said = " ".join(complaints)
    assert [words for words in complaint if words not in said] == [], said
    frontend.api.log_lines(f" WARNING a browser will refuse {warning}")


def test_the_browser_names_an_origin_that_is_not_allowed(
    open_page: Callable[[str], Any], frontends: list[str], api: Server, auth: BetterAuth
) -> None:
    """For a request with a preflight and for one without."""
    stranger = Frontend(open_page(f"{frontends[1]}/page.html"), api, auth)
    complaints: list[str] = []
    stranger.page.on("console", lambda message: complaints.append(message.text))
    for path, headers in ((path_of("u"), {"Authorization": "Bearer x"}), ("/healthz", {})):
        complaints.clear()
        answer = stranger.call("GET", path, headers=headers)
        assert answer == {"error": "TypeError: Failed to fetch"}
        stranger.page.wait_for_timeout(100)
        said = " ".join(complaints)
        assert f"from origin '{frontends[1]}' has been blocked by CORS policy" in said
        assert "No 'Access-Control-Allow-Origin' header is present" in said
        assert "HTTP ok status" not in said
    [line, *_] = api.log_lines(" WARNING a browser will refuse the origin ")
    assert f"the origin {frontends[1]}: it is not in ALLOWED_ORIGINS" in line


def test_what_tracing_tools_add_is_allowed(frontend: Frontend) -> None:
    """Design 4, CORS: a page need not know of them."""
    names = ("traceparent", "tracestate", "baggage", "sentry-trace", "X-Requested-With")
    headers = dict.fromkeys(names, "00-1")
    answer = frontend.call("GET", path_of(frontend.user), headers=headers)
    assert (answer["status"], answer["body"]) == (200, [])


REFUSALS: dict[str, tuple[str, str, Json]] = {
    "INVALID_TOKEN": ("GET", "/api/{user}/tasks", {"token": "a.b.c"}),
    "FORBIDDEN": ("GET", "/api/somebody-else/tasks", {}),
    "TASK_NOT_FOUND": ("GET", f"/api/{{user}}/tasks/{2**62}", {}),
    "NOT_FOUND": ("GET", "/api", {}),
    "METHOD_NOT_ALLOWED": ("PATCH", "/api/{user}/tasks", {}),
    "PAYLOAD_TOO_LARGE": ("POST", "/api/{user}/tasks", {"body": {"title": "x" * 70_000}}),
}


@pytest.mark.parametrize("code", REFUSALS)
def test_the_page_reads_every_refusal(frontend: Frontend, code: str) -> None:
    """Not masked as a failed fetch."""
    method, path, request = REFUSALS[code]
    answer = frontend.call(method, path.format(user=frontend.user), **request)
    is_error(answer, code)


def test_the_page_reads_a_401_without_a_token(frontend: Frontend) -> None:
    frontend.token = None
    answer = frontend.call("GET", path_of(frontend.user))
    is_error(answer, "AUTHENTICATION_REQUIRED")
    assert answer["headers"]["www-authenticate"] == "Bearer"


def test_the_page_reads_a_422(frontend: Frontend) -> None:
    """SC-008."""
    answer = frontend.call("POST", path_of(frontend.user), {"title": " "})
    assert answer["status"] == 422
    assert answer["body"]["field_errors"] == {"title": ["Title is required and cannot be empty"]}


def test_the_page_reads_a_500_and_a_503(frontend: Frontend, broken_api: Server) -> None:
    frontend.api = broken_api
    answer = frontend.call("GET", path_of(frontend.user))
    is_error(answer, "INTERNAL_ERROR")
    frontend.auth.command("rotate")
    frontend.auth.command("answer", jwks="nothing")
    rotated = frontend.auth.command("sign", payload={"sub": frontend.user})["token"]
    answer = frontend.call("GET", path_of(frontend.user), token=rotated)
    frontend.auth.command("answer", jwks=None)
    is_error(answer, "AUTH_KEYS_UNAVAILABLE")
    assert answer["headers"]["retry-after"] == "1"


def test_the_same_page_from_another_origin_can_do_none_of_it(
    open_page: Callable[[str], Any],
    frontend: Frontend,
    frontends: list[str],
    api: Server,
    auth: BetterAuth,
) -> None:
    """It has a good token of its own, and fails in the browser alone; nothing is changed."""
    stranger = Frontend(open_page(f"{frontends[1]}/page.html"), api, auth)
    stranger.sign_in()
    tasks = path_of(stranger.user)
    made = httpx.post(
        api.url + tasks,
        json={"title": "Mine"},
        headers={"Authorization": f"Bearer {stranger.token}"},
    ).json()
    attempts = [
        stranger.call("GET", tasks),
        stranger.call("POST", tasks, {"title": "x"}),
        stranger.call("GET", f"{tasks}/{made['id']}"),
        stranger.call("PUT", f"{tasks}/{made['id']}", {"title": "x"}),
        stranger.call("PATCH", f"{tasks}/{made['id']}/complete"),
        stranger.call("DELETE", f"{tasks}/{made['id']}"),
        stranger.call("GET", "/healthz"),
    ]
    assert attempts == [{"error": "TypeError: Failed to fetch"}] * len(attempts)
    # The very same token works for the page of the origin that is allowed.
    answer = frontend.call("GET", tasks, token=stranger.token)
    assert (answer["status"], answer["body"]) == (200, [made])


# /docs


class Docs:
    """The page /docs, with its assets answered from the npm package of the very version."""

    def __init__(self, page: Any, *, tamper: str = "", cdn: str = "answers") -> None:
        self.page = page
        self.tamper = tamper
        self.cdn = cdn  # or "refuses", or "says nothing"
        self.assets: list[str] = []
        self.elsewhere: list[str] = []
        self.complaints: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda exc: self.complaints.append(str(exc)))
        page.route("**/*", self._answer)

    def _answer(self, route: Any) -> None:
        url = urllib.parse.urlsplit(route.request.url)
        if url.hostname in ("127.0.0.1", "localhost", DEPLOYED) or url.scheme == "data":
            route.continue_()
        elif url.hostname == "cdn.jsdelivr.net" and self.cdn == "refuses":
            route.abort()
        elif url.hostname == "cdn.jsdelivr.net" and self.cdn == "answers":
            _, npm, package, name = url.path.split("/")
            package, _, version = package.partition("@")
            folder = HERE / "node_modules" / package
            assert npm == "npm"
            assert f'"version": "{version}"' in (folder / "package.json").read_text()
            body = (folder / name).read_bytes()
            self.assets.append(name)
            kind = "text/css" if name.endswith(".css") else "application/javascript"
            route.fulfill(
                body=body + b"\n" if self.tamper == name else body,
                headers={"Content-Type": kind, "Access-Control-Allow-Origin": "*"},
            )
        elif url.hostname != "cdn.jsdelivr.net":
            self.elsewhere.append(route.request.url)
            route.abort()

    def operations(self) -> set[tuple[str, str]]:
        """Method and path of each that it lists, once it does."""
        self.page.locator(".opblock").first.wait_for(timeout=20_000)
        return {
            (block.get_attribute("class").split("opblock-")[-1].split()[0], path.strip("\u200b"))
            for block in self.page.locator(".opblock").all()
            for path in [block.locator(".opblock-summary-path").get_attribute("data-path")]
        }

    def create_task(self, user: str, title: str) -> str:
        """What it shows of the answer when a person authorizes and tries the operation out."""
        page = self.page
        page.click(".btn.authorize")
        page.fill(".auth-container input", bearer(user)["Authorization"].removeprefix("Bearer "))
        page.click(".auth-btn-wrapper .authorize")
        page.click(".btn-done")
        create = page.locator("#operations-Tasks-create_task, .opblock-post").first
        create.locator(".opblock-summary-control").click()
        create.locator(".try-out__btn").click()
        create.locator("tr[data-param-name=user_id] input").fill(user)
        create.locator("textarea.body-param__text").fill(json.dumps({"title": title}))
        create.locator(".execute").click()
        answer = create.locator(".live-responses-table .response").first
        answer.wait_for()
        return str(answer.inner_text())


@pytest.fixture
def open_docs(open_page: Callable[[str], Any], api: Server) -> Callable[..., Docs]:
    def open_docs(host: str = "127.0.0.1", url: str = "", **options: str) -> Docs:
        docs = Docs(open_page("about:blank"), **options)
        silent = docs.cdn == "says nothing"
        docs.page.goto(
            url or f"http://{host}:{api.port}/docs", wait_until="commit" if silent else "load"
        )
        return docs

    return open_docs


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", DEPLOYED])
def test_docs_lists_the_operations_and_runs_one(open_docs: Callable[..., Docs], host: str) -> None:
    docs = open_docs(host)
    assert docs.operations() >= {
        ("get", "/api/{user_id}/tasks"),
        ("post", "/api/{user_id}/tasks"),
        ("get", "/api/{user_id}/tasks/{id}"),
        ("put", "/api/{user_id}/tasks/{id}"),
        ("delete", "/api/{user_id}/tasks/{id}"),
        ("patch", "/api/{user_id}/tasks/{id}/complete"),
    }
    answer = docs.create_task(new_user(), "From the docs")
    assert answer.startswith("201")
    assert '"From the docs"' in answer
    assert "This page needs Swagger UI" not in docs.page.locator("body").inner_text()
    assert docs.assets == ["swagger-ui.css", "swagger-ui-bundle.js"]
    assert (docs.complaints, docs.elsewhere) == ([], [])


def test_docs_shows_the_operations_without_scrolling(open_docs: Callable[..., Docs]) -> None:
    docs = open_docs()
    docs.page.set_viewport_size({"width": 1280, "height": 800})
    docs.operations()
    shown = [
        docs.page.locator(".btn.authorize"),
        *docs.page.locator("[id^=operations-Tasks]").all(),
    ]
    bottoms = [box["y"] + box["height"] for each in shown for box in [each.bounding_box()]]
    assert len(bottoms) == 7
    assert max(bottoms) <= 800


class SubPath(BaseHTTPRequestHandler):
    """A proxy that serves the API below /todo/ and takes that part off, as many do."""

    prefix = "/todo"

    def __init__(self, api: Server, *arguments: Any) -> None:
        self.api = api
        super().__init__(*arguments)

    def do_GET(self) -> None:
        path = self.path.removeprefix(self.prefix)
        if path == self.path:
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name != "Host"}
        answer = httpx.request(self.command, self.api.url + path, content=body, headers=headers)
        self.send_response(answer.status_code)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.content)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def sub_path(api: Server) -> Iterator[str]:
    """The API's URL behind such a proxy."""
    listener = ThreadingHTTPServer(("127.0.0.1", 0), partial(SubPath, api))
    Thread(target=listener.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listener.server_port}{SubPath.prefix}"
    listener.shutdown()
    listener.server_close()


def test_docs_works_below_a_path_of_a_proxy(open_docs: Callable[..., Docs], sub_path: str) -> None:
    """Contract and operations are asked for there; `Location` stays as the service sees it."""
    docs, user = open_docs(url=f"{sub_path}/docs"), new_user()
    sent: list[str] = []
    docs.page.on("request", lambda request: sent.append(f"{request.method} {request.url}"))
    assert ("post", "/api/{user_id}/tasks") in docs.operations()
    answer = docs.create_task(user, "From below")
    assert answer.startswith("201")
    assert f"location: /api/{user}/tasks/" in answer
    assert f"POST {sub_path}/api/{user}/tasks" in sent
    assert (docs.complaints, docs.elsewhere) == ([], [])


@pytest.mark.parametrize("cdn", ["refuses", "says nothing"])
def test_docs_without_its_assets_says_what_it_needs(
    open_docs: Callable[..., Docs], api: Server, cdn: str
) -> None:
    """Not a blank page, however long the browser waits."""
    docs = open_docs(cdn=cdn)
    # Not `wait_for_function`, whose `eval` the page's policy forbids.
    painted = "performance.getEntriesByName('first-contentful-paint').length"
    eventually(lambda: docs.page.evaluate(painted), within=30)
    said = docs.page.locator("#swagger-ui")
    assert "Swagger UI, which the browser loads from cdn.jsdelivr.net" in said.inner_text()
    link = said.locator("a").evaluate("(link) => link.href")
    assert link == f"{api.url}/openapi.yaml"
    assert httpx.get(link).status_code == 200


@pytest.mark.parametrize("name", ["swagger-ui.css", "swagger-ui-bundle.js"])
def test_an_asset_with_one_more_byte_is_not_used(open_docs: Callable[..., Docs], name: str) -> None:
    docs = open_docs(tamper=name)
    page = docs.page
    if name.endswith(".js"):
        assert page.evaluate("typeof SwaggerUIBundle") == "undefined"
    else:
        page.locator(".opblock").first.wait_for(timeout=20_000)
        assert page.evaluate("[...document.styleSheets].length") == 0
    assert any("integrity" in complaint for complaint in docs.complaints)


def test_the_policy_of_docs_lets_nothing_else_in(open_docs: Callable[..., Docs]) -> None:
    docs = open_docs()
    docs.page.locator(".opblock").first.wait_for(timeout=20_000)
    policy = docs.page.request.get(docs.page.url).headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "*" not in policy
    for directive in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert f"{directive} 'none'" in policy
    docs.page.evaluate(
        """() => {
            const script = document.createElement('script')
            script.textContent = 'window.injected = true'
            const other = document.createElement('script')
            other.src = 'https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.35.0/swagger-ui.js'
            const image = document.createElement('img')
            image.setAttribute('onerror', 'window.injected = true')
            image.src = 'https://elsewhere.example/x.png'
            document.body.append(script, other, image)
        }"""
    )
    failed = docs.page.evaluate(
        "fetch('https://elsewhere.example/').then(() => 'sent', (error) => String(error))"
    )
    assert failed.startswith("TypeError")
    assert docs.page.evaluate("window.injected") is None
    assert docs.assets == ["swagger-ui.css", "swagger-ui-bundle.js"]
    assert docs.elsewhere == []


def test_a_page_cannot_frame_docs(
    open_page: Callable[[str], Any], api: Server, frontends: list[str]
) -> None:
    page = open_page(f"{frontends[0]}/page.html")
    page.evaluate(
        "(url) => { document.body.innerHTML = `<iframe src='${url}'></iframe>` }", f"{api.url}/docs"
    )
    page.wait_for_timeout(500)
    assert all("SwaggerUI" not in frame.content() for frame in page.frames[1:])
