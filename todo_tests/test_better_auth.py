"""Tokens of a real Better Auth server, from sign-up to a task (FR-031, SC-002)."""

import asyncio
import json
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

import httpx
import jwt
import pytest

from todo_tests.better_auth import (
    HERE,
    BetterAuth,
    Session,
    StartBetterAuth,
    better_auth_servers,
)
from todo_tests.support import AUTH_URL, SECRET, assert_error, assert_task, client_of, get, path_of

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

ALGORITHMS = ("EdDSA", "ES256", "ES512", "RS256", "PS256")


@pytest.fixture(scope="module")
def start() -> Iterator[StartBetterAuth]:
    """A factory of Better Auth servers."""
    with better_auth_servers() as start:
        yield start


@pytest.fixture(scope="module")
def auth(start: StartBetterAuth) -> BetterAuth:
    """One as its documentation sets it up."""
    return start()


def authorized(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def status(client: httpx.AsyncClient, user: str, token: str) -> int:
    """200; or 401, and then the whole answer is right."""
    response = await client.get(path_of(user), headers=authorized(token))
    if response.status_code != 200:
        assert_error(response, "INVALID_TOKEN")
        assert response.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    return response.status_code


async def work(client: httpx.AsyncClient, user: str, token: str) -> None:
    """Create, read, list, change, toggle and delete a task (US1 to US5)."""
    headers, tasks = authorized(token), path_of(user)
    created = await client.post(tasks, headers=headers, json={"title": "Buy groceries"})
    assert created.status_code == 201, created.text
    task = created.json()
    assert_task(task, user_id=user, title="Buy groceries")
    path = created.headers["location"]
    assert (await client.get(path, headers=headers)).json() == task
    assert (await client.get(tasks, headers=headers)).json() == [task]
    changed = await client.put(path, headers=headers, json={"title": "Buy milk"})
    assert_task(changed.json(), user_id=user, title="Buy milk")
    toggled = await client.patch(f"{path}/complete", headers=headers)
    assert_task(toggled.json(), user_id=user, title="Buy milk", completed=True)
    assert (await client.delete(path, headers=headers)).status_code == 204
    assert (await client.get(tasks, headers=headers)).json() == []


def test_the_installed_versions_are_those_of_package_json(auth: BetterAuth) -> None:
    wanted = json.loads((HERE / "package.json").read_text())["dependencies"]
    for name, version in wanted.items():
        installed = json.loads((HERE / "node_modules" / name / "package.json").read_text())
        assert installed["version"] == version
        assert re.fullmatch(r"\d+\.\d+\.\d+", version)


# Accepted.

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    **{alg: {"jwtOptions": {"jwks": {"keyPairConfig": {"alg": alg}}}} for alg in ALGORITHMS},
    "HS256 by a custom jwt.sign": {"customSign": True},
    "uuid ids": {"options": {"advanced": {"database": {"generateId": "uuid"}}}},
    "serial ids": {"options": {"advanced": {"database": {"generateId": "serial"}}}},
    "audience list": {
        "jwtOptions": {"jwt": {"audience": ["todo-api", "https://elsewhere.example"]}}
    },
    "own issuer and audience": {"jwtOptions": {"jwt": {"issuer": "us", "audience": "todo-api"}}},
    "another base path": {"options": {"basePath": "/auth"}},
    "no key encryption": {"jwtOptions": {"jwks": {"disablePrivateKeyEncryption": True}}},
}
SETTINGS: dict[str, dict[str, str]] = {
    "audience list": {"jwt_audience": "todo-api"},
    "own issuer and audience": {"jwt_issuer": "us", "jwt_audience": "todo-api"},
    "another base path": {"jwks_url": "{}/auth/jwks"},
}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_user_signs_up_and_works(
    start: StartBetterAuth, make_settings: Any, kind: str
) -> None:
    auth = start(**KINDS[kind])
    session = auth.sign_up()
    token = session.token()
    header = jwt.get_unverified_header(token)
    expected = kind if kind in ALGORITHMS else "HS256" if kind.startswith("HS256") else "EdDSA"
    assert header["alg"] == expected
    settings = {name: value.format(auth.url) for name, value in SETTINGS.get(kind, {}).items()}
    async with client_of(make_settings(better_auth_url=auth.url, **settings)) as client:
        await work(client, session.user, token)
        # What get-session repeats is a token too.
        repeated = session.client.get(f"{auth.base}/get-session").headers["set-auth-jwt"]
        assert await status(client, session.user, repeated) == 200


