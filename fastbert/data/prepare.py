"""`fastbert prepare`: from raw text to a dataset, as tasks whose results are files.

    plan         which bytes of which file are encoded together     corpus_plan.py, segments.py
    vocabulary   trained on 64 MiB that the plan chose              vocabulary_task.py
    encode       a piece of about 16 MiB of text                    pieces.py
    settle       held-out documents, copies, shards                 settle.py
    assemble     a shard of about 512 MiB of token ids              assemble.py
    seal         held-out text, baselines, report, manifest         seal.py

A task is a function of the job and a number (job.py), and its result a file that appears by rename
(results.py). So the same command run again makes only what is missing, and it does not matter who
runs the tasks: this process, workers on this machine, Ray, or any scheduler by `--task I/N`. The
dataset depends on the text and the options only; it contains no time and no path.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.data import corpus_plan
from fastbert.data.assemble import Assembler, is_assembled
from fastbert.data.corpus_plan import Plan
from fastbert.data.decontaminate import grams_of, read_texts
from fastbert.data.encode import ChunkEncoder
from fastbert.data.job import Base, Job, Vocabulary, work_of
from fastbert.data.manifest import MANIFEST
from fastbert.data.pieces import PieceEncoder
from fastbert.data.report import Report
from fastbert.data.results import disk_errors, key_of, read_arrays, write_arrays
from fastbert.data.seal import published, remove_work, seal
from fastbert.data.segments import File, lay_out
from fastbert.data.settle import MissingPiece, NothingToAdd, Settled, read_settled, settle
from fastbert.data.sources import find_sources
from fastbert.data.tokenizer import is_bert, load_tokenizer
from fastbert.data.unpack import BadRecord
from fastbert.data.verify import AGAIN
from fastbert.data.vocabulary import ALGORITHMS, BPE, WORDPIECE, check_vocab_size
from fastbert.data.vocabulary_task import train_vocabulary
from fastbert.data.workers import map_in_order
from fastbert.durable import exit_at_signals, parents_of, sha256_of, unsealed
from fastbert.errors import InputError
from fastbert.machine import check_threads, usable_cores
from fastbert.presence import is_folder, status
from fastbert.progress import Progress
from fastbert.terminal import tell

# One more worker for each of these. With less text it does not pay: a worker has to start, and to
# tokenize every word for the first time.
BYTES_PER_WORKER = 16 << 20
MOST_PER_CORE = 4  # workers; more only take memory
ENGINES = LOCAL, RAY = "local", "ray"


@dataclass(frozen=True)
class Options:
    """Options of `prepare`.

    Attributes:
        vocab_size: of the vocabulary that is trained on the text; of BPE a multiple of 64, to which
            another size is rounded up.
        algorithm: "wordpiece", as BERT; or "bpe", byte-level as ModernBERT, which keeps case,
            accents, spaces and line breaks.
        tokenizer: a Hugging Face folder with any tokenizer.json, or a vocab.txt, to use instead;
            vocab_size, algorithm, lowercase and keep_accents are then ignored.
        lowercase: whether a trained vocabulary converts capitals to small letters; accents and
            vowel signs are then dropped too, as in BERT.
        keep_accents: whether it keeps these all the same.
        workers: processes that encode, at most MOST_PER_CORE per core; by default one per core, and
            fewer for little text. The number does not change the result.
        heldout: share of the documents that is set aside for evaluation. They are chosen by a hash
            of the text, so copies of a document are all in the same split. HELDOUT_BYTES and
            LEAST_HELDOUT of settle.py bound the share.
        text_format: a key of sources.FORMATS, where the suffix does not tell the format.
        text_field: the field of JSON lines, or the column of a table, that holds the text; "a.b" is
            the field b of the object a.
        bad_records: "error" raises at a record that cannot be read (no UTF-8, no JSON, no text,
            a csv row of other columns); "skip" leaves such records out, and the report lists them;
            a number does so up to that many, and more are an error.
        drop_copies: leave out documents that are copies of an earlier one; blanks at the beginning
            and the end do not count.
        without: files of evaluation sets; documents that share 13 token ids in a row with them are
            left out.
        add: add a part to the dataset that is there, with its tokenizer.
        engine: "local", or "ray" for a cluster that shares the disk.
        ray_address: of a running cluster; by default that of the environment, or a local one.
        progress: show progress on stderr: bars on a terminal, else a line every ten seconds.
    """

    vocab_size: int = 30522
    algorithm: str = WORDPIECE
    tokenizer: str | Path | None = None
    lowercase: bool = True
    keep_accents: bool = False
    workers: int | None = None
    heldout: float = 0.01
    text_format: str | None = None
    text_field: str = "text"
    bad_records: str | int = "error"
    drop_copies: bool = False
    without: Sequence[str | Path] = ()
    add: bool = False
    engine: str = LOCAL
    ray_address: str | None = None
    progress: bool = True


def prepare(sources: Sequence[str | Path], out: str | Path, **options: Any) -> Report:
    """Make the dataset `out` from text files and folders, as `fastbert.prepare` on a disk."""
    with _started(sources, Path(out), Options(**options)) as run:
        if isinstance(run, Report):
            return run
        with _alone(run.job.work):
            return run.finish()


def prepare_share(sources: Sequence[str | Path], out: str | Path, task: str, **options: Any) -> str:
    """Run a share of the tasks of `prepare`, for any scheduler: a Slurm array, a loop over ssh.

    It runs those of the first stage with missing work whose number modulo N is I. It waits for
    nobody.

    Args:
        sources, out: as for `prepare`.
        task: "I/N", with I from 0 to N - 1.
        options: of `Options`; the same for every task.

    Returns:
        What is missing now, and what to run next.

    Raises:
        InputError: as `prepare`.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", task)
    share, shares = (int(found[1]), int(found[2])) if found else (0, 0)
    if share >= shares:
        raise InputError(f"--task {task}: must be I/N with I from 0 to N - 1, for example 0/8")
    out, chosen = Path(out), Options(**options)
    if chosen.engine != LOCAL:
        raise InputError(f"--task {task}: is run by your scheduler; leave out --engine")
    finished = f"{out}: is there; nothing is missing"
    if not chosen.add and (out / MANIFEST).is_file():
        return finished
    try:
        with _started(sources, out, chosen) as run:
            return finished if isinstance(run, Report) else run.share(share, shares)
    except (InputError, FileNotFoundError):
        # Another task may have finished the dataset meanwhile, and removed what this one read.
        if not chosen.add and (out / MANIFEST).is_file():
            return finished
        raise


