"""Prices are dated, sourced and never guessed: what is asked for is found, or the error says what there is."""

import re
from datetime import date

import pytest

from kan_train.accounting.peaks import PEAKS
from kan_train.accounting.prices import KINDS, OWN, Price, chosen_price, parse_prices, price_from_row, price_of, prices
from kan_train.config import AccountingConfig, ConfigError

H100 = "NVIDIA H100 80GB HBM3"
ENTRY = {
    "device": H100, "provider": "a cloud", "kind": "on_demand", "currency": "USD", "per_device_hour": "2.5", "date": "2026-01-31", "source": "their page",
}  # fmt: skip


def group(*changes: dict[str, str | None]) -> str:
    """A file of entries: `ENTRY`, each with changes; None leaves a field out."""
    lines = ["entries:"]
    for change in changes:
        kept = {name: value for name, value in (ENTRY | change).items() if value is not None}
        lines += [f"  {'-' if number == 0 else ' '} {name}: {value}" for number, (name, value) in enumerate(kept.items())]
    return "\n".join(lines)


def test_shipped_prices_say_what_when_and_where_from():
    assert prices(), "there are some"
    assert {price.kind for price in prices()} == set(KINDS)
    for price in prices():
        assert price.device in PEAKS or price.device == "NVIDIA H800", "as the driver names it"
        assert 0.5 < price.per_device_hour < 20
        assert len(price.source) > 20
        assert date(2024, 1, 1) < price.date <= date(2026, 11, 28)


@pytest.mark.parametrize(
    ("device", "kind", "name", "dollars"),
    [(H100, "on_demand", "on_demand", 2.95), (H100, "on_demand", "on_demand_low", 2.40), (H100, "spot", None, 1.25), (H100, "reserved", None, 4.92),
     (H100, "assumed", None, 2.00), ("NVIDIA H200", "on_demand", None, 3.50), ("NVIDIA H200", "spot", None, 1.45), ("NVIDIA H800", None, None, 2.00),
     ("NVIDIA A100-SXM4-80GB", None, "on_demand", 1.40), ("NVIDIA A100-SXM4-80GB", None, "on_demand_low", 1.35)],
)  # fmt: skip
def test_a_device_and_a_kind_or_name_give_its_price(device: str, kind: str | None, name: str | None, dollars: float):
    found = price_of(device, kind=kind, name=name)
    assert (found.device, found.per_device_hour) == (device, dollars)
    assert kind in (None, found.kind)


def test_the_newest_price_of_before_a_day_counts(monkeypatch: pytest.MonkeyPatch):
    text = group({"date": "2026-03-01", "per_device_hour": "2"}, {"date": "2026-01-01", "per_device_hour": "3"}, {"date": "2026-05-01", "per_device_hour": "1"})
    found = parse_prices("mine", text)
    assert [price.per_device_hour for price in found] == [3, 2, 1], "by date"
    monkeypatch.setattr("kan_train.accounting.prices.prices", lambda: tuple(found))
    asked = {date(2026, 1, 1): 3, date(2026, 2, 28): 3, date(2026, 3, 1): 2, date(2026, 4, 30): 2, date(2026, 5, 1): 1, date(2030, 1, 1): 1, None: 1}
    for day, dollars in asked.items():
        assert price_of(H100, on=day).per_device_hour == dollars
    with pytest.raises(ConfigError, match=r"no price of .* as of 2025-12-31; there is mine \(on_demand, \$3, 2026-01-01\)"):
        price_of(H100, on=date(2025, 12, 31))


def test_what_is_not_there_is_refused_with_what_is():
    with pytest.raises(ConfigError, match=r"no price of 'cpu'; give a number .* conf/prices knows NVIDIA A100-SXM4-80GB, .*NVIDIA H800"):
        price_of("cpu")
    with pytest.raises(ConfigError, match=r"no price of 'NVIDIA H200' of kind reserved; there is on_demand .* spot"):
        price_of("NVIDIA H200", kind="reserved")
    with pytest.raises(ConfigError, match=r"several prices .* choose by name: on_demand \(.*\$2.95.*\), on_demand_low \(.*\$2.4,"):
        price_of(H100, kind="on_demand")
    with pytest.raises(ConfigError, match="kind='sopt' is not known; use kind=spot"):
        price_of(H100, kind="sopt")
    with pytest.raises(ConfigError, match="price='sopt' is not known; use price=spot"):
        price_of(H100, name="sopt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"date": None}, "missing or not known is date"), ({"region": "west"}, "missing or not known is region"),
        ({"kind": "weekly"}, "kind='weekly' is not known"),
        ({"currency": "EUR"}, "currency='EUR' is not known; use .*USD"), ({"per_device_hour": "-1"}, "must be a positive number"),
        ({"per_device_hour": ".nan"}, "must be a positive number"), ({"per_device_hour": "true"}, "must be a positive number"),
        ({"per_device_hour": "cheap"}, "must be a positive number"), ({"date": "yesterday"}, "must be a day"),
        ({"date": "2026-01-31 10:00:00"}, "must be a day"),
        ({"source": "''"}, "source='' must be text"), ({"device": "100"}, "device=100 must be text"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_refused_by_file_and_number(change: dict[str, str | None], message: str):
    assert parse_prices("mine", group({}))
    with pytest.raises(ConfigError, match=rf"conf/prices/mine.yaml, entry 2: .*({message})"):
        parse_prices("mine", group({"date": "2026-01-30"}, change))


@pytest.mark.parametrize(
    ("text", "message"),
    [("entries: []", "at least one entry"), ("- a", "one list"), ("", "one list"), ("entries: [", "is not YAML"), ("prices: []\nentries: []", "one list"),
     (group({}, {"per_device_hour": "3"}), f"two entries of {H100} on 2026-01-31")],
)  # fmt: skip
def test_a_wrong_file_is_refused_by_name(text: str, message: str):
    with pytest.raises(ConfigError, match=f"conf/prices/mine.yaml.*{message}"):
        parse_prices("mine", text)


def test_a_choice_is_a_number_or_a_name():
    own = chosen_price("2.35", "cpu", on=date(2026, 2, 3), setting="accounting.price")
    assert (own.name, own.device, own.per_device_hour, own.date, own.source) == (OWN, "cpu", 2.35, date(2026, 2, 3), "accounting.price=2.35")
    assert own.per_second * 3600 == pytest.approx(2.35)
    assert chosen_price("spot", H100) == price_of(H100, kind="spot")
    with pytest.raises(ConfigError, match=r"accounting\.price=spot: there is no price of 'cpu' in spot"):
        chosen_price("spot", "cpu", setting="accounting.price")
    for wrong in ("0", "-2", "nan", "inf"):
        with pytest.raises(ConfigError, match=re.escape(f"--price={wrong} must be a positive number")):
            chosen_price(wrong, H100, setting="--price")


def test_a_run_says_what_it_pays_by_number_or_name():
    for fine in (None, "spot", "1e-3", "2"):
        AccountingConfig(price=fine).validate()
    for wrong in ("0", "-2", "nan", "inf"):
        with pytest.raises(ConfigError, match=re.escape(f"accounting.price={wrong} must be a positive number")):
            AccountingConfig(price=wrong).validate()
    with pytest.raises(ConfigError, match=r"accounting\.price='sopt' is not known; use accounting\.price=spot, or another one of: assumed, "):
        AccountingConfig(price="sopt").validate()


def test_a_price_survives_json():
    import json

    for price in prices():
        row = json.loads(json.dumps(price.as_row()))
        assert price_from_row(row) == price
    assert isinstance(prices()[0], Price)
