"""Batches that are read again are the batches of the loop."""

import pytest

pytest.importorskip("torch")

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler

from bilevel_torch import replay

DATA = [(torch.tensor([float(i)]), i) for i in range(7)]


class Whole(Dataset):
    """A dataset that loads several examples at once."""

    def __getitem__(self, index):
        raise AssertionError

    def __getitems__(self, indices):
        return [10 * i for i in indices]

    def __len__(self):
        return 5


def generator():
    return torch.Generator().manual_seed(2)


LOADERS = {
    "in order": lambda: DataLoader(DATA, 3),
    "shuffled": lambda: DataLoader(DATA, 3, shuffle=True),
    "own generator": lambda: DataLoader(DATA, 3, shuffle=True, generator=generator()),
    "last dropped": lambda: DataLoader(DATA, 3, shuffle=True, drop_last=True),
    "weighted": lambda: DataLoader(DATA, 2, sampler=WeightedRandomSampler([1.0] * 7, 9, generator=generator())),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 2, False)),
    "no batches": lambda: DataLoader(DATA, batch_size=None, shuffle=True),
    "collated": lambda: DataLoader(DATA, 3, shuffle=True, collate_fn=lambda parts: [i for _, i in parts]),
    "at once": lambda: DataLoader(Whole(), 2, shuffle=True),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_batches_and_random_numbers_are_those_of_the_loop(make):
    torch.manual_seed(1)
    loader = make()
    expected = [str(batch) for _ in range(3) for batch in loader]
    after = torch.rand(1)
    torch.manual_seed(1)
    batches = replay(make(), epochs=3)
    assert torch.equal(torch.rand(1), after)
    assert len(batches) == len(expected)
    for i in [*reversed(range(len(batches))), 2]:
        assert str(batches[i]) == expected[i]
    assert [str(batch) for batch in batches[1:3]] == expected[1:3]
    assert [str(batch) for batch in batches] == expected


@pytest.mark.filterwarnings("ignore:Exception ignored.*_at_fork")  # a test of JAX may have run in this process
@pytest.mark.parametrize("persistent", [False, True])
def test_workers(persistent):
    def loader():
        return DataLoader(torch.arange(6), 2, shuffle=True, num_workers=1, persistent_workers=persistent)

    torch.manual_seed(1)
    workers = loader()
    expected = [batch.tolist() for _ in range(2) for batch in workers]
    torch.manual_seed(1)
    assert [batch.tolist() for batch in replay(loader(), epochs=2)] == expected


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: replay(DataLoader(Stream())), TypeError, r"Stream is an IterableDataset.*list\(loader\)"),
        (lambda: replay([1, 2]), TypeError, "expected a torch.utils.data.DataLoader, got list. A list needs no replay"),
        (lambda: replay(DataLoader(DATA), 0), ValueError, "epochs: expected a number >= 1, got 0"),
    ],
    ids=["stream", "list", "epochs"],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()
