"Images arrive whole, unchanged and in one split only; random numbers repeat; errors come before any work."
from __future__ import annotations
import os, pickle, shutil, struct, sys, time, warnings, zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from helpers import unpack_sample
from hypothesis import given, settings, strategies as st
from matplotlib.axes import Axes
from PIL import Image
from torchvision import datasets
from mwt.data import folders, streams
from mwt.data.augment import Augment, crop, cut_out, mirror
from mwt.data.batches import Batches, ImageData, channel_stats, from_tensors
from mwt.data.folders import BrokenImage, cached_images, decode_images, list_images, read_image
from mwt.data.labels import check_labels, class_indices, split_by_class
from mwt.data.sources import image_data
from mwt.data.streams import ImageFiles, image_files

CLASSES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
quick = settings(max_examples=40, deadline=None)


@pytest.fixture(scope='module')
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The real images, in train/ and test/."
    return unpack_sample(tmp_path_factory.mktemp('sample')/'photos')


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('data')


@pytest.fixture(scope='module')
def photos(sample: Path, root: Path) -> ImageData:
    return image_data(sample, root=root, device='cpu', show_progress=False)


@pytest.fixture
def digits() -> ImageData: return image_data('digits', device='cpu')


def numbered(n: int = 60, classes: int = 3, side: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    "Images that say their own number in every pixel."
    values = torch.arange(n, dtype=torch.uint8)[:, None, None, None]
    return values.expand(-1, 3, side, side).contiguous(), torch.arange(n) % classes


def rows(images: torch.Tensor) -> Counter: return Counter(bytes(i.numpy().tobytes()) for i in images)


def together(data: ImageData) -> torch.Tensor: return torch.cat([b.images for b in data.splits().values()])


def tree(folder: Path, files: dict[str, tuple[int, int] | str], mode: str = 'RGB') -> Path:
    "A small folder: image sizes, or a text, by path."
    generator = np.random.default_rng(0)
    for name, content in files.items():
        path = folder/name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
            continue
        pixels = generator.integers(0, 256, (content[1], content[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
    return folder


def small(folder: Path, n: int = 5, **kwargs) -> Path:
    return tree(folder, {f'{kind}/{i}.png': (8, 8) for kind in ('cat', 'dog') for i in range(n)}, **kwargs)


# Real images

def test_split_folder(photos: ImageData) -> None:
    assert photos.classes == CLASSES and photos.n_classes == 10
    assert (photos.channels, photos.size, photos.shape) == (3, (32, 32), (3, 32, 32))
    for part, count in ('train', 135), ('valid', 15), ('test', 50):
        assert photos.splits()[part].labels.bincount().tolist() == [count] * 10


def test_images_are_the_files(sample: Path, photos: ImageData) -> None:
    for label in 0, 7:
        files = sorted((sample/'test'/CLASSES[label]).iterdir())
        want = np.stack([np.asarray(Image.open(f).convert('RGB')).transpose(2, 0, 1) for f in files])
        assert torch.equal(photos.test.images[photos.test.labels == label], torch.from_numpy(want))


def test_no_image_is_lost_or_in_two_parts(sample: Path, photos: ImageData, tmp_path: Path) -> None:
    _, files = list_images(sample)
    for part, wanted in ('train', ['train', 'valid']), ('test', ['test']):
        decoded = decode_images([sample/f.path for f in files[part]], show_progress=False)
        assert rows(torch.cat([photos.splits()[w].images for w in wanted])) == rows(decoded)


def test_one_tree_is_split_by_seed(sample: Path, photos: ImageData, root: Path) -> None:
    options = dict(root=root, device='cpu', show_progress=False)
    first, again, other = (image_data(sample/'train', seed=seed, **options) for seed in (0, 0, 1))
    for part, count in ('train', 108), ('valid', 12), ('test', 30):
        assert first.splits()[part].labels.bincount().tolist() == [count] * 10
        assert torch.equal(first.splits()[part].images, again.splits()[part].images)
        assert not torch.equal(first.splits()[part].images, other.splits()[part].images)
    both = torch.cat([photos.train.images, photos.valid.images])
    assert rows(together(first)) == rows(together(other)) == rows(both)


def test_a_valid_folder_is_used(sample: Path, tmp_path: Path) -> None:
    for part, source in ('train', 'train'), ('test', 'test'), ('valid', 'test'):
        for kind in 'cat', 'dog': shutil.copytree(sample/source/kind, tmp_path/'pets'/part/kind)
    data = image_data(tmp_path/'pets', root=tmp_path, device='cpu', show_progress=False)
    assert [b.n for b in data.splits().values()] == [300, 100, 100]
    assert torch.equal(data.valid.images, data.test.images)


def test_report_and_pictures(photos: ImageData, digits: ImageData) -> None:
    table = photos.report()
    assert table.rows[0] == {'class': 'airplane', 'train': '135', 'valid': '15', 'test': '50'}
    assert table.rows[-1] == {'class': 'all', 'train': '1,350', 'valid': '150', 'test': '500'}
    assert '3x32x32' in repr(photos)
    assert 'shuffled' in repr(photos.train)
    assert 'shuffled' not in repr(photos.test)
    assert isinstance(photos.show(), Axes)
    assert [t.get_text() for t in digits.show(12, columns=4).texts] == [*'0123456789', '0', '1']
    assert len(digits.test.show(7).texts) == 7
    before = digits.train.epoch
    digits.train.show()
    assert digits.train.epoch == before


# The cache

@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    "How many images each decoding took."
    calls: list[int] = []
    real = folders.decode_images
    def counting(paths: list, *args) -> torch.Tensor:
        calls.append(len(paths))
        return real(paths, *args)
    monkeypatch.setattr(folders, 'decode_images', counting)
    return calls


def open_small(folder: Path, **kwargs) -> ImageData:
    return image_data(folder, root=folder.parent, device='cpu', show_progress=False, **kwargs)


def test_second_opening_decodes_nothing(tmp_path: Path, counted: list[int]) -> None:
    first, second = open_small(small(tmp_path/'a')), open_small(tmp_path/'a')
    assert counted == [10] and len(list((tmp_path/'cache').iterdir())) == 1
    assert torch.equal(first.test.images, second.test.images)
    open_small(tmp_path/'a', seed=3)            # the split is no part of the cache
    open_small(tmp_path/'a', valid=.3)
    assert counted == [10]
    assert open_small(tmp_path/'a', size=4).size == (4, 4)
    assert counted == [10, 10] and len(list((tmp_path/'cache').iterdir())) == 2


@pytest.mark.parametrize('change', ['add', 'remove', 'touch'])
def test_a_changed_folder_is_decoded_again(tmp_path: Path, counted: list[int], change: str) -> None:
    open_small(small(tmp_path/'a'))
    if change == 'add': shutil.copy(tmp_path/'a/cat/0.png', tmp_path/'a/cat/new.png')
    if change == 'remove': (tmp_path/'a/cat/0.png').unlink()
    if change == 'touch': os.utime(tmp_path/'a/cat/0.png', ns=(1, 1))
    open_small(tmp_path/'a')
    assert counted == [10, {'add': 11, 'remove': 9, 'touch': 10}[change]]
    assert len(list((tmp_path/'cache').iterdir())) == 1


@pytest.mark.parametrize('damage', ['truncated', 'a bit', 'empty', 'other', 'header'])
def test_a_damaged_cache_is_never_trusted(tmp_path: Path, counted: list[int], damage: str) -> None:
    whole = open_small(small(tmp_path/'a'))
    cache, = (tmp_path/'cache').iterdir()
    content = bytearray(cache.read_bytes())
    if damage == 'a bit': content[-100] ^= 4
    if damage == 'header': content[3] ^= 255
    spoilt = {'truncated': content[:-50], 'empty': b'', 'other': b'not a tensor at all'}
    cache.write_bytes(spoilt.get(damage, content))
    with pytest.warns(UserWarning, match='damaged.* the images are decoded again'):
        again = open_small(tmp_path/'a')
    assert torch.equal(whole.train.images, again.train.images) and counted == [10, 10]
    open_small(tmp_path/'a')
    assert counted == [10, 10]


def test_a_cache_that_cannot_be_kept_is_no_tragedy(tmp_path: Path) -> None:
    small(tmp_path/'a')
    (tmp_path/'file').write_text('in the way')
    with pytest.warns(UserWarning, match='could not keep the decoded images'):
        data = image_data(tmp_path/'a', root=tmp_path/'file', device='cpu', show_progress=False)
    assert data.train.n == 6


def test_cache_is_quick(sample: Path, photos: ImageData, root: Path) -> None:
    start = time.perf_counter()
    image_data(sample, root=root, device='cpu', show_progress=False)
    assert time.perf_counter() - start < 5


# Decoding

@pytest.mark.parametrize(('mode', 'suffix', 'channels'), [
    ('RGB', 'png', 3), ('RGB', 'bmp', 3), ('RGB', 'webp', 3), ('RGBA', 'png', 3), ('P', 'gif', 3),
    ('CMYK', 'tiff', 3),
    ('L', 'png', 1), ('1', 'png', 1), ('LA', 'png', 1), ('L', 'JPG', 1)])
def test_formats(tmp_path: Path, mode: str, suffix: str, channels: int) -> None:
    folder = tree(tmp_path/'a', {f'{kind}/{i}.{suffix}': (9, 6) for kind in 'xy' for i in range(3)}, mode)
    data = open_small(folder)
    assert data.shape == (channels, 6, 9)
    image = Image.open(folder/f'x/0.{suffix}').convert('RGB' if channels == 3 else 'L')
    want = np.asarray(image).reshape(6, 9, channels)
    assert bytes(np.ascontiguousarray(want.transpose(2, 0, 1))) in rows(together(data))


def test_one_coloured_image_among_grey_ones(tmp_path: Path) -> None:
    small(tmp_path/'a', n=4, mode='L')
    tree(tmp_path/'a', {'dog/colour.png': (8, 8)})
    images = decode_images(sorted((tmp_path/'a').glob('*/*.png')), show_progress=False)
    assert images.shape == (9, 3, 8, 8)
    assert [bool((i[0] == i[1]).all()) for i in images] == [True] * 8 + [False]


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    deep = np.array([[0, 255, 256], [32768, 65280, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path/'deep.png')
    assert read_image(tmp_path/'deep.png').ravel().tolist() == [0, 0, 1, 128, 255, 255]


def tiff(path: Path, values: np.ndarray, sample: int = 1, photometric: int = 1, planes: int = 1) -> Path:
    "An uncompressed TIFF of numbers (height, width) or (height, width, channels)."
    height, width, channels = values.shape if values.ndim == 3 else (*values.shape, 1)
    raw = (values.transpose(2, 0, 1) if planes == 2 else values).tobytes()
    parts = channels if planes == 2 else 1
    each, start = len(raw) // parts, 8 + len(raw) + len(raw) % 2
    bits = values.dtype.itemsize * 8
    tags = {256: [width], 257: [height], 258: [bits] * channels, 259: [1], 262: [photometric],
            273: [8 + i * each for i in range(parts)], 277: [channels], 278: [height], 279: [each] * parts,
            284: [planes], 339: [sample] * channels}
    end, entries, tail = start + 2 + 12 * len(tags) + 4, b'', b''
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f'<{len(numbers)}I', *numbers)
        where = packed if len(packed) == 4 else struct.pack('<I', end + len(tail))
        if len(packed) > 4: tail += packed
        entries += struct.pack('<HHI', tag, 4, len(numbers)) + where
    content = struct.pack('<2sHI', b'II', 42, start) + raw
    path.write_bytes(content.ljust(start, b'\0') + struct.pack('<H', len(tags)) + entries + bytes(4) + tail)
    return path


def png(path: Path, values: np.ndarray, color: int, transparent: Sequence[int] = ()) -> Path:
    "A PNG of 8 or 16 bits, perhaps with one value or colour that means transparent."
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    bits = values.dtype.itemsize * 8
    lines = b''.join(b'\0' + row.astype(values.dtype.newbyteorder('>')).tobytes() for row in values)
    header = struct.pack('>2I5B', *values.shape[1::-1], bits, color, 0, 0, 0)
    content = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header)
    if transparent: content += chunk(b'tRNS', struct.pack(f'>{len(transparent)}H', *transparent))
    path.write_bytes(content + chunk(b'IDAT', zlib.compress(lines)) + chunk(b'IEND', b''))
    return path


RAMP = np.arange(16).reshape(4, 4) / 15         # what deep images show: from 0 to 1


@pytest.mark.parametrize(('top', 'kind', 'options'), [
    (255, np.int32, dict(sample=2)), (255, np.uint32, {}), (1000, np.int32, dict(sample=2)),
    (1000, np.int16, dict(sample=2)), (32767, np.int16, dict(sample=2)),
    (1, np.float32, dict(sample=3)), (255, np.float32, dict(sample=3)), (65535, np.float32, dict(sample=3)),
    (255, np.uint16, {}), (1023, np.uint16, {}), (4095, np.uint16, {}), (16383, np.uint16, {})])
def test_deep_images_need_to_know_white(tmp_path: Path, top: float, kind: type, options: dict) -> None:
    "They are refused with a remedy that works, and read right by it."
    values = (RAMP * top).astype(kind)
    path = tiff(tmp_path/'a.tif', values, **options)
    with pytest.raises(ValueError, match='a.tif.*holds .*say .*--white') as caught:
        read_image(path)
    advised = float(str(caught.value).split('white=')[1].split()[0])
    found = read_image(path, white=advised)
    assert np.abs(found[0] - values * (255 / advised)).max() <= 1.01
    assert len(np.unique(found)) == 16 and found.min() == 0 and advised / 2 <= top <= advised
    with pytest.raises(ValueError, match='above white=.*say a larger one'): read_image(path, white=top / 3)
    with pytest.raises(ValueError, match='holds'): image_files([path], show_progress=False)
    streamed = image_files([path], white=advised, show_progress=False).read()
    assert np.array_equal(streamed[0].numpy(), found)


@pytest.mark.parametrize('top', [1023, 4095])
def test_deep_pngs_in_a_folder(tmp_path: Path, top: int) -> None:
    folder = tmp_path/'a'
    for kind in 'cat', 'dog':
        (folder/kind).mkdir(parents=True)
        for i in range(4): png(folder/kind/f'{i}.png', (RAMP * (top - i)).astype(np.uint16), 0)
    for streaming in False, True:
        with pytest.raises(ValueError, match=rf'brightest of 8.*none above {top}.*white={top} .--white'):
            open_small(folder, streaming=streaming)
    assert not (tmp_path/'cache').exists()
    whole, files = (open_small(folder, white=top, streaming=s, workers=0) for s in (False, True))
    assert len(whole.train.images[0].unique()) == 16
    assert torch.equal(whole.train.images, files.train.images.read())
    dark = open_small(folder, white=65535)                      # another file of the cache
    assert dark.train.images.max() == top // 256 and len(list((tmp_path/'cache').iterdir())) == 2
    png(folder/'dog'/'bright.png', (RAMP * 65535).astype(np.uint16), 0)
    for streaming in False, True:                               # now they are dark images of 16 bits
        data = open_small(folder, streaming=streaming, workers=0)
        assert data.train.n + data.valid.n + data.test.n == 9


@pytest.mark.parametrize(('values', 'options', 'text'), [
    (-RAMP.astype(np.float32), dict(sample=3), 'below 0, down to -1'),
    ((RAMP * 900 - 5).astype(np.int16), dict(sample=2), 'below 0, down to -5'),
    (np.where(RAMP > .5, np.nan, RAMP).astype(np.float32), dict(sample=3), 'no finite numbers'),
    (np.where(RAMP > .5, np.inf, RAMP).astype(np.float32), dict(sample=3), 'no finite numbers'),
    ((RAMP * 200 - 100).astype(np.int8), dict(sample=2), 'signed bytes'),
    (np.stack([RAMP * 65535] * 3, -1).astype(np.uint16), dict(photometric=2, planes=2), 'plane by plane'),
    (RAMP.astype(np.float64), dict(sample=3), 'not a readable image')])
def test_numbers_that_bytes_cannot_show(tmp_path: Path, values: np.ndarray, options: dict, text: str) -> None:
    path = tiff(tmp_path/'a.tif', values, **options)
    for white in None, 65535:
        with pytest.raises(ValueError, match=text): read_image(path, white=white)


def test_whole_ranges_are_read(tmp_path: Path) -> None:
    deep = (RAMP * 65535).astype(np.uint16)
    want = (deep // 256)[None]
    assert np.array_equal(read_image(tiff(tmp_path/'a.tif', deep)), want)
    assert np.array_equal(read_image(tiff(tmp_path/'b.tif', deep, photometric=0)), 255 - want)  # 0 is white
    assert np.array_equal(read_image(png(tmp_path/'a.png', deep, 0)), want)
    colours = np.stack([deep, deep.T, deep], -1)
    assert np.array_equal(read_image(png(tmp_path/'b.png', colours, 2)), (colours // 256).transpose(2, 0, 1))
    for top in 1023, 65535:                 # a PGM says what is white
        content = (RAMP * top).round().astype('>u2').tobytes()
        (tmp_path/'a.pgm').write_bytes(f'P5 4 4 {top}\n'.encode() + content)
        assert np.abs(read_image(tmp_path/'a.pgm')[0] - RAMP * 255).max() <= 1


@pytest.mark.parametrize('top', [1023, 4095, 16383])
def test_dark_colours_of_sixteen_bits(tmp_path: Path, top: int) -> None:
    colours = np.stack([RAMP * top] * 3, -1).astype(np.uint16)
    (tmp_path/'a.ppm').write_bytes(b'P6 4 4 65535\n' + colours.astype('>u2').tobytes())
    for path in (png(tmp_path/'a.png', colours, 2), tmp_path/'a.ppm',
                 tiff(tmp_path/'a.tif', colours, photometric=2)):
        with pytest.raises(ValueError, match='less than half of their range.*convert it to 8 bits'):
            read_image(path)
        assert read_image(path, white=65535).max() in (top // 257, top // 257 + 1)
        with pytest.raises(ValueError, match='only white=65535 can be read'): read_image(path, white=top)


# Transparency: on white

SEEN = [[255, 255, 255], [255, 127, 127], [0, 0, 255]]      # nothing, half of red, blue
RGBA = np.array([[[255, 0, 0, 0], [255, 0, 0, 128], [0, 0, 255, 255]]], np.uint8)


def palette() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert('P')
    image.putpalette([255, 0, 0, 255, 0, 0, 0, 0, 255])
    return image


def transparent(folder: Path) -> dict[str, tuple[Path, list]]:
    "Images of three pixels, and what is seen of them."
    folder.mkdir()
    hidden, rgba = [[255] * 3, [255, 0, 0], [0, 0, 255]], Image.fromarray(RGBA)
    Image.fromarray(RGBA).save(folder/'rgba.webp', lossless=True, exact=True)
    for suffix in 'png', 'tif', 'tga': rgba.save(folder/f'rgba.{suffix}')
    palette().save(folder/'p.png', transparency=0)
    palette().save(folder/'bytes.png', transparency=bytes([0, 128, 255]))
    palette().save(folder/'p.gif', transparency=0)
    pa = palette().convert('PA')
    pa.putalpha(Image.fromarray(RGBA[..., 3]))
    pa.save(folder/'pa.tif')
    Image.fromarray(np.array([[[9, 0], [0, 128], [80, 255]]], np.uint8), 'LA').save(folder/'la.png')
    Image.fromarray(np.array([[[9, 0], [0, 128], [80, 255]]], np.uint8), 'LA').save(folder/'la.tif')
    png(folder/'l.png', np.array([[7, 0, 80]], np.uint8), 0, [7])
    png(folder/'deep.png', np.array([[7, 0, 65535]], np.uint16), 0, [7])
    png(folder/'rgb.png', np.array([[[9, 8, 7], [255, 0, 0], [0, 0, 255]]], np.uint8), 2, [9, 8, 7])
    grey = [[255], [127], [80]]
    want = {name: SEEN for name in ('rgba.webp', 'rgba.png', 'rgba.tif', 'rgba.tga', 'bytes.png', 'pa.tif')}
    want |= {name: hidden for name in ('p.png', 'p.gif', 'rgb.png')} | {'la.png': grey, 'la.tif': grey}
    want |= {'l.png': [[255], [0], [80]], 'deep.png': [[255], [0], [255]]}
    return {name: (folder/name, pixels) for name, pixels in want.items()}


def test_transparent_images_lie_on_white(tmp_path: Path) -> None:
    for name, (path, want) in transparent(tmp_path/'a').items():
        assert read_image(path)[:, 0].T.tolist() == want, name
        streamed = image_files([path], show_progress=False).read()
        assert torch.equal(streamed, decode_images([path], show_progress=False)), name
        assert streamed[0, :, 0].T.tolist() == want, name


def test_hidden_colours_do_not_bleed_when_resized(tmp_path: Path) -> None:
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[:, :4] = 0                           # hidden black beside white
    Image.fromarray(pixels).save(tmp_path/'a.png')
    assert read_image(tmp_path/'a.png', size=5).min() == 255


def test_photos_are_turned_upright(tmp_path: Path) -> None:
    image, exif = Image.new('L', (4, 2)), Image.Exif()
    exif[0x112] = 6
    image.save(tmp_path/'a.png', exif=exif)
    assert read_image(tmp_path/'a.png').shape == (1, 4, 2)


def test_size_takes_the_largest_square(tmp_path: Path) -> None:
    wide = np.zeros((300, 600, 3), np.uint8)
    wide[:, 150:450] = 200
    Image.fromarray(wide).save(tmp_path/'wide.jpg', quality=95)
    found = read_image(tmp_path/'wide.jpg', size=20)
    assert found.shape == (3, 20, 20) and abs(found[:, 2:-2, 2:-2].astype(int) - 200).max() <= 4


def test_different_sizes(tmp_path: Path) -> None:
    tree(small(tmp_path/'a'), {'dog/tall.png': (8, 12)})
    with pytest.raises(ValueError, match=r'differ in size.*tall.png is 8x12, the first one 8x8.*size='):
        open_small(tmp_path/'a')
    assert open_small(tmp_path/'a', size=8).shape == (3, 8, 8)
    assert not [p for p in (tmp_path/'cache').iterdir() if p.name.startswith('.')]


def test_other_files_are_ignored(tmp_path: Path) -> None:
    others = ['cat/notes.txt', 'cat/.hidden.png', '.git/a.png', 'dog/Thumbs.db', 'README.md']
    tree(small(tmp_path/'a'), dict.fromkeys(others, 'x'))
    with pytest.warns(UserWarning, match=r'files ending in .txt: 1 .first: cat/notes.txt'):
        data = open_small(tmp_path/'a')
    assert data.classes == ['cat', 'dog'] and together(data).shape[0] == 10


def test_a_class_called_train(tmp_path: Path) -> None:
    tree(tmp_path/'a', {f'{kind}/{i}.png': (8, 8) for kind in ('train', 'ship') for i in range(3)})
    assert open_small(tmp_path/'a').classes == ['ship', 'train']


def split_names(folder: Path, n: int, *names: str) -> Path:
    "Two classes in each of some splits; no two images are equal."
    for seed, name in enumerate(names):
        for kind in 'cat', 'dog':
            for i in range(n):
                pixels = np.random.default_rng([seed, i, kind == 'cat']).integers(0, 256, (8, 8, 3), np.uint8)
                (folder/name/kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder/name/kind/f'{i}.png')
    return folder


@pytest.mark.parametrize('names', [
    ('train', 'test', 'val'), ('train', 'test', 'validation'), ('Train', 'Test', 'Val'),
    ('TRAIN', 'TEST', 'VALID'), ('Training', 'Testing', 'Validation'), ('training', 'test', 'Valid')])
def test_splits_by_any_of_their_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = split_names(tmp_path/'a', 3, *names)
    data = open_small(folder)
    assert [b.n for b in data.splits().values()] == [6, 6, 6]
    for split, name in zip(('train', 'test', 'valid'), names):
        want = decode_images(sorted((folder/name).glob('*/*')), show_progress=False)
        assert torch.equal(data.splits()[split].images, want)
    streamed = open_small(folder, streaming=True, workers=0)
    assert torch.equal(streamed.valid.images.read(), data.valid.images)


def test_two_folders_for_one_split(tmp_path: Path) -> None:
    split_names(tmp_path/'a', 2, 'train', 'test', 'val', 'valid')
    with pytest.raises(ValueError, match='has val/ and valid/, which all mean the valid split; keep one'):
        open_small(tmp_path/'a')
    shutil.rmtree(tmp_path/'a/val')
    (tmp_path/'a/val').mkdir()                  # without class folders it is none
    with pytest.warns(UserWarning, match=r'neither train, valid nor test: 1 \(first: val\)'):
        assert open_small(tmp_path/'a').valid.n == 4
    split_names(tmp_path/'b', 2, 'train', 'Test', 'testing')
    with pytest.raises(ValueError, match='Test/ and testing/, which all mean the test split'):
        open_small(tmp_path/'b')
    split_names(tmp_path/'c', 2, 'Train', 'val')
    with pytest.raises(ValueError, match='has Train/ and val/ but no test/'): open_small(tmp_path/'c')


@pytest.mark.parametrize('name', ['train', 'Testing', 'val', 'Validation'])
def test_a_class_may_be_called_like_a_split(tmp_path: Path, name: str) -> None:
    files = {f'{kind}/{i}.png': (8, 8) for kind in (name, 'ship') for i in range(3)}
    tree(tmp_path/'a', files)
    assert open_small(tmp_path/'a').classes == sorted([name, 'ship'])
    tree(tmp_path/'a', {f'{name}/more/1.png': (8, 8)})      # a sub-folder makes no split of it
    with pytest.warns(UserWarning, match='sub-folders of classes: 1'):
        assert open_small(tmp_path/'a').classes == sorted([name, 'ship'])


# Left out

def said(folder: Path, **options) -> list[str]:
    "What opening a folder warns about."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        open_small(folder, **options)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(('names', 'kind'), [
    (['cat/more/1.png', 'dog/more/deep/2.png'], 'sub-folders of classes: 2 (first: cat/more)'),
    (['cat/a.HEIC', 'cat/b.heic', 'dog/c.Heic'], 'files ending in .heic: 3 (first: cat/a.HEIC)'),
    (['dog/scan'], 'files without a suffix: 1 (first: dog/scan)'),
    (['dog/a.CR2'], 'files ending in .cr2: 1 (first: dog/a.CR2)'),
    (['dog/a.npy', 'cat/a.svg'], 'files ending in .svg: 1 (first: cat/a.svg); files ending in .npy: 1'),
    (['loose.png'], 'images beside the class folders: 1 (first: loose.png)')])
@pytest.mark.parametrize('streaming', [False, True])
def test_what_is_left_out_is_counted_and_said_once(tmp_path: Path, names: list[str], kind: str,
                                                   streaming: bool) -> None:
    small(tmp_path/'a')
    tree(tmp_path/'a', {name: (8, 8) if name.endswith('png') else 'x' for name in names})
    found = said(tmp_path/'a', streaming=streaming)
    assert len(found) == 1 and kind in found[0] and str(tmp_path/'a') in found[0]


def test_left_out_beside_splits_and_dead_links(tmp_path: Path) -> None:
    split_names(tmp_path/'a', 2, 'train', 'test', 'extra')
    tree(tmp_path/'a', {'loose.png': (8, 8), 'train/b.png': (8, 8), 'README.md': 'x'})
    os.symlink('nowhere.png', tmp_path/'a/test/cat/link.png')
    found, = said(tmp_path/'a')
    for kind in ('neither train, valid nor test: 1 (first: extra)', 'beside the splits: 1 (first: loose.png)',
                 'beside the class folders: 1 (first: train/b.png)', 'nowhere, and devices: 1'):
        assert kind in found
    assert 'README' not in found


def test_nothing_is_said_where_nothing_is_left_out(tmp_path: Path) -> None:
    hidden = ['cat/.DS_Store', 'dog/Thumbs.db', '.git/x.png', 'notes.md']
    tree(small(tmp_path/'a'), dict.fromkeys(hidden, 'x'))
    assert said(tmp_path/'a') == []


def test_a_class_with_nothing_but_other_files(tmp_path: Path) -> None:
    tree(small(tmp_path/'a'), {'bird/a.heic': 'x', 'bird/more/b.png': (8, 8)})
    wanted = 'bird holds no image .left out: files ending in .heic: 1 .*sub-folders of classes: 1'
    with pytest.raises(ValueError, match=wanted): open_small(tmp_path/'a')


# Names that are not UTF-8

needs_bytes = pytest.mark.skipif(sys.platform != 'linux', reason='file names are text here')


@needs_bytes
@pytest.mark.parametrize('place', ['one tree', 'split', 'above'])
def test_a_latin_1_name_is_refused_when_reading(tmp_path: Path, no_reading: None, place: str) -> None:
    odd = os.fsdecode('caf\xe9'.encode('latin-1'))
    folder = tmp_path/'a'
    if place == 'one tree': tree(small(folder), {f'{odd}/{i}.png': (8, 8) for i in range(5)})
    if place == 'split':
        split_names(folder, 2, 'train', 'test')
        for split in 'train', 'test': (folder/split/'cat').rename(folder/split/odd)
    if place == 'above': folder = small(tmp_path/odd/'a')
    with pytest.raises(ValueError, match=r"caf\\xe9.*not named in UTF-8.*rename") as caught:
        open_small(folder)
    str(caught.value).encode()
    assert not (tmp_path/'cache').exists()


@needs_bytes
def test_file_names_may_be_any_bytes(tmp_path: Path) -> None:
    small(tmp_path/'a')
    odd = tmp_path/'a/cat'/os.fsdecode(b'caf\xe9.png')
    (tmp_path/'a/cat/0.png').rename(odd)
    first, again = open_small(tmp_path/'a'), open_small(tmp_path/'a')
    assert together(first).shape[0] == 10 and first.fingerprint == again.fingerprint
    odd.write_bytes(b'no image')
    with pytest.raises(ValueError, match=r'caf\\xe9.png is not a readable image') as caught:
        open_small(tmp_path/'a')
    str(caught.value).encode()


# Splits

@quick
@given(counts=st.lists(st.integers(2, 40), min_size=1, max_size=6), fraction=st.floats(.01, .99),
       seed=st.integers(0, 2**32 - 1))
def test_split_by_class(counts: list[int], fraction: float, seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    names = [str(i) for i in range(len(counts))]
    rest, held = split_by_class(labels, names, fraction, seed)
    assert torch.equal(torch.cat([rest, held]).sort().values, torch.arange(len(labels)))
    for count, left, taken in zip(counts, labels[rest].bincount().tolist(), labels[held].bincount().tolist()):
        assert left >= 1 and taken >= 1 and left + taken == count
        assert abs(taken - fraction * count) <= 1
    assert torch.equal(split_by_class(labels, names, fraction, seed)[1], held)


def test_digits(digits: ImageData) -> None:
    from sklearn.datasets import load_digits
    want = torch.from_numpy(load_digits().images * 255 / 16).round().byte()[:, None]
    assert rows(together(digits)) == rows(want)
    assert digits.shape == (1, 8, 8) and digits.classes == [*'0123456789']
    assert digits.train.augment == Augment(pad=1, flip=False)
    assert [b.n for b in digits.splits().values()] == [1295, 143, 359]
    assert image_data('digits', size=16, device='cpu').shape == (1, 16, 16)
    assert not torch.equal(image_data('digits', seed=1, device='cpu').test.images, digits.test.images)


# Augmentation

@quick
@given(pad=st.integers(0, 4), seed=st.integers(0, 2**31), height=st.integers(5, 9), width=st.integers(5, 9),
       channels=st.sampled_from([1, 3]))
def test_crop_shifts(pad: int, seed: int, height: int, width: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, (6, channels, height, width), dtype=torch.uint8, generator=generator)
    top, left = torch.randint(2 * pad + 1, (2, 6), generator=generator)
    found = crop(images, top, left, pad)
    for i in range(6):
        want, (down, right) = torch.zeros_like(images[i]), (pad - top[i].item(), pad - left[i].item())
        source = images[i, :, max(0, -down):height - max(0, down), max(0, -right):width - max(0, right)]
        want[:, max(0, down):height + min(0, down), max(0, right):width + min(0, right)] = source
        assert torch.equal(found[i], want)


def test_mirror_and_cut_out() -> None:
    images = torch.randint(1, 256, (4, 3, 7, 6), dtype=torch.uint8)
    which = torch.tensor([True, False, True, False])
    for i, found in enumerate(mirror(images, which)):
        assert torch.equal(found, images[i].flip(-1) if which[i] else images[i])
    found = cut_out(images, torch.tensor([3, 0, 6, 3]), torch.tensor([3, 0, 5, 0]), side=3)
    assert (found == 0).sum((1, 2, 3)).tolist() == [27, 12, 12, 18]
    assert torch.equal(found[found > 0], images[found > 0])
    assert (found[0, :, 2:5, 2:5] == 0).all()


def test_draws_reach_every_value_and_no_other() -> None:
    draws = Augment(pad=2, cutout=3).draw(4000, 5, 7, torch.Generator().manual_seed(0))
    found = [column.unique().tolist() for column in draws.unbind(1)]
    assert found == [list(range(k)) for k in (5, 5, 2, 5, 7)]


def test_training_images_are_variants_of_the_originals(photos: ImageData) -> None:
    train = photos.train.seed(0)
    plan = train._plan(0)[:200]
    raw, labels = train._batch(plan)
    assert torch.equal(labels, train.labels[plan[:, 0]])
    for image, original in zip(raw, train.images[plan[:, 0]]):
        both = torch.stack([original, original.flip(-1)])
        shifts = both.unfold(2, 24, 1).unfold(3, 24, 1)     # (2, 3, 9, 9, 24, 24)
        assert (shifts == image[:, None, None, 4:-4, 4:-4]).all(-1).all(-1).all(1).any()


def test_no_augmentation() -> None:
    data = from_tensors(numbered(), numbered(), augment=None, device='cpu', batch_size=60)
    raw, _ = data.train._batch(data.train._plan(0))
    assert data.train.augment is None and rows(raw) == rows(data.train.images)


# Seeds

def epoch(batches: Batches) -> list[torch.Tensor]: return [t for pair in batches for t in pair]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_seeds(digits: ImageData) -> None:
    one, two = epoch(digits.train), epoch(digits.train)
    twin = image_data('digits', device='cpu')
    assert same(epoch(twin.train), one) and same(epoch(twin.train), two)
    assert not same(one, two)
    assert same(epoch(digits.train.seed(0)), one)
    assert same(epoch(digits.train.seed(0, epoch=1)), two)
    assert not same(epoch(digits.train.seed(1)), one)
    assert same(epoch(digits.test), epoch(digits.test))


def test_random_numbers_of_others_are_left_alone(digits: ImageData) -> None:
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    epoch(digits.train), digits.train.sample(5), image_data('digits', device='cpu')
    assert torch.equal(torch.rand(3), want)


def test_pickle(digits: ImageData) -> None:
    digits.train.seed(5)
    copy = pickle.loads(pickle.dumps(digits))
    assert copy.classes == digits.classes and same(epoch(copy.train), epoch(digits.train))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_cuda_gives_the_same_batches(digits: ImageData) -> None:
    moved = digits.to('cuda')
    for (a, x), (b, y) in zip(digits.train.seed(0), moved.train.seed(0)):
        assert b.is_cuda and torch.allclose(a, b.cpu(), atol=1e-6) and torch.equal(x, y.cpu())
    plan = moved.train._plan(0)
    torch.cuda.set_sync_debug_mode('error')       # a batch never makes the host wait
    try: moved.train.normalise(moved.train._batch(plan[:128])[0])
    finally: torch.cuda.set_sync_debug_mode('default')


# Batches

def test_batches_are_normalised(photos: ImageData) -> None:
    pixels = photos.train.images.float() / 255
    assert torch.allclose(photos.train.mean, pixels.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(photos.train.std, pixels.std((0, 2, 3)), atol=1e-5)
    everything = torch.cat([x for x, _ in photos.train.plain()])
    assert everything.dtype == torch.float32
    assert everything.mean((0, 2, 3)).abs().max() < 1e-3
    assert (everything.std((0, 2, 3)) - 1).abs().max() < 1e-3
    for batches in photos.valid, photos.test:
        assert torch.equal(batches.mean, photos.train.mean) and torch.equal(batches.std, photos.train.std)


def test_a_constant_channel_stays_finite() -> None:
    images = torch.zeros(20, 3, 4, 4, dtype=torch.uint8)
    images[:, 1] = 255
    assert all(torch.isfinite(x).all() for x, _ in Batches(images, torch.arange(20) % 2, ['a', 'b']))


def test_channel_stats_over_several_chunks() -> None:
    images = torch.randint(0, 256, (5000, 2, 3, 3), dtype=torch.uint8)
    mean, std = channel_stats(images)
    assert torch.allclose(mean, (images.double() / 255).mean((0, 2, 3)).float())
    assert torch.allclose(std, (images.double() / 255).std((0, 2, 3), correction=0).float())


@pytest.mark.parametrize(('n', 'size', 'shuffled', 'plain'), [
    (10, 4, [4, 4], [4, 4, 2]), (8, 4, [4, 4], [4, 4]), (3, 4, [3], [3]), (5, 1, [1] * 5, [1] * 5)])
def test_the_incomplete_batch(n: int, size: int, shuffled: list[int], plain: list[int]) -> None:
    images, labels = numbered(n)
    batches = Batches(images, labels, [*'abc'], batch_size=size, shuffle=True, augment=Augment(1))
    assert [len(y) for _, y in batches] == shuffled and len(batches) == len(shuffled)
    assert [len(y) for _, y in batches.plain()] == plain and len(batches.plain()) == len(plain)


def test_an_epoch_takes_each_image_once() -> None:
    images, labels = numbered(50)
    batches = Batches(images, labels, [*'abc'], batch_size=10, shuffle=True)
    for _ in range(2):
        raw = torch.cat([x for x, _ in batches])[:, 0, 0, 0] * batches.std[0] + batches.mean[0]
        assert sorted((raw * 255).round().int().tolist()) == list(range(50))


def test_labels_stay_with_their_images() -> None:
    images, labels = numbered(60)
    batches = Batches(images, labels, [*'abc'], batch_size=16, shuffle=True, augment=Augment(pad=2))
    for x, y in batches:
        numbers = ((x.amax((1, 2, 3)) * batches.std[0] + batches.mean[0]) * 255).round().long()
        assert torch.equal(numbers % 3, y)


def test_subset(photos: ImageData) -> None:
    pair = photos.subset(['dog', 3])
    assert pair.classes == ['dog', 'cat'] and [b.n for b in pair.splits().values()] == [270, 30, 100]
    for part, batches in pair.splits().items():
        whole = photos.splits()[part]
        for new, old in enumerate([5, 3]):
            assert torch.equal(batches.images[batches.labels == new], whole.images[whole.labels == old])
        assert torch.equal(batches.mean, photos.train.mean)
        assert batches.shuffle == whole.shuffle
        assert batches.augment == whole.augment
    assert pair.subset('cat').classes == ['cat'] and pair.subset(['cat']).test.labels.unique().tolist() == [0]
    assert photos.subset(np.array([1, 2])).classes == ['automobile', 'bird']


def test_plain_shares_the_images_and_sample_draws(photos: ImageData) -> None:
    plain = photos.train.plain()
    assert plain.images.data_ptr() == photos.train.images.data_ptr()
    assert not plain.shuffle
    assert plain.augment is None
    assert torch.equal(torch.cat([y for _, y in plain]), photos.train.labels)
    some = photos.train.sample(100, seed=2)
    assert some.n == 100 and not rows(some.images) - rows(photos.train.images)
    assert torch.equal(some.images, photos.train.sample(100, seed=2).images)
    assert not torch.equal(some.images, photos.train.sample(100, seed=3).images)
    assert photos.to('cpu').device == torch.device('cpu')


# From tensors

def test_from_tensors() -> None:
    data = from_tensors(numbered(60), numbered(12), valid=.2, device='cpu', batch_size=8)
    assert data.classes == ['0', '1', '2'] and [b.n for b in data.splits().values()] == [48, 12, 12]
    brought = from_tensors(numbered(60), numbered(12), valid=numbered(6), classes=[*'abc'], device='cpu')
    assert [b.n for b in brought.splits().values()] == [60, 6, 12]
    assert data.train.augment == Augment(pad=1, flip=True)


# Torchvision's sets

def fake(name: str, calls: list) -> type:
    "A stand-in for a torchvision class, with its attributes and layout."
    class Fake:
        def __init__(self, root: str, download: bool = False, **part) -> None:
            calls.append((root, download, part))
            n = 40 if part in ({'train': True}, {'split': 'train'}) else 20
            labels = np.arange(n) % 10
            number = np.arange(n, dtype=np.uint8)[:, None, None, None]
            channel = np.arange(3, dtype=np.uint8)[None, :, None, None]
            images = number + 50 * channel + np.zeros((1, 3, 32, 32), np.uint8)
            if name == 'SVHN':
                self.data, self.labels = images, labels.astype(np.int64)
                return
            self.data, self.targets = images.transpose(0, 2, 3, 1), labels.tolist()
            self.classes = [f'class {i}' for i in range(10)]
    return Fake


@pytest.mark.parametrize('name', ['cifar10', 'cifar100', 'svhn'])
def test_torchvision(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list = []
    monkeypatch.setattr(datasets, name.upper(), fake(name.upper(), calls))
    data = image_data(name, root=tmp_path, device='cpu', valid=.25)
    keys = [{'split': 'train'}, {'split': 'test'}] if name == 'svhn' else [{'train': True}, {'train': False}]
    assert calls == [(str(tmp_path), True, key) for key in keys]
    assert [b.n for b in data.splits().values()] == [30, 10, 20] and data.shape == (3, 32, 32)
    assert data.classes == ([*'0123456789'] if name == 'svhn' else [f'class {i}' for i in range(10)])
    assert data.test.images[7, :, 0, 0].tolist() == [7, 57, 107]
    assert data.test.labels[7] == 7
    assert data.test.images.is_contiguous()
    assert data.train.augment == Augment(pad=4, flip=name != 'svhn')
    assert image_data(name, root=tmp_path, size=16, device='cpu').train.augment.pad == 2


def test_a_failed_download_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args, **kwargs) -> None: raise OSError('Network is unreachable')
    monkeypatch.setattr(datasets, 'CIFAR10', broken)
    said = r"could not get 'cifar10' into .*Network is unreachable.*by hand.*folder of images"
    with pytest.raises(FileNotFoundError, match=said):
        image_data('cifar10', root=tmp_path)


# Bad input

@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    "Reading an image fails the test."
    for module in folders, streams:
        monkeypatch.setattr(module, 'read_image', lambda *args: pytest.fail('an image was read'))


@pytest.mark.parametrize(('source', 'error', 'said'), [
    ('cifar', ValueError, "did you mean 'cifar10'"), ('', ValueError, 'unknown data set'),
    ('no/such', FileNotFoundError, 'no folder no/such'),
    (Path('digits'), FileNotFoundError, 'no folder digits'), (__file__, ValueError, 'is a file'),
    (7, TypeError, 'must be a name')])
def test_unknown_source(source: object, error: type, said: str, tmp_path: Path,
                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=said): image_data(source)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('option', 'error', 'said'), [
    (dict(batch_size=0), ValueError, 'batch_size'), (dict(batch_size=2.5), TypeError, 'batch_size'),
    (dict(valid=0), ValueError, 'valid'),
    (dict(valid=1), ValueError, 'below 1, not 1'), (dict(valid=1.5), ValueError, 'valid'),
    (dict(valid=float('nan')), ValueError, 'valid'),
    (dict(valid='some'), TypeError, 'valid'), (dict(size=0), ValueError, 'size'),
    (dict(size=(8, 8)), TypeError, 'size'),
    (dict(seed=-1), ValueError, 'seed'), (dict(augment='none'), ValueError, 'or None for none'),
    (dict(white=0), ValueError, 'white'), (dict(white='1'), TypeError, 'white'),
    (dict(white=float('inf')), ValueError, 'white'), (dict(skip_broken=1), TypeError, 'skip_broken'),
    (dict(device='gpu'), ValueError, "use 'cpu' or 'cuda'")])
def test_options_out_of_range(option: dict, error: type, said: str, sample: Path, tmp_path: Path,
                              no_reading: None) -> None:
    with pytest.raises(error, match=said): image_data(sample, root=tmp_path/'data', **option)
    assert not (tmp_path/'data').exists()


def pngs(*names: str) -> dict[str, tuple[int, int]]: return {f'{name}.png': (8, 8) for name in names}


FOLDERS = {
    'empty': ({}, 'no class folders'),
    'loose images': ({'a.png': (8, 8), 'b.png': (8, 8)}, 'images but no class folders'),
    'one class': ({'cat/a.png': (8, 8)}, "one class folder only, 'cat'"),
    'no image': ({'cat/a.png': (8, 8), 'dog/a.txt': 'x'}, 'class folder .*dog holds no image'),
    'no test': ({'train/cat/a.png': (8, 8), 'train/dog/a.png': (8, 8)}, 'has train/ but no test/'),
    'no train': ({'test/cat/a.png': (8, 8), 'test/dog/a.png': (8, 8)}, 'has test/ but no train/'),
    'loose halves': (pngs('train/a', 'test/a'), 'train holds images but no class folders'),
    'not tested': (pngs('train/cat/a', 'train/dog/a', 'train/bird/a', 'test/cat/a', 'test/dog/a'),
                   "'bird' is in train/ but not in test/"),
    'misspelt': (pngs('train/cat/a', 'train/dog/a', 'test/cat/a', 'test/dogs/a'),
                 "'dog' is in train/ but not in test/; did you mean 'dogs'"),
    'untrained': (pngs('train/cat/a', 'train/dog/a', 'test/cat/a', 'test/dog/a', 'test/ant/a'),
                  "'ant' is in test/ but not in train/"),
    'too few': (pngs('cat/a', 'cat/b', 'cat/c', 'dog/a', 'dog/b'), "'dog' has 1 sample left to split"),
    'one to train': (pngs('train/cat/a', 'train/cat/b', 'train/dog/a', 'test/cat/a', 'test/dog/a'),
                     "'dog' has 1 sample"),
}


@pytest.mark.parametrize('case', FOLDERS)
def test_bad_folders(case: str, tmp_path: Path, no_reading: None) -> None:
    files, said = FOLDERS[case]
    (tmp_path/'a').mkdir()
    tree(tmp_path/'a', files)
    with pytest.raises(ValueError, match=said): open_small(tmp_path/'a')
    assert not (tmp_path/'cache').exists()


@pytest.mark.parametrize('kind', ['text', 'truncated', 'empty'])
def test_an_unreadable_image_is_named(kind: str, sample: Path, tmp_path: Path) -> None:
    small(tmp_path/'a', n=40)
    whole = (sample/'train/cat').glob('*').__next__().read_bytes()
    spoilt = {'text': b'no image', 'truncated': whole[:-200], 'empty': b''}
    (tmp_path/'a/dog/bad.jpg').write_bytes(spoilt[kind])
    with pytest.raises(ValueError, match=r'dog/bad.jpg is not a readable image .*; repair or remove it'):
        open_small(tmp_path/'a', size=8)
    assert not (tmp_path/'cache').exists()


# Broken images, skipped on request

def spoil(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        whole = (folder/name).read_bytes()
        (folder/name).write_bytes([whole[:-30], b'no image', b''][i % 3])


@pytest.mark.parametrize('streaming', [False, True])
@pytest.mark.parametrize('layout', ['one tree', 'splits'])
def test_broken_images_are_skipped_on_request(tmp_path: Path, streaming: bool, layout: str) -> None:
    "As if they had never been there: splits, labels, pixels."
    folder = tmp_path/'a'
    if layout == 'splits': split_names(folder, 12, 'train', 'test', 'val')
    else: split_names(folder, 30, '')
    first = 'test/' if layout == 'splits' else ''
    names = [f'{first}cat/0.png', f'{first}cat/11.png', f'{first}dog/3.png']    # the very first one too
    shutil.copytree(folder, tmp_path/'b'/'a')
    for name in names: (tmp_path/'b'/'a'/name).unlink()
    spoil(folder, *names)
    with pytest.raises(ValueError, match='not a readable image.*skip_broken=True .--skip-broken'):
        open_small(folder, streaming=streaming, workers=0).test.images.read()
    with pytest.warns(UserWarning, match=f'3 of .* broken and skipped: {names[0]}, .*{names[2]}'):
        found = open_small(folder, streaming=streaming, workers=0, skip_broken=True)
    want = open_small(tmp_path/'b'/'a')
    for split, batches in found.splits().items():
        images = batches.images.read() if streaming else batches.images
        assert torch.equal(images, want.splits()[split].images)
        assert torch.equal(batches.labels, want.splits()[split].labels)
    assert found.fingerprint == want.fingerprint


def test_broken_images_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, real = [], folders._is_broken
    monkeypatch.setattr(folders, '_is_broken', lambda path, size: looked.append(path) or real(path, size))
    spoil(small(tmp_path/'a'), 'cat/1.png')
    for _ in range(2):                          # and said each time
        with pytest.warns(UserWarning, match='1 of 10 images are broken and skipped: cat/1.png$'):
            assert together(open_small(tmp_path/'a', skip_broken=True)).shape[0] == 9
    assert len(looked) == 10
    tree(tmp_path/'a', {'cat/1.png': (8, 8)})   # repaired
    assert said(tmp_path/'a', skip_broken=True) == [] and len(looked) == 20
    assert together(open_small(tmp_path/'a')).shape[0] == 10


def test_skipping_is_for_broken_images_only(tmp_path: Path) -> None:
    tree(small(tmp_path/'a'), {'dog/wide.png': (9, 8)})
    with pytest.raises(ValueError, match='differ in size'): open_small(tmp_path/'a', skip_broken=True)
    (tmp_path/'a/dog/wide.png').unlink()
    tiff(tmp_path/'a/dog/float.tif', RAMP.astype(np.float32), sample=3)
    with pytest.raises(ValueError, match='no fixed range'): open_small(tmp_path/'a', skip_broken=True)
    (tmp_path/'a/dog/float.tif').unlink()
    (tmp_path/'a/dog/0.png').unlink()
    with pytest.raises(ValueError) as gone: read_image(tmp_path/'a/dog/0.png')     # no fault of the file
    assert not isinstance(gone.value, BrokenImage)
    spoil(tmp_path/'a', *[f'dog/{i}.png' for i in range(1, 5)])
    with pytest.raises(ValueError, match='all images in dog are broken'):
        with pytest.warns(UserWarning, match='4 of 9'): open_small(tmp_path/'a', skip_broken=True)


# Fingerprints

def test_fingerprint_of_a_folder(tmp_path: Path) -> None:
    "Of the files, not of the place, the time, or how they are read."
    known = open_small(small(tmp_path/'a')).fingerprint
    for options in dict(seed=3), dict(size=4), dict(streaming=True, workers=0), dict(valid=.4):
        assert open_small(tmp_path/'a', **options).fingerprint == known
    data = open_small(tmp_path/'a')
    for same in data.subset('cat'), data.to('cpu'), data.shard(0, 1): assert same.fingerprint == known
    (tmp_path/'a').rename(tmp_path/'moved')
    assert open_small(tmp_path/'moved').fingerprint == known
    shutil.copytree(tmp_path/'moved', tmp_path/'copy', copy_function=shutil.copyfile)
    assert open_small(tmp_path/'copy').fingerprint == known


@pytest.mark.parametrize('change', ['replaced', 'same size', 'added', 'removed', 'renamed', 'class'])
def test_fingerprint_of_a_changed_folder(tmp_path: Path, change: str) -> None:
    folder = tree(tmp_path/'a', {f'{kind}/{i}.bmp': (8, 8) for kind in ('cat', 'dog') for i in range(5)})
    known, cat = open_small(folder).fingerprint, folder/'cat'
    if change == 'replaced': shutil.copy(folder/'dog/0.bmp', cat/'0.bmp')
    if change == 'same size':                   # and the same dates: two pictures exchanged
        for path in folder.glob('*/*'): os.utime(path, ns=(1, 1))
        for old, new in ('cat/0', 'x'), ('dog/0', 'cat/0'), ('x', 'dog/0'):
            (folder/f'{old}.bmp').rename(folder/f'{new}.bmp')
    if change == 'added': shutil.copy(cat/'0.bmp', cat/'9.bmp')
    if change == 'removed': (cat/'0.bmp').unlink()
    if change == 'renamed': (cat/'0.bmp').rename(cat/'7.bmp')
    if change == 'class': cat.rename(folder/'lion')
    assert open_small(folder).fingerprint != known


def test_exchanged_pictures_are_decoded_again(tmp_path: Path, counted: list[int]) -> None:
    "Uncompressed files are all of one size, and an archive gives them all one date."
    folder = tree(tmp_path/'a', {f'{kind}/{i}.bmp': (8, 8) for kind in ('cat', 'dog') for i in range(5)})
    for path in folder.glob('*/*'): os.utime(path, ns=(1, 1))
    before = open_small(folder)
    for old, new in ('cat', 'x'), ('dog', 'cat'), ('x', 'dog'):
        for i in range(5):
            (folder/new).mkdir(exist_ok=True)
            (folder/old/f'{i}.bmp').rename(folder/new/f'{i}.bmp')
    (folder/'x').rmdir()
    after = open_small(folder)
    assert counted == [10, 10] and not torch.equal(before.train.images, after.train.images)


def test_fingerprint_of_tensors_and_named_sets(digits: ImageData) -> None:
    assert digits.fingerprint == image_data('digits', seed=5, size=16, valid=.3, device='cpu').fingerprint
    data = from_tensors(numbered(60), numbered(12), device='cpu')
    again = from_tensors(numbered(60), numbered(12), valid=.4, seed=2, device='cpu')
    assert again.fingerprint == data.fingerprint
    images, labels = numbered(60)
    images[7, 0, 0, 0] ^= 1
    others = [from_tensors((images, labels), numbered(12), device='cpu'),
              from_tensors(numbered(60), numbered(24), device='cpu'),
              from_tensors((numbered(60)[0], labels.roll(1)), numbered(12), device='cpu'),
              from_tensors(numbered(60), numbered(12), classes=[*'abc'], device='cpu')]
    assert len({d.fingerprint for d in [data, digits, *others]}) == 6
    assert pickle.loads(pickle.dumps(data)).fingerprint == data.fingerprint


def test_float_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path/'a.tiff')
    with pytest.raises(ValueError, match='no fixed range'): read_image(tmp_path/'a.tiff')


@pytest.mark.parametrize(('chosen', 'error', 'said'), [
    (['cat', 'dgo'], ValueError, "did you mean 'dog'"),
    (['cat', 'cat'], ValueError, "'cat' is chosen twice"), (['cat', 3], ValueError, "'cat' is chosen twice"),
    ([], ValueError, 'no class chosen'), ([10], ValueError, 'class index'),
    ([-1], ValueError, 'class index'), ([True], ValueError, 'unknown class True')])
def test_bad_subsets(chosen: list, error: type, said: str, photos: ImageData) -> None:
    with pytest.raises(error, match=said): photos.subset(chosen)
    with pytest.raises(error, match=said): class_indices(chosen, photos.classes)


@pytest.mark.parametrize(('labels', 'error', 'said'), [
    ([0, 3], ValueError, r'between 0 and 2 \(3 classes\), found 3'), ([-1], ValueError, 'found -1'),
    ([.5], TypeError, 'whole numbers'),
    ([[1]], TypeError, 'one for each sample'), ([True], TypeError, 'whole numbers')])
def test_bad_labels(labels: list, error: type, said: str) -> None:
    with pytest.raises(error, match=said): check_labels(labels, 3)
    with pytest.raises(error, match=said): check_labels(torch.tensor(labels), 3)


@pytest.mark.parametrize(('change', 'error', 'said'), [
    (dict(train=(torch.zeros(6, 3, 8, 8), torch.arange(6) % 3)), TypeError,
     'train images must be a uint8 tensor'),
    (dict(train=([1, 2], [0, 1])), TypeError, 'not list'),
    (dict(train=(numbered()[0], torch.arange(5) % 3)), ValueError, '60 images but 5 labels'),
    (dict(test=numbered(side=4)), ValueError, 'make them equal'),
    (dict(test=numbered(2)), ValueError, "'2' has no test image"),
    (dict(classes=['a', 'b']), ValueError, 'train labels'),
    (dict(classes=['a', 'b', 'a']), ValueError, 'different names'),
    (dict(train=(numbered()[0], torch.zeros(60).long())), ValueError, 'at least two'),
    (dict(classes=[*'abcd']), ValueError, "'d' has no train image"),
    (dict(augment=Augment(pad=8)), ValueError, 'out of sight'), (dict(valid=2), ValueError, 'valid')])
def test_bad_tensors(change: dict, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        from_tensors(**(dict(train=numbered(), test=numbered(), device='cpu') | change))


@pytest.mark.parametrize('option', [dict(pad=-1), dict(cutout=-2), dict(pad=1.5)])
def test_bad_augment(option: dict) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(option))): Augment(**option)
