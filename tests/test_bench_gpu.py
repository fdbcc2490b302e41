"""`make gpu` as far as a machine without a GPU can show it.

The tests cover a dry run of the whole flow, kills, crashes and hangs, and the handling of results.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import counters, items, measure, predicted, proposals, report, smoke
from benchmarks.gpu.__main__ import PARTS, Part, Session
from benchmarks.gpu.place import Place
from benchmarks.gpu.results import FILE, Results, read
from benchmarks.harness.record import read_record
from benchmarks.kernels.cases import Case, arguments, outcome
from benchmarks.kernels.tune import Key
from benchmarks.step.made_up_training import Sizes, made_up_batch
from fastbert.config import BertConfig
from fastbert.models.bert import BertForPreTraining
from fastbert_kernels._tiles import TABLE
from fastbert_kernels.checker.sanitizer import sanitize
from tests.tiers import slow

ROOT = Path(__file__).parents[1]
PATIENCE_S = 300  # for delays on a busy machine

# An image with torch, Triton, numpy, pytest and pytest-benchmark has none of these.
ABSENT = (
    *(
        "deepspeed",
        "matplotlib",
        "transformers",
        "tokenizers",
        "pyarrow",
        "typer",
        "rich",
        "psutil",
        "safetensors",
        "tensorboard",
    ),
    *(
        "zstandard",
        "hypothesis",
        "liger_kernel",
        "cut_cross_entropy",
        "datasets",
        "sklearn",
        "scipy",
        "pandas",
        "tomli",
    ),
)
BLOCKER = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> dict[str, str]:
    """The environment of a process, and of its children, with the imports of the image."""
    folder = tmp_path_factory.mktemp("image")
    (folder / "sitecustomize.py").write_text(BLOCKER, encoding="utf-8")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name != "TRITON_INTERPRET" and not name.startswith("PYTEST_")
    }
    path = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "kernels")])
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def python(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=PATIENCE_S
    )


def lines_of(out: Path, **wanted) -> list[dict]:
    return [
        line for line in read(out) if all(line.get(name) == value for name, value in wanted.items())
    ]


def until(true, what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


# ------------------------------------------------------------------------------ the whole flow


@pytest.mark.slow
def test_every_part_can_be_loaded_in_the_image(image):
    names = sorted(
        f"benchmarks.gpu.{path.stem}"
        for path in (ROOT / "benchmarks/gpu").glob("*.py")
        if path.stem != "__init__"
    )
    assert {f"benchmarks.gpu.{part.name}" for part in PARTS} - {"benchmarks.gpu.tests"} < set(names)
    blocked = (
        f"import importlib.util, sys; assert not any(map(importlib.util.find_spec, {ABSENT!r}))"
    )
    code = f"{blocked}\nfor name in sys.argv[1:]: importlib.import_module(name)"
    result = python(image, "-c", code, *names)
    assert result.returncode == 0, result.stderr


def children_of(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").glob("*/children")
        for child in task.read_text().split()
    ]


def ended(pid: int) -> bool:
    """Return whether the process is gone, or a zombie that has not been reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.slow
def test_a_dry_run_keeps_what_it_has_when_it_is_killed(image, tmp_path):
    """A process of a part is killed, and the next item runs; then the whole run is killed."""
    out = tmp_path / "out"
    arguments = [
        "-m",
        "benchmarks.gpu",
        "--out",
        str(out),
        "--dry-run",
        "--parts",
        "curves",
        "tuning",
        "--seconds",
        "3000",
    ]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=image,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            until(lambda: lines_of(out, what="begin", item="dropout 0"), "the first curve")
            os.kill(children_of(run.pid)[0], signal.SIGKILL)
            until(
                lambda: lines_of(out, what="curve", dropout_p=0.1, implementation="reference"),
                "the second item of the part",
            )
            (child,) = children_of(run.pid)
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            until(lambda: ended(child), "the child to end with its parent")
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)

    for text in (out / FILE).read_text(encoding="utf-8").splitlines()[:-1]:
        assert json.loads(text)["part"]
    (crash,) = lines_of(out, what="crashed")
    assert (crash["part"], crash["item"]) == (
        "curves",
        "dropout 0",
    ) and f"with {-signal.SIGKILL}" in crash["why"]
    assert not lines_of(out, what="part")  # none came to its end
    result = python(image, "-m", "benchmarks.gpu.report", out)
    assert result.returncode == 0, result.stderr
    page = (out / report.NAME).read_text(encoding="utf-8")
    assert "DRY" in page and "| curves | **not finished** | - |" in page and crash["why"] in page