class _Run:
    """The tasks of one job, in order."""

    def __init__(
        self, job: Job, sources: Sequence[str | Path], options: Options, recorded: dict[str, Any]
    ):
        self.job = job
        self._sources, self._options, self._recorded = sources, options, recorded
        self._bar = Progress("prepare", options.progress)

    @property
    def request(self) -> str:
        """Identifies the call: its files and options."""
        files = [Job._identity_of(file) for file in (*self.job.plan.files, *self.job.without)]
        options = self.job.tokenizer_or_vocabulary
        trained = vars(options) if isinstance(options, Vocabulary) else options
        return key_of(files, len(self.job.without), trained, self._recorded)

    def finish(self) -> Report:
        """Make all that is missing, and publish the dataset."""
        job = self.job
        with self._bar:
            self._tokenizer()
            while True:
                self._encode(self._missing_pieces())
                try:
                    settled = self._settle()
                    break
                except MissingPiece:
                    continue
            shards = range(len(settled.groups) - 1)
            with self._bar.count("shards", job.plan.size) as advance:
                for size in self._map(Assembler, (job, settled), shards):
                    advance(size)
            report = self._seal(settled)
        remove_work(job.work)
        return report

    def share(self, share: int, shares: int) -> str:
        """Make a share of the first stage that has missing work."""
        job, out = self.job, self.job.out
        tasks = f"--task 0/{shares}" + (f" to {shares - 1}/{shares}" if shares > 1 else "")
        rerun = f"run {tasks} again, or the command without --task"
        with self._bar:
            self._tokenizer()
            if missing := self._missing_pieces():
                self._encode([number for number in missing if number % shares == share])
                if left := len(self._missing_pieces()):
                    return (
                        f"{out}: {left:,} of {job.plan.pieces:,} pieces are missing still; "
                        f"when no task is running, {rerun}"
                    )
                return f"{out}: all {job.plan.pieces:,} pieces are there; next, {rerun}"
            try:
                settled = self._settle()
            except MissingPiece:
                return f"{out}: a piece was damaged; {rerun}"
            shards = range(len(settled.groups) - 1)
            if missing := [n for n in shards if not is_assembled(job, n, verify=False)]:
                ours = [number for number in missing if number % shares == share]
                for _ in self._map(Assembler, (job, settled, False), ours):
                    pass
                left = [n for n in missing if not is_assembled(job, n, verify=False)]
                if left:
                    return f"{out}: {len(left):,} of {len(shards):,} shards are missing; {rerun}"
                return f"{out}: all {len(shards):,} shards are there; next, {rerun}"
            if share != 0:
                return f"{out}: only the last task is missing; run --task 0/{shares}"
            with _alone(job.work):
                self._seal(settled)
        remove_work(job.work)
        return f"{out}: ready"

    def _tokenizer(self) -> None:
        """Make what encoding needs: the vocabulary, and the 13-grams of evaluation sets."""
        job = self.job
        if not job.has_vocabulary:
            with self._bar.wait("training the vocabulary"):
                train_vocabulary(job)
        self._check_words()
        if job.without and read_arrays(job.grams_path) is None:
            with self._bar.wait("reading the evaluation sets"), disk_errors(job.out):
                encoder = ChunkEncoder(job.tokenizer, job.text_field)
                sources = [file.source for file in job.without]
                grams = grams_of(read_texts(sources), encoder)
                write_arrays(job.grams_path, {}, grams=grams)

    def _check_words(self) -> None:
        from tokenizers import Tokenizer

        from fastbert.data.cuts import Cuts

        tokenizer = Tokenizer.from_str(self.job.tokenizer)
        if not is_bert(tokenizer) and (problem := Cuts(tokenizer).problem) is not None:
            tell(f"tokenizer: no words are looked up, which takes several times as long: {problem}")

    def _missing_pieces(self) -> list[int]:
        there = set(os.listdir(self.job.work))
        return [
            number
            for number, key in enumerate(self.job.piece_keys)
            if not {f"piece-{key}.npz", f"piece-{key}.arrays"} <= there
        ]

    def _encode(self, numbers: Sequence[int]) -> None:
        """Encode pieces; bytes of the others count as done."""
        job, bad, size = self.job, 0, self.job.plan.size
        done = size - sum(map(job.plan.piece_size, numbers))
        with self._bar.count("documents, sentences, tokens", size, done) as advance:
            if not numbers:
                return
            # Tasks on a cluster do not say how far they are.
            reports = None if self._options.engine == RAY else advance
            with closing(self._map(PieceEncoder, (job,), numbers, reports)) as results:
                for number, found in zip(numbers, results, strict=True):
                    if reports is None:
                        advance(job.plan.piece_size(number))
                    bad += found
                    if job.bad_allowed is not None and bad > job.bad_allowed:
                        raise InputError(
                            f"more than {job.bad_allowed:,} bad records, which --bad-records "
                            "allows; run again with --bad-records skip to list them in the report"
                        )

    def _map(
        self,
        make: Callable[..., Callable[[int], int]],
        arguments: tuple[Any, ...],
        numbers: Sequence[int],
        advance: Callable[[int], None] | None = None,
    ) -> Any:
        """Yield the results of tasks in order, by workers or by the engine that was asked for.

        Args:
            make, arguments, numbers: the tasks.
            advance: as `map_in_order` takes it.
        """
        if self._options.engine == RAY:
            from fastbert.data.engine_ray import map_on_ray

            return map_on_ray(make, arguments, numbers, self._options.ray_address)
        workers = processes(self._options, self.job.plan.size, len(numbers))
        return map_in_order(make, arguments, numbers, workers, advance)

    def _settle(self) -> Settled:
        settled = read_settled(self.job)
        if settled is None:
            with self._bar.wait("held-out documents and copies"):
                settled = settle(self.job, self._sources)
        return settled

    def _seal(self, settled: Settled) -> Report:
        with self._bar.wait("baselines"), disk_errors(self.job.out):
            return seal(self.job, settled, self._recorded, self.request)


