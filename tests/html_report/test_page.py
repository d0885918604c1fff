"""The page: whole, closed to the outside, readable without its drawings."""

import itertools
import re
from html.parser import HTMLParser

import pytest
from results import make_result, write_sweep

import vitcompress.html_report as html_report
from vitcompress.errors import ConfigError, InputError
from vitcompress.html_report import to_html, write_report
from vitcompress.sweep import read_sweep

#: Elements that have no end.
VOID = {"meta", "br", "hr", "img", "link", "input"}
#: Attributes by which a page fetches something.
LOADING = {"src", "srcset", "href", "data", "poster", "action", "background", "ping"}


class Outline(HTMLParser):
    """The elements of a page in order, and what is said in them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open, self.unbalanced = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attrs for name, attrs, _ in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(swept):
    return to_html(swept)


@pytest.fixture(scope="module")
def outline(page):
    return Outline(page)


def test_every_element_is_closed(outline):
    assert outline.unbalanced == []
    assert outline.open == []


def test_nothing_is_fetched_and_nothing_runs(outline, page):
    attributes = [pair for _, attrs, _ in outline.elements for pair in attrs.items()]

    assert outline.all("script") == outline.all("link") == outline.all("img") == []
    assert outline.all("iframe") == outline.all("object") == outline.all("base") == []
    assert {value[:1] for name, value in attributes if name in LOADING} <= {"#"}
    assert not [name for name, _ in attributes if name.startswith("on")]
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_page_forbids_what_it_does_not_need(outline):
    (policy,) = [m for m in outline.all("meta") if "http-equiv" in m]

    assert policy == {
        "http-equiv": "Content-Security-Policy",
        "content": "default-src 'none'; style-src 'unsafe-inline'",
    }


def test_identifiers_are_unique_and_references_lead_somewhere(outline, page):
    identifiers = [attrs["id"] for _, attrs, _ in outline.elements if "id" in attrs]
    references = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)

    assert len(identifiers) == len(set(identifiers))
    assert {a or b for a, b in references} <= set(identifiers)
    assert len(references) > 10
    for svg in outline.all("svg"):
        assert set(svg["aria-labelledby"].split()) <= set(identifiers)


def test_every_figure_has_a_name_and_a_table(outline, page):
    figures = page.split("<figure>")[1:]

    # Two curves, the strips, and two for each of the six cells.
    assert len(figures) == len(outline.all("svg")) == 3 + 2 * 6
    for figure in figures:
        inside = figure.split("</figure>")[0]
        assert inside.count("<svg") == 1
        assert re.search(r"<title[^>]*>[^<]+</title><desc[^>]*>[^<]+</desc>", inside)
        table = inside.split("</svg>")[1]
        assert table.count("<details><summary>") == 1
        assert table.count("<caption>") == 1
        assert len(re.findall("<tr><td", table)) >= 1
    assert all(svg["role"] == "img" for svg in outline.all("svg"))


def test_tables_that_scroll_can_be_reached_and_named(outline):
    regions = [attrs for attrs in outline.all("div") if attrs.get("class") == "scroll"]

    assert len(regions) == len(outline.all("table"))
    for region in regions:
        assert (region["tabindex"], region["role"]) == ("0", "region")
        assert region["aria-label"]


def test_headings_do_not_skip_a_level(outline):
    levels = [int(tag[1]) for tag, _, _ in outline.elements if re.fullmatch("h[1-6]", tag)]

    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_colours_of_drawings_follow_the_page(outline, page):
    styles = [
        attrs.get("style", "") for _, attrs, around in outline.elements if "svg" in around
    ]
    defined = set(re.findall(r"(--[\w-]+):", page.split("</style>")[0]))

    assert "#0102" not in page
    assert not [style for style in styles if "#000" in style or "#fff" in style]
    assert set(re.findall(r"var\((--[\w-]+)\)", page)) <= defined
    assert "prefers-color-scheme: dark" in page
    assert any("currentColor" in style for style in styles)
    dark = page.split("prefers-color-scheme: dark")[1].split("</style>")[0]
    assert defined == set(re.findall(r"(--[\w-]+):", dark))


def test_text_of_drawings_stays_text(page):
    drawings = " ".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))

    for words in ("W4A4", "repq_vit", "deploy", "Pareto front", "blocks.2.fc2:input, 7.0 dB"):
        assert words in drawings


def test_page_fits_a_phone(outline, page):
    (viewport,) = [m for m in outline.all("meta") if m.get("name") == "viewport"]

    assert viewport["content"] == "width=device-width, initial-scale=1"
    assert all("width" not in svg for svg in outline.all("svg"))


def test_page_says_what_was_measured(outline):
    said = " ".join(text for _, text in outline.texts)

    for words in (
        "200 images (200 images), seeds 0, 1",
        "97.50 (97.00 to 98.00)",  # repq_vit W8A8: 4 and 6 of 200 images are lost
        "Pareto front",
        "attach: skipped by a rule",
        "blocks.0.attn:probs",
        "pos_embed",
        "d1d1d1d1",
        "vitcompress sweep toy.pt",
        "2.14.1",
        "ValueError: <no>",
        "name: repq_vit",
    ):
        assert words in said


def test_cell_with_a_failed_seed_is_shown_by_the_others(outline):
    said = " ".join(text for _, text in outline.texts)

    assert "Cells that were asked for and have no result" in said
    assert "deploy W4A8 94.50 90.3 to 97.0" in said  # seed 0 alone
    assert "repq_vit W4A8 94.50 (94.00 to 95.00)" in said


def test_names_stay_text(named):
    page = to_html(named)
    outline = Outline(page)
    said = " ".join(text for _, text in outline.texts)

    assert outline.unbalanced == []
    assert outline.all("script") == outline.all("img") == outline.all("b") == []
    assert not [name for _, attrs, _ in outline.elements for name in attrs if name[:2] == "on"]
    assert len(outline.all("title")) == 1 + len(outline.all("svg"))
    assert "<script>alert('m')</script>" in said
    assert "<img src=x onerror=alert(1)>$a_" in said
    assert '"><svg onload=alert(1)>&amp;' in said
    assert "</pre><script>alert('r')</script>" in said
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", page)


def test_same_sweep_gives_the_same_page(named):
    assert to_html(named) == to_html(named)


def test_without_labels_agreement_is_drawn(tmp_path):
    results = [make_result(labelled=(), wrong=range(n), scheme=s) for n, s in ((2, "W8A8"),)]
    sweep = read_sweep(write_sweep(tmp_path / "sweep", results))

    page = to_html(sweep)

    assert "agreement with float, %" in page
    assert "top-1 accuracy" not in page
    assert "top-1 9" not in page


def test_sites_without_noise_and_names_of_any_script_are_drawn(tmp_path):
    sites = [
        site.model_copy(update={"sqnr_db": float("inf"), "site": f"層.{number}.😀:input"})
        for number, site in enumerate(make_result().report.sites)
    ]
    sweep = read_sweep(write_sweep(tmp_path / "sweep", [make_result(sites=sites, model="層")]))

    page = to_html(sweep)

    assert "層.0.😀:input" in page


def test_network_without_sites_is_drawn(tmp_path):
    sweep = read_sweep(write_sweep(tmp_path / "sweep", [make_result(sites=())]))

    assert to_html(sweep).count("<figure>") == 4


def test_analyses_are_shown(tmp_path, analysis):
    sweep = read_sweep(write_sweep(tmp_path / "sweep", [make_result()]))
    other = analysis.model_copy(update={"mode": "except", "not_measured": (), "by": "block"})

    outline = Outline(to_html(sweep, [analysis, other]))

    said = " ".join(text for _, text in outline.texts)
    identifiers = [attrs["id"] for _, attrs, _ in outline.elements if "id" in attrs]
    assert outline.unbalanced == []
    assert outline.all("i") == []
    assert len(identifiers) == len(set(identifiers))
    for words in (
        "What does the harm",
        "repq_vit-w4a4, site by site",
        "Each unit quantized alone; 2 images; not measured: 1. All quantized: KL 1.75",
        "repq_vit-w4a4, block by block",
        "Everything quantized but one unit",
        "blocks.1.fc2:input",
        "<i>blocks.1.fc1</i>:input",
    ):
        assert words in said


def test_analysis_of_another_model_is_refused(swept, analysis):
    other = analysis.model_copy(update={"model_digest": "ab" * 32})

    with pytest.raises(
        InputError, match=r"about another model \(digest abababababab, expected"
    ):
        to_html(swept, [other])


def test_files_are_written_whole(tmp_path):
    sweep = read_sweep(write_sweep(tmp_path / "sweep", [make_result()]))
    output, markdown, csv = (
        tmp_path / "out" / f"report.{end}" for end in ("html", "md", "csv")
    )

    write_report(sweep, output, markdown=markdown, csv=csv)

    assert output.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert markdown.read_text(encoding="utf-8").startswith("# toy: accuracy against bit-width")
    assert csv.read_text(encoding="utf-8").startswith("model,recipe,scheme,seed,")


def test_missing_libraries_are_named(swept, tmp_path, monkeypatch):
    found = html_report.importlib.util.find_spec
    monkeypatch.setattr(
        html_report.importlib.util,
        "find_spec",
        lambda name: None if name == "matplotlib" else found(name),
    )

    with pytest.raises(
        ConfigError, match=r"matplotlib not installed; pip install 'vitcompress"
    ):
        write_report(swept, tmp_path / "report.html")

    assert list(tmp_path.iterdir()) == []


def test_sweep_without_results_is_refused(tmp_path):
    sweep = read_sweep(write_sweep(tmp_path / "sweep", [make_result()], failed={0: "no"}))

    with pytest.raises(InputError, match="has no results yet; sweep at least one cell"):
        to_html(sweep)