# ------------------------------------------------------------------- crashes, hangs, the gate


class Scripted(Session):
    """A session whose parts are scripts: each runs with `out` and `add(what, **fields)`."""

    def __init__(self, out: Path, scripts: dict[str, str]):
        super().__init__(out, dry=False)
        self.scripts = scripts

    def commands(self, part: Part, until: float) -> list[list[str]]:
        head = f"""
        import os, sys, time
        from pathlib import Path
        from benchmarks.gpu.results import Results
        out = Path({str(self.out)!r})
        results = Results(out, {part.name!r}, False)
        add = results.add
        """
        return [
            [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(self.scripts[part.name])]
        ]


def run_scripts(out: Path, scripts: dict[str, str], seconds: float = PATIENCE_S) -> bool:
    return Scripted(out, scripts).run(
        [Part(name, 1) for name in scripts], time.monotonic() + seconds
    )


FINE = "add('begin', item='a'); add('end', item='a')"


def test_all_is_well(tmp_path):
    assert run_scripts(tmp_path, {"smoke": FINE, "attention": FINE})
    assert [line["part"] for line in lines_of(tmp_path, what="part", outcome="passed")] == [
        "smoke",
        "attention",
    ]


@pytest.mark.parametrize(
    "script",
    [
        "add('check', case='norm', shape={}, verdict='wrong', error_over_allowed=1.5); sys.exit(3)",
        "add('begin', item='norm'); add('failed', item='norm', why='does not compile'); "
        "add('end', item='norm'); sys.exit(3)",
        "add('begin', item='norm'); os.kill(os.getpid(), 11)",
        "import nothing_of_this_name",
    ],
    ids=["wrong", "failed", "segmentation fault", "cannot begin"],
)
def test_nothing_is_measured_where_something_is_wrong(tmp_path, script):
    assert not run_scripts(
        tmp_path,
        {
            "smoke": f"if not results.has('begin'): {script}" if "11" in script else script,
            "attention": FINE,
        },
    )
    assert [line["part"] for line in lines_of(tmp_path, what="part")] == ["smoke"]
    assert lines_of(
        tmp_path, what="stopped"
    ) and "**Stopped: smoke found something wrong" in report.page(tmp_path)


def test_a_part_continues_after_what_broke_it_and_the_next_part_runs(tmp_path):
    items = """
        for item in "abc":
            if not results.has("begin", item=item):
                add("begin", item=item)
                if item == "b": os._exit(4)  # "broken": it has written what failed
                if item == "c": os.kill(os.getpid(), 9)
                add("end", item=item)
        """
    assert not run_scripts(tmp_path, {"attention": items, "operations": FINE})
    assert [line["item"] for line in lines_of(tmp_path, part="attention", what="begin")] == [
        "a",
        "b",
        "c",
    ]
    assert {line["item"] for line in lines_of(tmp_path, part="attention", what="crashed")} == {
        "b",
        "c",
    }
    assert [line["outcome"] for line in lines_of(tmp_path, what="part")] == [
        "crashed once or more",
        "passed",
    ]


def test_a_part_that_does_not_end_is_stopped_and_keeps_what_it_has(tmp_path):
    hangs = "add('begin', item='a'); add('bound', case='kept'); time.sleep(1000)"
    begin = time.monotonic()
    assert not run_scripts(tmp_path, {"attention": hangs, "operations": FINE}, seconds=8)
    assert time.monotonic() - begin < PATIENCE_S
    assert lines_of(tmp_path, what="bound", case="kept") and lines_of(
        tmp_path, what="cut off", item="a"
    )
    assert [line["outcome"] for line in lines_of(tmp_path, what="part")] == [
        "stopped at its limit",
        "passed",
    ]


