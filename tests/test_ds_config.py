"""ds_config.json: accepted settings train and resume correctly, others get a clear error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastbert.cli import run as run_inside
from fastbert.config import (
    OptimizerConfig,
    RunConfig,
    RuntimeConfig,
)
from fastbert.errors import InputError
from fastbert.training.ds_config import DeepSpeedSettings, read_ds_config
from fastbert.training.ds_keys import NEVER, NOTHING, ONLY, OWN, RECIPE, SECTIONS
from fastbert.training.engine import check_settings
from tests.ranks import environment, free_port

ROOT = Path(__file__).parents[1]
# A file as people have it.
ACCEPTED = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "prescale_gradients": False,
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": "auto", "check_grad_overflow": True},
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16},
    "amp": {"enabled": False, "opt_level": "O1"},
    "optimizer": {"type": "auto", "params": {"lr": "auto", "betas": "auto"}},
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "allgather_bucket_size": 5e8,
        "reduce_bucket_size": "auto",
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    },
    "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False},
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
    "flops_profiler": {"enabled": False, "profile_step": 1, "module_depth": -1},
    "aio": {"block_size": 1048576, "queue_depth": 8, "thread_count": 1},
    "tensorboard": {"enabled": False},
    "steps_per_print": 100,
    "wall_clock_breakdown": False,
}


def read(tmp_path: Path, content: object, precision: str = "auto", **config) -> DeepSpeedSettings:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    runtime = RuntimeConfig(deepspeed=str(path), precision=precision)
    return read_ds_config(RunConfig(data="dataset", runtime=runtime, **config), "recipes/demo.toml")


def refused(tmp_path: Path, content: object, **config) -> str:
    with pytest.raises(InputError) as error:
        read(tmp_path, content, **config)
    message = str(error.value)
    assert "\n" not in message
    return message.replace(str(tmp_path) + "/", "")


def nested(place: str, value: object) -> dict:
    """{"a": {"b": value}} for "a.b"."""
    for key in reversed(place.split(".")):
        value = {key: value}
    return value  # type: ignore[return-value]


# What the recipe decides.


def test_a_file_that_leaves_it_to_the_recipe_is_accepted(tmp_path):
    settings = read(tmp_path, ACCEPTED, precision="bf16")
    assert set(settings.values) <= set(OWN)
    assert settings.values["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "allgather_bucket_size": 5e8,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    }
    assert settings.stage(precision="bf16", world=2, optimizer="adamw") == 2
    check_settings(settings)


@pytest.mark.parametrize(
    "key, value",
    [
        ("train_batch_size", 256),  # also where it says what the recipe says
        ("train_micro_batch_size_per_gpu", 1),
        ("gradient_accumulation_steps", 1),
        ("gradient_clipping", 1.0),
        ("optimizer", {"type": "AdamW"}),
        ("optimizer", {"type": "AdamW", "params": {"lr": "auto"}}),
        ("scheduler", {"type": "auto", "params": {"warmup_num_steps": 0}}),
        ("bf16", {"enabled": True}),
        ("bf16", True),
        ("bfloat16", {"enabled": True}),
        ("fp16", {"enabled": True}),
    ],
)
def test_what_the_recipe_decides_is_left_out_or_auto(tmp_path, key, value):
    assert refused(tmp_path, {key: value}) == (
        f"ds.json: {key} = {json.dumps(value)}: set by {RECIPE[key]} in recipes/demo.toml; "
        'remove it here, or write "auto"'
    )
    for off in ("auto", None, {"enabled": "auto", "more": 3}):
        assert key not in read(tmp_path, {key: off}).values


def test_all_problems_are_in_one_line(tmp_path):
    content = {
        "train_batch_size": 32,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "steps_per_print": 0,
        "zero_optimization": {"stage": 4, "round_robin_gradients": True},
        "wall_clock_brakedown": True,
    }
    message = refused(tmp_path, content)
    for number, words in enumerate(
        (
            "train_batch_size = 32: set by batch.sequences",
            'optimizer = {"type": "AdamW", "params": {"lr": "auto"}}: set by [optimizer]',
            "steps_per_print = 0; must be a whole number of 1 or more",
            "zero_optimization.stage = 4; must be",
            "zero_optimization.round_robin_gradients = true; must be false",
            "wall_clock_brakedown = true is no setting of fastbert; remove it; "
            "did you mean wall_clock_breakdown?",
        ),
        1,
    ):
        assert f"({number}) {words}" in message


@pytest.mark.parametrize(
    "content, fits",
    [
        ({"data_types": {"param_dtype": "bf16"}}, "bf16"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "bf16"),
        ({"bf16": {"enabled": "auto"}, "data_types": {"grad_accum_dtype": "fp32"}}, None),
    ],
)
def test_the_precision_is_the_recipes(tmp_path, content, fits):
    """Only the training machine decides what "auto" in the recipe means."""
    settings = read(tmp_path, content)
    for precision in ("fp32", "bf16"):
        if fits in (None, precision):
            assert settings.stage(precision=precision, world=2, optimizer="adamw") == 1
        else:
            with pytest.raises(InputError) as error:
                settings.stage(precision=precision, world=2, optimizer="adamw")
            assert (
                f'contradicts runtime.precision = "auto" in recipes/demo.toml, which keeps the '
                f"weights in {precision} here" in str(error.value)
            )
            assert f"{tmp_path / 'ds.json'}: {next(iter(content))}." in str(error.value)


def test_a_file_written_for_transformers_is_accepted(tmp_path):
    """The ZeRO-2 example of transformers' documentation, without the two types in it."""
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
        "optimizer": {
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {
            "params": {
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
            },
        },
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


# Keys and values.


@pytest.mark.parametrize(
    "content, hint",
    [
        ({"zero_optimisation": {"stage": 1}}, "did you mean zero_optimization?"),
        ({"zero_optimisation": {"stage": 0}}, "did you mean zero_optimization?"),
        ({"train_bach_size": 8}, "did you mean train_batch_size"),
        ({"data_types": {"grad_accum_type": "fp32"}}, "did you mean data_types.grad_accum_dtype"),
        (
            {"flops_profiler": {"enabled": True, "detail": True}},
            "did you mean flops_profiler.detailed?",
        ),
        ({"qqq": 1}, "qqq = 1 is no setting of fastbert; remove it; known: aio, comet,"),
    ],
)
def test_an_unknown_key_lists_the_near_ones(tmp_path, content, hint):
    assert hint in refused(tmp_path, content)


@pytest.mark.parametrize(
    "content",
    [
        {"zero_optimization": {"overlap_com": True}},
        {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
        {"tensorboard": {"enable": True}},
        {"comms_logger": {"enable": True}},
        {"timers": {"throughput": {"enable": True}}},
        {"zero_optimization": {"reduce_bucket_size": -1}},
        {"zero_optimization": {"mics_shard_size": 2}},
        {"log_level": 3},
        {"aio": {"use_gds": True}},
    ],
)
def test_other_sections_are_checked_by_deepspeed(tmp_path, content):
    with pytest.raises(InputError) as error:
        check_settings(read(tmp_path, content))
    assert str(error.value).startswith(f"{tmp_path / 'ds.json'}: ") and "\n" not in str(error.value)


EVERY_KIND = {
    "train_batch_size": 32,
    "steps_per_print": 0,
    "zero_optimization": {"stage": 4, "overlap_com": True, "reduce_bucket_size": -1},
    "tensorboard": {"enable": True},
    "comms_logger": {"enable": True},
    "timers": {"throughput": {"enable": True}},
}


def test_doctor_lists_everything_that_is_wrong_with_a_file(tmp_path, monkeypatch, capsys):
    """Each problem once and on a line of its own, whether fastbert or DeepSpeed has it."""
    monkeypatch.chdir(tmp_path)
    Path("ds.json").write_text(json.dumps(EVERY_KIND), encoding="utf-8")
    assert run_inside(["doctor", "--deepspeed", "ds.json"]) == 2
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "ds.json: 8 problems"
    for line, words in zip(
        lines,
        (
            "train_batch_size = 32: set by batch.sequences in the recipe; remove it here, or",
            "steps_per_print = 0; must be a whole number of 1 or more",
            'zero_optimization.stage = 4; must be 0, 1, 2, 3 or "auto"',
            "zero_optimization.reduce_bucket_size = -1: ",
            "unknown key 'zero_optimization.overlap_com'; did you mean overlap_comm",
            "unknown key 'comms_logger.enable'; did you mean enabled?",
            "unknown key 'tensorboard.enable'; did you mean enabled?",
            "unknown key 'timers.throughput.enable'; did you mean enabled?",
        ),
        strict=True,
    ):
        assert line.startswith(f"- {words}"), line
    assert run_inside(["doctor", "--deepspeed", "ds.json", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found == {"file": "ds.json", "problems": [line[2:] for line in lines]}
    Path("ds.json").write_text(json.dumps(ACCEPTED), encoding="utf-8")
    assert run_inside(["doctor", "--deepspeed", "ds.json"]) == 0
    assert capsys.readouterr().out == "ds.json: no problems\n"
    for wrong in ("{", "[]"):
        Path("ds.json").write_text(wrong, encoding="utf-8")
        assert run_inside(["doctor", "--deepspeed", "ds.json"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("fastbert: ds.json: ") and err.count("\n") == 1


def test_a_start_names_all_that_deepspeed_has_against_a_file(tmp_path):
    content = {key: value for key, value in EVERY_KIND.items() if key in OWN}
    content["zero_optimization"] = {"overlap_com": True}
    del content["steps_per_print"]
    with pytest.raises(InputError, match=r"\(4\) unknown key 'timers.throughput.enable'"):
        check_settings(read(tmp_path, content))


@pytest.mark.parametrize(
    "content, words",
    [
        ({"zero_optimization": True}, "zero_optimization = true; must be an object"),
        ({"steps_per_print": 0}, "steps_per_print = 0; must be a whole number of 1 or more"),
        ({"wall_clock_breakdown": "yes"}, 'wall_clock_breakdown = "yes"; must be true or false'),
        (
            {"zero_optimization": {"allgather_bucket_size": 11}},
            "zero_optimization.allgather_bucket_size = 11; must be even",
        ),
    ],
)
def test_a_value_of_the_wrong_type(tmp_path, content, words):
    assert refused(tmp_path, content) == f"ds.json: {words}"


@pytest.mark.parametrize(
    "content", ["{", "[]", "3", '{"a": ' * 100_000, "", '{"bf16": {}, "bf16": {}}']
)
def test_rubbish_is_one_line(tmp_path, content):
    assert refused(tmp_path, content).startswith("ds.json: ")


@pytest.mark.parametrize("levels", [40, 300, 900, 985])
@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"a": ', "}")])
@pytest.mark.parametrize(
    "key", ["optimizer", "zero_optimization", "wandb", "train_batch_size", "x"]
)
def test_values_of_any_depth_are_one_line(tmp_path, key, begin, end, levels):
    value = begin * levels + ("1" if begin != "[" else "") + end * levels
    assert refused(tmp_path, f'{{"{key}": {value}}}').startswith("ds.json: values are nested in m")


def test_the_key_that_is_there_twice_is_found_among_many(tmp_path):
    """In time that grows with the number of keys, and not with its square."""
    keys = ", ".join(f'"k{i}": 1' for i in range(200_000))
    assert refused(tmp_path, f'{{{keys}, "bf16": {{}}, "bf16": {{}}}}').startswith(
        "ds.json: key 'bf16' is there twice"
    )


def test_a_missing_file_names_the_recipe():
    config = RunConfig(data="dataset", runtime=RuntimeConfig(deepspeed="no/such.json"))
    with pytest.raises(
        InputError, match=r"^demo.toml: runtime.deepspeed = 'no/such.json': no such file"
    ):
        read_ds_config(config, "demo.toml")


@pytest.mark.parametrize("key", ["activation_checkpointing", "elasticity", "amp", "a_later_key"])
def test_what_fastbert_does_not_do_may_be_there_if_it_is_off(tmp_path, key):
    for off in (False, None, "auto", {}, {"enabled": False, "more": 3}, {"a": False, "b": {}}):
        assert key not in read(tmp_path, {key: off}).values
    for on in ({"enabled": True}, {"a": 1}, {"a": {"b": 0}}, "on", 7, 0):
        assert refused(tmp_path, {key: on}).startswith(
            f"ds.json: {key} = {json.dumps(on)} is no setting of fastbert; remove it"
        )


def test_defaults_of_what_fastbert_does_not_do(tmp_path):
    read(tmp_path, NOTHING)
    for on in (
        {"gradient_predivide_factor": 2.0},
        {"gradient_allreduce_op": "sum"},
        {"sequence_parallel_size": True},
    ):
        assert "is no setting of fastbert" in refused(tmp_path, on)


@pytest.mark.parametrize("place", sorted(ONLY))
def test_what_would_break_the_training_or_its_checkpoints(tmp_path, place):
    good, why = ONLY[place]
    bad = {bool: not good[0], int: 17, float: 17.0, str: "nvme"}[type(good[0])]
    for value in (*good, "auto"):
        read(tmp_path, nested(place, value))
    message = refused(tmp_path, nested(place, bad))
    assert (
        message == f"ds.json: {place} = {json.dumps(bad)}; "
        f"must be {' or '.join(map(json.dumps, good))}: {why}"
    )


def test_a_package_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (
        refused(tmp_path, {"wandb": {"enabled": True}})
        == "ds.json: wandb.enabled = true needs a package: pip install wandb, or remove it"
    )
    read(tmp_path, {"wandb": {"enabled": False}})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    read(tmp_path, {"wandb": {"enabled": True}})


@pytest.mark.parametrize("place", sorted(NEVER))
def test_what_works_in_no_form(tmp_path, place):
    assert (
        refused(tmp_path, nested(place, {"a": 1}))
        == f'ds.json: {place} = {{"a": 1}} does not work with fastbert: {NEVER[place]}; remove it'
    )


@pytest.mark.parametrize("stage", [4, -1, "2", True, {}])
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
        (None, "fp32", 2, "adamw", 1),
        (0, "fp32", 8, "adamw", 0),
        (3, "bf16", 1, "sgd", 3),
        (0, "bf16", 1, "adamw", "zero_optimization.stage = 0 does not train in bf16"),
        ("auto", "bf16", 1, "lamb", 'optimizer.name = "lamb" needs it'),
        ("auto", "bf16", 1, "muon", 1),
        (2, "fp32", 2, "muon", 2),
        (2, "bf16", 2, "stable_adamw", 2),
        (3, "bf16", 2, "stable_adamw", 'does not go with optimizer.name = "stable_adamw"'),
        (
            3,
            "fp32",
            2,
            "muon",
            'zero_optimization.stage = 3 does not go with optimizer.name = "muon"; set it to 0, 1',
        ),
        (
            2,
            "fp32",
            1,
            "lamb",
            'zero_optimization.stage = 2 does not go with optimizer.name = "lamb"',
        ),
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


def test_groups_of_ranks_come_out_even(tmp_path):
    settings = read(tmp_path, {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}})
    for world in (1, 2, 4, 8):
        assert settings.stage(precision="fp32", world=world, optimizer="adamw") == 3
    with pytest.raises(
        InputError,
        match=r"zero_optimization.zero_hpz_partition_size = 4 does not divide the number of "
        r"ranks, 6",
    ):
        settings.stage(precision="fp32", world=6, optimizer="adamw")


def test_the_projects_own_file_is_valid():
    settings = read_ds_config(
        RunConfig(
            data="dataset",
            optimizer=OptimizerConfig(),
            runtime=RuntimeConfig(deepspeed=str(ROOT / "fastbert/recipes/ds_config.json")),
        ),
        "r",
    )
    assert settings.stage(precision="fp32", world=1, optimizer="adamw") == 0
    assert settings.stage(precision="bf16", world=64, optimizer="adamw") == 1
    check_settings(settings)


def test_the_tables_fit_together_and_deepspeed():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    assert not set(OWN) & set(RECIPE) and not set(NOTHING) & {*OWN, *RECIPE}
    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    }
    for place in (*ONLY, *NEVER):
        section, _, key = place.rpartition(".")
        if section in models:
            fields = models[section].model_fields
            known = {*fields, *(field.alias for field in fields.values())}
        else:
            known = set(SECTIONS[section]) if section else set(OWN)
        assert key in known or place in NEVER, place


# What is taken, on real ranks.

MEMORY = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
OTHERWISE = {  # every setting that works, set to what it is not by default
    "overlap_comm": True,
    "contiguous_gradients": False,
    "reduce_scatter": False,
    "allgather_partitions": False,
    "use_multi_rank_bucket_allreduce": False,
    "ignore_unused_parameters": False,
    "elastic_checkpoint": True,
    "load_from_fp32_weights": False,
    "parameter_alignment": True,
    "sub_group_size": 5000,
    "zero_hpz_partition_size": 2,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 1000,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_use_all_reduce_for_fetch_params": True,
}
TRY = """
import json, os, sys, torch
from fastbert.data.batches import Batches
from fastbert.data.dataset import open_dataset
from fastbert.training.ds_config import DeepSpeedSettings
from fastbert.training.engine import Engine
from fastbert.cluster.group import join
from tests.test_engine import CONFIG, new_model, state_of

dataset = open_dataset(os.environ["DATASET"])
found = {}
with join(60) as group:
    packs = [Batches(dataset, CONFIG).step(i, group.rank, group.world) for i in range(3)]

    def run(zero, state, step):
        small = {"reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000}
        content = {"zero_force_ds_cpu_optimizer": False, "zero_optimization": {**small, **zero}}
        settings = DeepSpeedSettings("ds.json", content)
        with Engine(new_model(dataset), CONFIG, settings, "fp32", group, state, step) as engine:
            losses = [engine.step(packs[i], 1e-2).loss for i in range(step, len(packs))]
            return losses, state_of(engine)

    plain = DeepSpeedSettings("", {"zero_optimization": {"stage": 0}})
    with Engine(new_model(dataset), CONFIG, plain, "fp32", group) as engine:
        engine.step(packs[0], 1e-2)
        state = state_of(engine)
    found["plain"] = run({"stage": 0}, state, 1)
    for name, zero in json.loads(os.environ["CASES"]).items():
        found[name] = run(zero, state, 1)
    if group.rank == 0:
        torch.save(found, "found.pt")
"""


@pytest.mark.slow
def test_what_is_taken_trains_and_resumes_and_what_is_refused_would_not(small_dataset, tmp_path):
    """Two gloo ranks resume from a checkpoint of stage 0 for two steps.

    Losses and the final state are those of stage 0. This also proves that round_robin_gradients
    must be refused: it would give each parameter the state of another one.
    """
    cases = {
        f"{name} {stage}": {"stage": stage, **zero}
        for stage in (1, 2, 3)
        for name, zero in (("otherwise", OTHERWISE), ("memory", MEMORY))
    }
    cases["round robin"] = {"stage": 1, "round_robin_gradients": True}
    for zero in cases.values():
        if "round_robin_gradients" not in zero:
            check_settings(read(tmp_path, {"zero_optimization": zero}))
    variables = {
        "DATASET": str(small_dataset.path),
        "CASES": json.dumps(cases),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
    }
    variables["MASTER_PORT"] = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TRY],
            env=environment(**variables, RANK=rank, LOCAL_RANK=rank),
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    losses, state = found["plain"]
    for name, (losses_there, state_there) in found.items():
        pairs = [
            (tensor, state_there[slot][key])
            for slot, tensors in state.items()
            for key, tensor in tensors.items()
        ]
        same = (
            losses_there == pytest.approx(losses, rel=1e-5),
            all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs),
        )
        assert same == ((True, True) if name != "round robin" else (False, False)), name
