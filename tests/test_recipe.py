"""Mixtures and phases in a recipe: how they are read, written back and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fastbert
from fastbert.errors import InputError
from fastbert.recipe import dump_config, load_config, parse_config

BASE = {"data": [{"path": "a"}, {"path": "b"}], "stop": {"steps": 10}}

TEXT = """
weights = "size^0.7"
[stop]
steps = 100
[[data]]
path = "~/a"
epochs = 2
[[data]]
path = "b"
[[phase]]
steps = 50
weights = [0.1, 0.9]
objective.mask_rate = 0.3
[[phase]]
batch = {sequences = 128, warmup_tokens = 1000}
[phase.schedule]
decay = "cosine"
"""


def test_a_recipe_with_everything_is_written_back_as_the_same():
    config = parse_config(TEXT, "r.toml")
    assert parse_config(dump_config(config), "again") == config
    first, second = config.sources
    assert first.path == str(Path("~/a").expanduser()) and (first.epochs, second.epochs) == (
        2,
        None,
    )
    assert config.source_names == ("a", "b") and config.weights == "size^0.7"
    one, two = config.phase
    assert one.weights == (0.1, 0.9) and one.schedule is None and one.objective.mask_rate == 0.3
    # The schedule of a phase takes nothing from the recipe's: its warm-up is 0.
    assert two.schedule is not None and (two.schedule.decay, two.schedule.warmup) == ("cosine", 0)
    assert config.in_phase(one).objective.mask_rate == 0.3
    assert config.in_phase(two).batch.sequences == 128
    assert config.largest.batch.sequences == 256  # of the first phase, which sets none
    assert config.in_phase(two).objective.mask_rate == 0.15


def test_an_override_replaces_the_list_of_datasets():
    assert load_config(BASE, ["data=c"]).data == "c"
    listed = load_config(BASE, ['data=[{path = "c"}, {path = "runs/c"}]'])
    assert listed.source_names == ("c", "runs/c")  # the paths, where the names are the same
    given = load_config(BASE, {"data": [{"path": Path("d"), "weight": 1}]})
    assert [source.path for source in given.sources] == ["d"]
    assert load_config(BASE, (), "runs/x@5").branch_from == "runs/x@5"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "size^2"}, "weights = 'size^2'; must be \"size^E\" with E from 0 to 1"),
        ({"weights": [1]}, "weights has 1 numbers, and data has 2 sources"),
        ({"weights": [0, 0]}, "weights: all of them are 0; raise one"),
        ({"data": "x", "weights": "size^1"}, "but data is one dataset"),
        ({"data": []}, "data is an empty list; name a dataset"),
        ({"data": ["x"]}, "data 1 = 'x'; must be a table, such as {path ="),
        ({"data": [{"weight": 1}]}, "data 1: path is missing"),
        ({"data": [{"path": "a", "weigth": 1}]}, "did you mean data 1: weight?"),
        ({"data": [{"path": "a", "weight": -1}]}, "data 1: weight = -1; must be 0 or more"),
        ({"data": [{"path": "a"}, {"path": "a"}]}, "data names 'a' twice"),
        ({"data": [{"path": "/a"}, {"path": "file:///a"}]}, "data names '/a' twice"),
        ({"data": [{"path": "a", "weight": 1}, {"path": "b"}]}, "data 2 (b) has no weight"),
        (
            {"data": [{"path": "a", "weight": 1}, {"path": "b", "weight": 1}], "weights": [1, 1]},
            "and data 1 has a weight too; remove one",
        ),
        ({"data": 3}, "data = 3; must be a string that is not empty, or a list of tables"),
        ({"phase": {"steps": 3}}, "must be a list of tables, [[phase]]"),
        ({"phase": [{"stps": 3}]}, "unknown key 'phase 1: stps'; did you mean phase 1: steps?"),
        ({"phase": [{"steps": 3, "batch": {"max_len": 4}}]}, "phase 1: batch.max_length?"),
        ({"phase": [{"steps": 3, "batch": {"max_length": 4}}]}, "max_length = 4; must be 8 or"),
        (
            {"phase": [{"steps": 3, "batch": {"max_length": 999}}]},
            "phase 1: batch.max_length = 999",
        ),
        ({"phase": [{"steps": 3, "tokens": 9}]}, "phase 1 has steps and tokens; keep one"),
        ({"phase": [{"steps": 3}, {"steps": 3}]}, "where an earlier phase ends at 3"),
        ({"phase": [{}, {"steps": 3}]}, "phase 1 has no end; give it steps or tokens"),
        ({"phase": [{"steps": 3, "weights": [1]}]}, "phase 1: weights has 1 numbers"),
        ({"phase": [{"steps": 3}], "stop": {"epochs": 1}}, "and no stop.epochs"),
        ({"phase": [{"batch": {"warmup_tokens": 9}}]}, "needs batch.sequences in the same phase"),
        (
            {"phase": [{"steps": 3, "schedule": {"decay": "wsd", "warmup": 0.9}}]},
            "phase 1: schedule.warmup + schedule.cooldown = 1.15",
        ),
        (
            {
                "phase": [{"schedule": {"decay": "linear"}}],
                "stop": {"steps": None, "seconds": 5},
                "schedule": {"over": "seconds"},
            },
            "phase 1 has a schedule and no end that is known in advance",
        ),
        ({"data.path": "x"}, "'data' is not a section"),
    ],
)
def test_what_contradicts_itself_is_one_line(changes: dict[str, Any], message: str):
    with pytest.raises(InputError) as error:
        load_config(BASE, changes)
    assert message in str(error.value) and "\n" not in str(error.value)


LONG = ".".join(["a"] * 100_000)


@pytest.mark.parametrize(
    "text",
    [
        f"{LONG} = 1",
        f"[{LONG}]",
        f"[[{LONG}]]",
        f"run = {{{LONG} = 1}}",
        LONG.replace(".", " . ") + " = 1",
        '"' + LONG.replace(".", '"."') + '" = 1',
        "'" + LONG.replace(".", "'.'") + "' = 1",
    ],
)
def test_a_key_of_any_length_is_refused_before_it_is_parsed(text: str, tmp_path: Path):
    """tomllib takes memory that grows with the square of its parts."""
    file = tmp_path / "r.toml"
    file.write_text(f'data = "x"\n{text}\n')
    with pytest.raises(InputError, match=r"r\.toml: the key .* has more than 32 parts; keys of a"):
        load_config(file)
    with pytest.raises(InputError, match=r"^m: the key"):
        parse_config(text, "m")
    if not text.startswith("["):
        with pytest.raises(InputError, match=r"^command line: the key") as caught:
            load_config(BASE, [text])
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("levels", [40, 300, 900, 985, 3000, 100_000])
@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ("{a = ", "}")])
def test_values_of_any_depth_are_one_line(levels: int, begin: str, end: str):
    value = begin * levels + ("1" if begin != "[" else "") + end * levels
    for key in ("data", "batch.sequences", "model.hidden_size", "model.type", "weights", "x"):
        with pytest.raises(InputError) as caught:
            parse_config(f"{key} = {value}", "r.toml")
        assert len(str(caught.value)) < 200 and str(caught.value).startswith("r.toml: ")
        with pytest.raises(InputError) as caught:
            load_config(BASE, [f"{key} = {value}"])
        assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)
    made: Any = 1
    for _ in range(levels):
        made = [made] if begin == "[" else {"a": made}
    with pytest.raises(InputError, match=r"^overrides: values are nested in more than 32 levels"):
        load_config(BASE, {"batch": {"sequences": made}})
    with pytest.raises(InputError, match=r"^overrides: values are nested"):
        fastbert.pretrain(BASE, batch={"sequences": made})
    with pytest.raises(InputError, match=r"^recipe: values are nested"):
        load_config({**BASE, "batch": made})


def test_a_value_that_holds_itself():
    endless: dict[str, Any] = {}
    endless |= {"batch": endless, "model": endless}
    with pytest.raises(InputError, match=r"^overrides: values are nested"):
        fastbert.pretrain(BASE, endless)


def test_a_file_that_is_no_recipe(tmp_path: Path):
    file = tmp_path / "r.toml"
    file.write_text('data = "' + "x" * (1 << 20) + '"')
    with pytest.raises(InputError, match=r"r\.toml: 1,048,585 characters, and a recipe has 1,048"):
        load_config(file)
    # Many datasets, and paths with many dots, are none of that.
    listed = ", ".join(f'{{path = "{"../" * 50}v1.{i}"}}' for i in range(2000))
    assert len(parse_config(f"data = [{listed}]", "r").sources) == 2000
