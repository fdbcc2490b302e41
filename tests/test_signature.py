"""The key that the processes of a run share, and the values that are signed with it.

Signatures are compared with HMAC's definition, and tested with values that strangers may write.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from fastbert.cluster.rendezvous import hold_store
from fastbert.cluster.signature import LEAST, SIGNATURE, VARIABLE, Key, find_key
from fastbert.cluster.signed_store import No, SignedStore, look, printable
from fastbert.errors import InputError
from tests.disks import SmallDisk, Unavailable
from tests.ranks import PATIENCE_S, environment

SECRET = b"0123456789abcdef0123456789abcdef"


def by_definition(secret: bytes, message: bytes) -> str:
    """HMAC by RFC 2104, for a key of at most one block of SHA-256."""
    padded = secret.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(b ^ 0x36 for b in padded) + message).digest()
    return hashlib.sha256(bytes(b ^ 0x5C for b in padded) + inner).hexdigest()


def test_a_signature_is_hmac_sha256_of_name_and_value():
    message = (4).to_bytes(8, "big") + "nämé"[:3].encode() + b"a value"
    assert (
        Key(SECRET, "").sign("näm", b"a value")
        == by_definition(SECRET, message).encode() + b"a value"
    )


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.binary())
def test_what_is_signed_comes_back(name, value):
    key = Key(SECRET, "")
    assert key.verify(name, key.sign(name, value)) == value


@given(st.binary(), st.integers(min_value=0), st.integers(0, 7))
def test_no_bit_of_it_can_be_changed(value, place, bit):
    signed = bytearray(Key(SECRET, "").sign("a", value))
    signed[place % len(signed)] ^= 1 << bit
    assert Key(SECRET, "").verify("a", bytes(signed)) is None


@given(st.binary(max_size=200))
def test_nothing_else_passes(value):
    assert Key(SECRET, "").verify("a", value) is None


def test_it_holds_for_one_name_and_one_key():
    signed = Key(SECRET, "").sign("run/1", b"2 value")
    assert Key(SECRET[:-1] + b"0", "").verify("run/1", signed) is None
    assert Key(SECRET, "").verify("run/2", signed) is None
    # Where the name ends and the value begins is signed as well.
    assert Key(SECRET, "").verify("run/12", signed[:SIGNATURE] + b" value") is None
    assert all(Key(SECRET, "").verify("run/1", signed[:cut]) is None for cut in range(len(signed)))


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home directory without a key, and no variable."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def file_of(home: Path) -> Path:
    return home / ".fastbert" / "rendezvous.key"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def same(one: Key, other: Key) -> bool:
    return one.verify("a", other.sign("a", b"")) is not None


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_the_key_is_made_once_for_its_owner_alone(home, mask):
    before = os.umask(mask)
    try:
        first = find_key()
    finally:
        os.umask(before)
    assert (mode(file_of(home)), mode(file_of(home).parent)) == (0o600, 0o700)
    assert [path.name for path in file_of(home).parent.iterdir()] == ["rendezvous.key"]
    assert same(first, find_key()) and first.source == str(file_of(home))
    file_of(home).unlink()
    assert not same(first, find_key())


def test_the_variable_wins(home, monkeypatch):
    monkeypatch.setenv(VARIABLE, f" {SECRET.decode()}\n")  # as a file or a Secret may hand it on
    assert same(find_key(), Key(SECRET, "")) and find_key().source == VARIABLE
    assert list(home.iterdir()) == []


def test_the_file_may_be_a_copy_of_another_nodes(home):
    file_of(home).parent.mkdir(mode=0o755)
    file_of(home).write_bytes(SECRET)
    file_of(home).chmod(0o400)
    assert same(find_key(), Key(SECRET, ""))


READY = """
import sys
from fastbert.cluster.signature import find_key
print(flush=True)
sys.stdin.read()
print(find_key().sign("a", b"").decode())
"""


def test_many_processes_at_once_have_one_key(tmp_path):
    """The ranks of a first run each look for the key, find none, and make one."""
    for i in range(3):
        (home := tmp_path / str(i)).mkdir()
        variables = environment(HOME=str(home))
        variables.pop(VARIABLE, None)
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes: list[Any] = [
            subprocess.Popen([sys.executable, "-c", READY], env=variables, **pipes)
            for _ in range(8)
        ]
        for process in processes:
            process.stdout.readline()
        for process in processes:
            process.stdin.close()
        assert len({process.stdout.read() for process in processes}) == 1
        assert [process.wait(PATIENCE_S) for process in processes] == [0] * 8
        assert [path.name for path in file_of(home).parent.iterdir()] == ["rendezvous.key"]


def planted(
    home: Path, file_mode: int = 0o600, folder_mode: int = 0o700, content: bytes = SECRET
) -> Path:
    path = file_of(home)
    path.parent.mkdir()
    path.write_bytes(content)
    path.chmod(file_mode)
    path.parent.chmod(folder_mode)
    return path


WRONG = {
    "may be read by the group": (
        {"file_mode": 0o640},
        "{path}: other users may read or change the key (mode 640); if nobody has, run: chmod 600",
    ),
    "may be read by others": (
        {"file_mode": 0o604},
        "{path}: other users may read or change the key (mode 604)",
    ),
    "may be written by others": (
        {"file_mode": 0o602},
        "{path}: other users may read or change the key (mode 602)",
    ),
    "folder of the group": (
        {"folder_mode": 0o770},
        "{path.parent}: other users may put a key of theirs there (mode 770); run: chmod 700",
    ),
    "folder of all": (
        {"folder_mode": 0o1777},
        "{path.parent}: other users may put a key of theirs there (mode 1777)",
    ),
    "empty": ({"content": b""}, "{path}: not a key, which has at least 32 characters; remove it"),
    "short": (
        {"content": SECRET[1:] + b"\n"},
        "{path}: not a key, which has at least 32 characters; remove it",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_no_secret_is_refused(home, case):
    how, message = WRONG[case]
    path = planted(home, **how)
    refused(message.format(path=path))


def refused(message: str) -> None:
    with pytest.raises(InputError) as caught:
        find_key()
    assert str(caught.value).startswith(message), caught.value
    assert SECRET.decode() not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_file_of_another_user_is_refused(home, what):
    path = planted(home)
    theirs = path if what == "file" else path.parent
    os.chown(theirs, 4711, -1)
    refused(
        f"{theirs}: belongs to another user (number 4711), who could read the key; "
        f"remove it, or set {VARIABLE} to the same value"
    )


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["FIFO", "folder"])
def test_what_is_no_file_is_refused_at_once(home, make):
    file_of(home).parent.mkdir()
    make(file_of(home), 0o600)
    refused(f"{file_of(home)}: ")


@pytest.mark.parametrize("value", ["", " ", "x" * (LEAST - 1)])
def test_a_short_variable_is_refused(monkeypatch, value):
    """An empty variable is refused too, because it would be an accident.

    Otherwise the file would be used instead, and every node may have another file.
    """
    monkeypatch.setenv(VARIABLE, value)
    refused(
        f"{VARIABLE} has {len(value.strip())} characters; must have at least 32; "
        "make one by: openssl rand -hex 32"
    )


def test_no_place_for_a_file(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home / "nowhere"))
    refused(
        f"{file_of(home / 'nowhere')}: the key of the rendezvous cannot be kept there: "
        "No such file or directory; fix this, or set"
    )
    assert list(home.iterdir()) == []
    (home / "file").touch()
    monkeypatch.setenv("HOME", str(home / "file"))
    refused(
        f"{file_of(home / 'file')}: the key of the rendezvous cannot be kept there: Not a directory"
    )
    monkeypatch.setenv("HOME", "")
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", "relative")
    refused(
        "there is no home directory to keep the key of the rendezvous in; set HOME, or set "
        "FASTBERT_RENDEZVOUS_KEY"
    )


def test_a_home_that_is_read_only(home):
    """The disk is read-only, since permissions do not stop root."""
    code = (
        "from fastbert.cluster.signature import find_key\n"
        "try: find_key()\nexcept ValueError as error: print(error)"
    )
    try:
        with SmallDisk(home, "1m") as disk:
            disk.write_protect(home)
            variables = environment(HOME=str(home))
            variables.pop(VARIABLE, None)
            done = subprocess.run(
                [*disk.enter, sys.executable, "-c", code],
                env=variables,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
            )
    except Unavailable as why:
        pytest.skip(str(why))
    assert done.stdout == (
        f"{file_of(home)}: the key of the rendezvous cannot be kept there: Read-only file system; "
        f"fix this, or set {VARIABLE} to the same value for every process of the run\n"
    ), done.stderr


def test_the_secret_is_shown_nowhere():
    key = Key(SECRET, "FILE")
    assert SECRET.decode() not in f"{key!r} {key} {key.mismatch('rank 1')}" and key.mismatch(
        "rank 1"
    ).startswith("rank 1 and this process (FILE)")


@pytest.fixture
def store():
    """A real store, and a stranger's connection to it."""
    ours = hold_store("127.0.0.1", 0)
    return ours, dist.TCPStore(
        "127.0.0.1", ours.port, None, False, timeout=timedelta(seconds=PATIENCE_S)
    )