@pytest.mark.slow
def test_an_item_that_hangs_ends_its_process_and_one_that_fails_does_not(image, tmp_path):
    code = f"""
    import sys, time, torch
    from pathlib import Path
    from benchmarks.gpu.items import Item, Part
    from benchmarks.gpu.place import Place
    part = Part("attention", Place(torch.device("cpu"), False, "sm_90"), Path({str(tmp_path)!r}))
    items = [
        Item("fails", lambda seconds: 1 / 0),
        Item("hangs", lambda seconds: time.sleep(1000), patience_s=0.5),
        Item("fine", lambda seconds: None),
    ]
    sys.exit(part.walk(items, time.time() + 0.5))
    """
    first = python(image, "-c", textwrap.dedent(code))
    assert first.returncode == 1 and "Timeout" in first.stderr and "time.sleep" not in first.stdout
    second = python(image, "-c", textwrap.dedent(code))
    assert second.returncode == 0, second.stderr  # the failure is on disk
    assert [line["item"] for line in lines_of(tmp_path, what="begin")] == ["fails", "hangs", "fine"]
    assert [line["why"] for line in lines_of(tmp_path, what="failed")] == [
        "ZeroDivisionError: division by zero"
    ]


# ------------------------------------------------------------------------------ right or wrong


def test_a_wrong_step_of_the_model_is_seen():
    """The smoke check rejects other dropout masks, another weight, and NaN."""
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    batch = made_up_batch(Sizes("tiny", 100, 300, 40), 0, torch.device("cpu"))
    torch.manual_seed(0)
    model = BertForPreTraining(config, 100, "reference").to(torch.bfloat16).train()
    wide = BertForPreTraining(config, 100, "reference").train()
    wide.load_state_dict(model.state_dict())
    exact, plain = (smoke.outcome_of(one, "reference", batch, True) for one in (wide, model))

    def worst(values: dict[str, torch.Tensor]) -> float:
        return max(
            smoke.share_of_allowed(values[name], plain[name], value)
            for name, value in exact.items()
        )

    assert worst(plain) <= 0.5 and worst(exact) == 0
    assert (
        worst(
            smoke.outcome_of(
                model,
                "reference",
                dataclasses.replace(batch, dropout_seeds=batch.dropout_seeds + 1),
                True,
            )
        )
        > 1
    )
    with torch.no_grad():
        model.layers[1].feed_forward.bias[3] += 1
    assert worst(smoke.outcome_of(model, "reference", batch, True)) > 1
    assert (
        worst(plain | {"embeddings.word": torch.full_like(plain["embeddings.word"], float("nan"))})
        == math.inf
    )
    assert worst(plain | {"loss": torch.tensor(float("inf"))}) == math.inf


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets the kernels")
def test_what_is_right_is_called_right_and_a_nan_wrong(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    part = items.Part("smoke", Place(torch.device("cpu"), False, "sm_90"), tmp_path)
    cases = [Case("gelu", "tiny", {"T": 17, "F": 80}), Case("norm", "tiny", {"T": 9, "D": 80}, 0.1)]
    with sanitize():
        for case in cases:
            measure.compare(part, case, arguments(case, torch.bfloat16, part.place.device))
    assert not part.wrong and {line["verdict"] for line in read(tmp_path)} == {"right"}

    def with_nan(*given) -> list[torch.Tensor]:
        result, *gradients = outcome(*given)
        gradients[-1].view(-1)[0] = float("nan")
        return [result, *gradients]

    monkeypatch.setattr(measure, "outcome", with_nan)
    with sanitize():
        measure.compare(part, cases[0], arguments(cases[0], torch.bfloat16, part.place.device))
    assert part.wrong and (
        read(tmp_path)[-1]["verdict"],
        read(tmp_path)[-1]["error_over_allowed"],
    ) == ("wrong", "inf")


def test_smoke_has_every_kernel_and_every_way_to_call_it():
    cases = smoke.cases(2048, 5000)
    assert len({str(case) for case in cases}) == len(cases)
    attention = [case for case in cases if case.operation == "attention"]
    assert {
        (max(case.shape["lengths"]) <= 128, "R" in case.shape, case.dropout_p) for case in attention
    } == {(short, cut, p) for short in (True, False) for cut in (True, False) for p in (0.0, 0.1)}
    assert {case.operation for case in cases} == {
        "attention",
        "mlm_loss",
        "norm",
        "gelu",
        "embedding",
    }


# ------------------------------------------------------------------------------------- results


def test_a_piece_of_a_line_costs_that_line_alone(tmp_path):
    results = Results(tmp_path, "smoke", dry=False)
    results.add("time", ms=1.0)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"part": "smoke", "what": "ti')  # a process was killed here
    results.add("time", ms=float("nan"), other=[float("inf"), {"a": None}])
    results.add("time", ms=3.0)
    assert [line["ms"] for line in read(tmp_path)] == [1.0, "nan", 3.0]
    assert read(tmp_path)[1]["other"] == ["inf", {"a": None}]


def test_many_processes_write_whole_lines(tmp_path):
    code = f"""
    from pathlib import Path
    from benchmarks.gpu.results import Results
    results = Results(Path({str(tmp_path)!r}), "tests", False)
    for number in range(100): results.add("time", number=number, text="x" * 6000)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    for process in [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]:
        assert process.wait(PATIENCE_S) == 0
    texts = (tmp_path / FILE).read_text(encoding="utf-8").splitlines()
    assert sorted(json.loads(text)["number"] for text in texts) == sorted(3 * list(range(100)))


def test_the_report_has_every_section_and_goes_on_record(tmp_path, monkeypatch):
    """The report is made from lines as the parts write them."""
    add = Results(tmp_path, "attention", dry=False).add
    add(
        "machine",
        facts={"device": "NVIDIA H100 80GB HBM3", "commit": "abc"},
        installed=[],
        tools=["ncu"],
    )
    case = {
        "case": "attention n=512 p=0",
        "operation": "attention",
        "shape": {"T": 512, "longest": 512, "K": 64},
        "dropout_p": 0.0,
        "dtype": "bf16",
    }
    spread = {
        "ms": 1.0,
        "low_ms": 0.9,
        "high_ms": 1.1,
        "rounds": 9,
        "rate": 3e14,
        "unit": "FLOP/s",
        "share_of_peak": 0.3,
        "extra_bytes": 10,
    }
    add("check", **case, error_over_allowed=0.5, verdict="right")
    add(
        "time",
        **case,
        **{"pass": "forward"},
        implementation="triton",
        tile={},
        predicted_ms=2.0,
        **spread | {"ms": 4.0},
        alone=True,
    )
    add(
        "time",
        **case,
        **{"pass": "forward"},
        implementation="triton",
        tile={},
        predicted_ms=2.0,
        **spread,
    )
    add(
        "time",
        **case,
        **{"pass": "forward"},
        implementation="SDPA flash",
        tile=None,
        predicted_ms=None,
        **spread | {"ms": 1.5},
    )
    add("missing", **case, implementation="SDPA cuDNN", why="failed: no kernel")
    row = {"bits": 16, "size": 64, "num_warps": 4}
    add(
        "tile",
        **case,
        **{"pass": "forward"},
        tile={"kernel": "attention_forward", **row},
        predicted_us=9,
        ms=0.8,
        present_ms=1.0,
        ratio=0.8,
        verdict="better",
    )
    add("counters", case=case["case"], kernel="_forward_kernel", us=3.0, waits="barrier 1.00")
    step = {
        "case": "step T=4096 n=128",
        "pass": "gpu",
        "implementation": "triton",
        "tokens_per_s": 1e6,
        "predicted_ms": 20,
    }
    add("step", shape={}, **step, **{name: spread[name] for name in ("ms", "low_ms", "high_ms")})
    add("bound", case="step T=4096 n=128", submit_over_gpu=1.3, verdict="bound by the processor")
    add(
        "curves agree",
        dropout_p=0.1,
        steps=100,
        falls=True,
        distance=1e-3,
        distance_of_reference=1e-3,
        first=9.0,
        last=6.0,
        verdict="wrong",
    )
    add(
        "tuned",
        kernel="attention_dq",
        case=case["case"],
        first=row,
        best=row | {"num_warps": 8},
        ratio=0.9,
        tried=3,
    )
    (tmp_path / report.CLOCKS).write_text(
        "2026/01/01 10:00:00, 1980, 500.1, 60, 99\n2026/01/01 10:00:01, 345, 90.0, 40, 0\nbroken"
    )
    page = report.page(tmp_path)
    for words in (
        "**1 results are wrong or failed**",
        "| attention n=512 p=0 | forward | present tiles | 1.000 (0.900 to 1.100) "
        "| 300.0 TFLOP/s | 30 % | 2.000 (0.50x) "
        "| SDPA flash 1.500 | 1.50 | 0 | right |",
        "- attention: SDPA cuDNN: failed: no kernel",
        f"For tiles.json: `{json.dumps(row)}`",
        "bound by the processor; queueing takes 1.30 of the GPU's time",
        "| attention n=512 p=0 | _forward_kernel | 3.0 | barrier 1.00 |",
        '`{"bits": 16, "size": 64, "num_warps": 8}` takes 0.90 of the time',
        "1 samples while the GPU worked: 1980 to 1980 MHz",
        "- attention: dropout 0.1: the curves do not agree",
        "- device: NVIDIA H100 80GB HBM3",
        "| attention n=512 forward, over FlashAttention-2's 282 TFLOP/s "
        "| >= 1.15 | 1.06 | **not reached** |",
    ):
        assert words in page, words

    monkeypatch.setattr(report, "ROOT", tmp_path)
    folder = report.record(tmp_path)
    assert folder == tmp_path / "benchmarks/results/nvidia-h100-80gb-hbm3"
    written = read_record(folder / "gpu.json")
    # No complete pass was timed.
    assert (
        written.ratios == {}
        and written.header["commit"] == "abc"
        and len(written.rows) == len(read(tmp_path))
    )


def test_a_line_that_nobody_foresaw_costs_a_section_of_the_report(tmp_path):
    Results(tmp_path, "attention", dry=False).add("time", case="with nothing else")
    Results(tmp_path, "attention", dry=False).add("part", outcome="passed", seconds=3.0)
    page = report.page(tmp_path)
    assert "This section cannot be made: KeyError" in page and "| attention | passed | 3 |" in page


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("no GPU that torch can use", ["benchmarks.gpu", "--out", "new"]),
        slow("is not empty", ["benchmarks.gpu", "--out", "full", "--dry-run"]),
        slow("has no results.jsonl", ["benchmarks.gpu.report", "new"]),
    ],
)
def test_a_command_that_cannot_run_says_so_in_one_line(image, tmp_path, words, command):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/report.md").touch()
    places = {name: str(tmp_path / name) for name in ("new", "full")}
    result = python(image, "-m", *(places.get(word, word) for word in command))
    assert result.returncode == 2 and words in result.stdout and not result.stderr, result.stderr
    assert not (tmp_path / "new").exists()


# --------------------------------------------------------------- tiles, predictions, counters


def test_proposed_tiles_are_read(tmp_path):
    path = tmp_path / "proposed_tiles.json"
    assert proposals.read_proposals("sm_90", path) == []
    path.write_text("\n")
    assert proposals.read_proposals("sm_90", path) == []
    present = json.loads(TABLE.read_text(encoding="utf-8"))["sm_90"]["gelu_forward"][0]
    new = present | {"num_warps": 2 * present["num_warps"]}
    path.write_text(
        json.dumps(
            {
                "about": "text",
                "sm_90": {"gelu_forward": [present, new | {"predicted_us": 12.5, "note": "why"}]},
            }
        )
    )
    key = Key("gelu_forward", present["bits"], present["size"])
    # This is not the present row.
    assert proposals.read_proposals("sm_90", path) == [proposals.Proposal(key, new, 12.5)]
    assert proposals.read_proposals("sm_80", path) == []


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"sm_90": [1]}',
        '{"sm_90": {"gelu_forward": [{"bits": 16}]}}',
        '{"sm_90": {"no_kernel": [{"bits": 16, "size": 1}]}}',
    ],
)
def test_a_table_of_proposals_that_cannot_be_read_is_one_line(tmp_path, text):
    path = tmp_path / "proposed_tiles.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^proposed_tiles\.json: [^\n]*$"):
        proposals.read_proposals("sm_90", path)


def test_the_best_proposal_wins_over_all_its_cases():
    def line(warps: int, ratio: float | None, **more) -> dict:
        tile = {"kernel": "norm_backward", "bits": 16, "size": 768, "num_warps": warps}
        return {"what": "tile", "tile": tile} | ({} if ratio is None else {"ratio": ratio}) | more

    found = proposals.winners(
        [
            line(2, 0.9),
            line(2, 0.9),
            line(4, 0.5),
            line(4, 1.3),
            line(8, 0.1),
            line(8, None, verdict="wrong"),
            line(1, 1.5),
        ]
    )
    assert [
        (winner.key, winner.row and winner.row["num_warps"], round(winner.ratio, 2), winner.cases)
        for winner in found
    ] == [(Key("norm_backward", 16, 768), 4, 0.81, 2)]
    assert proposals.winners([line(2, 0.99)])[0].row is None  # the difference is only noise
    assert proposals.winners([line(2, None, verdict="does not run")])[0].row is None


def test_a_prediction_holds_for_its_device_and_tiles():
    old, new = {"num_stages": 2}, {"num_stages": 3, "BLOCK_Q": 64, "BLOCK_K": 128, "maxnreg": 128}
    case = ("attention n=512 p=0", "backward")

    def tflops(device: str, row: dict) -> float | None:
        ms = predicted.predicted_ms(
            device, *case, {"attention_dkdv": row, "attention_dq": row}, work=1e12
        )
        return ms and round(1 / (ms / 1e3))

    h100 = "NVIDIA H100 80GB HBM3"
    assert (
        tflops(h100, old),
        tflops(h100, new),
        tflops(h100, {"num_stages": 1}),
        tflops("NVIDIA A100", old),
    ) == (215, 265, None, None)
    assert predicted.predicted_ms(h100, "step T=16384 n=128", "gpu") == 20


METRICS = {
    "gpu__time_duration.sum": "312,416",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "67.25",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "56.5",
    "dram__bytes_read.sum": "75000000",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "2.5",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "0.5",
    "launch__block_dim_x": "n/a",
}
SHOWN = {
    "us": 312.416,
    "issue slots, %": 67.25,
    "matrix units, %": 56.5,
    "memory read MB": 75.0,
    "waits": "long_scoreboard 2.50, barrier 0.50",
}


def csv_line(*words: str) -> str:
    return ",".join(f'"{word}"' for word in words)


def test_both_forms_of_the_profilers_csv_are_read():
    head = ["==PROF== Connected to process 1", "==PROF== Profiling", ""]
    wide = [
        csv_line("ID", "Kernel Name", *METRICS),
        csv_line("", "", *("unit" for _ in METRICS)),
        csv_line("0", "_forward_kernel", *METRICS.values()),
        csv_line("1", "_dq_kernel(args)", *METRICS.values()),
        "==PROF== Disconnected",
    ]
    kernels = (("0", "_forward_kernel"), ("1", "_dq_kernel(args)"))
    long = [csv_line("ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value")]
    long += [
        csv_line(*kernel, metric, "unit", value)
        for kernel in kernels
        for metric, value in METRICS.items()
    ]
    for form in (wide, long):
        kernels = counters.parse("\n".join(head + form))
        assert [name for name, _ in kernels] == ["_forward_kernel", "_dq_kernel"]
        assert all(counters.shown(values) == SHOWN for _, values in kernels)
    assert counters.parse("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission") == []
    assert counters.parse("") == []


def test_every_part_has_its_file():
    for part in PARTS:
        assert importlib.util.find_spec(
            f"benchmarks.gpu.{'kernel_tests' if part.name == 'tests' else part.name}"
        )