@pytest.mark.parametrize("path", ["", "/", "/api/auth", "/api/auth/", "/auth", "/a/b/c/"])
async def test_both_sides_take_one_base_url_in_the_same_way(
    start: StartBetterAuth, make_settings: Any, path: str
) -> None:
    """Without a path the API is at /api/auth, with one it is there; a basePath is then ignored."""
    auth = start({"basePath": "/ignored"} if path.strip("/") else {}, path=path)
    session = auth.sign_up()
    async with client_of(make_settings(better_auth_url=auth.url + path)) as client:
        await work(client, session.user, session.token())
    assert auth.jwks_requests == 1


async def test_a_base_path_of_ones_own_needs_its_url(
    start: StartBetterAuth, make_settings: Any
) -> None:
    """Which Better Auth does not publish: a 404 there is no reason to log anybody out."""
    auth = start({"basePath": "/auth"})
    session = auth.sign_up()
    async with client_of(make_settings(better_auth_url=auth.url)) as client:
        response = await client.get(path_of(session.user), headers=authorized(session.token()))
        assert_error(response, "AUTH_KEYS_UNAVAILABLE")
    async with client_of(make_settings(better_auth_url=f"{auth.url}/auth")) as client:
        assert await status(client, session.user, session.token()) == 200


async def test_one_better_auth_of_two_hosts_issues_both(
    start: StartBetterAuth, make_settings: Any
) -> None:
    """JWT_ISSUER and JWT_AUDIENCE as lists; a third host is nobody."""
    auth = start()
    sub = auth.sign_up().user
    hosts = [auth.url, "https://app.example"]
    settings = make_settings(
        better_auth_url=auth.url, jwt_issuer=",".join(hosts), jwt_audience=", ".join(hosts)
    )
    async with client_of(settings) as client:
        for host, expected in ((hosts[0], 200), (hosts[1], 200), ("https://c.example", 401)):
            payload = {"sub": sub, "iss": host, "aud": host}
            token = auth.command("sign", payload=payload)["token"]
            assert await status(client, sub, token) == expected, host


async def test_tokens_are_those_that_better_auth_md_describes(auth: BetterAuth) -> None:
    """If this fails after an update of Better Auth, read its release notes before the code."""
    session = auth.sign_up()
    token = session.token()
    header = jwt.get_unverified_header(token)
    claims = jwt.decode(token, options={"verify_signature": False})
    (key,) = get(f"{auth.base}/jwks").json()["keys"]
    assert header == {"alg": "EdDSA", "kid": key["kid"]}
    assert {name: value for name, value in key.items() if name not in ("x", "kid")} == {
        "alg": "EdDSA",
        "crv": "Ed25519",
        "kty": "OKP",
    }
    assert (claims["sub"], claims["id"]) == (session.user, session.user)
    assert (claims["iss"], claims["aud"]) == (auth.url, auth.url)
    assert claims["exp"] - claims["iat"] == 900


async def test_users_of_one_better_auth_see_no_tasks_of_each_other(
    auth: BetterAuth, make_settings: Any
) -> None:
    """SC-004, US1-AS2."""
    ann, ben = auth.sign_up(), auth.sign_up()
    async with client_of(make_settings(better_auth_url=auth.url)) as client:
        response = await client.get(path_of(ann.user), headers=authorized(ben.token()))
        assert_error(response, "FORBIDDEN")
        assert await status(client, ben.user, ben.token()) == 200


async def test_a_user_names_himself_but_not_his_id(auth: BetterAuth, make_settings: Any) -> None:
    """`name` and `image` are the user's own words, in every token."""
    session = auth.sign_up()
    words = {"name": '","sub":"admin"} \u202e\0🦊', "image": "https://x.example/" + "y" * 3000}
    session.client.post(f"{auth.base}/update-user", json=words).raise_for_status()
    async with client_of(make_settings(better_auth_url=auth.url)) as client:
        assert await status(client, session.user, session.token()) == 200


# Refused: all that Better Auth hands out and that is no token of the jwt plugin.

CACHE = {"session": {"cookieCache": {"enabled": True}}}


def cookie(session: Session) -> str:
    """The session's data as the cookie cache holds it."""
    return session.client.cookies["better-auth.session_data"]


def cached(strategy: str) -> dict[str, Any]:
    return {"session": {"cookieCache": {"enabled": True, "strategy": strategy}}}


