"""The checker as people use it: the command, the pytest plugin, the report, the lint, the bound."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs TRITON_INTERPRET=1, which tests/conftest.py sets where there is no GPU",
        allow_module_level=True,
    )

from fastbert_kernels.checker import template
from fastbert_kernels.checker.arithmetic import round_fp8
from fastbert_kernels.checker.bounds import compare, compare_small, relative_error, stand_in
from fastbert_kernels.checker.cases import Check, carry_out, check
from fastbert_kernels.checker.clocks import Clocks
from fastbert_kernels.checker.command import main
from fastbert_kernels.checker.execute import NO_BACKWARD, launch_both_ways
from fastbert_kernels.checker.lint import NAMES, lint_source
from fastbert_kernels.checker.machine_code import amd_load_widths
from fastbert_kernels.checker.noise import Noise
from fastbert_kernels.checker.report import Finding, count
from fastbert_kernels.checker.serial import Serial
from fastbert_kernels.checker.shrink import shrink
from fastbert_kernels.checker.signs import one_sided, unread
from tests.wrong_kernels import WRONG

ROOT = Path(__file__).parents[1]
RULES = ROOT / "docs/checker/rules"


def python(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python that has imported nothing yet, and does not interpret by itself."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**inherited, "PYTHONPATH": path, **environment},
        timeout=300,
    )


# ---- the command


def test_the_template_is_a_check_that_passes(tmp_path, capsys):
    assert main(["--init"]) == 0
    file = tmp_path / "template_check.py"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    assert main([str(file)]) == 0
    assert "template_check: 0 faults, 0 notes, 8 cases" in capsys.readouterr().out


def test_the_command_interprets_finds_and_prints_json(tmp_path):
    file = tmp_path / "planted.py"
    text = (ROOT / "kernels/fastbert_kernels/checker/template.py").read_text(encoding="utf-8")
    wrong = "tl.store(out_ptr + i, x + y, mask=i < n)"
    assert wrong in text
    file.write_text(text.replace(wrong, "tl.store(out_ptr + i, x + y)"), encoding="utf-8")
    done = python(
        *("-m", "fastbert_kernels.checker", "planted.py", "--json"),
        *("--shapes", "n=100", "--dtypes", "fp16"),
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    (finding,) = [f for f in report["findings"] if f["severity"] == "fault"]
    line = 1 + text.splitlines().index(f"    {wrong}")
    assert finding["kind"] == "out of bounds"
    assert finding["kernel"] == "add_kernel"
    assert finding["line"] == f"{tmp_path.name}/planted.py:{line}"
    assert finding["program"] == [1, 0, 0]
    assert finding["tensor"] == "out_ptr"
    assert finding["offsets"] == list(range(100, 128))
    assert (finding["shape"], finding["dtype"]) == ({"n": 100}, "fp16")
    assert finding["smallest"] == {"n": 1}
    assert [case["dtype"] for case in report["cases"]] == ["fp16"]


BAD_INPUT = {
    "no file": (["missing.py"], "missing.py is not a file; --init prints one to start from"),
    "no name": (["empty.py"], "empty.py has no kernel; --init prints a file with all"),
    "fails": (["broken.py"], "broken.py fails in line 1: ZeroDivisionError: division by zero"),
    "size": (["good.py", "--shapes", "n=many"], "--shapes n=many: 'n=many' is not a size such as"),
    "size twice": (["good.py", "--shapes", "n=3,n=4"], "--shapes n=3,n=4: n has two sizes; give"),
    "other digits": (["good.py", "--shapes", "n=²"], "--shapes n=²: 'n=²' is not a size such as"),
    "no shapes": (["no_shapes.py"], "no_shapes: shapes = None; expected a list"),
    "other large size": (["other_large.py"], "inputs fails at {'rows': 9}: TypeError: missing a"),
    "inputs exit": (["inputs_exit.py"], "inputs fails at {'n': 1}: SystemExit: 0 ("),
    "reference exits": (
        ["reference_exits.py"],
        "the reference fails at {'n': 1}, fp32: SystemExit",
    ),
    "dtype": (["good.py", "--dtypes", "fp8"], "dtype = 'fp8'; known are fp32, bf16, fp16"),
    "no dtype": (["good.py", "--dtypes", ","], "good: dtypes is empty; give one at least"),
    "exits": (["exits.py"], ": SystemExit: 3"),
    "other size": (["good.py", "--shapes", "rows=3"], "inputs fails at {'rows': 3}: TypeError"),
    "shape": (["shape.py"], "shape: 'n' in shapes; expected a dict of sizes, such as"),
    "large": (["large.py"], "large: 2147483648 in large; expected a dict of sizes, such as"),
    "list": (["list.py"], "inputs returns list, expected a dict of arguments by name"),
    "name": (["name.py"], "inputs fails at {'n': 1}: NameError: name 'm' is not defined ("),
    "gradient": (["gradient.py"], "gradients has 'z', which is no floating-point input; there"),
    "jit": (["jit.py"], "kernel is a @triton.jit function; give the function that launches it"),
    "text": (["text.py"], "text: reference = 'add'; expected a function"),
    "one dtype": (["one_dtype.py"], "one_dtype: dtypes = 'fp32'; expected a list"),
    "number": (["number.py"], "number: shapes = 5; expected a list"),
    "ideal": (["ideal.py"], "least_bytes fails at {'n': 1}: TypeError: least_bytes()"),
    "reference": (["three.py"], "the reference fails at {'n': 1}, fp32: TypeError: returned int"),
    "architecture": (["good.py", "--compile", "sm_1"], "--compile: unknown architecture 'sm_1'"),
    "no architecture": (["good.py", "--compile", ","], "--compile: unknown architecture ','"),
    "nothing": ([], "name a file to check, or print a template with --init"),
}


APPENDED = {  # to the template
    "exits": "raise SystemExit(3)",
    "no_shapes": "shapes = None",
    "other_large": 'large = [{"rows": 9}]',
    "inputs_exit": "def inputs(dtype, n): raise SystemExit(0)",
    "reference_exits": "def reference(x, y): raise SystemExit(0)",
    "shape": 'shapes = {"n": 1}',
    "large": "large = [2**31]",
    "list": "inputs = lambda dtype, n: [torch.ones(n)]",
    "name": "inputs = lambda dtype, n: m",
    "gradient": 'gradients = ["x", "z"]',
    "jit": "kernel = add_kernel",
    "text": 'reference = "add"',
    "one_dtype": 'dtypes = "fp32"',
    "number": "shapes = 5",
    "ideal": "def least_bytes(n): return n",
    "three": "reference = lambda x, y: 3",
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty.py").write_text("", encoding="utf-8")
    Path("broken.py").write_text("1 / 0", encoding="utf-8")
    main(["--init"])
    Path("good.py").write_text(capsys.readouterr().out, encoding="utf-8")
    good = Path("good.py").read_text(encoding="utf-8")
    for name, text in APPENDED.items():
        Path(f"{name}.py").write_text(good + text, encoding="utf-8")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_kernel_that_exits_is_a_fault(tmp_path, capsys):
    main(["--init"])
    text = capsys.readouterr().out + "def kernel(x, y): raise SystemExit(0)"
    (tmp_path / "exits.py").write_text(text, encoding="utf-8")
    assert main([str(tmp_path / "exits.py"), "--dtypes", "fp32"]) == 1
    line = text.count("\n") + 1
    assert f"fault: exception: {tmp_path.name}/exits.py:{line}" in capsys.readouterr().out


ASKS_FOR_A_GPU = {  # what a launcher does, and what the report says of it; the last one does not
    "assert x.is_cuda": "AssertionError: ; kernels run on CPU tensors here: leave out what asks",
    "torch.cuda.device(x.device).__enter__()": "cpu; kernels run on CPU tensors here: leave out",
    "assert x.is_contiguous() and x.numel() > 9": "AssertionError: \n",
}


@pytest.mark.parametrize("line", ASKS_FOR_A_GPU)
def test_a_launcher_that_asks_for_a_gpu_is_told_how_kernels_run(line, tmp_path, capsys):
    main(["--init"])
    text = capsys.readouterr().out + f"def kernel(x, y):\n    {line}\n    return x + y\n"
    (tmp_path / "asks.py").write_text(text, encoding="utf-8")
    assert main([str(tmp_path / "asks.py"), "--dtypes", "fp32", "--shapes", "n=3"]) == 1
    assert ASKS_FOR_A_GPU[line] in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_report_that_cannot_be_written_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    assert main([template.__file__, "--json", "--shapes", "n=3", "--dtypes", "fp32"]) == 2
    error = "error: the report cannot be written: No space left on device\n"
    assert capsys.readouterr().err == error


def test_sizes_of_the_reference_that_fail_are_said():
    run = lambda x: x  # noqa: E731
    with pytest.raises(ValueError, match=r"the reference fails at \{'n': 3\}, fp32: ZeroDivision"):
        check(run, lambda x: 1 / 0, lambda dtype, n: {"x": torch.ones(n)}, [{"n": 3}])
    with pytest.raises(ValueError, match="shapes is empty"):
        check(run, run, lambda dtype: {}, [])


def test_what_a_check_prints_is_not_in_the_json(tmp_path, capsys):
    main(["--init"])
    text = "print('loaded')\n" + capsys.readouterr().out
    shown = text.replace("    tl.store(", "    tl.device_print('x', x)\n    tl.store(")
    file = tmp_path / "random.py"  # as a module that is in use
    file.write_text(shown.replace("    return x + y", "    print('called')\n    return x + y"))
    used, path = sys.modules["random"], list(sys.path)
    assert main([str(file), "--json", "--shapes", "n=3", "--dtypes", "fp32"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["faults"] == 0
    assert printed.err.startswith("loaded\n") and "called\n" in printed.err
    assert sys.modules["random"] is used and sys.path == path


@pytest.mark.slow
def test_an_interrupted_kernel_is_named_by_its_line(tmp_path, capsys):
    main(["--init"])
    text = capsys.readouterr().out
    endless = "    while i.to(tl.int64).sum() >= 0:\n        x += print('runs') or 1\n    tl.store("
    (tmp_path / "endless.py").write_text(text.replace("    tl.store(", endless), encoding="utf-8")
    line = text[: text.index("    tl.store(")].count("\n") + 1
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "fastbert_kernels.checker", "endless.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "kernels")},
    )
    assert process.stdout is not None and process.stdout.readline() == "runs\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert error in {f"interrupted at endless.py:{line + n}\n" for n in (0, 1)}


@pytest.mark.slow
def test_kernels_are_compiled_for_gpus_that_are_not_there(tmp_path, capsys):
    main(["--init"])
    (tmp_path / "mine.py").write_text(capsys.readouterr().out, encoding="utf-8")
    command = ("-m", "fastbert_kernels.checker", "mine.py", "--dtypes", "fp32", "--compile")
    done = python(*command, "sm_90,gfx942", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # 200 elements: not a multiple of 16, so loads cannot be wide.
    pattern = r"sm_90: add_kernel, fp32: \d+ registers, 0 bytes spilled, 0 bytes of shared memory"
    assert re.search(pattern, done.stdout), done.stdout
    assert "narrowest load of x_ptr 32 bits, y_ptr 32 bits" in done.stdout
    (amd,) = re.findall(r"gfx942: add_kernel, fp32: .*", done.stdout)
    assert "narrowest load of an unknown argument 32 bits" in amd
    done = python(*command, "sm_1", cwd=tmp_path)
    assert done.returncode == 2 and "unknown architecture 'sm_1'; known are sm_80" in done.stderr


@pytest.mark.parametrize(
    ("loads", "bits"),
    [
        (
            ["global_load_dwordx4 v[4:7], v[0:1], off", "buffer_load_dwordx2 v[2:3], v1, s[8:11]"],
            64,
        ),
        (["global_load_dwordx4 v[4:7], v[0:1], off", "global_load_ushort v2, v[0:1], off"], 16),
        (["buffer_load_sbyte_d16 v2, v1, s[8:11], 0 offen", "global_load_dword v3, v[0:1]"], 8),
        (["s_load_dwordx2 s[2:3], s[0:1], 0x0", "global_store_short v[0:1], v2, off"], None),
    ],
)
def test_the_narrowest_load_in_the_assembly_of_amd(loads, bits):
    """Scalar loads, which read arguments, do not count."""
    found = amd_load_widths({"amdgcn": "\n\t".join(["kernel:", *loads])})
    assert list(found.values()) == ([] if bits is None else [bits])


# ---- the plugin

SUITE = """
import pytest
import torch
from fastbert_kernels.checker.template import inputs, kernel, reference, shapes

