"""The published predictions are those of the model as it stands, and say that they are predictions."""

from benchmarks.head.predicted_times import TABLE, table


def test_the_table_is_up_to_date():
    assert TABLE.read_text() == table(), "run python benchmarks/head/predicted_times.py"


def test_the_table_says_that_nothing_was_measured():
    assert "**Predictions, not measurements.**" in TABLE.read_text()
