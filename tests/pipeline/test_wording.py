import pytest

from pipeline import wording
from pipeline.records import Form


def plain(text):
    return text.replace("\xa0", " ")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.24123, "0.2412 ms"), (2.4123, "2.412 ms"), (24.123, "24.12 ms"), (2412.3, "2,412.3 ms")],
)
def test_latencies_keep_the_digits_that_matter(value, text):
    assert plain(wording.ms(value)) == text


def test_a_pair_of_latencies_shares_unit_and_digits():
    assert plain(wording.ms_pair((12.3456, 8.7654), "→")) == "12.346 → 8.765 ms"


def test_counts_are_told_in_thousands_millions_and_billions():
    assert [plain(wording.many(value)) for value in (999, 1500, 40_813_184, 4.1e9)] == [
        "999",
        "1.5 k",
        "40.8 M",
        "4.1 G",
    ]


def test_durations_are_told_as_people_say_them():
    assert [plain(wording.duration(seconds)) for seconds in (1.25, 61, 3720)] == [
        "1.2 s",
        "1 min 01 s",
        "1 h 02 min",
    ]


def test_a_change_has_a_sign():
    assert plain(wording.change((200, 150))) == "\N{MINUS SIGN}25.0 %"
    assert wording.change((0, 1)) == "unknown"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_unknown(value):
    formats = (
        wording.ms,
        wording.us,
        wording.pct,
        wording.share,
        wording.signed,
        wording.times,
        wording.number,
        wording.tiny,
        wording.many,
        wording.duration,
    )

    assert {show(value) for show in formats} == {"unknown"}


def test_a_limit_says_whether_it_held():
    assert wording.limit("ok: parity") == (True, "parity")
    assert wording.limit("MISSED: parity") == (False, "parity")
    assert wording.limit("parity") == (None, "parity")


def test_a_form_is_told_with_its_reason_and_what_each_could_lose():
    found = Form(taken="graph", reason="as asked", graph_share=0.938, class_share=0.721)

    assert plain(wording.form(found)) == (
        "Graph form: as asked. Of the convolution channels the graph can lose 93.8 %, "
        "the class 72.1 %."
    )
