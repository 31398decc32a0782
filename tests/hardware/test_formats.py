"""What CI systems are told, checked against what their schemas ask for."""

import re
from xml.etree import ElementTree

import pytest

from hardware.comparing import Verdict
from hardware.formats import annotation, annotations, junit, junit_refused, markdown
from hardware.measuring import Subject
from hardware.outcomes import Checked, Figures, Outcome, Row

# JUnit.xsd: what each element must carry, and the order of a suite's children.
REQUIRED = {
    "testsuite": {
        *("name", "timestamp", "hostname", "tests", "failures", "errors", "time"),
        *("id", "package"),
    },
    "testcase": {"name", "classname", "time"},
    "failure": {"type"},
    "error": {"type"},
    "skipped": set(),
}
COMMAND = re.compile(r"::(notice|warning|error) file=([^:,]*),title=([^:,]*)::([^\r\n]*)")


def outcome(*verdicts: Verdict, path: str = "models/net.onnx") -> Outcome:
    subject = Subject(
        path=path, sha256="0", runtime="ort", version="1", precision="fp32", threads=1, inputs=()
    )
    figures = Figures(
        p50_ms=2.0, p90_ms=2.5, p99_ms=3.0, p50_low_ms=1.9, p50_high_ms=2.1, load_ms=20.0,
        first_ms=4.0, samples=100, loads=10,
    )  # fmt: skip
    checks = tuple(
        Checked(
            metric="p50", limit_pct=2, verdict=verdict, slower_pct=5, low_pct=4, high_pct=6,
            detectable_pct=3, units=20,
        )
        for verdict in verdicts
    )  # fmt: skip
    return Outcome(
        mode="paired", started="2026-01-02T03:04:05+00:00", seconds=8, device="Bench | 1",
        fingerprint="f", confidence_pct=99, foreign_cores=0, is_complete=True,
        verdict=verdicts[0] if verdicts else None, baseline=None,
        rows=(Row(subject=subject, figures=figures, checks=checks),),
    )  # fmt: skip


def validated(text: str) -> ElementTree.Element:
    """Hold a document to the schema's rules and return its suite."""
    root = ElementTree.fromstring(text.encode())
    assert root.tag == "testsuites" and not root.attrib
    [suite] = root
    for element in suite.iter():
        assert REQUIRED.get(element.tag, set()) <= element.attrib.keys()
    order = [child.tag for child in suite]
    cases = suite.findall("testcase")
    assert order == ["properties", *["testcase"] * len(cases), "system-out", "system-err"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.attrib["timestamp"])
    for count, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        assert int(suite.attrib[count]) == sum(case.find(tag) is not None for case in cases)
    assert int(suite.attrib["tests"]) == len(cases)
    assert all(float(case.attrib["time"]) >= 0 and len(case) <= 1 for case in cases)
    return suite


def test_junit_fits_its_schema_and_only_a_regression_fails():
    suite = validated(junit(outcome(Verdict.REGRESSION, Verdict.PASS, Verdict.INCONCLUSIVE)))

    first, second, third = suite.findall("testcase")
    assert "p50 +5.0 %" in first.find("failure").attrib["message"]
    assert len(second) == 0
    assert third.find("skipped") is not None


def test_junit_of_a_bench_without_a_baseline_has_a_case():
    [case] = validated(junit(outcome())).findall("testcase")

    assert case.attrib["name"] == "measured"


def test_junit_of_what_is_not_comparable_is_an_error():
    suite = validated(junit_refused(["a.onnx"], "another <device> & more", "2026-01-02T03:04:05Z"))

    assert suite.find("testcase/error").attrib["message"] == "another <device> & more"


@pytest.mark.parametrize(
    ("verdict", "level"),
    [
        (Verdict.PASS, "notice"),
        (Verdict.INCONCLUSIVE, "warning"),
        (Verdict.REGRESSION, "error"),
    ],
)
def test_annotations_are_one_command_per_check(verdict, level):
    [line] = annotations(outcome(verdict))

    found = COMMAND.fullmatch(line)
    assert found is not None
    assert found[1] == level
    assert found[2] == "models/net.onnx"
    assert "+5.0 %25" in found[4]


def test_annotations_escape_what_would_end_them():
    line = annotation("error", "a: b, 50%", "odd,\nname.onnx", "100%\r\nsecond: line, whole")

    assert COMMAND.fullmatch(line)
    assert line == (
        "::error file=odd%2C%0Aname.onnx,title=a%3A b%2C 50%25::100%25%0D%0Asecond: line, whole"
    )


def test_markdown_is_a_table_that_no_name_breaks():
    text = markdown(outcome(Verdict.REGRESSION, path="a|b.onnx"))

    assert text.startswith("### espalier bench: regression\n")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {8}
    assert r"a\|b.onnx" in text and r"Bench \| 1" in text
