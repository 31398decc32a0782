from hardware.pages import html_page, legible


def test_labels_are_short_and_have_no_exponent():
    assert [legible(value) for value in (0, 0.01234, 1.234, 99.5, 2711.4)] == [
        "0", "0.0123", "1.23", "99.5", "2,711"
    ]  # fmt: skip


def test_a_title_is_text_and_a_body_is_html():
    text = html_page("Latency on x & y", "<p>10 ms</p>")

    assert "<title>Latency on x &amp; y</title>" in text and "<h1>Latency on x &amp; y</h1>" in text
    assert "<p>10 ms</p>" in text
