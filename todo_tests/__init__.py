"""The test suite: a real PostgreSQL, real processes, no mocks.

    test_tasks, test_validation, test_isolation,   the specification by its ids (FR-001 to FR-033,
    test_http, test_round_trips, test_plans        US1-AS1 ...), in process
    test_contract, test_clients,                   Schemathesis, linters and generated clients over
    test_completeness                              openapi.yaml; contract, code, schema, settings
                                                   and README agree
    test_settings, test_start, test_check,         real processes: refusals, the first minute,
    test_commands, test_dev, test_lifecycle        signals, workers, check
    test_vm, test_growth                           the README's units, proxies, upgrade, backup;
                                                   several services, a partitioned table
    test_tokens, test_jwks, test_better_auth,      attacks on tokens; a real Better Auth;
    test_browser                                   a real browser
    test_database_faults, test_pooler,             damage done for real, see below
    test_fairness, test_floods, test_framing,
    test_endurance

What they promise, as last measured on a shared machine with 2 cores (`pytest -s` prints it anew):

    idle connections cut by the server, again and again        no request sees it
    database stopped: every request is answered 500            first within 8 ms, /healthz stays 200
    database back, without a restart                           first success within 0.3 s
    database killed (-9) three times under 16 writers          1,265 kept, 377 refused, none twice
    table locked, 40 callers, DB_TIMEOUT 2 s                   all 500 within 2.02 s, cancelled
    a write whose fate is unknown is never repeated            also behind PgBouncer
    PgBouncer 1.18 in transaction mode, two services           no failed request, no setting
    a head, a body, or a reader of answers stalls              dropped after 25 s, nothing stored
    heads over 64 KiB in any shape                             431 or cut off, + 15 MiB at most
    300 half-open connections                                  median unchanged
    upgrades, CONNECT, trailers, junk, a proxy in between      one request is one request
    one connection pipelines for 5 s                           + 2 MiB, others within 0.06 s
    40 lists of 100,000 tasks a second, read or not            others within 0.30 s
    eight lists of 25 MB at once, twice                        + 3 MiB afterwards
    80 answers of 25 MB that nobody reads                      + 780 MiB at most, others 0.14 s
    a reader of the log who sleeps                             no request waits
    the parent of two workers is killed                        they end within 5 s
    SIGTERM finishes what is in flight, exits 0                0.2 to 0.8 s, 10.8 s at most
    a worker that dies is replaced                             after 0.8 s
    three restarts on systemd's socket under wrk               40,075 requests through nginx, 28,508
                                                               through Caddy, none failed
    one of two services is killed under 32 callers             1,482 writes kept, 15 refused, reads
                                                               all answered
    1,000,000 tasks of 10,000 users against 20,000 of 200      list and get within 1.3 times
    100 concurrent callers for 20 s                            94,258 requests, slowest 153 ms
    memory during 20 s of outage under 30 callers              + 1 MiB
    memory after 30,000 requests within 10 % of after 5,000    85.4 MiB, 85.9 MiB
    36,000 different tokens                                    84 MiB
"""

import pytest

pytest.register_assert_rewrite("todo_tests.support")
