"""Recipes: defaults, overrides, round trip, and one clear line for every error."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbert.config import MODERNBERT_PRESETS, PRESETS, RunConfig
from fastbert.errors import InputError
from fastbert.recipe import FIXED, dump_config, load_config, parse_config

ROOT = Path(__file__).parent.parent


def test_one_line_is_a_recipe():
    config = parse_config('data = "data/x"', "a.toml")
    assert config == RunConfig(data="data/x")
    assert (config.model.hidden_size, config.model.num_hidden_layers) == (768, 12)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "fastbert/recipes").glob("*.toml")), ids=lambda p: p.stem
)
def test_packaged_recipes_are_valid(path):
    config = load_config(path)
    assert parse_config(dump_config(config), "again") == config


def test_preset_fills_in_what_is_not_said():
    config = parse_config('data = "x"\n[model]\npreset = "mini"\nnum_hidden_layers = 6', "a.toml")
    assert config.model.num_hidden_layers == 6
    assert config.model.hidden_size == PRESETS["mini"]["hidden_size"]


def test_presets_of_modernbert_have_the_published_numbers_of_parameters():
    """Those of Ettin, and of ModernBERT-base and -large, with a vocabulary of 50,368 tokens."""
    millions = [
        round((50_368 * d + size["num_hidden_layers"] * (4 * d * d + 3 * d * f)) / 1e6)
        for size in MODERNBERT_PRESETS.values()
        for d, f in [(size["hidden_size"], size["intermediate_size"])]
    ]
    assert millions == [17, 32, 68, 149, 395]


def test_a_path_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/u/ada")
    keys = {"data": "~/d", "run": "~", "init": "~/m/x", "runtime.deepspeed": "~/ds.json"}
    for overrides in (keys, [f"{key}={value}" for key, value in keys.items()]):
        config = load_config({}, overrides)
        assert (config.data, config.run) == ("/u/ada/d", "/u/ada")
        assert (config.init, config.runtime.deepspeed) == ("/u/ada/m/x", "/u/ada/ds.json")
    assert load_config({"data": "./~/d", "run": "a~"}).data == "./~/d"


def test_a_path_may_be_a_file_url():
    config = load_config({"data": "file:///d/a", "run": "file:///r", "init": "file:///i/"})
    assert (config.data, config.run, config.init) == ("/d/a", "/r", "/i")


@pytest.mark.parametrize("text", ["64 MiB", "64MiB", " 64  MiB ", "65536 KiB"])
def test_a_size_has_a_unit(text):
    assert load_config({"data": "x", "order": {"window": text}}).order.window == 64 << 20


@pytest.mark.parametrize("text", ["64MB", "64", "MiB", "-64MiB", "6.4 GiB", "64 MiB KiB"])
def test_what_is_no_size_is_one_line(text):
    with pytest.raises(InputError, match=r"order.window = .*must be bytes, or a number with"):
        load_config({"data": "x", "order": {"window": text}})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stop.steps=1e6", "stop.steps = 1000000.0; must be a whole number, 1000000"),
        ("stop.steps=1.5", "stop.steps = 1.5; must be a whole number"),
        ("optimizer.lr=.001", "optimizer.lr = '.001'; must be a number, with a digit before and b"),
        ("optimizer.lr=1.", "optimizer.lr = '1.'; must be a number, with a digit before and b"),
        ("optimizer.lr=1,5", "optimizer.lr = '1,5'; must be a number"),
    ],
)
def test_numbers_as_other_programs_write_them(override, words):
    with pytest.raises(InputError) as raised:
        load_config({"data": "x"}, [override])
    message = str(raised.value)
    assert message.startswith(f"command line: {words}") and words.endswith(("b", message[-8:]))


def test_a_recipe_from_windows(tmp_path):
    (tmp_path / "r.toml").write_bytes(b'\xef\xbb\xbfdata = "x"\r\n[batch]\r\nsequences = 8\r\n')
    assert load_config(tmp_path / "r.toml").batch.sequences == 8
    (tmp_path / "r.toml").write_text('data = "x"', encoding="utf-16")
    with pytest.raises(InputError, match=r"r\.toml: not UTF-8 .*; save it as UTF-8"):
        load_config(tmp_path / "r.toml")


def test_overrides_win_and_are_named_in_errors(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('data = "x"\n[batch]\nsequences = 8\n')
    assert (
        load_config(
            recipe, ["batch.sequences=64", "run=runs/a b", "optimizer.betas=[0.9, 0.95]"]
        ).batch.sequences
        == 64
    )
    with pytest.raises(InputError, match=r"^command line: batch\.sequences = 0; must be 1 or more"):
        load_config(recipe, ["batch.sequences=0"])
    with pytest.raises(InputError, match=r"^command line: 'steps' is not key=value"):
        load_config(recipe, ["steps"])


@pytest.mark.parametrize("text", ["1\nstop.steps=5", "1\n", "one\nstop.steps=5"])
def test_an_override_is_one_setting(tmp_path, text):
    """No line of it is dropped, as where a shell variable of several lines stands in quotes."""
    recipe = tmp_path / "r.toml"
    recipe.write_text('data = "x"\n')
    if text == "1\n":
        assert load_config(recipe, [f"seed={text}"]).seed == 1
        return
    with pytest.raises(InputError, match=r"^command line: 'seed=.*has several lines; give each"):
        load_config(recipe, [f"seed={text}"])


WRONG = [
    ("", "data is missing"),
    ("data = 3", "data = 3; must be a string"),
    ('data = ""', "data = ''; must be a string that is not empty"),
    ('data = "x"\nbatch = 3', "batch = 3; must be a section"),
    (
        'data = "x"\n[batch]\nsequence = 3',
        "unknown key 'batch.sequence'; did you mean batch.sequences",
    ),
    (
        'data = "x"\n[batch]\nzzz = 3',
        "unknown key 'batch.zzz'; known in \\[batch\\]: sequences, max_length",
    ),
    ('data = "x"\n[batch]\nsequences = 1.5', "batch.sequences = 1.5; must be a whole number"),
    ('data = "x"\n[batch]\nsequences = true', "batch.sequences = True; must be a whole number"),
    (
        'data = "x"\n[batch]\nmax_length = 600',
        "batch.max_length = 600 is more than model.max_position_embeddings = 512",
    ),
    (
        'data = "x"\n[batch]\nmicro_batch_tokens = 64',
        "batch.micro_batch_tokens = 64 is less than batch.max_length = 128",
    ),
    (
        'data = "x"\n[optimizer]\nname = "adam"',
        "optimizer.name = 'adam'; must be one of adamw, lamb, muon, sgd, stable_adamw",
    ),
    ('data = "x"\n[optimizer]\nlr = 0', "optimizer.lr = 0; must be above 0"),
    ('data = "x"\n[optimizer]\nlr = nan', "optimizer.lr = nan; must be a number"),
    ('data = "x"\n[optimizer]\nbetas = [0.9]', "must be two numbers"),
    (
        'data = "x"\n[optimizer]\nname = "muon"\nmomentum = 1',
        'optimizer.momentum = 1 with optimizer.name = "muon"; must be below 1',
    ),
    ('data = "x"\n[model]\npreset = "huge"', "model.preset = 'huge'; must be one of tiny, mini"),
    (
        'data = "x"\n[model]\nnum_attention_heads = 7',
        "model.num_attention_heads = 7 does not divide model.hidden_size = 768",
    ),
    (
        'data = "x"\n[objective]\nmask_token = 0.95',
        "objective.mask_token \\+ objective.random_token = 1.05",
    ),
    ('data = "x"\n[objective]\nwhole_word = 1', "objective.whole_word = 1; must be true or false"),
    ('data = "x"\n[schedule]\nover = "seconds"', 'schedule.over = "seconds" needs stop.seconds'),
    ('data = "x"\n[stop]\nseconds = 60', 'schedule.over = "steps" needs stop.steps or stop.epochs'),
    ('data = "x"\n[stop]\nmin_delta = 0.1', "stop.min_delta = 0.1 needs stop.patience"),
    (
        'data = "x"\n[schedule]\ndecay = "wsd"\nwarmup = 0.9\ncooldown = 0.3',
        "schedule.warmup \\+ schedule.cooldown = 1.2",
    ),
    (
        'data = "x"\n[schedule]\ndecay = "cosine"\ncooldown_shape = "1-sqrt"',
        'schedule.cooldown_shape = "1-sqrt" with schedule.decay = "cosine"',
    ),
    (
        'data = "x"\n[optimizer]\nname = "stable_adamw"\nmomentum = 0.95',
        'optimizer.momentum = 0.95 with optimizer.name = "stable_adamw"',
    ),
    (
        'data = "x"\ninit = "m"\n[batch]\nmax_length = 1024',
        "if init = 'm' is a ModernBERT, set model.type = \"modernbert\"",
    ),
    ('data = "x', "not valid TOML"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_wrong_gets_one_line_that_names_file_key_and_value(tmp_path, text, message):
    recipe = tmp_path / "r.toml"
    recipe.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_config(recipe)
    assert str(caught.value).startswith(str(recipe))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", FIXED)
def test_a_key_of_bert_config_that_is_fixed(key):
    with pytest.raises(InputError) as raised:
        load_config("mini", ["data=x", f"{key}=3"])
    assert str(raised.value) == f"command line: unknown key '{key}'; {FIXED[key]}"
    with pytest.raises(InputError, match=r"hidden_sice'; did you mean"):
        load_config("mini", ["data=x", "model.hidden_sice=3"])


@pytest.mark.parametrize(
    "override",
    [
        f"batch.sequences={'[' * 30}{'1, ' * 100}{']' * 30}",
        f"optimizer.lr=1{'0' * 400}",
        f"model={'9' * 4000}",
        f"seed={'1' * 5000}",
        "x" * 9999,
    ],
)
def test_a_long_value_is_not_shown_whole(override):
    with pytest.raises(InputError) as raised:
        load_config("mini", ["data=x", override])
    assert "..." in str(raised.value) and len(str(raised.value)) < 300


@pytest.mark.parametrize(
    "text, words",
    [
        (f"seed = {'1' * 5000}", "not valid TOML: Exceeds the limit (4300 digits)"),
        (f"run = {'[' * 100_000}{']' * 100_000}", "values are nested in more than 32 levels"),
        (f"[optimizer]\nlr = 1{'0' * 400}", f"optimizer.lr = 1{'0' * 79}...; must be a number"),
        ("[runtime]\ntimeout_s = 1e30", "runtime.timeout_s = 1e+30; must be 1 or more and 1"),
        ("[order]\nwindow = 1e400", "order.window = inf; must be a whole number"),
    ],
)
def test_a_number_that_no_type_holds_is_one_line(tmp_path, text, words):
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'data = "x"\n{text}\n')
    with pytest.raises(InputError) as raised:
        load_config(recipe)
    message = str(raised.value)
    assert message.startswith(f"{recipe}: {words}") and "\n" not in message and len(message) < 500


@pytest.mark.parametrize(
    "key", ["seed", "data", "run", "runtime.timeout_s", "optimizer.betas", "order.window", "model"]
)
@pytest.mark.parametrize("zeros", [400, 5000])
def test_such_a_number_of_python_is_one_line(key, zeros):
    for value in (10**zeros, [0.9, 10**zeros]):
        with pytest.raises(InputError, match=rf"^overrides: {key}( 1)? = .{{0,300}}; must be "):
            load_config("mini", {"data": "x", key: value})


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no such recipe"):
        load_config(tmp_path / "none.toml")


# Pieces of recipes, some of them wrong.
PIECES = ['data = "x"', "data = [", "[batch]", "[[phase]]", "[model", "=", "sequences = 8", "seed"]
PIECES += [
    "sequences = 0",
    "seed = 3",
    'seed = "3"',
    'init = ""',
    "[data]",
    "steps = 1e3",
    "\n",
    " ",
]


@given(st.text(max_size=60) | st.lists(st.sampled_from(PIECES)).map("\n".join))
def test_rubbish_is_a_recipe_or_an_error_of_one_line_that_names_the_file(text):
    try:
        config = parse_config(text, "rubbish")
    except InputError as error:
        assert re.fullmatch(r"rubbish\b.+", str(error))
    else:
        assert parse_config(dump_config(config), "again") == config


@pytest.mark.parametrize(
    "overrides",
    [
        ["batch.max_length=262144", "model.max_position_embeddings=262144"],
        ["batch.micro_batch_tokens=786432"],
        ["batch.micro_batch_tokens=1" + "0" * 30],
    ],
)
def test_packs_that_masking_cannot_number_are_refused(overrides):
    with pytest.raises(InputError, match=r"batch\.\w+ = \d+; must be 8 or more and \d+ at most"):
        load_config("mini", ["data=x", *overrides])


def test_a_value_out_of_range_is_not_called_bad_toml():
    with pytest.raises(InputError, match=r"^here: seed = -1; must be 0 or more"):
        parse_config('data = "x"\nseed = -1', "here")


@given(st.text(min_size=1, max_size=20), st.integers(1, 10**6), st.floats(1e-8, 1.0))
def test_every_config_survives_the_round_trip(data, sequences, lr):
    config = RunConfig(data=os.path.expanduser(data))  # as it is once it has been read
    config = dataclasses.replace(
        config,
        batch=dataclasses.replace(config.batch, sequences=sequences),
        optimizer=dataclasses.replace(config.optimizer, lr=lr),
    )
    assert parse_config(dump_config(config), "again") == config


def test_the_momentum_of_muon_has_a_default_of_its_own():
    def momentum(*overrides: str) -> float:
        return load_config({"data": "x"}, overrides).optimizer.momentum

    assert momentum() == 0.9 and momentum("optimizer.name=muon") == 0.95
    assert momentum("optimizer.name=muon", "optimizer.momentum=0.8") == 0.8
    config = load_config({"data": "x"}, ["optimizer.name=muon"])
    assert parse_config(dump_config(config), "x") == config
