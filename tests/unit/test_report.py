"""The report as a browser would read it: whole, safe, self-contained, and true to what it was given."""

import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from diptych.errors import UserError
from diptych.evaluate import report as rp

EVIL = """<script>alert(1)</script>"><img src=x onerror=alert(2)>' & {{ 7*7 }} </style>"""
VOID = {"meta", "img", "br", "line", "use", "path", "link", "input"}


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.tags, self.words, self.open, self.unbalanced = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))

    def with_class(self, name):
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]

    def pictures(self):
        sources = [attrs["src"] for tag, attrs in self.tags if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) for source in sources]


def result(ceiling=True):
    one = {"r@1": 0.621, "r@5": 0.85, "r@10": 0.9, "mean_rank": 4.25, "median_rank": 1.0}
    low = {"r@1": 0.001, "r@5": 0.005, "r@10": 0.01, "mean_rank": 1234.5, "median_rank": 1200.0}
    most = {"r@1": 0.98, "r@5": 1.0, "r@10": 1.0, "mean_rank": 1.1, "median_rank": 1.0}
    made = {
        "protocol": "1 picture : 5 captions, 1000 pictures, top 16 by ITC re-ranked by ITM+ITC",
        "counts": {"pictures": 1000, "texts": 5000},
        "image_to_text": one,
        "text_to_image": one | {"r@1": 0.48},
        "chance": {"image_to_text": low, "text_to_image": low},
        "interval": {way: {"r@1": (0.59, 0.653), "r@5": (0.8, 0.9)} for way in rp.DIRECTIONS},
    }
    return made | ({"ceiling": {"image_to_text": most, "text_to_image": most}} if ceiling else {})


def example(picture=None, right=True, text="a dog", rank=None):
    ranked = [rp.Candidate(f"{text} {i}", 0.5 - i, right if i == 0 else False) for i in range(6)]
    picture = np.full((40, 60, 3), 200, np.uint8) if picture is None else picture
    return rp.Example(picture, "one.png", ranked, [f"{text} 0"], ["a generated dog"], rank)


def full(text="a dog"):
    steps = np.arange(3000)
    return rp.ReportData(
        title=f"Title {text}",
        recipe=text,
        machine=text,
        seconds=3725.0,
        samples=128_000,
        losses={f"ITC {text}": (steps, np.exp(-steps / 500)), "LM": (steps, 1 / (1 + steps))},
        validation={f"i → t {text}": ([0, 10, 20], [0.1, 0.2, 0.345])},
        results=[result(), result()],
        breakdowns={f"By {text}": [{"attribute": text, "pictures": 48, "r@1": 0.4125}]},
        examples=[example(text=text), example(right=False, text=text, rank=1499)],
        score_name="ITM+ITC",
        settings={"train": {"lr": 1e-4, "ema": None, "betas": [0.9, 0.98]}, "name": text},
        fingerprints={text: text},
        next_commands=[(text, text)],
        notes=[text],
    )


def test_it_is_whole_and_reaches_for_nothing_outside_itself(tmp_path):
    page = Page(rp.write_report(tmp_path / "new" / "report.html", full()))
    assert not page.unbalanced and not page.open
    assert "http:" not in page.source and "https:" not in page.source and "@import" not in page.source
    assert not re.search(r"url\((?!#)", page.source)
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "href", "xlink:href", "srcset"):
            assert attrs.get(name, "#").startswith(("#", "data:image/jpeg;base64,"))
        assert not any(name.startswith("on") for name in attrs)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 0
    used = set(re.findall(r"url\(#([^)]+)\)", page.source)) | set(re.findall(r'xlink:href="#([^"]+)"', page.source))
    assert used <= set(ids)
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "prefers-color-scheme: dark" in page.source


def test_everything_given_is_shown(tmp_path):
    text = Page(rp.write_report(tmp_path / "report.html", full())).text
    for shown in (
        "1 h 02 min", "128,000", "62.1 %", "48.0 %", "59.0–65.3", "0.1", "98.0", "1,234.5", "41.2 %",
        "top 16 by ITC re-ranked by ITM+ITC", "among 5,000", "among 1,000", "ITM+ITC score",
        "train.lr=0.0001", "train.ema=null", "train.betas=[0.9, 0.98]", "name=a dog",
        "a generated dog", "the best right one is at rank 1,500", "last 34.5 %", "−0.500",
    ):  # fmt: skip
        assert shown in text, shown
    assert "a dog 4" in text and "a dog 5" not in text  # five candidates, not six