def processes(options: Options, size: int, tasks: int) -> int:
    """Return how many processes run a number of tasks for a text of `size` bytes."""
    workers = options.workers
    most = usable_cores() * (MOST_PER_CORE if workers else 1)
    return max(min(workers or 1 + size // BYTES_PER_WORKER, most, tasks), 1)


def job_of(sources: Sequence[str | Path], out: Path, options: Options) -> Job:
    """Check everything that can be checked at once, and return what is to be made.

    Raises:
        InputError: something is wrong with the sources, the tokenizer or the options.
    """
    _check(out, options)
    # A source may be the folder that the dataset is made in.
    ours = work_of(out).absolute()
    files = [
        file
        for file in _laid_out(sources, options.text_format)
        if not isinstance(at := file.source.path, Path) or ours not in at.absolute().parents
    ]
    without = _laid_out(options.without, None, "--without ") if options.without else []
    base, vocabulary = _base(out, options), _vocabulary(out, options)
    bad_allowed = {"error": 0, "skip": None}.get(str(options.bad_records), options.bad_records)
    return Job(
        out=out,
        plan=Plan(tuple(files), corpus_plan.PIECE_BYTES),
        text_field=options.text_field,
        tokenizer_or_vocabulary=vocabulary,
        heldout=options.heldout,
        drop_copies=options.drop_copies,
        without=tuple(without),
        bad_allowed=None if bad_allowed is None else int(bad_allowed),
        base=base,
    )


@contextmanager
def _started(sources: Sequence[str | Path], out: Path, options: Options) -> Iterator[_Run | Report]:
    """Yield the run, when everything is checked that can be checked at once.

    It is the report where the call was killed after its dataset had got its name.
    """
    job = job_of(sources, out, options)
    # A thread of each core for the tokenizer, a process and a thread for each worker, and a few.
    workers = min(options.workers or usable_cores(), MOST_PER_CORE * usable_cores())
    check_threads("prepare", usable_cores() + 2 * workers + 4)
    run = _Run(job, sources, options, _recorded(options))
    made_before = published(out, job.work, run.request)
    if made_before is not None:
        remove_work(job.work)
        yield made_before
        return
    if job.base is None and (os.path.islink(out) or status(out) is not None):
        with contextlib.suppress(OSError):  # if it is empty, of a call that was just finished
            job.work.rmdir()
        raise InputError(f"{out}: exists already; remove it or choose another --out")
    with disk_errors(out), exit_at_signals(), parents_of(out):
        job.work.mkdir(exist_ok=True)
        try:
            yield run
        except BadRecord as error:
            _say_what_is_left(job.work)
            raise InputError(
                f"{error}; or leave out what cannot be read: --bad-records skip"
            ) from None
        except BaseException:
            _say_what_is_left(job.work)
            raise


def _say_what_is_left(work: Path) -> None:
    """Remove the folder of the results if it is empty; else say what to do with it.

    Nothing else is removed: other tasks may be writing there.
    """
    with contextlib.suppress(OSError):
        if os.listdir(work):
            tell(
                f"{work}: holds what is finished; run the same command again to continue, "
                "or remove it"
            )
        else:
            work.rmdir()


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Raise InputError where another process finishes the same dataset.

    If the block finds nothing in the results to add, they are removed, being of no further use.
    """
    descriptor = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{work}: another process works there; wait until it ends") from None
        except OSError:
            pass  # a disk without locks
        yield
    except NothingToAdd:
        remove_work(work)
        raise
    finally:
        os.close(descriptor)


def _check(out: Path, options: Options) -> None:
    """Raise InputError where an option is out of range or contradicts another one."""
    if options.add:
        given = Options(add=True)
        for name, shown in _OF_THE_TOKENIZER.items():
            if getattr(options, name) != getattr(given, name):
                raise InputError(f"{shown}: --add uses the tokenizer of {out}; leave it out")
    elif os.path.islink(out) or (status(out) is not None and not work_of(out).is_dir()):
        raise InputError(f"{out}: exists already; remove it or choose another --out")
    if not 0 < options.heldout <= 0.5:
        raise InputError(
            f"--heldout {options.heldout}: must be above 0 and at most 0.5 (share of the documents)"
        )
    if options.workers is not None and options.workers < 1:
        raise InputError(f"--workers {options.workers}: must be 1 or more")
    if options.algorithm not in ALGORITHMS:
        raise InputError(f"--algorithm {options.algorithm}: must be {' or '.join(ALGORITHMS)}")
    trains = options.tokenizer is None
    if options.algorithm == BPE and trains and (options.keep_accents or not options.lowercase):
        option = "--keep-accents" if options.keep_accents else "--cased"
        raise InputError(f"{option}: --algorithm bpe keeps case and accents anyway; leave it out")
    bad = options.bad_records
    if bad not in ("error", "skip") and not re.fullmatch(r"\d+", str(bad)):
        raise InputError(f"--bad-records {bad}: must be error or skip, or how many to skip")
    if options.engine not in ENGINES:
        raise InputError(f"--engine {options.engine}: must be {' or '.join(ENGINES)}")
    if options.ray_address is not None and options.engine != RAY:
        raise InputError("--ray-address: is of --engine ray; add it")
    if options.engine == RAY:
        from fastbert.data.engine_ray import check_ray

        check_ray()


_OF_THE_TOKENIZER = {
    "vocab_size": "--vocab-size",
    "algorithm": "--algorithm",
    "tokenizer": "--tokenizer",
    "lowercase": "--cased",
    "keep_accents": "--keep-accents",
}


def _laid_out(paths: Sequence[str | Path], text_format: str | None, option: str = "") -> list[File]:
    """Find the files to read, say what is left out, and see how each is cut."""
    files, left_out = find_sources(paths, text_format)
    for reason in dict.fromkeys(item.reason for item in left_out):
        names = [str(item.path) for item in left_out if item.reason == reason]
        more = ", ..." if len(names) > 5 else ""
        tell(f"{option}left out ({reason}): {len(names):,}: {', '.join(names[:5])}{more}")
    return [lay_out(source) for source in files]


def _base(out: Path, options: Options) -> Base | None:
    """Return the dataset that a part is added to."""
    if not options.add:
        return None
    if not is_folder(out) or not (out / MANIFEST).is_file():
        raise InputError(f"{out}: no dataset; make it first, without --add")
    data = (out / MANIFEST).read_bytes()
    try:
        manifest = unsealed(data)
    except (ValueError, TypeError, KeyError, RecursionError):
        manifest = None
    if manifest is None or manifest.get("format") != 3:
        raise InputError(
            f"{out / MANIFEST}: not the manifest of a dataset in format 3, which --add needs; "
            "make the dataset again with `fastbert prepare`"
        )
    tokenizer = out / "tokenizer" / "tokenizer.json"
    if not tokenizer.is_file() or sha256_of(tokenizer) != manifest["tokenizer_sha256"]:
        raise InputError(f"{tokenizer}: not the file that {out / MANIFEST} names; {AGAIN}")
    parts = manifest["parts"]
    return Base(
        hashlib.sha256(data).hexdigest(), len(parts), min(part["heldout_below"] for part in parts)
    )


def _vocabulary(out: Path, options: Options) -> str | Vocabulary:
    """Return the tokenizer that is given, or what to train."""
    given = out / "tokenizer" if options.add else options.tokenizer
    if given is not None:
        return load_tokenizer(given).to_str()
    check_vocab_size(options.vocab_size, options.algorithm)
    return Vocabulary(
        options.algorithm, options.vocab_size, options.lowercase, options.keep_accents
    )


def _recorded(options: Options) -> dict[str, Any]:
    """Return the options that the manifest keeps."""
    kept: dict[str, Any] = {
        "heldout": options.heldout,
        "text_format": options.text_format,
        "text_field": options.text_field,
    }
    if options.bad_records != "error":
        kept["bad_records"] = options.bad_records
    if options.tokenizer is None and not options.add:
        kept["vocab_size"] = options.vocab_size
        if options.algorithm == BPE:
            kept["algorithm"] = BPE
        else:
            kept["lowercase"] = options.lowercase
        if options.keep_accents:
            kept["keep_accents"] = True
    if options.drop_copies:
        kept["drop_copies"] = True
    if options.without:
        kept["without"] = [Path(path).name for path in options.without]
    return kept
