"""ds_config.json: what is taken, what is refused, and how it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastbert.config import OptimizerConfig, RunConfig, RuntimeConfig
from fastbert.errors import InputError
from fastbert.training.ds_config import OWN, RECIPE, REFUSED, DeepSpeedSettings, read_ds_config

ROOT = Path(__file__).parents[1]


def read(tmp_path: Path, content: object, **config) -> DeepSpeedSettings:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_ds_config(RunConfig(data="store", runtime=RuntimeConfig(deepspeed=str(path)), **config), "recipes/demo.toml")


def refused(tmp_path: Path, content: object, **config) -> str:
    with pytest.raises(InputError) as error:
        read(tmp_path, content, **config)
    message = str(error.value)
    assert "\n" not in message
    return message.replace(str(tmp_path) + "/", "")


def test_a_key_of_the_recipe_names_both_places(tmp_path):
    assert refused(tmp_path, {"train_batch_size": 64}) == (
        "ds.json: train_batch_size = 64 belongs to the recipe: batch.sequences in recipes/demo.toml (now 256); "
        'remove it from ds.json or write "auto"'
    )


@pytest.mark.parametrize("key", sorted(RECIPE))
def test_every_key_of_the_recipe_is_refused_unless_auto(tmp_path, key):
    assert f"ds.json: {key} = 1 belongs to the recipe: {RECIPE[key]} in recipes/demo.toml" in refused(tmp_path, {key: 1})
    assert key not in read(tmp_path, {key: "auto"}).values


def test_an_unknown_key_lists_the_near_ones(tmp_path):
    assert (
        refused(tmp_path, {"zero_optimisation": {"stage": 1}})
        == "ds.json: unknown key 'zero_optimisation'; did you mean zero_optimization?"
    )
    assert "known: activation_checkpointing" in refused(tmp_path, {"qqq": 1})


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_what_would_change_the_training_in_silence_is_refused(tmp_path, key):
    assert f"ds.json: {key} = true is not for fastbert" in refused(tmp_path, {key: True})


def test_a_file_written_for_transformers_is_accepted(tmp_path):
    """The ZeRO-2 example of transformers' documentation, as it stands there."""
    content = {
        "fp16": {
            "enabled": "auto",
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "initial_scale_power": 16,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 2,
            "allgather_partitions": True,
            "allgather_bucket_size": 2e8,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": "auto",
            "contiguous_gradients": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }
    settings = read(tmp_path, content)
    assert set(settings.values) == {"zero_optimization", "steps_per_print", "wall_clock_breakdown"}
    assert "reduce_bucket_size" not in settings.values["zero_optimization"]
    assert settings.stage(precision="fp32", world=1, optimizer="adamw") == 2


@pytest.mark.parametrize(
    "content, part",
    [
        ({"optimizer": {"type": "Lamb", "params": {"lr": "auto"}}}, "optimizer.name in recipes/demo.toml (now 'adamw')"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, "optimizer.name in recipes/demo.toml"),
        ({"bf16": {"enabled": True}}, "runtime.precision in recipes/demo.toml (now 'auto')"),
    ],
)
def test_a_section_that_decides_something_is_refused(tmp_path, content, part):
    assert part in refused(tmp_path, content)


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"a": ' * 100_000, ""])
def test_rubbish_is_one_line(tmp_path, content):
    assert refused(tmp_path, content).startswith("ds.json: ")


def test_a_missing_file_names_the_recipe():
    config = RunConfig(data="store", runtime=RuntimeConfig(deepspeed="no/such.json"))
    with pytest.raises(InputError, match=r"^demo.toml: runtime.deepspeed = 'no/such.json': no such file"):
        read_ds_config(config, "demo.toml")


@pytest.mark.parametrize("stage", [4, -1, "2", True, None])
def test_a_stage_that_does_not_exist(tmp_path, stage):
    assert f"ds.json: zero_optimization.stage = {json.dumps(stage)}; must be 0, 1, 2, 3" in refused(
        tmp_path, {"zero_optimization": {"stage": stage}}
    )


@pytest.mark.parametrize(
    "stage, precision, world, optimizer, expected",
    [
        ("auto", "fp32", 1, "adamw", 0),
        ("auto", "fp32", 2, "adamw", 1),
        ("auto", "bf16", 1, "adamw", 1),
        ("auto", "fp32", 8, "lamb", 0),
        (0, "fp32", 8, "adamw", 0),
        (3, "bf16", 1, "sgd", 3),
        (0, "bf16", 1, "adamw", "zero_optimization.stage = 0 does not train in bf16"),
        ("auto", "bf16", 1, "lamb", 'optimizer.name = "lamb" needs it'),
        (2, "fp32", 1, "lamb", 'zero_optimization.stage = 2 does not go with optimizer.name = "lamb"'),
    ],
)
def test_the_stage(tmp_path, stage, precision, world, optimizer, expected):
    settings = read(tmp_path, {"zero_optimization": {"stage": stage}})
    if isinstance(expected, int):
        assert settings.stage(precision=precision, world=world, optimizer=optimizer) == expected
    else:
        with pytest.raises(InputError, match=r"ds\.json: ") as error:
            settings.stage(precision=precision, world=world, optimizer=optimizer)
        assert expected in str(error.value)


def test_the_projects_own_file_is_sound():
    settings = read_ds_config(
        RunConfig(data="store", optimizer=OptimizerConfig(), runtime=RuntimeConfig(deepspeed=str(ROOT / "ds_config.json"))), "r"
    )
    assert settings.stage(precision="fp32", world=1, optimizer="adamw") == 0
    assert settings.stage(precision="bf16", world=64, optimizer="adamw") == 1


def test_the_three_kinds_of_keys_do_not_overlap():
    assert not OWN & set(RECIPE) and not OWN & REFUSED and not set(RECIPE) & REFUSED
