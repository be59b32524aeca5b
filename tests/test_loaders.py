"Any loader of a PyTorch user gives batches for this library; what cannot be taken is refused early."
from __future__ import annotations
from collections.abc import Iterator
from pathlib import Path
import pytest
import torch
from helpers import unpack_sample
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split
from torchvision import datasets, transforms
from mwt.data.batches import Batches, ImageData
from mwt.data.loaders import LoaderBatches, LoaderData, as_batches, as_image_data
from mwt.data.sources import image_data

PHOTOS = transforms.Compose([transforms.ToTensor(), transforms.Normalize((.5,) * 3, (.25,) * 3)])
workers = pytest.mark.parametrize('num_workers', [0, 2])
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')


def numbered(n: int = 12, classes: int = 3, channels: int = 3) -> TensorDataset:
    "Images that say their own number in every pixel."
    images = torch.arange(n).float()[:, None, None, None].expand(-1, channels, 8, 8).contiguous()
    return TensorDataset(images, torch.arange(n) % classes)


def loader(n: int = 12, classes: int = 3, batch_size: int = 5, **options) -> DataLoader:
    return DataLoader(numbered(n, classes), batch_size, **options)


def wrapped(**options) -> LoaderBatches:
    return as_batches(loader(**options), classes=['a', 'b', 'c'], device='cpu')


def numbers(batches: LoaderBatches) -> list[int]:
    return [int(x) for images, _ in batches for x in images[:, 0, 0, 0]]


@pytest.fixture(scope='module')
def digits() -> ImageData: return image_data('digits', device='cpu')


@pytest.fixture(scope='module')
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_sample(tmp_path_factory.mktemp('sample')/'photos')


# Batches

@workers
def test_tensors_come_through_unchanged(num_workers: int) -> None:
    batches = wrapped(num_workers=num_workers)
    found = list(batches)
    assert [len(y) for _, y in found] == [5, 5, 2]
    assert torch.equal(torch.cat([x for x, _ in found]), numbered().tensors[0])
    assert torch.equal(torch.cat([y for _, y in found]), numbered().tensors[1])
    assert numbers(batches) == list(range(12))          # and again
    assert all(x.dtype == torch.float32 and y.dtype == torch.int64 for x, y in found)


@workers
def test_image_folder(num_workers: int, sample: Path) -> None:
    source = DataLoader(datasets.ImageFolder(str(sample/'test'), PHOTOS), 64, num_workers=num_workers)
    batches = as_batches(source, device='cpu')
    assert batches.classes == sorted(p.name for p in (sample/'test').iterdir())
    assert (batches.shape, batches.n, len(batches), batches.batch_size) == ((3, 32, 32), 500, 8, 64)
    assert sum(len(y) for _, y in batches) == 500
    pair = batches.subset(['dog', 'cat'])
    labels = torch.cat([y for _, y in pair])
    assert labels.bincount().tolist() == [50, 50]
    assert labels.tolist() == [1] * 50 + [0] * 50       # the folder lists cats before dogs


def test_fake_data() -> None:
    source = DataLoader(datasets.FakeData(20, (3, 16, 16), 4, transforms.ToTensor()), 8)
    batches = as_batches(source, classes=4, device='cpu')
    assert batches.classes == ['0', '1', '2', '3']
    assert batches.shape == (3, 16, 16)


def test_facts() -> None:
    batches = wrapped()
    assert (len(batches), batches.n, batches.shape, batches.batch_size) == (3, 12, (3, 8, 8), 5)
    assert batches.device == torch.device('cpu')
    assert not batches.shared
    assert batches.plain() is batches
    assert batches.seed(1, epoch=4).epoch == 4
    assert '12 images of 3x8x8' in repr(batches)


def test_epochs_are_counted() -> None:
    batches = wrapped().seed(0)
    for _ in range(2): list(batches)
    assert batches.epoch == 2


def test_a_list_of_batches() -> None:
    pairs = [(torch.ones(2, 1, 4, 4, dtype=torch.float64), [0, 1]), (torch.zeros(1, 1, 4, 4), [1])]
    batches = as_batches(pairs, classes=2, device='cpu')
    assert [y.tolist() for _, y in batches] == [[0, 1], [1]]
    assert (len(batches), batches.n) == (2, None)
    assert all(x.dtype == torch.float32 for x, _ in batches)


class Endless(IterableDataset):
    "A set without a length."
    def __iter__(self) -> Iterator: return iter(zip(*numbered().tensors))


def test_without_a_length_it_can_be_judged_but_not_learned() -> None:
    source = DataLoader(Endless(), 5)
    batches = as_batches(source, classes=3, device='cpu')
    assert numbers(batches) == list(range(12))
    assert batches.n is None
    with pytest.raises(TypeError, match='does not say how many batches'): len(batches)
    with pytest.raises(TypeError, match='does not say how many batches'):
        as_image_data((source, loader()), classes=3, device='cpu')


# Classes

