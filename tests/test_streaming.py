"Images in files give the batches that they would give from memory; shares of batches add up to the whole."
from __future__ import annotations
import functools, gc, json, multiprocessing, os, pickle, subprocess, sys
from collections.abc import Iterator
from pathlib import Path
import numpy as np
import pytest
import torch
from helpers import unpack_sample
from hypothesis import given, settings, strategies as st
from matplotlib.axes import Axes
from PIL import Image
from torch.utils.data import DataLoader
import mwt.data.batches
from mwt.core.checks import seeded
from mwt.data import folders, streams
from mwt.data.augment import Augment
from mwt.data.batches import Batches, ImageData, channel_stats, from_tensors
from mwt.data.streams import ImageFiles, image_files
from mwt.data.folders import decode_images, list_images
from mwt.data.sources import image_data
from mwt.measure import evaluate
from mwt.networks import create_model
from mwt.train.fit import fit

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device('cpu')
VARIED = Augment(pad=3, flip=True, cutout=5)
quick = settings(max_examples=60, deadline=None)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
either = pytest.mark.parametrize('workers', [0, 2])


@pytest.fixture(scope='module')
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_sample(tmp_path_factory.mktemp('sample')/'photos')


@pytest.fixture(scope='module')
def resident(sample: Path) -> ImageData: return photos(sample, streaming=False)


@pytest.fixture(scope='module')
def streamed(sample: Path) -> ImageData: return photos(sample, streaming=True)


@pytest.fixture(autouse=True)
def no_process_stays() -> Iterator[None]:
    "Workers end with the epoch that they were started for, also with one that is left early or fails."
    yield
    if multiprocessing.active_children(): gc.collect()      # an error holds on to the frames that it passed
    assert not multiprocessing.active_children()


def photos(folder: Path, **options) -> ImageData:
    usual = dict(root=folder.parent/'data', device='cpu', show_progress=False, batch_size=100)
    return image_data(folder, **usual | dict(augment=VARIED, workers=2) | options)


def epoch(batches: Batches) -> list[tuple[torch.Tensor, torch.Tensor]]: return list(batches)


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(torch.equal(x, p) and torch.equal(y, q) for (x, y), (p, q) in zip(a, b))


def tree(folder: Path, names: list[str], mode: str = 'RGB', side: int = 8, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder/name)
    return folder


def small(folder: Path, n: int = 5, **kwargs) -> Path:
    kinds = 'train/cat', 'train/dog', 'test/cat', 'test/dog'
    return tree(folder, [f'{kind}/{i}.png' for kind in kinds for i in range(n)], **kwargs)


# The same batches

def test_an_epoch_is_the_same_bit_for_bit(resident: ImageData, streamed: ImageData) -> None:
    assert isinstance(streamed.train.images, ImageFiles) and isinstance(resident.train.images, torch.Tensor)
    assert torch.equal(resident.train.mean, streamed.train.mean)
    assert torch.equal(resident.train.std, streamed.train.std)
    whole, found = resident.train.seed(4), streamed.train.seed(4)
    first = epoch(found)
    assert len(first) == len(found) == 13 and first[0][0].dtype == torch.float32
    assert same(epoch(whole), first) and same(epoch(whole), epoch(found))
    assert same(epoch(found.seed(4, epoch=1)), epoch(whole.seed(4, epoch=1)))
    assert not same(first, epoch(found.seed(4, epoch=1)))


@pytest.mark.parametrize('make', [
    lambda data: data.valid, lambda data: data.test, lambda data: data.train.plain(),
    lambda data: data.train.subset(['dog', 2]), lambda data: data.test.subset('cat'),
    lambda data: data.train.sample(150, seed=3), lambda data: data.subset(['ship', 'cat']).valid,
    lambda data: data.train.sample(40).plain().subset([1, 0]),
    lambda data: data.train.to('cpu')], ids=['valid', 'test', 'plain', 'subset', 'one class', 'sample',
    'all three', 'several', 'to'])
def test_whatever_is_made_of_them_is_the_same(make, resident: ImageData, streamed: ImageData) -> None:
    whole, found = make(resident), make(streamed)
    assert isinstance(found.images, ImageFiles)
    def facts(b: Batches) -> tuple: return b.n, len(b), b.shape, b.classes, b.device
    assert facts(found) == facts(whole)
    assert torch.equal(found.labels, whole.labels) and same(epoch(found), epoch(whole))


