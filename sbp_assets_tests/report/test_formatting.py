"""Numbers and settings as the page shows them."""

import pytest

from sbp_assets.report.formatting import percent, publishable, quantity, signed


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (999.6, "1,000"), (1234, "1,234"), (12_300, "12.3 K"), (4.56e6, "4.56 M"), (1.2e18, "1.20e+18")],
)
def test_quantities_have_three_digits(value: float | None, shown: str) -> None:
    assert quantity(value) == shown


def test_numbers_have_a_minus_sign_and_no_hyphen() -> None:
    assert (percent(-0.051), percent(0.5, 0), percent(None)) == ("−5.1%", "50%", "–")
    assert (signed(-0.5), signed(0.5), signed(0), signed(-123.45)) == ("−0.500", "+0.500", "0.000", "−123.5")


def test_published_settings_name_data_and_no_machine() -> None:
    shown = publishable({
        "path": "/home/someone/corpus.jsonl", "hub": "s3://bucket/data", "model": "Qwen/Qwen3",
        "host": "http://judge.internal:8000", "query": "https://host/v1/a.jsonl?token=secret",
    })  # fmt: skip
    assert shown == {
        "path": "…/corpus.jsonl", "hub": "…/data", "model": "Qwen/Qwen3", "host": "…/", "query": "…/a.jsonl"
    }  # fmt: skip
