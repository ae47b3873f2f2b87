"""Contract 4: the samples of a step depend on the step alone."""

from collections import Counter

import numpy as np
import pytest

from data.config import BatchSettings
from data.loader import DataLoader, Loader
from data.mixture import Mixture, Source
from data.permutation import key_of, permute
from infra.errors import ConfigError

SOURCES = [Source("a", 1000, 0.7), Source("b", 37, 0.25), Source("c", 5, 0.05)]


def _loader(**changes: object) -> Loader:
    return Loader(Mixture(SOURCES, seed=3), BatchSettings(size=24, growth=((5, 31), (9, 64))), **changes)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 65, 1000, 4097])
def test_permutation_is_a_bijection(size):
    images = permute(np.arange(size), size, key_of(1, "x"))
    assert sorted(images.tolist()) == list(range(size))


def test_permutations_are_even_over_keys_and_pinned():
    hits = Counter(int(permute(np.array([0]), 10, key)[0]) for key in range(5000))
    assert all(400 < hits[image] < 600 for image in range(10)), hits
    orders = {tuple(permute(np.arange(4), 4, key_of(key)).tolist()) for key in range(1000)}
    assert len(orders) == 24
    assert permute(np.arange(8), 8, 42).tolist() == [0, 2, 3, 1, 7, 5, 6, 4]  # moving it would reorder resumed runs


def test_large_places_need_no_memory_for_the_rest():
    size = 10**15
    places = np.array([0, 1, size - 1])
    images = permute(places, size, 7)
    assert len(set(images.tolist())) == 3 and images.max() < size and images.min() >= 0
    with pytest.raises(ValueError, match="places must lie in"):
        permute(np.array([5]), 5, 0)


def test_every_epoch_of_every_source_is_a_whole_shuffle():
    ids = Mixture(SOURCES, seed=0).samples(0, 20_000).tuples()
    for number, source in enumerate(SOURCES):
        drawn = [(epoch, index) for place, epoch, index in ids if place == number]
        last = drawn[-1][0]
        assert [epoch for epoch, _ in drawn] == sorted(epoch for epoch, _ in drawn)
        orders = []
        for epoch in range(last):
            order = [index for turn, index in drawn if turn == epoch]
            assert sorted(order) == list(range(source.size))
            orders.append(order)
        assert len(orders) > 5 and orders[0] != orders[1]


def test_shares_follow_the_weights_everywhere():
    mixture = Mixture(SOURCES, seed=0)
    for start in (0, 100_000, 10**12):
        counts = Counter(source for source, _, _ in mixture.samples(start, 20_000).tuples())
        assert [counts[n] / 20_000 for n in range(3)] == pytest.approx([0.7, 0.25, 0.05], abs=0.01)


def test_reading_in_pieces_gives_the_same_stream():
    mixture = Mixture(SOURCES, seed=5)
    whole = mixture.samples(1000, 3000).tuples()
    pieces = []
    for start in range(1000, 4000, 77):
        pieces += Mixture(SOURCES, seed=5).samples(start, min(77, 4000 - start)).tuples()
    assert pieces == whole
    assert Mixture(SOURCES, seed=6).samples(1000, 3000).tuples() != whole


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7, 24, 100])
def test_ranks_together_are_the_batch_for_any_world_size(world_size):
    loader = _loader()
    for step in (0, 4, 5, 8, 9, 20):
        shares = [loader.share(step, rank, world_size) for rank in range(world_size)]
        assert [item for share in shares for item in share.tuples()] == loader.batch(step).tuples()
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        pieces = [loader.micro_batches(step, rank, world_size, 4) for rank in range(world_size)]
        assert len({len(piece) for piece in pieces}) == 1
        together = [item for rank in pieces for piece in rank for item in piece.tuples()]
        assert together == loader.batch(step).tuples()
        assert all(len(piece) <= 4 for rank in pieces for piece in rank)


def test_steps_follow_each_other_without_gap_or_overlap_while_the_batch_grows():
    loader = _loader()
    assert [loader.batch_size(step) for step in (0, 4, 5, 8, 9)] == [24, 24, 31, 31, 64]
    consumed = [item for step in range(12) for item in loader.batch(step).tuples()]
    assert consumed == loader.mixture.samples(0, 5 * 24 + 4 * 31 + 3 * 64).tuples()


def test_after_faults_exactly_the_skipped_windows_are_missing():
    clean = _loader()
    windows = [clean.batch(step).tuples() for step in range(20)]
    skipped: set[int] = set()
    consumed = []
    loader = _loader()
    for step in range(14):
        for bad in {3: (3, 4), 7: (9,), 11: (14, 15)}.get(step, ()):
            assert loader.window(step) == bad
            skipped.add(bad)
            loader = _loader(skipped=skipped)  # a resumed process knows the step and the list, nothing else
        consumed += loader.batch(step).tuples()
    expected = [item for window in range(19) if window not in skipped for item in windows[window]]
    assert consumed == expected
    assert _loader(skipped=[9, 3, 4]).window(8) == 11


def test_data_loader_fetches_the_samples_themselves():
    samples = {"words": ["w0", "w1", "w2"], "digits": ["0", "1"]}
    loader = DataLoader(samples, BatchSettings(size=10), seed=0, weights={"words": 0.5, "digits": 0.5})
    batch = loader.batch(0)
    assert len(batch) == 10 and set(batch) <= {"w0", "w1", "w2", "0", "1"}
    pieces = [item for rank in range(3) for piece in loader.micro_batches(0, rank, 3, 2) for item in piece]
    assert pieces == batch
    with pytest.raises(ValueError, match="name the same sources"):
        DataLoader(samples, BatchSettings(), seed=0, weights={"words": 1.0})


def test_default_weights_are_one_shuffle_over_everything():
    loader = DataLoader({"a": list(range(300)), "b": list(range(300, 400))}, BatchSettings(size=40), seed=1)
    seen = Counter(item for step in range(640) for item in loader.batch(step))
    assert len(seen) == 400 and max(seen.values()) - min(seen.values()) <= 1


@pytest.mark.parametrize(
    ("sources", "problem"),
    [
        ([], "no source"),
        ([Source("a", 0)], "'a' is empty"),
        ([Source("a", 1), Source("a", 2)], "two sources are called 'a'"),
        ([Source("a", 1, -1.0)], "weight -1.0"),
        ([Source("a", 1, 1.0), Source("b", 1, 1e-9)], "'b' has a share below"),
    ],
)
def test_bad_mixtures_are_named(sources, problem):
    with pytest.raises(ConfigError, match=problem):
        Mixture(sources, seed=0)


def test_bad_batches_are_refused():
    with pytest.raises(ValueError, match="windows must rise"):
        BatchSettings(size=4, growth=((5, 8), (5, 9)))
    with pytest.raises(ValueError, match="windows must rise"):
        BatchSettings(size=4, growth=((0, 8),))
    with pytest.raises(ValueError, match="rank 2 of 2"):
        _loader().share(0, 2, 2)
    with pytest.raises(ValueError, match="step -1"):
        _loader().batch(-1)
