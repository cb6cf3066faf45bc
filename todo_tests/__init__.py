"""The test suite: a real PostgreSQL, real processes, no mocks."""

import pytest

pytest.register_assert_rewrite("todo_tests.support")
