import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib as mpl
import pytest

from hardware.errors import StorageError
from hardware.graph.channel_map import ChannelMap, FrozenAxis, Group
from hardware.latency.layers import Layer, LayerKey
from pipeline.channels import counts as counting
from pipeline.records import Choice, Form
from pipeline.report import figures as drawing
from pipeline.report.inspection import Inspection, write_inspection
from pipeline.report.report import LayerRow, write_report

VOID = {"meta", "link", "br", "img", "hr", "input"}
NAN = float("nan")


class Page(HTMLParser):
    """A page's texts, ids and links; refuses tags that are not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.pieces, self.rows = [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    @property
    def text(self):
        return " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.pieces.append(data)
        if "tr" in self.open:
            self.rows[-1].append(data)

    def row(self, start):
        """Return the text of the one table row that starts so."""
        texts = [" ".join(" ".join(pieces).split()) for pieces in self.rows]
        (found,) = [text for text in texts if text.startswith(start)]
        return found

    def values(self, attribute):
        return [value for _, name, value in self.attributes if name == attribute]


def written(report, tmp_path):
    path = tmp_path / "report.html"
    write_report(report, path)
    return path.read_text()


@pytest.fixture(scope="module")
def html(report, tmp_path_factory):
    return written(report, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_verdict_stands_at_the_top_with_its_measured_figures(page):
    top = page.text[: page.text.index("The layers, each measured")]

    assert "Passed. 0.4120 → 0.2410 ms, 1.71× as fast, accuracy 91.73 → 91.40 %" in top
    assert "0.4105 to 0.4138 ms before, 0.2402 to 0.2419 ms after" in top
    assert "0.2472 ms 60.0 % of the latency before" in top  # 0.2472 / 0.4120
    assert "−0.33 points on 10,000 test images" in top
    assert "Intel Xeon Platinum 8481C with OpenVINO, fp32, batch 1, 1 thread" in top


def test_every_limit_is_listed_with_whether_it_held(report, tmp_path):
    missed = ("MISSED: latency 0.2613 ms, target 0.2472 ms", *report.verdict.reasons[1:])
    verdict = report.verdict.model_copy(update={"passed": False, "reasons": missed})

    text = Page(written(replace(report, verdict=verdict), tmp_path)).text

    assert "Missed. " in text
    assert "missed latency 0.2613 ms, target 0.2472 ms" in text
    assert "held parity 2.1e-06, allowed 1.0e-03" in text


def test_every_group_has_a_row_with_widths_floor_and_reason(page, plan):
    for choice in plan.choices:
        name = choice.group.removesuffix(".weight")
        row = page.row(f"{name} {choice.full} " if choice.detail else f"{name} 4 coupled layers")

        assert all(part in row for part in choice.reason.split(": "))
        assert choice.detail in row
        assert str(choice.width) in row.split()
        assert choice.reason.startswith("frozen") or str(choice.floor) in row.split()


def test_a_floor_says_what_was_measured_for_it(page, floors):
    for floor in floors:
        assert floor.detail in page.row(f"{floor.group.removesuffix('.weight')} {floor.width}")


def test_emptied_branches_are_named(page):
    assert "2 of 7 residual branches were emptied" in page.text
    assert "left: layer1.1 , layer2.2 ." in page.text


def test_the_layers_table_tells_channels_multiply_adds_and_latency(page):
    # 9 * 16 * 16 * 32 * 32 multiply-adds, 7 us and one more per 150,000 of them; half are left
    assert page.row("layer1.0.conv1 Conv") == (
        "layer1.0.conv1 Conv 16 16 → 8 2.36 M → 1.18 M 22.7 → 14.9 measured"
    )
    assert page.row("layer3.2.conv2 Conv").endswith("estimated")
    assert page.row("layer1.1.conv1 Conv").endswith("emptied")


def test_the_loop_shows_predicted_against_measured(page):
    # 0.2398 / 0.2512 - 1, and 0.2512 / 0.2472
    assert page.row("1 0.2398") == "1 0.2398 ms 0.2512 ms −4.54 % 101.6 %"
    assert "No plan can score more than 0.042 % better" in page.text


def test_frozen_channels_and_unknown_operators_are_explained(page, channels):
    assert page.row("network output") == "network output 10 fc"
    assert page.row(channels.groups[0].frozen).endswith("16 conv1")
    assert "com.vendor::FancyPool (2×)" in page.text


def test_sections_come_in_the_order_an_engineer_asks_for_them(page):
    ids = [value for tag, name, value in page.attributes if (tag, name) == ("section", "id")]

    assert ids == ["time", "pruned", "plan", "layers", "training", "frozen", "proof", "repeat"]


def test_the_recipe_and_the_command_are_verbatim(report, page):
    assert report.recipe_yaml in "".join(page.pieces)
    assert report.command in "".join(page.pieces)


def test_ids_are_unique_and_every_link_inside_the_page_arrives(page):
    ids = page.values("id")
    links = [link for link in page.values("href") + page.values("xlink:href") if link[0] == "#"]

    assert len(ids) == len(set(ids))
    assert links and {link[1:] for link in links} <= set(ids)
    assert set(page.values("aria-labelledby")) <= set(ids)


def test_the_page_loads_nothing_and_needs_no_script(html, page):
    assert "script" not in page.tags
    assert not page.values("src")
    assert all(link.startswith(("#", "data:")) for link in page.values("href"))
    assert "://" not in html and "@import" not in html
    assert all(place.startswith("#") for place in re.findall(r"url\(([^)]*)", html))


def test_every_figure_says_in_words_what_it_shows(page):
    figures = [tag for tag in page.tags if tag == "svg"]
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]

    assert len(figures) == len(labels) == 6  # three figures, each for wide and narrow screens
    assert any("from 85.80 % to 91.34 %" in label.replace("\xa0", " ") for label in labels)


def test_texts_of_the_user_are_escaped(report, tmp_path):
    row = replace(report.layers[0], layer="a<b> & $c$ \\frac 層")
    title = '<script>alert("x")</script>'

    html = written(replace(report, title=title, layers=(row, *report.layers[1:])), tmp_path)
    page = Page(html)

    assert "script" not in page.tags
    assert title in page.text
    assert "a<b> & $c$ \\frac 層" in page.text


def test_what_is_not_a_number_is_never_printed_as_one(report, tmp_path):
    epoch = report.epochs[0].model_copy(update={"val_loss": NAN, "val_accuracy_pct": NAN})
    verdict = report.verdict.model_copy(
        update={
            "predicted_ms": NAN,
            "prediction_error_pct": NAN,
            "measured_interval_ms": (NAN, NAN),
            "accuracy_pct": NAN,
            "parity": NAN,
        }
    )
    row = replace(report.layers[0], before_us=NAN)
    plan = report.plan.model_copy(update={"gap": float("inf")})
    broken = replace(
        report, epochs=(epoch,), verdict=verdict, plan=plan, layers=(row, *report.layers[1:])
    )

    html = written(broken, tmp_path)

    assert not re.search(r"\b(nan|inf)\b", html, flags=re.IGNORECASE)
    assert "unknown" in Page(html).text


def test_a_run_without_training_and_without_rounds_is_told_as_such(report, tmp_path):
    bare = replace(
        report,
        epochs=(),
        loop=(),
        floors=(),
        layers=(),
        channels=ChannelMap(groups=()),
        conditions={},
    )

    text = Page(written(bare, tmp_path)).text

    assert "was not fine-tuned" in text
    assert "Nothing: every channel of every layer may be pruned." in text


def test_the_same_records_give_the_same_page(html, report, tmp_path):
    assert written(report, tmp_path) == html


def test_a_page_for_a_network_like_resnet_50_stays_below_a_megabyte(report, tmp_path):
    rows = tuple(
        replace(row, layer=f"{row.layer}.{copy}") for copy in range(5) for row in report.layers
    )
    choices = tuple(
        choice.model_copy(update={"group": f"{choice.group}.{copy}"})
        for copy in range(8)
        for choice in report.plan.choices
    )
    plan = report.plan.model_copy(update={"choices": choices})

    html = written(replace(report, layers=rows, plan=plan), tmp_path)

    assert len(rows) > 100 and len(html.encode()) < 1_000_000


def test_drawing_leaves_the_settings_of_matplotlib_alone():
    # Read as a plain dict: asking for the backend would make matplotlib choose one.
    before = dict(dict.items(mpl.rcParams))

    drawing.draw("x", "label", lambda width: drawing.paired_bars([], "us", width))

    assert dict(dict.items(mpl.rcParams)) == before


def test_colours_of_figures_are_those_of_the_page():
    bars = [drawing.Bar(name="conv", before=2.0, after=1.0, note="emptied", measured=False)]

    figure = drawing.draw("x", "label", lambda width: drawing.paired_bars(bars, "us", width))

    assert "var(--before)" in figure.wide and "var(--after)" in figure.narrow
    assert "#0a0b0" not in figure.wide + figure.narrow
    assert "emptied" in figure.wide


def test_a_page_that_cannot_be_written_is_a_storage_error(report, tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(StorageError, match="Cannot write"):
        write_report(report, tmp_path / "file" / "report.html")


def test_removed_filters_are_counted_over_all_layers(channels, plan):
    # The stream has four producers of 16; inner groups 3 * (16 + 32 + 64); the frozen head has 10.
    # Kept of the inner ones: 8 + 0 + 16 + 32 + 16 + 0 + 48 + 32 + 16 = 168 of 336. The emptied
    # branch layer1.1 takes its 16 filters of the stream along.
    assert counting.filters_removed(channels, plan) == (336 - 168 + 16, 4 * 16 + 336 + 10)


def test_prunable_shares_count_channels_and_multiply_adds(channels, layers):
    shares = counting.prunable_shares(channels, layers)

    # The inner convolutions produce 336 of the 16 + 2 * 336 channels, and each of the 18
    # convolutions after the first reads or produces them.
    assert shares.channels == pytest.approx(336 / (16 + 2 * 336))
    total = sum(layer.macs for layer in layers)
    assert shares.macs == pytest.approx(1 - 9 * 3 * 16 * 32 * 32 / total)


def test_multiply_adds_between_fixed_channels_are_not_prunable():
    half = ChannelMap(groups=(Group(name="g", width=4, slices=()),))
    key = LayerKey(operator="Conv", in_channels=8, out_channels=8)
    parts = {"in_parts": {"g": 1}, "in_fixed": 4, "out_parts": {"g": 1}, "out_fixed": 4}
    dense = Layer(name="dense", key=key, **parts)
    depthwise = replace(dense, key=LayerKey(**dict(key) | {"conv_groups": 8, "group_channels": 1}))

    assert counting.prunable_macs(dense, half) == 64 - 4 * 4
    assert counting.prunable_macs(depthwise, half) == 4


def test_frozen_channels_are_summed_by_reason():
    channels = ChannelMap(
        groups=(Group(name="a.weight", width=4, slices=(), frozen="why"),),
        frozen=(
            FrozenAxis(parameter="b.weight", channels=3, reason="why"),
            FrozenAxis(parameter="c.weight", channels=5, reason="other"),
        ),
    )

    rows = counting.frozen_rows(channels)

    assert [(row.reason, row.channels, row.places) for row in rows] == [
        ("why", 7, ("a", "b")),
        ("other", 5, ("c",)),
    ]


def test_a_branch_counts_as_emptied_only_when_all_its_groups_are(channels, plan):
    names = [branch.name for branch in counting.emptied_branches(channels, plan)]

    assert names == ["layer1.1", "layer2.2"]


def test_an_inspection_tells_groups_coupled_layers_and_what_is_frozen(
    channels, layers, floors, tmp_path
):
    path = tmp_path / "inspection.html"

    found = Inspection(
        title="<ResNet-20>",
        channels=channels,
        layers=layers,
        floors=floors,
        form=Form(taken="class", reason="as asked", graph_share=0.5, class_share=0.25),
    )

    write_inspection(found, path)
    page = Page(path.read_text())

    assert "48.8 % of all convolution channels can be pruned" in page.text  # 336 of 688
    assert "<ResNet-20>" in page.text and "Class form: as asked." in page.text
    assert page.row("layer3.0.conv1 64 48") == (
        "layer3.0.conv1 64 48 0.25 – yes layer3.0.conv1 layer3.0.conv2"
    )
    stream = page.row("conv1 16 –")
    assert f"no: {channels.groups[0].frozen} conv1 , layer1.0.conv2 ," in stream
    assert stream.endswith("layer1.2.conv2")
    assert "9 of 10" in page.text and "7 can be emptied as a whole" in page.text


def test_an_unknown_reason_is_shown_as_it_is(report, tmp_path):
    choice = Choice(
        group="g.weight", full=8, floor=2, width=4, reason="by: hand", detail="as asked"
    )
    plan = report.plan.model_copy(update={"choices": (choice,)})

    row = Page(written(replace(report, plan=plan), tmp_path)).row("g 8")

    assert "by: hand as asked" in row


def test_a_layer_that_got_slower_is_drawn_beyond_its_former_bar():
    row = LayerRow(
        layer="conv",
        operator="Conv",
        in_before=3,
        in_after=3,
        out_before=8,
        out_after=8,
        macs_before=1,
        macs_after=1,
        before_us=1.0,
        after_us=2.0,
        measured=True,
    )
    bar = drawing.Bar(name=row.layer, before=row.before_us, after=row.after_us)

    axes = drawing.paired_bars([bar], "us", drawing.WIDE_PX).axes[0]

    assert axes.get_xlim()[1] > 2.0


def test_epochs_of_several_rounds_are_told_apart(report, page, tmp_path):
    first = report.epochs[:2]
    again = tuple(epoch.model_copy(update={"seconds": 60.0}) for epoch in first)
    twice = Page(written(replace(report, rounds=2, epochs=(*first, *again)), tmp_path))

    assert "in 2 rounds. The plan joins them" in twice.text
    assert "the gap, the largest of all rounds" in twice.text
    assert "plan again; every round has its own target" in twice.text
    assert twice.row("1.2 ").endswith("31.5 s") and twice.row("2.1 ").endswith("1 min 00 s")
    assert "Round.epoch" in twice.text and "that of the last one is delivered" in twice.text
    assert "rounds" not in page.text


def test_sparsifying_is_shown_where_there_was_some(report, tmp_path):
    write_report(report, tmp_path / "without.html")
    sparse = replace(report, sparse_epochs=report.epochs[:2], sparsified="scp")
    write_report(sparse, tmp_path / "with.html")

    assert "sparsifying" not in (tmp_path / "without.html").read_text()
    page = (tmp_path / "with.html").read_text()
    assert "2 epochs of\nsoft masks (SCP)" in page and page.count("Every epoch") == 2