@pytest.mark.kernel_checker
def test_right(kernel_checker):
    assert len(kernel_checker(kernel, reference, inputs, shapes).cases) == 8

@pytest.mark.kernel_checker
def test_wrong(kernel_checker):
    kernel_checker(kernel, lambda x, y: x - y, inputs, shapes)
"""


@pytest.mark.slow
def test_the_plugin_runs_checks_where_it_is_asked_to(tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE, encoding="utf-8")
    run = ("-m", "pytest", "-q", "--strict-markers", "-p", "fastbert_kernels.checker.plugin")
    done = python(*run, "--kernel-checker", cwd=tmp_path)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "fault: wrong result" in done.stdout and "Traceback" not in done.stdout


@pytest.mark.slow
def test_the_plugin_skips_checks_where_it_is_not_asked_to(tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE, encoding="utf-8")
    run = ("-m", "pytest", "-q", "--strict-markers", "-p", "fastbert_kernels.checker.plugin")
    skipped = python(*run, "-rs", cwd=tmp_path)
    assert "2 skipped" in skipped.stdout
    assert "run pytest with --kernel-checker" in skipped.stdout


def test_the_plugin_costs_nothing_where_it_is_not_used():
    code = (
        "import sys, fastbert_kernels.checker.plugin; "
        "print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))"
    )
    assert python("-c", code, cwd=ROOT).stdout.strip() == "[]"


def test_the_plugin_is_registered_once():
    text = (ROOT / "kernels/pyproject.toml").read_text(encoding="utf-8")
    assert '"fastbert_kernels.checker.plugin" = "fastbert_kernels.checker.plugin"' in text


# ---- the report


def test_a_report_has_bytes_against_the_ideal():
    wrong = WRONG["wrong constant"].check
    report = carry_out(
        Check(
            wrong.kernel,
            lambda x: 2.0001 * x,
            wrong.inputs,
            [{"n": 40}],
            dtypes=["fp32"],
            least_bytes=lambda itemsize, n: 2 * itemsize * n,
        )
    )
    assert not report.faults
    assert "1 launch, 320 bytes, 1.00 times the least" in str(report)


def test_shrinking_goes_on_as_long_as_the_finding_shows():
    def examine(shape):
        if shape["c"] == (1,):
            raise ValueError("no such shape")
        return [found] if shape["a"] >= 3 and sum(shape["c"]) >= 10 else []

    found = Finding("race", "", shape={"a": 40, "b": 7, "c": (20, 9)}, dtype="fp32")
    smallest = shrink(found, examine).smallest
    assert smallest is not None
    assert examine(smallest) and (smallest["a"], smallest["b"]) == (3, 1)
    assert sum(smallest["c"]) == 10


def test_numbers_agree_with_their_nouns():
    assert [count(n, "byte") for n in (0, 1, 1200)] == ["0 bytes", "1 byte", "1,200 bytes"]
    shapes = [{"n": 40}]
    report = str(carry_out(replace(WRONG["write past the end"].check, shapes=shapes)))
    assert "stores 8 elements past the end: the tensor spans 40 elements" in report
    assert "; 1 launch, 320 bytes" in report and report.endswith(": 1 fault, 1 note, 1 case")


# ---- the backward pass, where launches are only listed


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        called.append(dy.shape)
        return 2 * ctx.saved_tensors[0] * dy


called: list[torch.Size] = []


@pytest.mark.parametrize(
    "wrap", [lambda y: y, lambda y: {"y": y}, lambda y: (None, y), lambda y: [y]]
)
def test_both_ways_are_launched_whatever_holds_the_outputs(wrap):
    called.clear()
    assert launch_both_ways(lambda x: wrap(Squared.apply(x)), {"x": torch.ones(3)}, None)
    assert called == [torch.Size([3])]
    assert not launch_both_ways(lambda x: wrap(x.detach()), {"x": torch.ones(3)}, None)
    assert launch_both_ways(wrap, {"y": torch.arange(3)}, None)  # there is none


def test_a_backward_pass_that_does_not_run_at_a_large_size_is_said():
    wrong = WRONG["index of 32 bits"].check
    report = carry_out(wrong)
    assert f"32-bit offsets at n={2**31 + 64}: {NO_BACKWARD}" in report.remarks

    def stops(x):
        if x.numel() > 32:
            wrong.kernel(x)
            raise KeyError("no such size")
        return wrong.kernel(x)

    report = carry_out(replace(wrong, kernel=stops))
    assert (
        f"32-bit offsets at n={2**31 + 64}: stopped by KeyError: 'no such size'" in report.remarks
    )
    assert "32-bit overflow" in {finding.kind for finding in report.faults}


# ---- the bound


def test_the_bound_is_twice_torchs_error_and_one_rounding():
    exact = torch.tensor([100.0, 1.0, -3.0], dtype=torch.float64)
    plain = exact.float() + torch.tensor([0.0, 0.5, 0.0])
    allowed = 2 * 0.5 + 2.0**-23 * 100
    result = compare(exact.float() + torch.tensor([0, 0, 0.75]), plain, exact, 0.0)
    assert result.allowed == allowed and result.ratio == 0.75 / allowed
    assert (result.index, result.got, result.expected) == ((2,), -2.25, -3.0)
    assert compare(exact.float() - 1.5, plain, exact, 0.0).ratio > 1
    broken = exact.float().clone()
    broken[0] = math.nan
    assert compare(broken, plain, exact, 0.0).ratio == math.inf


def test_elements_that_the_dtype_cannot_hold_are_left_out():
    exact = torch.tensor([1e39, 1.0], dtype=torch.float64)
    result = compare(torch.tensor([math.inf, 1.0]), exact.float(), exact, 0.0)
    assert result.ratio == 0 and result.allowed == 2.0**-23
    nothing = compare(torch.tensor([1.0]), torch.tensor([math.nan]), exact[:1], 0.0)
    assert nothing.ratio == 0


def test_a_small_element_is_measured_by_torchs_errors_in_small_ones():
    exact = torch.cat([torch.full((64,), 2.0**-20), torch.full((64,), 1024.0)]).double()
    errors = torch.cat([torch.full((64,), 2.0**-43), torch.full((64,), 2.0**-13)]).double()
    ours = exact + 3 * errors
    result = compare_small(ours, exact.float(), exact, [(exact, exact + errors)])
    small = 3 * 2.0**-43 / (2 * 2.0**-43 + 2.0**-23 * 2.0**-20)
    assert result.ratio == pytest.approx(small, rel=1e-12) and small == 1
    ours[5] = 0.0
    result = compare_small(ours, exact.float(), exact, [(exact, exact + errors)])
    assert result.index == (5,) and result.ratio == 2.0**-20 / (3 * 2.0**-43)
    cancelled = [(exact, exact + 2.0**-13)]  # torch's errors do not shrink with the element
    assert compare_small(exact + 2.0**-13, exact.float(), exact, cancelled).ratio < 1


def test_an_element_may_change_as_much_as_a_rounding_of_the_inputs_changes_it():
    exact = torch.full((100,), 2.0**-10, dtype=torch.float64)
    ours = exact + torch.where(torch.arange(100) == 3, 2.0**-13, 0.0)  # its terms cancel
    plain = [(exact, exact + 2.0**-20)]
    assert compare_small(ours, exact.float(), exact, plain).ratio > 1
    moved = exact + torch.where(torch.arange(100) == 3, 2.0**-14, 0.0)
    allowed = 2 * (2.0**-20 + 2.0**-14) + 2.0**-23 * 2.0**-10
    result = compare_small(ours, exact.float(), exact, plain, [exact, moved])
    assert (result.index, result.allowed) == ((3,), allowed) and result.ratio == 2.0**-13 / allowed
    assert compare_small(ours.roll(1), exact.float(), exact, plain, [moved]).ratio > 1


def test_serial_sums_add_term_after_term():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(300, 20, generator=generator), torch.randn(20, 7, generator=generator)
    total, products = np.zeros(20, np.float32), np.zeros((300, 7), np.float32)
    for row in x.numpy():
        total = total + row
    for k in range(20):
        products = products + x.numpy()[:, k : k + 1] * w.numpy()[k]
    with Serial():
        assert np.array_equal(x.sum(0).numpy(), total)
        assert np.array_equal((x @ w).numpy(), products)
        assert torch.equal(x.bfloat16().sum(), x.bfloat16().float().sum().bfloat16())
        assert x.sum((0, 1), keepdim=True).shape == (1, 1) and torch.arange(4).sum() == 6


def test_serial_sums_reach_inside_of_what_torch_fuses():
    def results():
        x = torch.linspace(-2, 3, 60, dtype=torch.float64).view(4, 15).requires_grad_()
        h = torch.nn.functional.layer_norm(x, (15,)).softmax(-1) + x.var(-1, keepdim=True)
        loss = torch.nn.functional.cross_entropy(h, torch.arange(4)) + x.mean()
        return loss.detach(), *torch.autograd.grad(loss, [x])

    plain = results()
    with Serial():
        serial = results()
    for a, b in zip(plain, serial, strict=True):
        torch.testing.assert_close(a, b)


def test_noise_moves_the_result_of_every_operator_by_a_rounding():
    x, seen = torch.full((50,), 3.0, dtype=torch.float64), set()
    with Noise(2.0**-10, 0):
        for total in ((x.view(5, 10) * 2) + 1).flatten().tolist():
            seen.add(total)
    e = 2.0**-10
    assert seen == {(6 * (1 + a) + 1) * (1 + b) for a in (e, -e) for b in (e, -e)}
    with Noise(2.0**-10, 0):  # steps inside of what torch fuses have errors, too
        far = torch.nn.functional.layer_norm(torch.arange(8.0).double() + 1e4, (8,))
    plain = torch.nn.functional.layer_norm(torch.arange(8.0).double(), (8,))
    assert (far - plain).abs().max() > 0.5


def test_inputs_are_moved_to_one_side_of_zero_in_their_order():
    given = {"a": torch.tensor([3.0, -1.0, 0.5]), "b": torch.ones(2), "c": -torch.arange(-1.0, 2.0)}
    (first, negative), (second, mixed) = one_sided(given)
    assert first == "where all of a is negative and of c is negative"
    assert second == "where all of a is positive and of c is negative"
    assert negative["a"].tolist() == [-4.0, -8.0, -6.5]
    assert mixed["a"].tolist() == [8.0, 4.0, 5.5]
    assert mixed["c"].tolist() == negative["c"].tolist() == [-2.0, -3.0, -4.0]
    assert torch.equal(mixed["b"], given["b"])
    assert not list(one_sided({"b": given["b"], "n": 3}))


def test_inputs_that_a_reference_does_not_read_are_named():
    given = {"x": torch.randn(4), "mean": torch.randn(1), "n": torch.arange(3)}
    assert unread(lambda x, mean, n: x - x.mean(), given) == ["mean"]
    assert unread(lambda x, mean, n: x - mean, given) == []
    assert unread(lambda x, mean, n: (x > 0, mean.isnan()), given) == []  # no NaN comes out


def test_fp8_is_rounded_to_nearest_even_and_saturates():
    numbers = np.array([-127.9, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10, 1e9, -np.inf, np.nan])
    rounded = torch.from_numpy(round_fp8(numbers, torch.float8_e4m3fn)).view(torch.float8_e4m3fn)
    # Steps are 8 below 128, 2 above 16 and 2^-9 at the bottom; the largest number is 448.
    expected = [-128.0, 16.0, 20.0, 0.0, 2.0**-8, 448.0, -448.0]
    assert rounded.float().tolist()[:-1] == expected and rounded.float()[-1].isnan()


def test_results_that_vanish_are_measured_by_the_others():
    outputs = {"y": torch.tensor([0.25, -4.0]), "dx": torch.zeros(3)}
    assert stand_in(outputs) == 32
    tiny = torch.full((3,), 1e-7)
    assert compare(tiny, torch.zeros(3), torch.zeros(3).double(), 32.0).ratio < 1
    assert compare(tiny, torch.zeros(3), torch.zeros(3).double(), 0.0).ratio == math.inf


def test_a_scalar_is_measured_by_more_draws():
    exact = torch.tensor(1.0, dtype=torch.float64)
    ours, lucky = torch.tensor(1.0 + 2**-21), torch.tensor(1.0)
    assert compare(ours, lucky, exact, 0.0).ratio == 4
    typical = relative_error(torch.tensor(3.0 + 2**-20), torch.tensor(3.0, dtype=torch.float64))
    assert typical == 2.0**-20 / 3
    assert compare(ours, lucky, exact, 0.0, typical).ratio < 1


# ---- order by atomics


def test_clocks_follow_who_reads_whose_updates():
    clocks = Clocks()
    before = clocks.stamp(1)
    clocks.release(1, 100)
    after = clocks.stamp(1)
    clocks.release(2, 100)  # it does not look at the result
    assert not clocks.knows(2, before)
    clocks.acquire(3, 100)
    assert clocks.knows(3, before) and not clocks.knows(3, after)
    clocks.release(3, 200)
    clocks.acquire(4, 200)
    assert clocks.knows(4, before)  # through 3
    clocks.acquire(5, 300)
    assert not clocks.knows(5, before)


# ---- the lint


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_every_rule_has_a_page():
    assert {page.stem for page in RULES.glob("*.md")} == set(NAMES)


@pytest.mark.parametrize("rule", NAMES)
def test_the_page_of_a_rule_shows_what_it_finds(rule):
    wrong, right = blocks(RULES / f"{rule}.md")
    found = lint_source(wrong, "wrong.py")
    assert {finding.kind for finding in found} == {f"lint {rule}"}, found
    assert not lint_source(right, "right.py")
    for finding in found:
        lines = wrong.splitlines()
        number = int(finding.line.rpartition(":")[2]) - 1
        for silenced in (
            [*lines[:number], f"{lines[number]}  # checker: allow {rule}", *lines[number + 1 :]],
            [*lines[:number], f"# checker: allow other, {rule}", *lines[number:]],
        ):
            again = lint_source("\n".join(silenced), "wrong.py")
            assert len(again) == len(found) - 1
    other = wrong.replace(lines[number], f"{lines[number]}  # checker: allow something-else")
    assert len(lint_source(other, "wrong.py")) == len(found)


def test_dtypes_of_a_launch_decide_what_a_rule_says():
    wrong, _ = blocks(RULES / "sixteen-bit-accumulation.md")
    (kernel,) = [n.name for n in ast.parse(wrong).body if isinstance(n, ast.FunctionDef)]
    (finding,) = lint_source(wrong, "wrong.py")
    base = re.search(r"loads from (\w+)", finding.message)[1]
    assert finding.severity == "note"
    (finding,) = lint_source(wrong, "wrong.py", {(kernel, base): {"bfloat16"}})
    assert finding.severity == "fault"
    assert not lint_source(wrong, "wrong.py", {(kernel, base): {"float32"}})


def test_our_own_kernels_have_no_lint_faults():
    for path in sorted((ROOT / "kernels/fastbert_kernels").rglob("*.py")):
        found = lint_source(path.read_text(encoding="utf-8"), path.name)
        assert not [finding for finding in found if finding.severity == "fault"]