@pytest.mark.parametrize('options', [
    dict(workers=0), dict(workers=1), dict(size=20), dict(seed=7, valid=.3), dict(batch_size=2000)], ids=str)
def test_options(options: dict, sample: Path) -> None:
    options = dict(workers=0) | options         # to start workers takes longer than to read few images
    whole, found = (photos(sample/'test', streaming=streaming, **options) for streaming in (False, True))
    for split in 'train', 'valid', 'test':
        assert same(epoch(whole.splits()[split]), epoch(found.splits()[split]))


def test_facts_and_pictures(resident: ImageData, streamed: ImageData) -> None:
    assert streamed.report().rows == resident.report().rows
    assert streamed.shape == (3, 32, 32)
    assert streamed.device == CPU
    assert streamed.storage == 'streamed to cpu by 2 workers, as asked'
    assert resident.storage == '6.14 MB in memory on cpu'
    for data in streamed, resident: assert data.storage in repr(data) and data.storage in str(data.report())
    assert 'streamed by 2 workers' in repr(streamed.train) and 'streamed' not in repr(resident.train)
    for data in streamed, streamed.train: assert isinstance(data.show(5), Axes)
    pictures = [data.show(30).images[0].get_array() for data in (resident, streamed)]
    assert np.array_equal(*pictures)


def test_training_and_judging(resident: ImageData, streamed: ImageData) -> None:
    def trained(data: ImageData) -> tuple[dict[str, torch.Tensor], float]:
        data = ImageData(data.train.sample(300), data.valid, data.test.sample(100))
        with seeded(0): model = create_model('simcnn', 10, .1)
        fit(model, data, 1, device='cpu', show_progress=False)
        return model.state_dict(), evaluate(model, data.test)
    (weights, accuracy), (found, found_accuracy) = trained(resident), trained(streamed)
    assert accuracy == found_accuracy and all(torch.equal(weights[k], found[k]) for k in weights)


def test_a_copy_goes_on_alike(streamed: ImageData) -> None:
    copy = pickle.loads(pickle.dumps(streamed.valid))
    assert same(epoch(copy), epoch(streamed.valid))


def test_processes_that_start_from_nothing(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "As on macOS and Windows: all that a worker needs is sent to it."
    streamed = photos(sample, streaming=True, workers=1)        # to start one takes seconds
    want = epoch(streamed.valid)
    spawning = functools.partial(DataLoader, multiprocessing_context='spawn')
    monkeypatch.setattr(streams, 'DataLoader', spawning)
    assert same(epoch(streamed.valid), want)


def test_random_numbers_of_others_are_left_alone(streamed: ImageData) -> None:
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    epoch(streamed.valid)
    assert torch.equal(torch.rand(3), want)


def test_an_epoch_may_be_left_and_two_may_interleave(resident: ImageData, streamed: ImageData) -> None:
    first = next(iter(streamed.test))
    for (x, _), (p, _) in zip(streamed.test, streamed.test): assert torch.equal(x, p)
    assert torch.equal(first[0], next(iter(resident.test))[0])


@needs_cuda
def test_cuda_gives_the_same_batches(sample: Path, streamed: ImageData) -> None:
    moved = photos(sample, streaming=True, device='cuda')
    assert moved.device.type == 'cuda'
    assert all(images.is_cuda for images in moved.valid.images.stream([np.arange(3)]))
    for (x, y), (p, q) in zip(streamed.train.seed(0), moved.train.seed(0)):
        assert p.is_cuda and q.is_cuda and torch.allclose(x, p.cpu(), atol=1e-6) and torch.equal(y, q.cpu())
    assert 0 < streams._free_memory(moved.device) <= torch.cuda.get_device_properties(0).total_memory


# Which of the two

def test_half_of_the_free_memory_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture) -> None:
    folder, asked = small(tmp_path/'a'), []
    def free(amount: int) -> None:
        monkeypatch.setattr(streams, '_free_memory', lambda device: asked.append(device) or amount)
    need = 20 * 3 * 8 * 8
    free(2 * need)
    assert isinstance(photos(folder, show_progress=True).train.images, torch.Tensor)
    assert capsys.readouterr().out == ''
    free(2 * need - 1)
    data = photos(folder, show_progress=True, root=tmp_path/'none')
    assert isinstance(data.test.images, ImageFiles) and asked == [CPU, CPU] and not (tmp_path/'none').exists()
    assert data.storage == ('streamed to cpu by 2 workers, since decoded they take 3.84 kB, '
                            'more than half of the 7.68 kB of memory that is free')
    said = capsys.readouterr().out
    assert said.count('\n') == 1 and 'more than half of the 7.68 kB' in said and 'streaming=False' in said
    assert isinstance(photos(folder, size=4).train.images, torch.Tensor)            # a quarter of the bytes
    assert isinstance(photos(folder, size=9).train.images, ImageFiles)
    assert isinstance(photos(folder, streaming=False).train.images, torch.Tensor)
    assert capsys.readouterr().out == ''