def put(stranger: Any, key: str, value: Any) -> None:
    """Write a value and wait for it; `set` returns before, and other connections may be faster."""
    stranger.set(key, value)
    stranger.check([key])


LARGE = 8 * 2**20 - 1000  # bytes of the largest value that a store takes


def test_values_of_strangers_are_not_read(store):
    ours, stranger = store
    table = SignedStore(dist.PrefixStore("a", ours), Key(SECRET, ""), "a")
    other = SignedStore(dist.PrefixStore("a", stranger), Key(SECRET[::-1], ""), "a")
    table.part("here").write("1", ["a value"])
    assert table.part("here").read("1") == ["a value"] and table.part("here").read_all(["1"]) == [
        ["a value"]
    ]
    copy = stranger.get("a/here/1")
    forged = {
        "JSON": b'["bye", 0]',
        "no text": b"\xff\x00\xfe",
        "one byte": b"x",
        "a mere signature": copy[:SIGNATURE],
        "cut short": copy[:-1],
        "of another key": copy[:SIGNATURE] + json.dumps(["another"]).encode(),
        "very large": b"[" * LARGE,
    }
    for name, value in forged.items():
        put(stranger, "a/there/1", value)
        assert table.part("there").read("1") is No.FORGED, name
    for place in ("a/there/1", "a/here/2", "a/1"):
        put(stranger, place, copy)  # signed, but for another place
        part, _, name = place[2:].rpartition("/")
        assert (table.part(part) if part else table).read(name) is No.FORGED, place
    other.part("here").write("1", ["a value"])
    stranger.check(["a/here/1"])  # `write` returns before the store has the value
    assert table.part("here").read("1") is No.FORGED
    assert table.part("here").read_all(["1", "2"]) is None
    put(stranger, "a/emptied", "")
    put(stranger, "a/deleted", "x")
    stranger.delete_key("a/deleted")
    for nothing in ("never", "deleted", "emptied"):
        assert table.read(nothing) is No.ABSENT


