"""The cache of spectra: hits, limits, threads, files."""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path

import pytest
import torch

import gfnode_fast
from gfnode_fast.data import build_graph, load_sample
from gfnode_fast.spectra import Graphs, SpectralCache, graph_spectrum, shared_cache
from gfnode_fast.spectra import cache as cache_module
from graph_shapes import batch_of, random, ring, star

MANY = [ring(5), star(4), ring(5), ring(5), random(6, 0), star(4)]


def test_each_graph_is_solved_once():
    cache = SpectralCache()
    graphs = batch_of(MANY)
    for _ in range(2):
        found = cache.spectrum(graphs)
        expected = graph_spectrum(graphs)
        torch.testing.assert_close(found.U, expected.U, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.w, expected.w, atol=1e-6, rtol=0)
    counters = cache.counters()
    assert (counters["solved"], counters["hits"]) == (3, 3)
    assert counters["bytes"] == 4 * (5 + 25 + 4 + 16 + 6 + 36)


def test_what_a_spectrum_is_known_by():
    cache = SpectralCache()
    cache.spectrum(batch_of([ring(4)]))
    cache.spectrum(batch_of([ring(4)], weighted=True))
    cache.spectrum(batch_of([2 * ring(4)], weighted=True))
    cache.spectrum(batch_of([ring(4)]), "symmetric")
    cache.spectrum(batch_of([ring(4)]), dtype=torch.float64)
    cache.spectrum(batch_of([ring(4)]), canonical=False)
    order = torch.tensor([0, 2, 1, 3])
    cache.spectrum(batch_of([ring(4)[order][:, order]]))
    assert cache.counters()["solved"] == 7
    graphs = batch_of([ring(4)])
    flipped = Graphs(graphs.row.flip(0), graphs.col.flip(0), graphs.ptr)  # the same edges
    cache.spectrum(flipped)
    assert cache.counters()["solved"] == 7


def test_equal_graphs_share_memory():
    cache = SpectralCache()
    a = random(6, 1)
    found = cache.spectrum(Graphs.repeat(*a.nonzero(as_tuple=True), 6, 1000))
    assert found.U.shape == (1000, 6, 6)
    assert found.U.untyped_storage().nbytes() == 4 * 36


def test_a_batch_of_known_graphs_is_an_index(monkeypatch: pytest.MonkeyPatch):
    known = batch_of([ring(5), star(4), random(6, 0), ring(5)], weighted=True)
    which = torch.tensor([3, 1, 1, 0, 3])
    cache = SpectralCache()
    found = cache.spectrum(known, which=which)
    batch = known.select(which)
    expected = graph_spectrum(batch)
    assert torch.equal(found.U, expected.U)
    assert torch.equal(found.w, expected.w)
    assert cache.counters()["solved"] == 2  # the rings are one graph
    assert torch.equal(SpectralCache().spectrum(batch).U, expected.U)
    monkeypatch.setattr(Graphs, "select", None)  # a hit makes no edges
    assert torch.equal(cache.spectrum(known, which=which).U, expected.U)
    assert cache.counters()["hits"] == 2


