"""The test suite: a real PostgreSQL, real processes, no mocks. README.md beside it is its map."""

import pytest

pytest.register_assert_rewrite("todo_tests.support")