class Named(Dataset):
    classes = ['x', 'y', 'z']
    def __len__(self) -> int: return 6
    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]: return torch.zeros(1, 4, 4), i % 3


def test_classes_of_the_data_set() -> None:
    assert as_batches(DataLoader(Named(), 2), device='cpu').classes == ['x', 'y', 'z']
    inside = Subset(random_split(Named(), [4, 2])[0], [0, 1])
    assert as_batches(DataLoader(inside, 2), device='cpu').classes == ['x', 'y', 'z']


def test_who_is_asked_first() -> None:
    given = as_batches(DataLoader(Named(), 2), ['a', 'b', 'c'], 'cpu', n_classes=5)
    assert given.classes == ['a', 'b', 'c']
    assert as_batches(DataLoader(Named(), 2), device='cpu', n_classes=5).classes == ['x', 'y', 'z']
    assert as_batches(loader(), device='cpu', n_classes=3).classes == ['0', '1', '2']
    with pytest.raises(ValueError, match='give their names or their number'): as_batches(loader())


@pytest.mark.parametrize(('classes', 'error', 'said'), [
    (1, ValueError, 'classes must be a whole number at least 2'), (True, TypeError, 'classes'),
    (['a'], ValueError, 'at least two'), (['a', 'a', 'b'], ValueError, 'different names'),
    (2, ValueError, r'between 0 and 1 \(2 classes\), found 2')])
def test_bad_classes(classes: object, error: type, said: str) -> None:
    with pytest.raises(error, match=said): as_batches(loader(), classes, 'cpu')


# Subsets

@pytest.mark.parametrize(('chosen', 'want'), [
    (['c', 'a'], [(0, 1), (2, 0), (3, 1), (5, 0), (6, 1), (8, 0), (9, 1), (11, 0)]),
    ('b', [(1, 0), (4, 0), (7, 0), (10, 0)]),
    ([2], [(2, 0), (5, 0), (8, 0), (11, 0)])])
def test_subset(chosen: object, want: list) -> None:
    fewer = wrapped().subset(chosen)
    found = [(int(x), int(label)) for images, labels in fewer for x, label in zip(images[:, 0, 0, 0], labels)]
    assert found == want
    assert fewer.n is None
    with pytest.raises(TypeError, match='torch.utils.data.Subset'): len(fewer)


def test_subset_of_a_subset() -> None:
    fewer = wrapped().subset(['c', 'a']).subset('a')
    assert fewer.classes == ['a']
    assert numbers(fewer) == [0, 3, 6, 9]
    with pytest.raises(ValueError, match="unknown class 'b'"): wrapped().subset(['c', 'a']).subset('b')


def test_another_order_is_no_smaller() -> None:
    turned = wrapped().subset(['c', 'b', 'a'])
    assert len(turned) == 3
    assert next(iter(turned))[1].tolist() == [2, 1, 0, 2, 1]


def test_a_batch_without_the_class_is_left_out() -> None:
    fewer = as_batches(loader(12, 12, 3), classes=12, device='cpu').subset(['4', '5'])
    assert [y.tolist() for _, y in fewer] == [[0, 1]]


def test_subset_leaves_the_original_alone() -> None:
    batches = wrapped()
    batches.subset('a')
    assert numbers(batches) == list(range(12))
    assert batches.classes == ['a', 'b', 'c']


# Randomness

def test_wrapping_draws_no_random_numbers() -> None:
    source = loader(shuffle=True)
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    as_batches(source, 3, 'cpu')
    assert torch.equal(torch.rand(3), want)


def test_the_global_seed_decides_the_order() -> None:
    orders = []
    for seed in 0, 0, 1:
        batches = wrapped(shuffle=True)
        torch.manual_seed(seed)
        orders.append(numbers(batches))
    assert orders[0] == orders[1] != orders[2]


# What is refused

def pairs_once() -> Iterator: yield torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])


class Triples(Dataset):
    def __len__(self) -> int: return 4
    def __getitem__(self, i: int) -> tuple: return torch.zeros(3, 8, 8), 0, i


ZEROS = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(('data', 'error', 'said'), [
    (pairs_once(), TypeError, 'can be gone through only once; give a DataLoader, or list'),
    (iter(loader()), TypeError, 'can be gone through only once'),
    (numbered(), TypeError, 'gives single images; give DataLoader'),
    (7, TypeError, 'or be a DataLoader, not int'), ([], ValueError, 'gives no batch'),
    (loader(n=3, drop_last=True), ValueError, 'gives no batch; with drop_last=True'),
    (DataLoader(Triples(), 2), TypeError, r'must be a pair \(images, labels\), not list of 3'),
    ([dict(image=ZEROS, label=[0, 1])], TypeError, 'not dict'), ([ZEROS], TypeError, 'not Tensor'),
    ([(ZEROS.byte(), [0, 1])], TypeError, r'are uint8; make them floats .*ToTensor.*from_tensors'),
    ([(ZEROS.long(), [0, 1])], TypeError, 'must be floats .* not torch.int64'),
    ([(ZEROS[0], [0, 1])], TypeError, r'not torch.float32 of shape \(3, 8, 8\)'),
    ([([1, 2], [0, 1])], TypeError, 'must be floats .* not list'),
    ([(ZEROS, [0, 3])], ValueError, r'between 0 and 2 \(3 classes\), found 3'),
    ([(ZEROS, [-1, 0])], ValueError, 'found -1'), ([(ZEROS, [.5, 1.])], TypeError, 'whole numbers'),
    ([(ZEROS, torch.zeros(2, 3).long())], TypeError, 'one for each sample'),
    ([(ZEROS, [0])], ValueError, '2 images but 1 labels')])
