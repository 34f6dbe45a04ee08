"""Parsing of numbers in realistic answers, and the metrics of the finance output formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lceval.tasks import scoring as shared
from lceval.tasks.finance import numbers, scoring
from lceval.tasks.finance.reports import _with_scale

READ = {
    "$1,577.00": 1577.0,
    "(1,234)": -1234.0,
    "($1,234.5)": -1234.5,
    "$(0.91)": -0.91,
    "-$0.04": -0.04,
    "\u22125.2": -5.2,
    "-3.5%": -0.035,
    "(3.5)%": -0.035,
    "(3.5%)": -0.035,
    "(3.4% jump)": 0.034,
    "1.2 million": 1.2e6,
    "USD 1.2 million": 1.2e6,
    "S$1.75 billion": 1.75e9,
    "$1.6B": 1.6e9,
    "$2,018mn": 2.018e9,
    "$10,135 in thousands": 1.0135e7,
    "1,234 (in millions)": 1.234e9,
    "12 bps": 0.0012,
    "8 per cent": 0.08,
    "about 93.86": 93.86,
    "93.86 days": 93.86,
    "1.42403x": 1.42403,
    "5 miles": 5.0,
    "-.5": -0.5,
    "1e-3": 0.001,
    "12,34,567": 1234567.0,
    "0.14123.": 0.14123,
    "14% in 2019": 0.14,
    "2019: 14%": 0.14,
    "In 2019": 2019.0,
    "the 2,019 units": 2019.0,
    "60.94 - 25.14 = 35.8": 35.8,
    "35.8 = 60.94 - 25.14": 60.94,
    "x = unknown, not 7": 7.0,
    "14.1% (from 93 to 103)": 0.141,
    "9.8%-10.2%": 0.098,
    "The change:\n93 - 103 = -10\nthen 12": -10.0,
    "3-month rate: 4.5%": 0.045,
    r"14.1\%": 0.141,
    r"$14.1\%$": 0.141,
    "14.1\uff05": 0.141,
    "\uff11\uff14\uff0e\uff11\uff05": 0.141,
    "\u201114.1%": -0.141,
    "\uff0d14.1%": -0.141,
    "\u221214.1%": -0.141,
    r"1\,234": 1234.0,
}


@pytest.mark.parametrize(("text", "value"), READ.items())
def test_a_number_is_parsed_from_realistic_answers(text: str, value: float) -> None:
    number = numbers.read_number(text)
    assert number is not None
    assert number.value == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("text", ["", "no", "none of them", "FY2023", "Q2", "10-K", "2nd", "the 8-K filing"])
def test_text_without_a_number_gives_none(text: str) -> None:
    assert numbers.read_number(text) is None


@given(st.decimals(-(10**9), 10**9, places=2), st.sampled_from(["{:,}", "${:,}", "about {}", "{} .", "it was {} then"]))
def test_any_printed_amount_is_parsed(amount: Any, template: str) -> None:
    text = template.format(amount)
    number = numbers.read_number(text)
    assert number is not None
    assert number.value == float(amount)
    assert numbers.number_match(text, f"{amount:,}") == 1.0


@given(st.text(max_size=60))
def test_parsing_never_raises(text: str) -> None:
    number = numbers.read_number(text)
    assert number is None or isinstance(number.value, float)
    assert numbers.number_metrics(text, "14").keys() == {"exact", "within_1pct"}
    scoring.scaled_metrics(text, ["14", "15"], "", "multi-span")


MATCHES = [
    ("Answer: 93.86 days", "93.86", 1.0),
    ("93.857", "93.86", 1.0),
    ("93.9", "93.86", 0.0),
    ("30.8", "30.8%", 1.0),
    ("0.308", "30.8%", 1.0),
    ("30.84%", "30.8%", 1.0),
    ("30.86%", "30.8%", 0.0),
    ("$1,577 million", "$1577.00", 1.0),
    ("$8,738 million", "$8.7 billion", 1.0),
    ("$8,662 million", "$8.7 billion", 1.0),
    ("$8,662 million", "$8.70 billion", 0.0),
    ("30.8 million", "30.8%", 0.0),
    ("36%", "36%. The answer here assumes a year that ends in January.", 1.0),
    ("<think>12</think> Answer: 77.78", "77.78", 1.0),
    ("I do not know", "77.78", 0.0),
    ("Yes", "Yes", None),
    ("87%", "87% of the liability is related to employees.", None),
    ("2,018", "Adj. EBITDA was $2,018mn in FY 2023", None),
]


@pytest.mark.parametrize(("output", "gold", "match"), MATCHES)
def test_figures_match_at_the_printed_precision_of_the_gold(output: str, gold: str, match: float | None) -> None:
    assert numbers.number_match(output, gold) == match


NUMBER_SCORES = [
    ("1.42403", "1.42403", 1.0, 1.0),
    ("1.424031", "1.42403", 1.0, 1.0),
    ("1.42404", "1.42403", 0.0, 1.0),
    ("1.41", "1.42403", 0.0, 1.0),
    ("1.40", "1.42403", 0.0, 0.0),
    ("14.123%", "0.14123", 1.0, 1.0),
    ("14%", "0.14123", 0.0, 1.0),
    ("14.123", "0.14123", 0.0, 0.0),  # a percentage without its sign is a different number
    ("24.69136%", "24.69136", 1.0, 1.0),  # a program that multiplied by 100
    ("$380 million", "380", 1.0, 1.0),
    ("-0.09709", "-0.09709", 1.0, 1.0),
    ("0.09709", "-0.09709", 0.0, 0.0),
    ("(10)", "-10", 1.0, 1.0),
    ("0.001", "0", 0.0, 0.0),
    ("no", "no", 1.0, 1.0),
    ("No, it fell.", "no", 1.0, 1.0),
    ("yes", "no", 0.0, 0.0),
    ("7", "no", 0.0, 0.0),
    ("unknown", "3.5", 0.0, 0.0),
    ("14.12%", "14.1%", 1.0, 1.0),  # a gold in printed form
    ("14.2%", "14.1%", 0.0, 1.0),
]


@pytest.mark.parametrize(("answer", "gold", "exact", "close"), NUMBER_SCORES)
def test_computed_numbers_are_compared_at_five_decimals_and_the_tolerance_is_separate(
    answer: str, gold: str, exact: float, close: float
) -> None:
    assert numbers.number_metrics(answer, gold) == {"exact": exact, "within_1pct": close}


# answer, gold spans, gold scale, answer type -> em, f1, scale
SCALED = [
    ("$1,496.5 million", ["$1,496.5"], "million", "span", (1.0, 1.0, 1.0)),
    ("1,496.5 million", ["$1,496.5"], "million", "span", (1.0, 1.0, 1.0)),
    ("1,496.5", ["$1,496.5"], "million", "span", (0.0, 0.0, 0.0)),  # the scale is part of the answer
    ("1,496.5 thousand", ["$1,496.5"], "million", "span", (0.0, 0.0, 0.0)),
    ("$1,496,500,000", ["$1,496.5"], "million", "span", (1.0, 1.0, 0.0)),  # equal value, different scale
    ("1.4965 billion", ["$1,496.5"], "million", "span", (0.0, 0.0, 0.0)),  # 1.4965 is rounded before scaling
    ("Sales were $1,496.5 million.", ["$1,496.5"], "million", "span", (1.0, 1.0, 1.0)),
    ("-12.6 million", ["-12.6"], "million", "arithmetic", (1.0, 1.0, 1.0)),
    ("(12.6) million", ["-12.6"], "million", "arithmetic", (1.0, 1.0, 1.0)),
    ("12.6 million", ["-12.6"], "million", "arithmetic", (0.0, 0.0, 1.0)),
    ("-12.604 million", ["-12.6"], "million", "arithmetic", (1.0, 1.0, 1.0)),
    ("-22.22%", ["-22.22"], "percent", "arithmetic", (1.0, 1.0, 1.0)),
    ("-22.22 percent", ["-22.22"], "percent", "arithmetic", (1.0, 1.0, 1.0)),
    ("-0.2222", ["-22.22"], "percent", "arithmetic", (1.0, 1.0, 0.0)),  # a fraction, by the published rule
    ("-22.22", ["-22.22"], "percent", "arithmetic", (0.0, 0.0, 0.0)),
    ("-22%", ["-22.22"], "percent", "arithmetic", (0.0, 0.0, 1.0)),
    ("4", ["4"], "", "count", (1.0, 1.0, 1.0)),
    ("4 million", ["4"], "", "count", (0.0, 0.0, 0.0)),
    ("5 of them", ["4"], "", "count", (0.0, 0.0, 1.0)),  # no partial credit for a count
    ("2019", ["2019"], "", "span", (1.0, 1.0, 1.0)),
    ("The fixed-price type", ["fixed-price type"], "", "span", (1.0, 1.0, 1.0)),
    ("fixed-price contracts", ["fixed-price type"], "", "span", (0.0, 0.5, 1.0)),
    ("red red red blue", ["red green"], "", "span", (0.0, 0.5, 1.0)),  # each word counts once
    ("S$1.75 billion", ["S$1.75 billion"], "", "span", (1.0, 1.0, 1.0)),
    ("2018; 2019", ["2019", "2018"], "", "multi-span", (1.0, 1.0, 1.0)),
    ("2019, 2018 and 2017", ["2019", "2018", "2017"], "", "multi-span", (1.0, 1.0, 1.0)),
    ("2019", ["2019", "2018"], "", "multi-span", (0.0, 0.67, 1.0)),
    ("2019; 2019", ["2019", "2018"], "", "multi-span", (0.0, 0.67, 1.0)),
    ("77%; 23%", ["23%", "77%"], "", "multi-span", (1.0, 1.0, 1.0)),
    ("$1,073.3; $1,095.0 million", ["$1,073.3", "$1,095.0"], "million", "multi-span", (1.0, 1.0, 1.0)),
    ("$1,073.3 million and $1,095.0 million", ["$1,073.3", "$1,095.0"], "million", "multi-span", (1.0, 1.0, 1.0)),
    ("$1,073.3; $1,095.0", ["$1,073.3", "$1,095.0"], "million", "multi-span", (0.0, 0.0, 0.0)),
    (
        "fees, incentives and other benefits",
        ["Fees", "Incentives", "Other benefits"],
        "",
        "multi-span",
        (1.0, 1.0, 1.0),
    ),
    ("other; salaries and fees", ["Salaries and fees", "Other"], "", "multi-span", (1.0, 1.0, 1.0)),
    ("", ["4"], "", "count", (0.0, 0.0, 0.0)),
    ("", ["a", "b"], "", "multi-span", (0.0, 0.0, 0.0)),
]


@pytest.mark.parametrize(("answer", "spans", "scale", "kind", "expected"), SCALED)
def test_an_answer_is_scored_with_its_scale(
    answer: str, spans: list[str], scale: str, kind: str, expected: tuple[float, float, float]
) -> None:
    scores = scoring.scaled_metrics(answer, spans, scale, kind)
    assert tuple(scores[name] for name in ("em", "f1", "scale")) == pytest.approx(expected)


def test_every_gold_answer_of_tatqa_scores_one_as_a_reply(data_folder: Path) -> None:
    lines = (data_folder / "tatqa/tatqa_dataset_dev.jsonl").read_text(encoding="utf-8").splitlines()
    scored = 0
    for question in (question for line in lines for question in json.loads(line)["questions"]):
        gold = question["answer"] if isinstance(question["answer"], list) else [question["answer"]]
        spans = [str(span) for span in gold if str(span).strip()]
        reply = _with_scale(spans, question["scale"])
        scores = scoring.scaled_metrics(reply, spans, question["scale"], question["answer_type"])
        assert scores == {"em": 1.0, "f1": 1.0, "scale": 1.0}, reply
        scored += 1
    assert scored == 1668


# process_results


class Response(str):
    """A response of our own model: text with telemetry."""

    meta: dict[str, Any]

    def __new__(cls, text: str, **meta: Any) -> Response:
        response = super().__new__(cls, text)
        response.meta = meta
        return response


def test_numbers_are_scored_after_the_marker_and_replies_without_a_number_are_not_parsed() -> None:
    doc = {"answers": ["0.375"]}
    assert scoring.number_results(doc, ["3 of 8\nAnswer: 37.5%"]) == {
        "exact": 1.0,
        "within_1pct": 1.0,
        "parse_rate": 1.0,
    }
    assert scoring.number_results(doc, ["0.375"]) == {"exact": 1.0, "within_1pct": 1.0, "parse_rate": 0.0}
    assert scoring.number_results(doc, ["Answer: I cannot tell"])["parse_rate"] == 0.0


def test_a_failed_sample_scores_zero_on_all_metrics() -> None:
    failed = Response("Answer: 4", status="error", kv={})
    doc = {"answers": ["4"], "spans": ["4"], "scale": "", "answer_type": "count"}
    for results in (scoring.number_results, scoring.scaled_results, scoring.judged_results):
        metrics = results(doc, [failed])
        assert {value for name, value in metrics.items() if not name.startswith("kv")} == {0.0}
        assert metrics["kv"]["status"] == "error"


def test_an_answer_with_a_scale_also_has_subem() -> None:
    doc = {"answers": ["12.6 million"], "spans": ["12.6"], "scale": "million", "answer_type": "arithmetic"}
    metrics = scoring.scaled_results(doc, ["Answer: $12.6 million"])
    assert metrics == {"em": 1.0, "f1": 1.0, "scale": 1.0, "subem": 1.0, "parse_rate": 1.0}


def test_a_judged_answer_is_the_whole_reply_without_a_marker() -> None:
    doc = {"answers": ['{"high": [], "low": ["Acme Inc."]}']}
    metrics = scoring.judged_results(doc, [Response('<think>high?</think>{"high": [], "low": ["Acme Inc."]}', kv={})])
    assert (metrics["f1"], metrics["subem"], metrics["em"], metrics["parse_rate"]) == (1.0, 1.0, 1.0, 1.0)
    assert metrics["kv"]["status"] == "ok"
    assert scoring.judged_results(doc, [Response("", kv={})])["kv"]["status"] == "wrong_format"


def test_short_answers_compare_figures_only_if_the_gold_is_a_number() -> None:
    assert shared.short_results({"answers": ["30.8%"]}, ["Answer: it grew 30.8%"])["number"] == 1.0
    assert shared.short_results({"answers": ["30.8%"]}, ["Answer: it grew"])["number"] == 0.0
    assert shared.short_results({"answers": ["Customer deposits"]}, ["Answer: 30.8%"])["number"] is None