def test_what_a_user_wrote_is_text_and_never_markup(tmp_path):
    plain = Page(rp.write_report(tmp_path / "plain.html", full()))
    evil = Page(rp.write_report(tmp_path / "evil.html", full(EVIL)))
    assert [tag for tag, _ in evil.tags] == [tag for tag, _ in plain.tags]
    assert evil.text.count(EVIL) >= 10
    assert "49" not in evil.text.replace("1499", "")  # no template of theirs was run


def test_right_answers_are_marked_by_more_than_colour(tmp_path):
    page = Page(rp.write_report(tmp_path / "report.html", full()))
    assert len(page.with_class("is-right")) == 1 and len(page.with_class("is-wrong-first")) == 1
    marks = page.text.split("Pictures and what is said of them")[1].split("Right at rank 1")[1]
    assert marks.count("✓") == marks.count("right:") == 1
    assert marks.count("✗") == marks.count("wrong:") == 9
    assert marks.index("✓") < marks.index("Wrong at rank 1")


def test_a_tie_at_the_top_is_not_shown_as_a_success():
    assert example().right and not example(right=False).right
    assert not example(rank=1).right
    assert not rp.Example(None, "", [], []).right


def test_parts_that_are_empty_are_left_out(tmp_path):
    page = Page(rp.write_report(tmp_path / "report.html", rp.ReportData("Only a title")))
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert not {"h2", "table", "img", "svg", "details", "dl"} & {tag for tag, _ in page.tags}


def test_a_result_without_ceiling_chance_or_interval_still_reads(tmp_path):
    bare = {key: value for key, value in result(False).items() if key not in ("chance", "interval", "counts")}
    text = Page(rp.write_report(tmp_path / "report.html", rp.ReportData("t", results=[bare]))).text
    assert "the right caption comes first." in text and "ceiling" not in text and "None" not in text
    assert any("62.1 %" in line for line in rp.summary_lines(bare))


def test_the_same_data_make_the_same_file(tmp_path):
    first = rp.write_report(tmp_path / "a.html", full()).read_bytes()
    assert rp.write_report(tmp_path / "b.html", full()).read_bytes() == first


def test_many_large_pictures_and_long_captions_stay_under_two_megabytes(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (800, 600, 3), dtype=np.uint8)
    data = full()
    data.examples = [example(noise, text="long " * 500) for _ in range(30)]
    path = rp.write_report(tmp_path / "report.html", data)
    assert 100_000 < path.stat().st_size < 2_000_000
    page = Page(path)
    assert len(page.pictures()) == 30 and max(page.pictures()[0].size) < max(rp.THUMBNAIL_SIDES)
    assert "long " * 100 not in page.text and "…" in page.text


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_pictures_of_any_kind_are_shown_as_they_look(tmp_path):
    red = Image.new("RGB", (720, 360), (255, 0, 0))
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    red.save(tmp_path / "red.png")
    given = [red, tmp_path / "red.png", encoded(red, "PNG"), clear, red.convert("L"), red.convert("P")]
    given += [np.asarray(red), encoded(red, "JPEG", exif=turned), clear.convert("P")]
    data = rp.ReportData("t", examples=[example(picture) for picture in given])
    shown = Page(rp.write_report(tmp_path / "report.html", data)).pictures()
    assert [picture.size for picture in shown] == [(360, 180)] * 3 + [(20, 20)] + [(360, 180)] * 3 + [
        (180, 360),
        (20, 20),
    ]
    colours = [picture.getpixel((10, 10)) for picture in shown]
    for colour in (colours[0], colours[1], colours[2], colours[5], colours[6], colours[7]):
        assert colour[0] > 245 and max(colour[1:]) < 10
    assert min(colours[3]) > 245  # what is transparent is white


