"""Check and time one case of an operation: our present and proposed tiles, and the rivals."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.items import Item, Part, in_one_line
from benchmarks.gpu.place import Place
from benchmarks.gpu.predicted import predicted_ms
from benchmarks.gpu.proposals import Proposal, read_proposals
from benchmarks.harness.machine import Peak
from benchmarks.harness.timing import Contender, Times, extra_memory, in_turns
from benchmarks.kernels.cases import Case, arguments, call, outcome, truth, upstream_of
from benchmarks.kernels.contenders import that_run
from benchmarks.kernels.kernel_report import PASSES, rows_of
from benchmarks.kernels.rivals import Rival
from benchmarks.kernels.tune import NOISE, Asked, Key, Use, asked
from fastbert_kernels._tiles import Row

OURS, BEST = "triton", "triton, best tiles"
DTYPE, ELEMENT = torch.bfloat16, 2
# Shares of a case's time; the rest is for inputs, checks and compilers.
IN_TURNS, OF_BEST = 0.6, 0.15


def shape_of(case: Case) -> dict[str, Any]:
    """The shape, short enough for a line of output: without the length of each sequence."""
    lengths = case.shape.get("lengths")
    short = (
        {}
        if lengths is None
        else {"sequences": len(lengths), "T": sum(lengths), "longest": max(lengths)}
    )
    return short | {axis: size for axis, size in case.shape.items() if axis != "lengths"}


def facts(case: Case) -> dict[str, Any]:
    """The fields that every line on a case has."""
    return {
        "case": str(case),
        "operation": case.operation,
        "shape": shape_of(case),
        "dropout_p": case.dropout_p,
        "dtype": "bf16",
    }


def proposals_for(part: Part) -> list[Proposal]:
    """The proposals in the file; if it cannot be read, the rest is still measured."""
    try:
        found = read_proposals(part.place.architecture)
    except ValueError as error:
        part.results.add("note", item="proposed tiles", why=str(error))
        return []
    if not found:
        part.results.add(
            "note",
            item="proposed tiles",
            why="benchmarks/kernels/proposed_tiles.json proposes none for "
            f"{part.place.architecture}: present tiles alone",
        )
    return found


def compare(part: Part, case: Case, given: dict[str, Any], **more: Any) -> Use:
    """Check result and gradients with the error bound of the tests, and write the verdict.

    The reference is computed in higher precision.
    """
    upstream = upstream_of(call(case, given, OURS))
    use = Use(case, given, upstream, truth(case, given, upstream))
    error = use.truth.share(outcome(case, given, OURS, upstream))
    part.results.add(
        "check", **facts(case), error_over_allowed=error, verdict=part.verdict(error <= 1), **more
    )
    return use


def items(
    part: Part,
    cases: Sequence[Case],
    proposals: Sequence[Proposal],
    offered: Callable[[Case, dict[str, Any]], Mapping[str, Rival | str]],
) -> list[Item]:
    """An item for each case."""
    peak = functools.cache(part.place.peak)
    return [
        Item(str(case), functools.partial(Measurement.make, part, case, proposals, offered, peak))
        for case in cases
    ]


class Measurement(NamedTuple):
    part: Part
    use: Use
    rows: dict[Key, Asked]
    peak: Peak

    @classmethod
    def make(
        cls,
        part: Part,
        case: Case,
        proposals: Sequence[Proposal],
        offered: Callable[[Case, dict[str, Any]], Mapping[str, Rival | str]],
        peak: Callable[[], Peak],
        seconds: float,
    ) -> None:
        given = arguments(case, DTYPE, part.place.device)
        use = compare(part, case, given)
        cls(part, use, asked(case, given), peak()).time(proposals, offered(case, given), seconds)

    def time(
        self, proposals: Sequence[Proposal], offered: Mapping[str, Rival | str], seconds: float
    ) -> None:
        """Time ours first: a few rounds, saved to disk before any rival's code runs."""
        device = self.part.place.device
        ours = {OURS: self.ours([])}
        self.write(in_turns(ours, device, 0), alone=True)
        mine = [proposal for proposal in proposals if proposal.key in self.rows]
        trials = {
            str(number): proposal for number, proposal in enumerate(mine) if self.runs(proposal)
        }
        rivals, notes = that_run(offered)
        for name, why in notes.items():
            self.part.results.add("missing", **facts(self.use.case), implementation=name, why=why)
        contenders = (
            ours | {number: self.ours([proposal]) for number, proposal in trials.items()} | rivals
        )
        times = in_turns(contenders, device, IN_TURNS * seconds)
        memory = {name: extra_memory(contenders[name], device) for name in (OURS, *rivals)}
        self.write({name: times[name] for name in (OURS, *rivals)}, memory=memory)
        best = self.judge(trials, times)
        if best:
            self.write(in_turns(ours | {BEST: self.ours(best)}, device, OF_BEST * seconds), best)

    def ours(self, replaced: Sequence[Proposal]) -> Contender:
        """The case, run with these rows in place of the table's."""
        return self.use.contender({proposal.key: proposal.row for proposal in replaced})

    def runs(self, proposal: Proposal) -> bool:
        """Whether a proposed tile compiles, fits and is right; if not, a line gives the reason."""
        try:
            error = self.use.error(proposal.key, proposal.row)
        # Triton has no common class for a tile that does not compile, does not fit, or is refused
        # by the device.
        except Exception as failure:
            self.part.place.wait()  # raises if the trial has broken the device
            self.tile(proposal, verdict="does not run", why=in_one_line(failure))
            return False
        right = error <= 1 or self.part.place.dry
        if not right:
            self.tile(proposal, verdict="wrong", error_over_allowed=error)
        return right

    def judge(self, trials: Mapping[str, Proposal], times: Mapping[str, Times]) -> list[Proposal]:
        """Write how each proposed tile compares with the present one.

        Returns the better ones, at most one for a row.
        """
        best: dict[Key, tuple[float, Proposal]] = {}
        for number, proposal in trials.items():
            which = self.rows[proposal.key].which
            spread, present = times[number].spread(which), times[OURS].spread(which)
            ratio = spread.median / present.median
            verdict = "dry" if self.part.place.dry else "better" if ratio < NOISE else "no better"
            self.tile(
                proposal,
                ms=spread.median,
                low_ms=spread.low,
                high_ms=spread.high,
                present_ms=present.median,
                ratio=ratio,
                verdict=verdict,
            )
            if (ratio < NOISE or self.part.place.dry) and ratio < best.get(
                proposal.key, (float("inf"),)
            )[0]:
                best[proposal.key] = ratio, proposal
        return [proposal for _, proposal in best.values()]

    def tile(self, proposal: Proposal, **more: Any) -> None:
        which = self.rows[proposal.key].which
        self.part.results.add(
            "tile",
            **facts(self.use.case),
            **{"pass": which},
            tile=proposal.tile,
            predicted_us=proposal.predicted_us,
            **more,
        )

    def write(
        self,
        times: Mapping[str, Times],
        replaced: Sequence[Proposal] = (),
        memory: Mapping[str, int | None] | None = None,
        **more: Any,
    ) -> None:
        """A line for each contender and pass."""
        case = self.use.case
        for name, found in times.items():
            mine = name in (OURS, BEST)
            rows = {key.kernel: asked.row for key, asked in self.rows.items()}
            if name == BEST:
                rows |= {proposal.key.kernel: proposal.row for proposal in replaced}
            for which in PASSES:
                row = rows_of(
                    case,
                    which,
                    {name: [ms / 1e3 for ms in found.rounds(which)]},
                    self.peak,
                    ELEMENT,
                )[0]
                low, high = row["quartiles"]
                work = row["rate"] and row["rate"] * row["ms"] / 1e3
                self.part.results.add(
                    "time",
                    **facts(case),
                    **{"pass": which, "implementation": name},
                    tile={kernel: tile_of(row) for kernel, row in rows.items()} if mine else None,
                    ms=row["ms"],
                    low_ms=low,
                    high_ms=high,
                    rounds=row["rounds"],
                    rate=row["rate"],
                    unit=row["unit"],
                    share_of_peak=row["share_of_peak"],
                    predicted_ms=predicted_ms(
                        name_of(self.part.place), str(case), which, rows, work
                    )
                    if mine
                    else None,
                    extra_bytes=(memory or {}).get(name),
                    **more,
                )


def name_of(where: Place) -> str:
    """The name of the device; a dry run shows the predictions for an H100."""
    return "H100" if where.dry else where.name


def tile_of(row: Row) -> dict[str, int]:
    return {name: value for name, value in row.items() if name not in ("bits", "size")}
