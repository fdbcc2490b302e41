"""Ray on several nodes makes the same dataset, also when one of them is killed.

These tests run where Ray is installed: pip install "fastbert-pretrain[ray]". A cluster of three
nodes, each of some nine processes, takes half a minute to start.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import operator
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastbert.data.engine_ray import check_ray, map_on_ray
from fastbert.data.prepare import Options, job_of, prepare
from fastbert.data.sources import find_sources
from fastbert.errors import InputError
from tests.prepared import files_of, small_pieces

__all__ = ["small_pieces"]

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra: ray)"
)
OPTIONS: dict[str, Any] = {"vocab_size": 500, "progress": False}


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "ray" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    with pytest.raises(InputError, match=r"--engine ray: Ray is missing; pip install .*\[ray\]"):
        check_ray()
    with pytest.raises(InputError, match="Ray is missing"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", engine="ray")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "spark"}, "--engine spark: must be local or ray"),
        ({"ray_address": "a:1"}, "--ray-address: is of --engine ray; add it"),
    ],
)
def test_wrong_engines(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    with pytest.raises(InputError, match=words):
        prepare([tmp_path / "a.txt"], tmp_path / "out", **options)


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        yield made
    finally:
        import ray

        ray.shutdown()
        made.shutdown()


@needs_ray
@pytest.mark.slow
def test_order_and_errors(cluster: Any, tmp_path: Path) -> None:
    """The nodes import only what is installed there, so the functions are not the test's own."""
    tripled = map_on_ray(operator.methodcaller, ("__mul__", 3), range(50), cluster.address)
    assert list(tripled) == [3 * number for number in range(50)]
    paths = [[tmp_path / name] for name in ("a.txt", "b.txt", "none.txt")]
    for (path,) in paths[:2]:
        path.write_text("One.")
    found = map_on_ray(functools.partial, (find_sources,), paths, cluster.address)
    assert next(found)[0][0].path == paths[0][0]
    with pytest.raises(InputError, match=r"none\.txt: no such file or folder$"):
        list(found)


@needs_ray
@pytest.mark.slow
@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kills", [0, 1])
def test_three_nodes_make_the_same_dataset(
    cluster: Any, tmp_path: Path, english_documents: list[str], kills: int
) -> None:
    """The nodes have one core each; where one is killed, it is killed while the text is encoded."""
    draw = random.Random(0)
    text = tmp_path / "a.jsonl"
    with open(text, "w") as file:
        for _ in range(20 if kills else 5):
            for document in draw.sample(english_documents, len(english_documents)):
                file.write(json.dumps({"text": document + f" {draw.random()}."}) + "\n")
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    out, work = tmp_path / "ray", tmp_path / "ray.work"
    pieces = job_of([text], out, Options(**OPTIONS)).plan.pieces
    encoded = list[int]()

    def kill() -> None:
        while len(list(work.glob("piece-*.npz"))) < 10:
            time.sleep(0.05)
        cluster.remove_node(nodes[0], allow_graceful=False)
        encoded.append(len(list(work.glob("piece-*.npz"))))

    killer = threading.Thread(target=kill, daemon=True)
    if kills:
        killer.start()
    prepare([text], out, engine="ray", ray_address=cluster.address, **OPTIONS)
    if kills:
        killer.join()
        assert 10 <= encoded[0] < pieces, "the node was killed before all was encoded"
    assert len(cluster.list_all_nodes()) == 3 - kills
    prepare([text], tmp_path / "local", workers=2, **OPTIONS)
    assert files_of(out) == files_of(tmp_path / "local")
    assert "ray" in sys.modules