def test_a_broken_picture_leaves_a_note_and_loses_nothing(tmp_path):
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)), "PNG")
    broken = [tmp_path / "missing.png", b"no picture", whole[: len(whole) // 2], None, np.zeros((2, 2, 7))]
    data = rp.ReportData("t", examples=[example(right=False), *(example() for _ in broken)])
    for shown, picture in zip(data.examples[1:], broken, strict=True):
        shown.picture = picture
    page = Page(rp.write_report(tmp_path / "report.html", data))
    assert page.text.count("This picture could not be read.") == len(broken) and page.text.count("a generated dog") == 6
    assert len(page.pictures()) == 1


def test_half_a_surrogate_pair_in_a_caption_is_no_reason_to_fail(tmp_path):
    data = rp.ReportData("t", examples=[example(text="odd \ud83d caption")])
    assert "odd ? caption" in Page(rp.write_report(tmp_path / "report.html", data)).text


def test_a_failed_write_leaves_the_old_report_and_nothing_beside_it(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(KeyError):
        rp.write_report(path, rp.ReportData("t", results=[{"protocol": "p"}]))
    assert path.read_text() == "old"
    with pytest.raises(UserError, match="can't be written") as told:
        rp.write_report(path / "report.html", rp.ReportData("t"))
    assert "\n" not in str(told.value) and str(path) in str(told.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="can't be written"):
        rp.write_report(tmp_path / "folder", rp.ReportData("t"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "report.html"]


def test_a_new_report_takes_the_old_ones_place_in_one_step(tmp_path):
    path, kept = tmp_path / "report.html", tmp_path / "kept.html"
    path.write_text("old")
    kept.hardlink_to(path)
    rp.write_report(path, rp.ReportData("new"))
    assert (
        kept.read_text() == "old" and "new" in path.read_text()
    )  # a new file was renamed, the old one not overwritten


def test_curves_follow_the_page_and_skip_what_is_not_a_number(tmp_path):
    steps = np.arange(50_000)
    values = np.where(steps % 7 == 0, np.nan, 2.0)
    losses = {"ITC": (steps, values), "ITM": ([1], [0.5]), "none": ([], []), "nan": ([1, 2], [np.nan, np.inf])}
    many = {f"r@{k}": ([0, 1], [0.1, k / 10]) for k in range(1, 7)}
    path = rp.write_report(tmp_path / "report.html", rp.ReportData("t", losses=losses, validation=many))
    page = Page(path)
    assert len(page.with_class("curve")) == 3 and "2 → 2" in page.text and "0.5 → 0.5" in page.text
    assert path.stat().st_size < 150_000
    drawn = page.source[page.source.index("<svg") :]
    assert "var(--line-0)" in drawn and "var(--line-3)" in drawn and "var(--muted)" in drawn
    assert not re.search(r"#0[1-4]0[1-4]0[1-4]", drawn)
    assert "nan" not in drawn.replace("dominant", "").lower().replace("<b>nan", "")


def test_the_running_mean_and_thinning_are_means():
    values = np.random.default_rng(0).random(1003)
    thin = rp._thinned(values)
    assert len(thin) == 335 and thin[0] == pytest.approx(values[:3].mean()) and thin[-1] == pytest.approx(values[-1])
    mean = rp._running_mean(values)
    assert mean[500] == pytest.approx(values[495:506].mean()) and mean[0] == pytest.approx(values[:6].mean())
    assert np.array_equal(rp._thinned(values[:5]), values[:5])


@pytest.mark.parametrize(
    ("seconds", "shown"), [(3.14, "3.1 s"), (59.99, "60.0 s"), (125, "2 min 05 s"), (7322, "2 h 02 min")]
)
def test_durations(seconds, shown):
    assert rp._duration(seconds) == shown


def test_examples_are_half_right_half_wrong_and_the_same_for_a_seed():
    ranks = np.random.default_rng(0).integers(0, 3, 200)
    chosen = rp.choose_examples(ranks)
    assert len(set(chosen)) == 12 and [ranks[i] == 0 for i in chosen] == [True] * 6 + [False] * 6
    assert chosen == rp.choose_examples(ranks) != rp.choose_examples(ranks, seed=1)
    assert [ranks[i] == 0 for i in rp.choose_examples(ranks, 5)].count(True) == 3
    assert len(rp.choose_examples(np.zeros(50))) == 12 == len(rp.choose_examples(np.ones(50)))
    assert [r == 0 for r in np.take([0, 1, 1, 1, 1], rp.choose_examples([0, 1, 1, 1, 1], 4))] == [True] + [False] * 3
    assert sorted(rp.choose_examples([0, 1, 5])) == [0, 1, 2] and rp.choose_examples([]) == []


def test_the_summary_fits_a_terminal_and_says_its_protocol():
    made = result()
    made["chance"]["image_to_text"]["mean_rank"] = 12501.0
    lines = rp.summary_lines(made)
    assert lines[0] == made["protocol"] and max(map(len, lines)) <= 80
    row = next(line for line in lines if line.startswith("image → text"))
    assert row.split() == ["image", "→", "text", "r@1", "62.1", "%", "59.0–65.3", "0.1", "98.0"]
    assert len(lines) == 2 + 2 * 5
    assert "ceiling" not in "\n".join(rp.summary_lines(result(ceiling=False)))
    made["protocol"] = "a protocol " * 20
    assert max(map(len, rp.summary_lines(made))) <= 80


def test_it_loads_neither_torch_nor_matplotlib_until_it_must():
    code = "import sys, diptych.evaluate.report; print({'torch', 'matplotlib', 'PIL', 'jinja2'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"
