"""Make a dataset of its assembled shards: held-out text, table, report, manifest; then publish it.

The manifest is written last, and the folder gets its name when every byte is on the disk. A part
that is added gets its name first, and counts when the new manifest replaces the old one.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fastbert.config import OrderConfig
from fastbert.data import baselines
from fastbert.data.assemble import HELDOUT, TRAIN, Shard, read_shard
from fastbert.data.block_split import BlockSplit
from fastbert.data.block_table import Blocks, windows_of
from fastbert.data.block_writer import BlockWriter
from fastbert.data.blocks import BLOCK_BYTES
from fastbert.data.byte_level import rounded_up
from fastbert.data.copies import distinct
from fastbert.data.format_3 import FORMAT, HELDOUT_HASHES, REPORTS, TABLE, read_tables
from fastbert.data.job import Job, Vocabulary
from fastbert.data.manifest import MANIFEST, SPLITS, token_dtype
from fastbert.data.report import About, CorpusStats, Report, Row, make_report
from fastbert.data.results import publish, read_json, write_json
from fastbert.data.settle import SHARD_BYTES, NothingToAdd, Settled
from fastbert.data.tokenizer import is_bert, kind_of, save_tokenizer, special_ids, unreachable
from fastbert.data.vocabulary import BPE
from fastbert.durable import sealed, sha256_of, sync, unsealed, write_whole
from fastbert.errors import InputError

WINDOW = OrderConfig().window
SEALED = "sealed.json"  # in the folder of the results, just before the dataset gets its name


def seal(job: Job, settled: Settled, options: dict[str, Any], request: str) -> Report:
    """Publish the dataset, and return the report on its text.

    Args:
        job: what to make; all its shards are there.
        settled: what was decided.
        options: for the manifest.
        request: identifies the call of `prepare`, see `published`.

    Raises:
        InputError: the part is there already, or the dataset has changed meanwhile.
        OSError: the disk refused.
    """
    tokenizer = Tokenizer.from_str(job.tokenizer)
    tokenizer.encode_special_tokens = True
    shards = _without_empty(job, len(settled.groups) - 1)
    dtype = token_dtype(tokenizer.get_vocab_size())
    heldout = _write_heldout(job, shards, dtype)
    table = np.concatenate([*(shard.table for shard in shards), heldout])
    _write(job, TABLE, table.tobytes())
    if job.base is None:
        save_tokenizer(tokenizer, job.dataset / "tokenizer")
    old = _old_manifest(job)
    part = _part_entry(job, settled, options, table)
    _check_new(job, old, table)
    train, held = _splits(job, old, table, tokenizer)
    measured = baselines.measure(train, held, tokenizer.get_vocab_size())
    stats = CorpusStats(bits=settled.bits)
    for shard in shards:
        stats.merge(shard.facts, shard.arrays)
    stretches = _stretches(job, table, dtype)
    report = make_report(stats, settled.text, _about(job, settled, tokenizer, measured, stretches))
    _write(job, "report.json", report.json().encode())
    _write(job, "report.md", report.markdown().encode())
    manifest = _manifest(job, tokenizer, measured, old, part)
    data = sealed(manifest)
    note = {
        "request": request,
        "manifest_sha256": hashlib.sha256(data).hexdigest(),
        "figures": report.figures,
        "rows": [asdict(row) for row in report.rows],
    }
    write_json(job.work / SEALED, note)
    _publish(job, data)
    return report


def published(out: Path, work: Path, request: str) -> Report | None:
    """Return the report of a call that was killed after its dataset had got its name.

    Args:
        out: the dataset.
        work: the folder of the results.
        request: identifies the call.
    """
    note = read_json(work / SEALED)
    if note is None or note["request"] != request or not (out / MANIFEST).is_file():
        return None
    if sha256_of(out / MANIFEST) != note["manifest_sha256"]:
        return None
    return Report(note["figures"], [Row(**row) for row in note["rows"]])


def remove_work(work: Path) -> None:
    """Remove the results; the note of `seal` goes last, so that `published` finds it till then."""
    for path in work.iterdir():
        if path.name == SEALED:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    (work / SEALED).unlink(missing_ok=True)
    work.rmdir()


def _write(job: Job, name: str, data: bytes) -> None:
    with publish(job.part / name, job.work) as new:
        new.write_bytes(data)


def _without_empty(job: Job, count: int) -> list[Shard]:
    """Return the shards, and remove the files of those without a document that stays.

    Those behind are renumbered. A later call would miss them, and make them again.
    """
    shards, number = list[Shard](), 0
    for old in range(count):
        shard = read_shard(job, old)
        assert shard is not None, f"{job.shard_path(old)}: not there"
        path = job.part / f"train-{old:05d}"
        if not shard.size:
            path.unlink(missing_ok=True)
        else:
            path.rename(job.part / f"train-{number:05d}")
            shard.table["shard"] = number
            number += 1
        shards.append(shard)
    return shards


def _write_heldout(job: Job, shards: list[Shard], dtype: np.dtype) -> np.ndarray:
    """Write the held-out text of all shards; return its table of blocks."""
    tables = list[np.ndarray]()
    waiting = [shard.heldout for shard in shards if len(shard.heldout.documents)]
    while waiting:
        number = len(tables)
        with publish(job.part / f"heldout-{number:05d}", job.work) as new:
            writer = BlockWriter(new, HELDOUT, number, dtype)
            while waiting and writer.size < SHARD_BYTES:
                writer.add(waiting.pop(0))
            tables.append(writer.close())
    hashes = distinct(np.concatenate([shard.heldout_hashes for shard in shards]))
    with publish(job.part / HELDOUT_HASHES, job.work) as new, open(new, "wb") as file:
        np.save(file, hashes.astype("<u8"), allow_pickle=False)
    return np.concatenate([shards[0].table[:0], *tables])


def _part_entry(
    job: Job, settled: Settled, options: dict[str, Any], table: np.ndarray
) -> dict[str, Any]:
    splits = {}
    for number, name in enumerate(SPLITS):
        entries = table[table["split"] == number]
        counts = {
            kind: int(entries[kind].sum(dtype=np.int64))
            for kind in ("documents", "sentences", "tokens")
        }
        paths = sorted(job.part.glob(f"{name}-[0-9]*"))
        splits[name] = {**counts, "shards": [path.stat().st_size for path in paths]}
    return {"options": options, "heldout_below": settled.heldout_below, "splits": splits}


def _old_manifest(job: Job) -> dict[str, Any] | None:
    """Return the manifest of the dataset that a part is added to."""
    if job.base is None:
        return None
    data = (job.out / MANIFEST).read_bytes()
    manifest = unsealed(data)
    if manifest is None or hashlib.sha256(data).hexdigest() != job.base.manifest_sha256:
        raise InputError(
            f"{job.out / MANIFEST}: changed meanwhile; run the same command again to add this "
            "text to what is there now"
        )
    return manifest


def _check_new(job: Job, old: dict[str, Any] | None, table: np.ndarray) -> None:
    """Raise NothingToAdd where a part of the dataset has exactly this text."""
    digest = hashlib.sha256(table.tobytes()).hexdigest()
    for name, entry in (old or {"files": {}})["files"].items():
        if name.endswith("/blocks") and entry["sha256"] == digest:
            raise NothingToAdd(
                f"{job.out}: {name.partition('/')[0]} has exactly this text already; "
                "nothing was added"
            )


def _stretches(job: Job, table: np.ndarray, dtype: np.dtype) -> int | None:
    """Return how many stretches of text a window mixes; None where one window has all text."""
    train = table[table["split"] == TRAIN]
    if windows_of(len(train), WINDOW) == 1:
        return None
    ids = int(train["tokens"].sum(dtype=np.int64)) * dtype.itemsize
    return round(WINDOW / job.plan.stretch(ids, BLOCK_BYTES))


def _about(
    job: Job,
    settled: Settled,
    tokenizer: Tokenizer,
    measured: dict[str, float],
    stretches: int | None,
) -> About:
    options, asked = job.tokenizer_or_vocabulary, None
    if isinstance(options, Vocabulary):
        asked = rounded_up(options.size) if options.algorithm == BPE else options.size
    given = asked is None and job.base is None
    return About(
        tokenizer.get_vocab_size(),
        asked,
        measured,
        files=len(job.plan.files),
        blank_lines=job.blank_lines,
        unreachable=unreachable(tokenizer) if given else (),
        tokenizer=None if is_bert(tokenizer) else kind_of(tokenizer),
        duplicates=settled.duplicates,
        copies=settled.copies if job.drop_copies else None,
        evaluated=settled.evaluated if job.without else None,
        bad_records=settled.bad,
        stretches=stretches,
    )


def _manifest(
    job: Job,
    tokenizer: Tokenizer,
    measured: dict[str, float],
    old: dict[str, Any] | None,
    part: dict[str, Any],
) -> dict[str, Any]:
    listed = [f"{job.part_name}/{name}" for name in _PART_FILES]
    if old is None:
        paths = sorted((job.dataset / "tokenizer").iterdir())
        listed = [f"tokenizer/{path.name}" for path in paths] + listed
    files = {
        name: {
            "size": (job.dataset / name).stat().st_size,
            "sha256": sha256_of(job.dataset / name),
        }
        for name in listed
    }
    if old is not None:
        return {
            **old,
            "baselines": measured,
            "files": {**old["files"], **files},
            "parts": [*old["parts"], part],
        }
    return {
        "format": FORMAT,
        **({} if is_bert(tokenizer) else {"tokenizer": kind_of(tokenizer)}),
        "vocab_size": tokenizer.get_vocab_size(),
        "special": asdict(special_ids(tokenizer, job.dataset)),
        "tokenizer_sha256": files["tokenizer/tokenizer.json"]["sha256"],
        "baselines": measured,
        "files": files,
        "parts": [part],
    }


_PART_FILES = (TABLE, *REPORTS, HELDOUT_HASHES)


def _publish(job: Job, manifest: bytes) -> None:
    """Give the dataset, or the new part, its name."""
    if job.base is None:
        (job.dataset / MANIFEST).write_bytes(manifest)
        for path in [*job.dataset.rglob("*"), job.dataset]:
            sync(path)
        job.dataset.rename(job.out)
        sync(job.out.parent)
        return
    for path in [*job.part.rglob("*"), job.part]:
        sync(path)
    target = job.out / job.part_name
    if target.exists():  # of an earlier try, which the manifest does not have
        shutil.rmtree(target)
    job.part.rename(target)
    sync(job.out)
    write_whole(job.out / MANIFEST, manifest)
    sync(job.out)


def _splits(
    job: Job, old: dict[str, Any] | None, table: np.ndarray, tokenizer: Tokenizer
) -> list[BlockSplit]:
    """Open both splits of all parts, with the new one."""
    size, words = tokenizer.get_vocab_size(), not is_bert(tokenizer)
    width, number = token_dtype(size).itemsize, job.part_number
    before = read_tables(job.out, old) if old is not None else {}
    result = list[BlockSplit]()
    for split, name in enumerate(SPLITS):
        entries = [table[table["split"] == split]]
        parts = [np.full(len(entries[0]), number)]
        if name in before:
            entries.insert(0, before[name].entries)
            parts.insert(0, before[name].parts)
        both = np.concatenate(entries), np.concatenate(parts)
        joined = _Joined(job.out, *both, width, words, size, added=job.dataset, number=number)
        result.append(BlockSplit(joined))
    return result


@dataclass(frozen=True, kw_only=True)
class _Joined(Blocks):
    """Blocks of a dataset, and of a part that lies in another folder still."""

    added: Path
    number: int

    def ranges(self) -> list[tuple[Path, int, int]]:
        return [
            (self.added / path.relative_to(self.folder), begin, size)
            if part == self.number
            else (path, begin, size)
            for part, (path, begin, size) in zip(self.parts.tolist(), super().ranges(), strict=True)
        ]