def test_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
    monkeypatch.setattr(os, 'cpu_count', lambda: 64)
    assert 10**7 < streams._host_memory() and streams._default_workers() == 16
    monkeypatch.setattr(streams, '_host_memory', lambda: 800)
    assert streams._free_memory(CPU) == 800
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '8')     # processes on one machine share its memory and cores
    assert streams._free_memory(CPU) == 100 and streams._default_workers() == 8
    monkeypatch.setattr(os, 'cpu_count', lambda: None)
    assert streams._default_workers() == 1


@pytest.mark.parametrize(('source', 'options', 'error', 'said'), [
    ('digits', dict(streaming=True), ValueError, "'digits' fits into memory whole"),
    ('cifar10', dict(streaming=True), ValueError, 'is for folders of images'),
    (None, dict(streaming='yes'), TypeError, "streaming must be True, False or None, not 'yes'"),
    (None, dict(workers=-1), ValueError, 'workers'),
    (None, dict(workers=1.5), TypeError, 'workers')])
def test_options_that_cannot_be(source: str | None, options: dict, error: type, said: str, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small(tmp_path/'a')
    for module in folders, streams:
        monkeypatch.setattr(module, 'read_image', lambda *args: pytest.fail('an image was read'))
    with pytest.raises(error, match=said):
        image_data(source or folder, root=tmp_path/'data', device='cpu', **options)
    assert not (tmp_path/'data').exists()


def test_named_sets_are_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, '_free_memory', lambda device: 0)
    for streaming in None, False:
        assert image_data('digits', device='cpu', streaming=streaming).storage == '115 kB in memory on cpu'


# Images of every kind

@either
@pytest.mark.parametrize('kind', ['truncated', 'text', 'size', 'gone', 'colour'])
def test_a_bad_image_is_named(kind: str, workers: int, tmp_path: Path) -> None:
    folder = small(tmp_path/'a', n=30, mode='L' if kind == 'colour' else 'RGB')
    data = photos(folder, streaming=True, workers=workers, batch_size=16)
    bad = tmp_path/'a/test/dog/7.png'
    if kind == 'truncated': bad.write_bytes(bad.read_bytes()[:-60])
    if kind == 'text': bad.write_text('no image')
    if kind == 'size': tree(tmp_path/'a', ['test/dog/7.png'], side=9)
    if kind == 'gone': bad.unlink()
    if kind == 'colour': tree(tmp_path/'a', ['test/dog/7.png'])
    says = dict(size=f'images differ in size: {bad} is 9x9, the first one 8x8',
                colour=f'{bad} is in colour, all other images are grey')
    with pytest.raises(ValueError) as raised: epoch(data.test)
    assert str(raised.value).startswith(says.get(kind, f'{bad} is not a readable image'))
    assert len(str(raised.value)) < 400
    assert len(epoch(data.train.plain())) == 4          # the others are as good as before


def test_a_bad_image_is_named_when_opening(tmp_path: Path) -> None:
    small(tmp_path/'a', mode='L')
    (tmp_path/'a/train/dog/1.png').write_text('no image')
    with pytest.raises(ValueError, match=r'train/dog/1.png is not a readable image .*; repair or remove it'):
        photos(tmp_path/'a', streaming=True)


@pytest.mark.parametrize(('first', 'last', 'channels'), [
    ('L', 'L', 1), ('L', 'RGB', 3), ('RGB', 'L', 3), ('1', 'LA', 1), ('LA', 'P', 3)])
def test_grey_and_colour(first: str, last: str, channels: int, tmp_path: Path) -> None:
    modes = {'a.png': first, 'b.png': first, 'c.png': last}
    paths = [tree(tmp_path, [name], mode)/name for name, mode in modes.items()]
    files, want = image_files(paths, show_progress=False), decode_images(paths, show_progress=False)
    assert files.shape == want.shape == (3, channels, 8, 8) and torch.equal(files.read(), want)


