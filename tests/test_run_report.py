"""The page of a run is complete, self-contained, and readable in a real browser and on a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny_bert import make_hugging_face_folder, make_run

from fastbert.errors import InputError
from fastbert.tasks.run_report import read_history, report
from fastbert.training.metrics import STEP_KEYS
from tests.tiers import slow

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
STEPS = 7


@pytest.fixture(scope="module")
def run(small_dataset, tmp_path_factory) -> Path:
    """A run folder with a made-up history, whose recipe contains HTML's special characters."""
    folder = make_hugging_face_folder(tmp_path_factory.mktemp("hf"), small_dataset.tokenizer_dir)
    run = make_run(tmp_path_factory.mktemp("runs") / "a <b> run", folder, str(small_dataset.path))
    lines = []
    for step in [1, 2, 3, *range(2, STEPS + 1)]:  # two steps were repeated after a resume
        values = {
            "loss_nsp": 0.69,
            "loss_mlm": 7.0 / step,
            "loss": 0.69 + 7.0 / step,
            "lr": 1e-3,
            "tokens": 100,
            "seconds": 2.0,
        }
        lines.append(
            {key: values.get(key, 1.0) for key in STEP_KEYS} | {"step": step, "tokens_per_s": 50.0}
        )
    found = {
        "loss": 3.0,
        "loss_mlm": 2.3,
        "accuracy_mlm": 0.4,
        "loss_mask_token": 2.5,
        "loss_nsp": 0.6,
        "accuracy_nsp": 0.7,
    }
    lines += [
        {
            "event": "evaluate",
            "step": STEPS,
            **found,
            "accuracy_mask_token": 0.3,
            "training_tokens": 700,
            "training_seconds": 20.0,
            "seconds": 2.0,
        },
        {"event": "save", "step": STEPS, "checkpoint": "step-00000007", "seconds": 1.0},
        {"event": "stop", "step": STEPS, "reason": "stop.steps = 7 <done>"},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "log.txt").write_text("12:00 INFO a & b\n")
    return run


class Page(HTMLParser):
    """Parse tags, check that they nest correctly, and collect the text."""

    VOID = frozenset({"meta", "br", "use", "path", "image", "img"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.links += [
            value for name, value in attrs if name in ("src", "href", "xlink:href") and value
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_holds_everything_and_needs_nothing(run, tmp_path):
    before = {path.name for path in run.iterdir()}
    assert report(run) == run / "report.html" and {
        path.name for path in run.iterdir()
    } == before | {"report.html"}
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    words = " ".join(" ".join(page.words).split())
    for wanted in (
        "a <b> run",
        "stop.steps = 7 <done>",
        "max_position_embeddings = 32",
        "a & b",
        "[MASK]",
        "sequences of 1 to 32 tokens",
    ):
        assert wanted in words, wanted
    for curve in (
        "MLM loss, nats",
        "NSP loss, nats",
        "held-out accuracy, %",
        "tokens a second",
        "norm of the gradient",
        "learning rate",
    ):
        assert f'aria-label="{curve}"' in text
    assert (
        "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
        and "<script" not in text
        and "@import" not in text
    )
    assert all(link.startswith("#") for link in page.links)
    assert 4 <= text.count('class="sample"') <= 8
    for part in (
        "steps</td><td>0:14",
        "evaluations</td><td>0:02",
        "waiting for saves</td><td>0:01",
        "the rest</td><td>0:03",
    ):
        assert part in text
    report(run, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text


def test_a_step_that_was_made_again_counts_once(run):
    history = read_history(run)
    assert history.column("step").tolist() == list(range(1, STEPS + 1))


def test_a_long_history_takes_numbers_and_not_records(run, tmp_path):
    """A million steps as dictionaries took 2 GB; here a step may take 100 bytes."""
    steps = 20_000
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps(dict.fromkeys(STEP_KEYS, 0.5) | {"step": step}) + "\n")
    tracemalloc.start()
    history = read_history(tmp_path)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(history) == steps and used < 100 * steps


def test_a_single_evaluation_shows_and_baselines_stand_beside_the_curves(run):
    text = report(run).read_text(encoding="utf-8")
    (mlm,) = re.findall(r'<svg[^>]*aria-label="MLM loss, nats".*?</svg>', text, re.DOTALL)
    assert mlm.count("<use ") >= 2  # the dots of two curves of one point each
    right = float(re.search(r'viewBox="0 0 ([\d.]+)', mlm)[1])  # type: ignore[index]
    label = re.search(r'([\d.]+)[ ,][\d.]+\)"[^>]*>word frequencies', mlm)
    assert label is not None and float(label[1]) > right / 2


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "Running: no end is on record."),
        (
            [("stop", 3), ("resume", 3)],
            "Running: no end is on record since it was resumed after step 3.",
        ),
        ([("resume", 3), ("stop", 5), ("save", 5)], "Ended by: SIGINT"),
    ],
)
def test_a_run_that_goes_on_has_not_ended(run, tmp_path, events, state):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if '"stop"' not in line]
    kept += [json.dumps({"event": e, "step": step, "reason": "SIGINT"}) for e, step in events]
    (copy / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))
    page = report(copy).read_text()
    assert f'<p class="note">{state}' in page
    # The results are those of the newest checkpoint, whatever step the run is at.
    assert "held-out MLM loss, step 7" in page and "masked tokens right, step 7" in page