def test_refused_before_any_work(data: object, error: type, said: str) -> None:
    with pytest.raises(error, match=said): as_batches(data, 3, 'cpu')


def test_a_bad_label_later_on() -> None:
    batches = as_batches([(ZEROS, [0, 1]), (ZEROS, [0, 9])], 3, 'cpu')
    with pytest.raises(ValueError, match='found 9'): list(batches)


@pytest.mark.parametrize(('rank', 'world'), [(0, 2), (1, 2)])
def test_several_processes(rank: int, world: int) -> None:
    for data in wrapped(), LoaderData(wrapped(), wrapped()):
        with pytest.raises(ValueError, match='DistributedSampler'): data.shard(rank, world)


# Whole data

def test_what_the_library_made_passes_through(digits: ImageData) -> None:
    assert as_image_data(digits) is digits
    assert as_batches(digits.valid) is digits.valid
    batches = wrapped()
    assert as_batches(batches) is batches
    data = LoaderData(batches, batches)
    assert as_image_data(data) is data
    for several in digits, data:
        with pytest.raises(TypeError, match='give one of them, as in data.valid'): as_batches(several)


@pytest.mark.parametrize('kind', ['pair', 'list', 'names', 'three'])
def test_whole_data(kind: str) -> None:
    two = loader(), loader(n=6)
    given = dict(pair=two, list=list(two), names=dict(valid=two[1], train=two[0]), three=(*two, loader(n=3)))
    data = as_image_data(given[kind], classes=['a', 'b', 'c'], device='cpu')
    assert (data.classes, data.n_classes, data.shape) == (['a', 'b', 'c'], 3, (3, 8, 8))
    assert (data.channels, data.size, data.device) == (3, (8, 8), torch.device('cpu'))
    assert (data.train.n, data.valid.n) == (12, 6)
    assert list(data.splits()) == ['train', 'valid', 'test'][:3 if kind == 'three' else 2]
    assert data.to('cpu').shard(0, 1).splits().keys() == data.splits().keys()
    assert data.subset(['c', 'a']).valid.classes == ['c', 'a']


def test_a_loader_beside_batches(digits: ImageData) -> None:
    normal = TensorDataset(digits.valid.normalise(digits.valid.images), digits.valid.labels)
    data = as_image_data((digits.train, DataLoader(normal, 50)), n_classes=10, device='cpu')
    assert isinstance(data.train, Batches)
    assert torch.equal(torch.cat([x for x, _ in data.valid]), normal.tensors[0])


@pytest.mark.parametrize(('data', 'error', 'said'), [
    (loader(), TypeError, 'a train and a valid loader are needed, not one DataLoader'),
    ([(ZEROS, [0, 1])], TypeError, 'not one list'), (wrapped(), TypeError, 'not one LoaderBatches'),
    (dict(train=loader()), TypeError, "'valid' is missing"),
    (dict(train=loader(), valid=loader(), tset=loader()), TypeError, "unknown split 'tset'"),
    ((loader(), DataLoader(numbered(channels=1), 4)), ValueError, 'make them equal'),
    ((loader(), DataLoader(numbered(), 4, sampler=[])), ValueError, 'gives no batch'),
    ((ZEROS, torch.tensor([0, 1])), TypeError, 'must be a pair')])
def test_data_that_cannot_be(data: object, error: type, said: str) -> None:
    with pytest.raises(error, match=said): as_image_data(data, classes=3, device='cpu')


def test_splits_of_different_classes() -> None:
    pair = DataLoader(Named(), 2), [(torch.zeros(2, 1, 4, 4), [0, 1])]
    with pytest.raises(ValueError, match='both need the same, in the same order'):
        as_image_data(pair, device='cpu', n_classes=2)


@needs_cuda
def test_cuda() -> None:
    batches = as_batches(loader(pin_memory=True), 3)
    assert all(x.is_cuda and y.is_cuda for x, y in batches)
    assert numbers(batches) == numbers(batches.to('cpu'))
    assert numbers(batches.subset([1])) == [1, 4, 7, 10]


def test_batches_for_a_module_must_be_pixels() -> None:
    "Whatever the device: numbers are looked at before they go there."
    batches = wrapped().pixels()
    assert not wrapped().for_module and batches.subset(['b', 'a']).for_module
    with pytest.raises(ValueError, match='a module takes pixels, .* not from 0 to 4'):
        next(iter(batches))