def test_deep_greys_are_grey(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 256], [32768, 65535]], dtype=np.uint16)).save(tmp_path/'deep.png')
    paths = [tree(tmp_path, ['a.png'], 'L', side=2)/'a.png', tmp_path/'deep.png']
    assert image_files(paths, show_progress=False).shape == (2, 1, 2, 2)
    assert image_files(paths, show_progress=False)[[1]].read().ravel().tolist() == [0, 1, 128, 255]


def test_names_beyond_ascii(tmp_path: Path) -> None:
    paths = [tree(tmp_path, [name])/name for name in ('Käfer.png', '猫 1.png', 'a.png')]
    files = image_files(paths, show_progress=False)
    assert torch.equal(files.read(), decode_images(paths, show_progress=False))


def test_choosing_opens_no_file(tmp_path: Path) -> None:
    files = ImageFiles(np.array([f'no/such/{i}.png'.encode() for i in range(6)]), (3, 4, 5))
    none = torch.tensor([], dtype=torch.long)
    cases = [([4, 1], '41'), (torch.tensor([4, 1]), '41'), (torch.arange(6) > 3, '45'), (slice(2), '01'),
             (np.array([0]), '0'), (none, '')]
    for rows, want in cases:
        chosen = files[rows]
        assert chosen.paths.tolist() == [f'no/such/{i}.png'.encode() for i in want]
        assert chosen.shape == (len(want), 3, 4, 5)


def test_files_as_splits(sample: Path, resident: ImageData) -> None:
    "Files that no folder layout describes."
    _, found = list_images(sample)
    files = image_files([sample/f.path for f in found['test']], show_progress=False)
    labels = torch.tensor([f.label for f in found['test']])
    options = dict(valid=.2, device='cpu', show_progress=False)
    data = from_tensors((files, labels), (files[::5], labels[::5]), **options)
    assert [b.n for b in data.splits().values()] == [400, 100, 100]
    assert torch.equal(data.test.images.read(), resident.test.images[::5])
    with pytest.raises(ValueError, match='500 images but 499 labels'):
        from_tensors((files, labels[1:]), (files, labels), device='cpu')


# Normalisation