def test_the_notes_of_the_log_stand_on_top_and_losses_come_first(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    line = "12:00:00 INFO note: the loss <is> not normal\n"
    (copy / "log.txt").write_text("12:00:00 INFO a\n" + 2 * line)
    page = report(copy).read_text()
    note = "<p>the loss &lt;is&gt; not normal</p>"
    assert page.count(note) == 1 and page.index(note) < page.index("<h2>Curves</h2>")
    assert "<th></th><th>loss (nats)</th>" in page  # a narrow screen shows the first columns
    assert '<pre class="log">' in page


def test_records_without_their_keys_are_no_error(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    with open(copy / "metrics.jsonl", "a") as file:
        for record in (
            {"step": 8},
            {"step": 9, "loss_mlm": "a", "tokens": None},
            {"event": "evaluate", "step": 9, "loss_mlm": [1]},
            {"event": "save", "step": 9, "seconds": None},
            {"event": "stop", "step": 9},
        ):
            file.write(json.dumps(record) + "\n")
    assert "Ended by: a stop without a reason" in report(copy).read_text()


def test_without_a_checkpoint_or_a_dataset_the_rest_is_there(run, small_dataset, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints")
    words = report(copy).read_text(encoding="utf-8")
    assert "without a checkpoint" in words and "Recipe" in words and 'class="sample"' not in words


@pytest.mark.slow
def test_only_an_earlier_report_is_replaced(run, tmp_path):
    out = tmp_path / "x.html"
    out.touch()
    for _ in range(2):
        assert report(run, out) == out
    for content in ("<!doctype html>\n<p>mine</p>", "mine"):
        out.write_text(content)
        with pytest.raises(InputError, match=r"--out .*x\.html: exists, and is no report of"):
            report(run, out)
        assert out.read_text() == content


def test_what_is_no_run_is_one_line(run, tmp_path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "device.html").symlink_to("/dev/null")
    (tmp_path / "begun/config.toml").write_text("")
    for arguments, words in (
        ((tmp_path,), "no config.toml; give the folder of a run"),
        ((tmp_path / "begun",), "no step in metrics.jsonl"),
        ((run, tmp_path / "no/x.html"), "--out .*x.html: the folder .* does not exist"),
        ((run, run / "metrics.jsonl"), "--out .*metrics.jsonl: must end in .html"),
        ((run, run / "checkpoints"), "--out .*checkpoints: must end in .html"),
        ((run, "/dev/null"), "--out /dev/null: must end in .html"),
        ((run, tmp_path / "device.html"), "--out .*device.html: is no file"),
        ((run, tmp_path / "folder.html"), "--out .*folder.html: is a folder"),
    ):
        with pytest.raises(InputError, match=words):
            report(*arguments)


PROBE = """<script>
addEventListener("load", () => {
  const right = e => e.getBoundingClientRect().right, tall = e => e.getBoundingClientRect().height;
  const outside = e => !e.closest(".wide, pre, svg") && right(e) > innerWidth + 1;
  const wide = [...document.querySelectorAll("body *")].filter(outside);
  const small = [...document.querySelectorAll("svg text")].map(tall);
  const curves = [...document.querySelectorAll(".curves svg")];
  const svg = curves.map(e => e.getBoundingClientRect().width);
  const tops = [...document.querySelectorAll(".cards div")].map(e => e.offsetTop);
  const log = document.querySelector("pre.log");
  document.body.innerHTML = "<pre id=found>" + JSON.stringify({
    inner: innerWidth, page: document.documentElement.scrollWidth,
    tiles: tops.length, last: tops.filter(top => top == Math.max(...tops)).length,
    cut: log.scrollWidth > log.clientWidth,
    wide: wide.map(e => e.tagName), text: Math.min(...small), svg: Math.min(...svg)}) + "</pre>";
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [390, slow(1280)])
def test_a_browser_shows_it_without_scrolling_sideways(run, tmp_path, width):
    """On a phone and on a desktop nothing is cut off, and the text of the curves is readable."""
    page = report(run, tmp_path / "page.html").read_text(encoding="utf-8")
    # A frame as wide as the screen: a headless window has a least width of its own.
    (tmp_path / "probe.html").write_text(
        page.replace("</body>", PROBE + "</body>"), encoding="utf-8"
    )
    (tmp_path / "frame.html").write_text(
        f'<iframe src="probe.html" style="width:{width}px;height:2000px;border:0"></iframe>'
        "<pre id=out></pre><script>"
        'addEventListener("load", () => setTimeout(() => { '
        'document.getElementById("out").textContent = '
        'document.querySelector("iframe").contentDocument.getElementById("found").textContent '
        "}, 200))</script>",
        encoding="utf-8",
    )
    assert BROWSER is not None
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--no-first-run",
        "--disable-sync",
    ]
    flags += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command = [
        BROWSER,
        *flags,
        "--virtual-time-budget=5000",
        "--dump-dom",
        (tmp_path / "frame.html").as_uri(),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="out">(\{.*?\})</pre>', shown.stdout)
    found = json.loads(match[1])  # type: ignore[index]
    assert found["inner"] == width and found["page"] <= width and found["wide"] == []
    assert found["svg"] >= min(300, width - 40) and found["text"] >= 7
    assert found["tiles"] == 8 and found["last"] > 1 and not found["cut"]
