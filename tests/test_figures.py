"""The README and the docs quote the recorded results, and a ratio that falls is noticed."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from benchmarks.check import LEAST, RESULTS, compare
from benchmarks.figures import FIGURES, MACHINE, PAGES, renewed
from benchmarks.harness.record import Record, read_record
from benchmarks.harness.tables_and_plots import filled, places


def test_the_pages_quote_the_record():
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    assert sorted(name for text in texts for name in places(text)) == sorted(FIGURES)
    for text in texts:
        assert renewed(text) == text, "run python -m benchmarks.figures"
        assert renewed(text.replace("1", "2")) != text.replace("1", "2")


def test_the_headline_is_the_median_of_complete_runs():
    """It is against the Trainer with its own recipe, whatever the other figures are."""
    rows = [
        {"against": "Trainer", "sooner_by_a_shorter_run": times, "sooner_on_the_curve": 9.0}
        for times in (2.0, 5.0, 2.5)
    ]
    rows.append({"against": "Trainer, our recipe", "sooner_by_a_shorter_run": 7.0})
    text = FIGURES["headline"][1](Record({}, rows))
    assert "**2.5 times sooner** (3 seeds, 2.0 to 5.0;" in text


def test_the_readme_shows_the_lowest_ratio_of_a_step():
    record = read_record(RESULTS / MACHINE / "step.json")
    lowest = min(row["to_best"][0] for row in record.rows)
    assert f"**{lowest:.2f}x**" in FIGURES["two_steps"][1](record)


@pytest.mark.parametrize(
    ("page", "times"), [("no place", 0), (2 * "<!-- step -->\nold\n<!-- end of step -->\n", 2)]
)
def test_a_part_has_one_place(page, times):
    with pytest.raises(SystemExit, match=f"<!-- step --> .* is there {times} times"):
        filled(page, {"step": "new"})


@pytest.mark.parametrize(
    "folder",
    sorted(path for path in RESULTS.iterdir() if path.is_dir()),
    ids=lambda path: path.name,
)
def test_records_can_be_read_and_say_where_they_come_from(folder):
    records = [read_record(path) for path in folder.glob("*.json")]
    assert records
    for record in records:
        assert (
            record.header["commit"]
            and record.header["device"]
            and record.header["torch"]
            and record.rows
        )


def test_a_ratio_that_falls_is_noticed(tmp_path):
    before, now = RESULTS / MACHINE, tmp_path / "now"
    shutil.copytree(before, now)
    assert not any(one.fell for one in compare(before, now))
    record = read_record(now / "step.json")
    name = next(iter(record.ratios))
    for share, fell in ((LEAST + 0.01, False), (LEAST - 0.01, True), (float("nan"), True)):
        replace(record, ratios={**record.ratios, name: share * record.ratios[name]}).write(
            now, "step", "A step"
        )
        assert [one.name for one in compare(before, now) if one.fell] == (
            [f"step: {name}"] if fell else []
        )
    replace(
        record, ratios={key: value for key, value in record.ratios.items() if key != name}
    ).write(now, "step", "A step")
    # The time budget is used up.
    assert [(one.name, one.fell) for one in compare(before, now) if one.now is None] == [
        (f"step: {name}", False)
    ]
    (now / "step.json").unlink()
    assert {one.name for one in compare(before, now) if one.fell} == {
        f"step: {name}" for name in record.ratios
    }
