"""The operator's reference says what the code does."""

import pytest

from tests.reference import README, TABLES, with_tables


def test_its_tables_are_the_codes_own() -> None:
    """`python -m tests.reference` writes them."""
    assert with_tables(README.read_text()) == README.read_text()


@pytest.mark.parametrize("table", TABLES)
def test_every_table_is_in_it(table: str) -> None:
    assert f"<!-- table: {table} -->" in README.read_text()