def test_a_batch_must_name_known_graphs():
    known, cache = batch_of([ring(5), star(4)]), SpectralCache()
    assert cache.spectrum(known, which=torch.tensor([], dtype=torch.int64)).U.shape == (0, 0, 0)
    with pytest.raises(TypeError, match="`which` must be int64, got torch.int32"):
        cache.spectrum(known, which=torch.tensor([0], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"`which` must be \(K,\) on cpu, got \(1, 1\)"):
        known.select(torch.tensor([[0]]))
    for number in (-1, 2):
        with pytest.raises(ValueError, match=f"`which` must be in 0 … 1, got {number}"):
            known.select(torch.tensor([number]))


def test_molecules_are_solved_once_in_a_process():
    sample = load_sample("ethanol")
    first = build_graph(sample.positions[0], sample.numbers)
    solved = shared_cache().counters()["solved"]
    expected = first.eigvecs.clone()
    first.eigvecs.zero_()  # its own
    again = build_graph(sample.positions[1], sample.numbers)
    assert torch.equal(again.eigvecs, expected)
    assert shared_cache().counters()["solved"] == solved


def test_the_oldest_go_when_it_is_full():
    size = 4 * (5 + 25)
    cache = SpectralCache(max_bytes=2 * size)
    first, second, third = (batch_of([random(5, seed, 0.6)]) for seed in (1, 2, 3))
    for graphs in (first, second, first, third):  # the second is the least recently used
        cache.spectrum(graphs)
    assert cache.counters()["evicted"] == 1
    cache.spectrum(first)
    assert cache.counters()["solved"] == 3
    cache.spectrum(second)
    assert cache.counters()["solved"] == 4
    assert cache.counters()["bytes"] <= 2 * size


def test_what_is_too_large_drops_nothing():
    small = batch_of([ring(5)])
    cache = SpectralCache(max_bytes=4 * (5 + 25))
    cache.spectrum(small)
    cache.spectrum(batch_of([ring(6)]))
    cache.spectrum(small)
    assert cache.counters()["hits"] == 1
    assert cache.counters()["evicted"] == 0


def test_nothing_is_kept_without_room():
    cache = SpectralCache(max_bytes=0)
    graphs = batch_of([ring(5), star(4)])
    for _ in range(2):
        torch.testing.assert_close(cache.spectrum(graphs).U, graph_spectrum(graphs).U)
    assert cache.counters()["bytes"] == 0


def test_no_graphs_have_no_spectra():
    none = batch_of([ring(3)]).select(torch.tensor([], dtype=torch.int64))
    found = SpectralCache().spectrum(none)
    assert (found.w.shape, found.U.shape) == ((0, 0), (0, 0, 0))


def test_threads_solve_once():
    cache = SpectralCache()
    graphs = [batch_of([random(8, seed)]) for seed in range(4)]
    threads = [threading.Thread(target=cache.spectrum, args=(graphs[k % 4],)) for k in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.counters()["solved"] == 4
    assert cache.counters()["hits"] == 8


def test_files_serve_the_next_cache(tmp_path: Path):
    graphs = batch_of(MANY)
    written = SpectralCache(directory=tmp_path).spectrum(graphs)
    cache = SpectralCache(directory=tmp_path)
    read = cache.spectrum(graphs)
    assert cache.counters()["read"] == 3
    assert cache.counters()["solved"] == 0
    assert torch.equal(read.U, written.U)
    assert not list(tmp_path.glob("*.part"))


def test_files_of_another_algorithm_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    graphs = batch_of([star(4)])
    SpectralCache(directory=tmp_path).spectrum(graphs)
    monkeypatch.setattr(cache_module, "ALGORITHM", cache_module.ALGORITHM + 1)
    cache = SpectralCache(directory=tmp_path)
    cache.spectrum(graphs)
    assert (cache.counters()["read"], cache.counters()["solved"]) == (0, 1)


def test_the_canonical_rule_has_not_changed():
    """If it has on purpose: raise `ALGORITHM`, then put the new numbers here."""
    assert cache_module.ALGORITHM == 1
    expected = torch.tensor(
        [
            [0.447213595, 0.632455532, 0.0, 0.632455532, 0.0],
            [0.447213595, 0.195439508, -0.601500955, -0.511667274, -0.371748034],
            [0.447213595, -0.511667274, -0.371748034, 0.195439508, 0.601500955],
            [0.447213595, -0.511667274, 0.371748034, 0.195439508, -0.601500955],
            [0.447213595, 0.195439508, 0.601500955, -0.511667274, 0.371748034],
        ]
    )
    torch.testing.assert_close(graph_spectrum(batch_of([ring(5)])).U[0], expected)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_file_is_reported_and_replaced(tmp_path: Path, caplog, damage: str):
    graphs = batch_of([random(8, 4)])
    expected = SpectralCache(directory=tmp_path).spectrum(graphs)
    [path] = tmp_path.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-9] ^= 1  # in the values
    path.write_bytes({"cut": data[:-40], "flip": data, "empty": b""}[damage])
    cache = SpectralCache(directory=tmp_path)
    assert torch.equal(cache.spectrum(graphs).U, expected.U)
    assert cache.counters()["solved"] == 1
    assert "is damaged" in caplog.text
    again = SpectralCache(directory=tmp_path)
    again.spectrum(graphs)
    assert again.counters()["read"] == 1


def _solve_in(directory: str) -> None:
    SpectralCache(directory=directory).spectrum(batch_of([random(8, seed) for seed in range(20)]))


def test_two_processes_share_a_directory(tmp_path: Path):
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_solve_in, args=(str(tmp_path),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    cache = SpectralCache(directory=tmp_path)
    cache.spectrum(batch_of([random(8, seed) for seed in range(20)]))
    assert cache.counters()["read"] == 20


def test_info_counts_all_caches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_module, "_ALL", type(cache_module._ALL)())
    cache = SpectralCache()
    cache.spectrum(batch_of(MANY))
    counters = gfnode_fast.info()["spectra"]["caches"]
    assert (counters["caches"], counters["solved"]) == (1, 3)


def test_bad_arguments_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="`max_bytes` must not be negative"):
        SpectralCache(-1)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        SpectralCache(directory=tmp_path / "file")
