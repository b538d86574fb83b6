"""Streams: every example once an epoch, and resumed exactly where they were."""

import itertools

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mtljax.data import DataError, stream

SIZE, BATCH = 23, 5  # four batches an epoch, three examples left over


def make_arrays():
    return {"image": np.arange(2 * SIZE).reshape(SIZE, 2), "left": np.arange(SIZE)}


class Rows:
    """A random access source without batched reads."""

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return {key: array[index] for key, array in make_arrays().items()}


class BatchedRows(Rows):
    """One with them, that counts its calls."""

    calls = 0

    def __getitems__(self, indices):
        self.calls += 1
        return [self[i] for i in indices]


def assert_same(one, two):
    assert set(one) == set(two)
    for key in one:
        np.testing.assert_array_equal(one[key], two[key])


def test_every_example_at_most_once_an_epoch_and_another_order_each():
    batches = stream(make_arrays(), BATCH, seed=0)
    epochs = [np.stack([next(batches)["left"] for _ in range(4)]) for _ in range(3)]
    for epoch in epochs:
        assert len(np.unique(epoch)) == 20
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[1] != epochs[2]).any()


def test_every_example_once_when_batches_divide_the_set():
    arrays = {"left": np.arange(20)}
    batches = stream(arrays, 5, seed=3)
    for _ in range(3):
        epoch = np.concatenate([next(batches)["left"] for _ in range(4)])
        np.testing.assert_array_equal(np.sort(epoch), np.arange(20))


def test_rows_stay_together_and_seed_decides():
    one = next(stream(make_arrays(), BATCH, seed=0))
    np.testing.assert_array_equal(one["image"][:, 0], 2 * one["left"])
    assert_same(one, next(stream(make_arrays(), BATCH, seed=0)))
    assert (one["left"] != next(stream(make_arrays(), BATCH, seed=1))["left"]).any()


@pytest.mark.parametrize("source", [Rows(), BatchedRows()])
def test_sources_give_what_arrays_give(source):
    batches = stream(source, BATCH, seed=0)
    for ours, theirs in zip(
        range(6), stream(make_arrays(), BATCH, seed=0), strict=False
    ):
        del ours
        assert_same(next(batches), theirs)
    assert getattr(source, "calls", 6) == 6  # one read a batch


def test_threads_do_not_change_the_batches():
    one = stream(make_arrays(), BATCH, seed=0)
    two = stream(make_arrays(), BATCH, seed=0, num_threads=2)
    for _ in range(6):
        assert_same(next(one), next(two))


def test_transform_sees_whole_batches():
    halve = lambda batch: {"half": batch["left"] / 2}
    batch = next(stream(make_arrays(), BATCH, seed=0, transform=halve))
    assert set(batch) == {"half"}
    assert batch["half"].shape == (BATCH,)


@pytest.mark.parametrize("done", [0, 3, 4, 7])
def test_resumes_from_its_state(done):
    batches = stream(make_arrays(), BATCH, seed=0)
    for _ in range(done):
        next(batches)
    state = batches.get_state()
    following = list(itertools.islice(batches, 6))  # across the end of an epoch
    resumed = stream(make_arrays(), BATCH, seed=0)
    resumed.set_state(state)
    for expected in following:
        assert_same(next(resumed), expected)


def test_resumes_through_orbax(tmp_path):
    batches = stream(make_arrays(), BATCH, seed=0)
    for _ in range(3):
        next(batches)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        save = grain.checkpoint.CheckpointSave(batches)
        manager.save(3, args=ocp.args.Composite(data=save))
        manager.wait_until_finished()
    following = list(itertools.islice(batches, 6))

    resumed = stream(make_arrays(), BATCH, seed=0)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        restore = grain.checkpoint.CheckpointRestore(resumed)
        manager.restore(3, args=ocp.args.Composite(data=restore))
    for expected in following:
        assert_same(next(resumed), expected)


@pytest.mark.parametrize("batch_size", [0, SIZE + 1])
def test_batch_must_fit(batch_size):
    with pytest.raises(
        DataError, match=f"{SIZE} examples of the set, not {batch_size}"
    ):
        stream(make_arrays(), batch_size, seed=0)


def test_wrong_sources_and_seeds():
    with pytest.raises(DataError, match="equal length"):
        stream({"a": np.zeros(3), "b": np.zeros(4)}, 1, seed=0)
    with pytest.raises(DataError, match="equal length"):
        stream({}, 1, seed=0)
    with pytest.raises(DataError, match="not generator"):
        stream((i for i in range(3)), 1, seed=0)
    with pytest.raises(DataError, match="seed must be between"):
        stream(make_arrays(), 1, seed=-1)


@pytest.mark.data
def test_streams_the_real_catalogue(real_data_dir):
    from mtljax.data import tfds_source

    if not (real_data_dir / "tfds" / "mnist").is_dir():
        pytest.skip("no tfds/mnist below the folder of real data sets")
    source = tfds_source("mnist", "train[:500]", data_dir=real_data_dir)
    batches = stream(source, 100, seed=0)
    one = [next(batches) for _ in range(5)]
    assert one[0]["image"].shape == (100, 28, 28, 1)
    labels = np.concatenate([batch["label"] for batch in one])
    every = [row["label"] for row in source.__getitems__(range(500))]
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(every))