async def test_what_is_no_login_is_refused(start: StartBetterAuth, make_settings: Any) -> None:
    """Each with a good token of the same user beside it."""
    auth, jwe = start(cached("jwt")), start(cached("jwe"))
    session, other = auth.sign_up(), jwe.sign_up()
    raw_cookie = session.client.cookies["better-auth.session_token"]
    refused = {
        "bearer": session.bearer,
        "session token": session.session_token,
        "session cookie": raw_cookie,
        "session cookie, decoded": urllib.parse.unquote(raw_cookie),
        "cookie cache": cookie(session),
        "cookie cache, encrypted": cookie(other),
        "e-mail": auth.command("state")["mails"][-1],
    }
    assert jwt.get_unverified_header(refused["cookie cache"])["alg"] == "HS256"
    assert jwt.decode(refused["e-mail"], SECRET, ["HS256"])["userId"] == session.user
    assert refused["cookie cache, encrypted"].count(".") == 4
    async with client_of(make_settings(better_auth_url=auth.url)) as client:
        assert await status(client, session.user, session.token()) == 200
        statuses = {
            kind: await status(client, session.user, token) for kind, token in refused.items()
        }
        assert statuses == dict.fromkeys(refused, 401)


async def test_a_cookie_cache_signed_by_the_jwks_key_is_refused(
    start: StartBetterAuth, make_settings: Any
) -> None:
    """It has the right key, iss and sub: only typ and aud tell."""
    auth = start(cached("jwt"), jwtOptions={"sessionCookieCache": True})
    session = auth.sign_up()
    token = session.token()
    header = jwt.get_unverified_header(cookie(session))
    assert header["typ"] == "better-auth.session-cache+jwt"
    assert header["kid"] == jwt.get_unverified_header(token)["kid"]
    async with client_of(make_settings(better_auth_url=auth.url)) as client:
        assert await status(client, session.user, token) == 200
        assert await status(client, session.user, cookie(session)) == 401


async def test_other_claims_by_better_auths_own_key_are_refused(
    auth: BetterAuth, make_settings: Any
) -> None:
    sub = auth.sign_up().user

    def sign(**payload: object) -> str:
        return str(auth.command("sign", payload={"sub": sub, **payload})["token"])

    refused = {
        "OIDC id token": sign(aud="client-id"),
        "aud of others": sign(aud=["client-id", "https://elsewhere.example"]),
        "wrong iss": sign(iss="https://elsewhere.example"),
        "iss with path": sign(iss=auth.base),
        "no sub": sign(sub=None, id=sub),
        "not yet": sign(nbf=2**40, exp=2**41),
    }
    expired = sign(iat=1, exp=2)
    async with client_of(make_settings(better_auth_url=auth.url)) as client:
        assert await status(client, sub, sign()) == 200
        statuses = {kind: await status(client, sub, token) for kind, token in refused.items()}
        assert statuses == dict.fromkeys(refused, 401)
        response = await client.get(path_of(sub), headers=authorized(expired))
        assert_error(response, "TOKEN_EXPIRED")


async def test_a_token_of_another_better_auth_is_refused(
    start: StartBetterAuth, auth: BetterAuth, make_settings: Any
) -> None:
    """Its keys are not ours, even where iss and aud are; nor is its secret."""
    alike = {"jwt": {"issuer": auth.url, "audience": auth.url}}
    other = start(jwtOptions=alike)
    custom = start(secret=SECRET[::-1], customSign=True)
    session, stranger, third = auth.sign_up(), other.sign_up(), custom.sign_up()
    async with client_of(make_settings(better_auth_url=auth.url)) as client:
        assert await status(client, session.user, session.token()) == 200
        assert await status(client, stranger.user, stranger.token()) == 401
        assert await status(client, third.user, third.token()) == 401
    async with client_of(make_settings(better_auth_url=other.url)) as client:
        assert await status(client, session.user, session.token()) == 401


async def test_an_algorithm_that_is_not_in_the_list_is_refused(
    start: StartBetterAuth, make_settings: Any
) -> None:
    """Better Auth would sign ES384 too, though it does not document it."""
    auth = start(jwtOptions={"jwks": {"keyPairConfig": {"alg": "ES384"}}})
    session = auth.sign_up()
    assert jwt.get_unverified_header(session.token())["alg"] == "ES384"
    async with client_of(make_settings(better_auth_url=auth.url)) as client:
        assert await status(client, session.user, session.token()) == 401


# Keys that come and go.


async def test_the_first_token_after_a_rotation_is_accepted_at_once(
    start: StartBetterAuth, make_settings: Any
) -> None:
    auth = start()
    session = auth.sign_up()
    async with client_of(make_settings(better_auth_url=auth.url)) as client:
        old = session.token()
        assert await status(client, session.user, old) == 200
        for _ in range(4):
            auth.command("rotate")
            new = session.token()
            kids = {jwt.get_unverified_header(token)["kid"] for token in (old, new)}
            assert len(kids) == 2
            assert await status(client, session.user, new) == 200
        assert await status(client, session.user, old) == 200
    assert auth.jwks_requests == 5