@either
def test_many_files_are_measured_by_an_even_spread(workers: int, sample: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = list_images(sample)
    paths = [sample/f.path for f in found['train']]
    files, read = image_files(paths, workers=workers, show_progress=False), []
    decoded = decode_images(paths, show_progress=False)
    assert all(map(torch.equal, channel_stats(files), channel_stats(decoded)))
    monkeypatch.setattr(mwt.data.batches, '_MEASURED', 200)
    real = ImageFiles.stream
    def noting(self: ImageFiles, batches: list[np.ndarray]) -> Iterator[torch.Tensor]:
        read.extend(np.concatenate(batches))
        return real(self, batches)
    monkeypatch.setattr(ImageFiles, 'stream', noting)
    spread = decoded[[i * 1500 // 200 for i in range(200)]]
    assert all(map(torch.equal, channel_stats(files), channel_stats(spread)))
    assert len(set(read)) == 200
    assert np.bincount([found['train'][i].label for i in read]).tolist() == [20] * 10


# Shares of several processes

def numbered(n: int, **options) -> Batches:
    "Each image has a class of its own."
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    names, raw = [str(i) for i in range(n)], dict(mean=torch.zeros(1), std=torch.ones(1))
    return Batches(images, torch.arange(n), names, **raw, **options)


def check_share_of_each_batch(batches: Batches, world: int) -> None:
    "Side by side, the shares of a batch are the batch."
    shares = [batches.shard(rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {len(batches)}
    whole = epoch(batches)
    for (x, y), *parts in zip(whole, *map(epoch, shares), strict=True):
        n = len(y) // world * world
        assert {len(q) for _, q in parts} == {n // world} and (n == len(y) or len(whole) == 1)
        assert torch.equal(torch.cat([p for p, _ in parts]), x[:n])
        assert torch.equal(torch.cat([q for _, q in parts]), y[:n])


def check_share_of_all(batches: Batches, world: int) -> None:
    "One after another, the shares are everything."
    shares = [batches.shard(rank, world) for rank in range(world)]
    found = [epoch(share) for share in shares]
    assert [len(f) for f in found] == [len(share) for share in shares]
    counts = [sum(len(y) for _, y in f) for f in found]
    assert max(counts) - min(counts) <= 1 and sum(counts) == batches.n
    assert all(len(y) <= -(-batches.batch_size // world) for f in found for _, y in f)
    for i in range(2):
        whole = torch.cat([b[i] for b in epoch(batches.seed(0))])
        assert torch.equal(torch.cat([b[i] for f in found for b in f]), whole)


@quick
@given(n=st.integers(1, 70), each=st.integers(1, 12), world=st.integers(1, 6), seed=st.integers(0, 2**32 - 1),
       start=st.integers(0, 5))
def test_shares_of_shuffled_batches(n: int, each: int, world: int, seed: int, start: int) -> None:
    varied = Augment(pad=1, cutout=2)
    batches = numbered(n, batch_size=each * world, shuffle=True, augment=varied).seed(seed, start)
    if n < world:
        with pytest.raises(ValueError, match=f'{n} training images are too few for {world} processes'):
            batches.shard(0, world)
    else: check_share_of_each_batch(batches, world)


@quick
@given(n=st.integers(1, 70), batch_size=st.integers(1, 40), world=st.integers(1, 6), varied=st.booleans())
def test_shares_in_order(n: int, batch_size: int, world: int, varied: bool) -> None:
    check_share_of_all(numbered(n, batch_size=batch_size, augment=Augment(pad=1) if varied else None), world)


def test_shares_of_streamed_batches(sample: Path, resident: ImageData, streamed: ImageData) -> None:
    alone = photos(sample, streaming=True, workers=0)           # workers change nothing of a share
    for batches in alone.train.seed(2), alone.train.sample(99): check_share_of_each_batch(batches, 2)
    for batches in alone.test, alone.train.plain(): check_share_of_all(batches, 2)
    found, whole = (data.shard(1, 2).splits() for data in (streamed, resident))
    for part in found: assert same(epoch(found[part].seed(3)), epoch(whole[part].seed(3)))


def test_one_process_shares_with_nobody(resident: ImageData) -> None:
    for batches in resident.train.seed(1, epoch=3), resident.test:
        alone = batches.shard(0, 1)
        assert alone.epoch == batches.epoch
        assert len(alone) == len(batches)
        assert repr(alone) == repr(batches)
        assert same(epoch(alone), epoch(batches))


def test_a_share_stays_one(resident: ImageData) -> None:
    share = resident.train.shard(1, 4)
    assert share.n == resident.train.n
    assert torch.equal(share.labels, resident.train.labels)
    assert 'share 1 of 4' in repr(share)
    assert same(epoch(share.plain()), epoch(resident.train.plain().shard(1, 4)))
    pair = resident.train.subset(['cat', 'dog'])
    assert same(epoch(share.subset(['cat', 'dog']).seed(0)), epoch(pair.shard(1, 4).seed(0)))
    some = resident.train.sample(200)
    assert same(epoch(share.to('cpu').sample(200).seed(0)), epoch(some.shard(1, 4).seed(0)))
    assert same(epoch(pickle.loads(pickle.dumps(share.seed(5)))), epoch(share.seed(5)))
    assert same(epoch(share.shard(0, 1).seed(5)), epoch(resident.train.seed(5)))
    assert len(resident.shard(2, 4).test) == 5 and resident.shard(2, 4).train._shard == (2, 4)


@pytest.mark.parametrize(('rank', 'world', 'error', 'said'), [
    (0, 3, ValueError, 'batch_size=100 cannot be shared equally by 3 processes; take a multiple of 3'),
    (2, 2, ValueError, 'rank must be a whole number at least 0 and at most 1'),
    (-1, 2, ValueError, 'rank'), (0, 0, ValueError, 'world'), (0., 2, TypeError, 'rank')])
def test_shares_that_cannot_be(rank: int, world: int, error: type, said: str, resident: ImageData) -> None:
    with pytest.raises(error, match=said): resident.train.shard(rank, world)


# The benchmark

@pytest.mark.slow
def test_benchmark_of_loading(sample: Path, tmp_path: Path) -> None:
    results = tmp_path/'loading.jsonl'
    command = [sys.executable, str(ROOT/'benchmarks'/'loading.py'), '--data', str(sample)]
    command += ['--root', str(tmp_path)]
    command += ['--quick', '--device', 'cpu', '--results', str(results)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(found) == 4
    assert len({row['loader'] for row in found}) == 4
    assert all(row['images_per_second'] > 0 and row['speedup'] > 0 for row in found)
    assert found[0]['speedup'] == 1