def test_the_first_signed_value_is_settled(store):
    _, stranger = store
    one, other = (
        SignedStore(dist.PrefixStore("a", connection), Key(SECRET, ""), "a") for connection in store
    )
    put(stranger, "a/roster", b'["bye", 0]\xff')
    assert one.settle("roster", [1]) == [1] == other.settle("roster", [2]) == one.read("roster")
    put(stranger, "a/roster", b"[3]")
    assert other.settle("roster", [2]) == [2] == one.read("roster")


def test_only_what_is_forged_is_swept_away(store):
    ours, stranger = store
    table = SignedStore(ours, Key(SECRET, ""), "")
    table.write("kept", None)
    put(stranger, "swept", "x")
    for name in ("kept", "swept", "absent"):
        table.sweep(name)
    assert [table.read(name) for name in ("kept", "swept", "absent")] == [
        None,
        No.ABSENT,
        No.ABSENT,
    ]
    assert not ours.check(["absent"])


def test_a_look_never_waits(store):
    ours, stranger = store
    assert look(ours, "x") is None
    for value in (b"-", b"", b"\0\xff"):
        put(stranger, "x", value)
        assert look(ours, "x") == value == stranger.get("x")


def test_text_from_the_store_takes_one_line_and_commands_no_terminal(store):
    ours, _ = store
    table = SignedStore(ours, Key(SECRET, ""), "")
    table.write(
        "x",
        {
            "who": "\x1b]0;title\x07 \x9b2J",
            "what": ["é 中 \N{NO-BREAK SPACE}|", "two\nlines\r", 7, None, True],
        },
    )
    found = table.read("x")
    assert found == {
        "who": r"\x1b]0;title\x07 \x9b2J",
        "what": [r"é 中 \xa0|", r"two\nlines\r", 7, None, True],
    }
    assert printable("\u202egnp.exe\ud800") == r"\u202egnp.exe\ud800"