async def test_two_first_uses_at_once_make_two_good_keys(
    start: StartBetterAuth, make_settings: Any
) -> None:
    auth = start()
    session = auth.sign_up()
    async with httpx.AsyncClient(cookies=session.client.cookies) as browser:
        answers = await asyncio.gather(*[browser.get(f"{auth.base}/token") for _ in range(4)])
    async with client_of(make_settings(better_auth_url=auth.url)) as client:
        for answer in answers:
            assert await status(client, session.user, answer.json()["token"]) == 200


async def test_a_withdrawn_key_is_gone_for_whoever_fetches_anew(
    start: StartBetterAuth, make_settings: Any
) -> None:
    """test_jwks.py has the five minutes."""
    auth = start()
    session = auth.sign_up()
    old = session.token()
    async with client_of(make_settings(better_auth_url=auth.url)) as client:
        assert await status(client, session.user, old) == 200
        auth.command("withdraw")
        assert await status(client, session.user, session.token()) == 200
        assert await status(client, session.user, old + "A") == 401
    async with client_of(make_settings(better_auth_url=auth.url)) as client:
        assert await status(client, session.user, old) == 401


HTML = [200, {"Content-Type": "text/html"}]
ANSWERS: dict[str, object] = {
    "500": {"head": [500], "body": "Internal Server Error"},
    "HTML": {"head": HTML, "body": "<!doctype html><title>Sign in</title>"},
    "empty set": {"head": [200], "body": '{"keys":[]}'},
    "nothing at all": "nothing",
}


@pytest.mark.parametrize("answer", ANSWERS)
async def test_nobody_is_logged_out_while_the_jwks_is_broken(
    start: StartBetterAuth, make_settings: Any, answer: str
) -> None:
    """503 until a key is known; shared secrets go on."""
    auth = start()
    session = auth.sign_up()
    headers = authorized(session.token())
    auth.command("answer", jwks=ANSWERS[answer])
    async with client_of(make_settings(better_auth_url=auth.url)) as client:
        response = await client.get(path_of(session.user), headers=headers)
        assert_error(response, "AUTH_KEYS_UNAVAILABLE")
        assert response.headers["retry-after"] == "1"
        shared = jwt.encode({"sub": session.user, "exp": 2**40}, SECRET, "HS256")
        assert await status(client, session.user, shared) == 200
        auth.command("answer", jwks=None)
        assert await status(client, session.user, headers["Authorization"][7:]) == 200
        auth.command("answer", jwks=ANSWERS[answer])
        assert await status(client, session.user, session.token()) == 200


async def test_better_auths_own_rate_limit_logs_nobody_out(
    start: StartBetterAuth, make_settings: Any
) -> None:
    """429 past so many requests in ten seconds, as in production."""
    auth = start({"rateLimit": {"enabled": True, "window": 10, "max": 1}})
    token, user = auth.command("sign", payload={"sub": "demo"})["token"], "demo"
    async with client_of(make_settings(better_auth_url=auth.url)) as client:
        assert await status(client, user, token) == 200
        limited = get(f"{auth.base}/jwks")
        assert (limited.status_code, "retry-after" in limited.headers) == (429, False)
        assert 0 < int(limited.headers["x-retry-after"]) <= 10
        assert (
            await status(client, user, auth.command("sign", payload={"sub": user})["token"]) == 200
        )
        auth.command("rotate")
        rotated = auth.command("sign", payload={"sub": user})["token"]
        asked = auth.jwks_requests
        for _ in range(3):
            response = await client.get(path_of(user), headers=authorized(rotated))
            assert_error(response, "AUTH_KEYS_UNAVAILABLE")
        assert auth.jwks_requests == asked + 1
        assert await status(client, user, token) == 200


def test_a_real_server_starts_without_better_auth_and_finds_it_later(
    auth: BetterAuth, serve: Any
) -> None:
    session = auth.sign_up()
    server = serve({"BETTER_AUTH_URL": auth.url})
    url, headers = f"{server.url}{path_of(session.user)}", authorized(session.token())
    auth.command("answer", jwks="nothing")
    assert_error(get(url, headers=headers), "AUTH_KEYS_UNAVAILABLE")
    assert get(f"{server.url}/readyz").status_code == 200
    auth.command("answer", jwks=None)
    assert get(url, headers=headers).json() == []
    twice = [("Authorization", headers["Authorization"])] * 2
    assert_error(get(url, headers=twice), "INVALID_TOKEN")
    assert AUTH_URL not in server.stderr()
