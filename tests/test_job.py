"""A result is named by all that it depends on, and by nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fastbert.data.corpus_plan import Plan
from fastbert.data.job import Base, Job, Vocabulary
from fastbert.data.segments import File
from fastbert.data.sources import Source

MIB = 1 << 20
FILES = [File(Source(Path(name), "txt", ""), 9 * MIB + 5, 7, MIB) for name in "abcdef"]
JOB = Job(Path("out"), Plan(FILES, 4 * MIB), "text", "a tokenizer", 0.01)


def test_pieces() -> None:
    keys = JOB.piece_keys
    assert len(set(keys)) == len(keys) == JOB.plan.pieces
    for same in ({"heldout": 0.3}, {"drop_copies": True}, {"bad_allowed": None}):
        other = replace(JOB, **same)
        assert other.piece_keys == keys
        assert (other.settled_key == JOB.settled_key) == ("bad_allowed" in same)
    added = replace(JOB, base=Base("0", 1, 5))
    assert added.piece_keys == keys and added.settled_key != JOB.settled_key
    assert (JOB.part_name, added.part_name) == ("part-00000", "part-00001")
    for other in (
        {"text_field": "body"},
        {"tokenizer_or_vocabulary": "another"},
        {"without": tuple(FILES[:1])},
    ):
        assert not set(replace(JOB, **other).piece_keys) & set(keys)


def test_one_file_changes() -> None:
    files = [*FILES[:2], replace(FILES[2], stamp="8"), *FILES[3:]]
    other = replace(JOB, plan=Plan(files, 4 * MIB))
    for number, (old, new) in enumerate(zip(JOB.piece_keys, other.piece_keys, strict=True)):
        assert (old != new) == any(part.file == 2 for part in JOB.plan.piece(number))


def test_the_vocabulary() -> None:
    options = Vocabulary("wordpiece", 1000, True, False)
    job = replace(JOB, tokenizer_or_vocabulary=options)
    paths = {job.vocabulary_path}
    for other in (replace(options, size=1001), replace(options, lowercase=False)):
        paths.add(replace(job, tokenizer_or_vocabulary=other).vocabulary_path)
    paths.add(replace(job, text_field="body").vocabulary_path)
    assert len(paths) == 4 and all(path.parent == Path("out.work") for path in paths)
    assert replace(job, heldout=0.2).vocabulary_path in paths
