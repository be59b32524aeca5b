"""Random valid and invalid arguments: each call gives a right result or one of our errors.

A call below names its good arguments; `fuzz.py` mixes them with bad ones. What stands under it checks
the result."""
from __future__ import annotations
import json, math, shutil
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any
import matplotlib.pyplot as plt
import pytest
import torch
from fuzz import CALLS, NAMES, NETS, Call, call, data, draw, model, module, net, snapshot, split, try_out
from helpers import pictures, same_state
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from mwt import all as mwt
from mwt.core.signature import weights_of
from mwt.methods.base import METHODS, describe_method, make_method
from mwt.methods.modular import ModularModel, fixed_masks
from mwt.modules.parts import union_masks
from mwt.networks import NETWORKS
from torch import Tensor, nn

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))

def answer(net: nn.Module, x: Tensor = X) -> Tensor:
    "What a network says in eval mode, in double precision."
    was = {m: m.training for m in net.modules()}
    like = next(net.parameters())
    with torch.no_grad(): found = net.eval()(x.to(like.dtype))
    for m, mode in was.items(): m.training = mode
    return found.double()

def close(a: Tensor, b: Tensor) -> bool: return a.shape == b.shape and bool((a - b).abs().max() < 1e-5)

def is_fraction(value: Any) -> bool: return isinstance(value, float) and 0 <= value <= 1


# Display

@call('percent', needed='fraction', fraction='.5 | 0 | 1 | None | nan | -.2 | np.float32(.25) | 12. | inf',
      digits='0 | 1 | 3 | np.int64(2)', odd=dict(digits='-1 | 1.5 | 10**6 | None'))
def _(found: str, fraction: Any, digits: int = 1) -> None:
    if fraction is None or math.isnan(fraction): assert found == '-'
    else:
        assert found.endswith(' %')
        value, wanted = float(found[:-2]), 100 * float(fraction)
        assert value == wanted or abs(value - wanted) <= .51 * 10. ** -digits + 1e-9 * abs(wanted)

@call('Table', needed='rows', rows="[] | [{'a': 1}] | [{'a': 1, 'b|c': 2}, {'a': '\\n', 'b|c': None}] | [{}]",
      title="'' | 'A title' | 'zwölf ☃'",
      odd=dict(rows="[1] | [{'a': 1}, 2] | {'a': 1} | [{'a': 1}, {'b': 2}]"))
def _(found: Any, rows: Sequence[dict], title: Any = '') -> None:
    assert len(found) == len(rows)
    for text in (str(found), repr(found), found.html(), found._repr_markdown_()):
        assert isinstance(text, str)
        for row in rows: assert all(str(v) in text for v in row.values() if isinstance(v, int))


# Images

@call('Augment', pad='0 | 1 | 4 | np.int64(2)', flip='True | False', cutout='0 | 3 | np.uint8(2)')
def _(found: Any, pad: int = 4, flip: bool = True, cutout: int = 0) -> None:
    assert (found.pad, found.flip, found.cutout) == (pad, flip, cutout)
    draws = found.draw(4, 8, 8, torch.Generator().manual_seed(0))
    varied = found.apply(split()[0][:4], draws)
    assert varied.shape == (4, 1, 8, 8) and varied.dtype == torch.uint8
    if not (pad or flip or cutout): assert torch.equal(varied, split()[0][:4])

def whole(found: Any, n: int, batch_size: int, valid: float) -> None:
    "All images of tiny data are there once, each class in each split."
    counts = {name: b.n for name, b in found.splits().items()}
    assert counts['train'] + counts['valid'] == n and min(counts.values()) > 0
    assert abs(counts['valid'] - valid * n) <= len(found.classes)
    for b in found.splits().values():
        assert b.labels.bincount(minlength=found.n_classes).min() > 0
        images, labels = next(iter(b))
        assert images.isfinite().all() and len(images) == len(labels) <= max(batch_size, 1)

SPLITS = ('split() | (split()[0], split()[1].tolist()) | (split()[0], split()[1].to(torch.uint8))'
          ' | split()[::1]')
BAD_SPLITS = ("split('train', 2) | split()[:1] | (split()[0],) * 3 | (split()[0].float(), split()[1])"
              ' | (split()[0], None) | (split()[0], split()[1].float()) | (split()[0][:0], split()[1][:0])'
              ' | (split()[0], split()[1][1:]) | (split()[0][..., :0], split()[1])'
              " | (split()[0].to('meta'), split()[1]) | (split()[0], split()[1] - 1)"
              " | (split()[0][:, 0], split()[1]) | (split()[0], split()[1].to('meta'))"
              ' | (split()[1], split()[0]) | (split()[0].numpy(), split()[1].numpy())'
              " | (split()[0], split()[1].numpy()) | 'xy' | {1: 2, 3: 4} | (split()[0], ['cat'] * 30)"
              ' | (split()[0], [[0]] * 30) | (split()[0], [2**70] * 30)'
              ' | (split()[0].to_sparse(), split()[1])'
              ' | (split()[0], split()[1] + 10**12) | (split()[0][:3], split()[1][:3])'
              ' | (split()[0], torch.zeros(30, dtype=torch.long))')
DEVICES = "'cpu' | None | torch.device('cpu')"
BAD_DEVICES = ("'meta' | 'cuda:99' | 'mps' | 'gpu' | 3 | -1 | torch.device('meta') | 'cpu:1' | 'xpu'"
               " | 'cuda:x' | ''")
CLASSES = "None | ['cat', 'dog', 'owl'] | ('ä', '☃', '') | np.array(['cat', 'dog', 'owl'])"
BAD_CLASSES = ("'abc' | [1, 2, 3] | ['a', 'a', 'b'] | ['a', 'b'] | [None] * 3 | 'ab'"
               " | {'a': 0, 'b': 1, 'c': 2} | 3")

@call('from_tensors', examples=60, needed='train test device', words='labels|images|class|pad', train=SPLITS,
      test="split('test') | (split('test')[0], split('test')[1].tolist())",
      valid=".2 | .5 | np.float32(.3) | split('test')", classes=CLASSES,
      batch_size='8 | 1 | np.int64(5) | 10**6', seed='0 | 2**32 - 1 | np.int64(3)',
      augment="'auto' | None | Augment(1)", device="'cpu'", show_progress='False',
      fingerprint="None | 'mine'",
      odd=dict(
          train=BAD_SPLITS,
          test=BAD_SPLITS,
          valid=BAD_SPLITS + ' | 1. | 1e-9 | .999',
          classes=BAD_CLASSES,
          device=BAD_DEVICES,
          augment='Augment(8) | Augment(100) | Augment'))
def _(found: Any, train: Any, test: Any, valid: Any = .1, classes: Any = None, batch_size: int = 128,
      **rest: Any) -> None:
    names = ['0', '1', '2'] if classes is None else list(classes)
    assert found.classes == names and all(isinstance(c, str) for c in found.classes)
    held_out = isinstance(valid, tuple)
    if not held_out: whole(found, 30, batch_size, valid)
    assert found.test.n == len(test[0]) and found.train.n + (0 if held_out else found.valid.n) == 30
    assert (found.train.augment is None) == (rest.get('augment', 'auto') is None)

@call('Batches', examples=60, needed='images labels classes', words='pad', images='split()[0]',
      labels='split()[1] | split()[1].tolist()', classes="NAMES | ('a', 'b', 'c')", batch_size='8 | 1 | 100',
      mean='None | torch.tensor([.5])', std='None | torch.tensor([.1])', shuffle='False | True',
      augment='None | Augment(2, cutout=2)', seed='0 | 5',
      odd=dict(
          images=("split()[0].float() | split()[0][:0] | split()[0][..., :0] | split()[0].to('meta')"
                  ' | split()[0][0]'),
          labels="split()[1][1:] | split()[1].float() | split()[1].to('meta') | split()[1] + 1",
          classes=BAD_CLASSES,
          mean='torch.zeros(2) | torch.tensor([nan]) | [.5] | .5 | torch.tensor(.5)',
          std='torch.zeros(1) | torch.tensor([-1.]) | torch.tensor([nan]) | torch.ones(3) | [.1]',
          augment="'auto' | Augment(8) | Augment(100)"))
def _(found: Any, images: Tensor, labels: Any, classes: Sequence[str], batch_size: int = 128,
      shuffle: bool = False, **rest: Any) -> None:
    batches = list(found)
    assert len(batches) == len(found) and found.n == 30 and found.shape == (1, 8, 8)
    assert all(x.isfinite().all() and len(x) == len(y) for x, y in batches)
    if not shuffle: assert torch.cat([y for _, y in batches]).tolist() == torch.as_tensor(labels).tolist()

BATCHES = "data().train | data().test | data(channels=3).valid | data(augment=Augment(1)).train"

@call('Batches.seed', needed='seed', changes='self', self=BATCHES, seed='0 | 7 | np.int64(3)', epoch='0 | 3')
def _(found: Any, self: Any, seed: int, epoch: int = 0) -> None:
    assert found is self
    again = list(found)
    for (x, y), (u, v) in zip(again, found.seed(seed, epoch)): assert torch.equal(x, u) and torch.equal(y, v)

@call('Batches.shard', needed='rank world_size', loose=True, self=BATCHES, rank='0 | 1',
      world_size='1 | 2 | np.int64(4)')
def _(found: Any, self: Any, rank: int, world_size: int) -> None:
    if world_size > 64: return
    shares = [self.shard(r, world_size) for r in range(world_size)]
    labels = torch.cat([y for share in shares for _, y in share])
    if not self.shuffle: assert torch.equal(labels.bincount(), self.labels.bincount())
    assert found._shard == (rank, world_size) and found.shared == (world_size > 1)

@call('Batches.plain', self=BATCHES)
def _(found: Any, self: Any) -> None:
    assert torch.equal(torch.cat([y for _, y in found]), self.labels)

@call('Batches.pixels', self=BATCHES)
def _(found: Any, self: Any) -> None:
    for x, _ in found: assert 0 <= x.min() and x.max() <= 1

@call('Batches.with_batch_size', needed='n', self=BATCHES, n='1 | 5 | np.int64(7) | 10**6')
def _(found: Any, self: Any, n: int) -> None:
    assert max(len(y) for _, y in found) <= n and found.n == self.n

@call('Batches.to', needed='device', self=BATCHES, device=DEVICES, odd=dict(device=BAD_DEVICES))
def _(found: Any, self: Any, device: Any) -> None:
    for (x, y), (u, v) in zip(found, self._replace()): assert torch.equal(x, u) and torch.equal(y, v)

@call('Batches.normalised_by', needed='mean std', self='data().train', mean='[.5] | [0.] | (.2,)',
      std='[1.] | [.1]',
      odd=dict(mean='[.1, .2] | [nan] | .5 | torch.tensor([.5])', std='[0.] | [-1.] | [inf] | [1.] * 3'))
def _(found: Any, self: Any, mean: Any, std: Any) -> None:
    (x, _), (pixels, _) = next(iter(found)), next(iter(self.pixels()))
    assert close(x * float(std[0]) + float(mean[0]), pixels)

CHOSEN = ("'cat' | 0 | ['owl', 'cat'] | [2, 'cat'] | NAMES | ('dög ☃',) | np.int64(1) | [np.int64(2)]"
          ' | range(2) | np.array([1, 0])')
BAD_CHOSEN = ("[3] | [-1] | ['cat', 0] | ['Cat'] | [1.] | [True] | [0, 0] | np.array([.5]) | 3 | -1"
              " | {'cat': 1} | [[]]")

def positions(classes: Any) -> list[int]:
    "The labels of chosen classes."
    single = isinstance(classes, str) or not hasattr(classes, '__len__')
    return [NAMES.index(c) if isinstance(c, str) else int(c) for c in ([classes] if single else classes)]

@call('Batches.subset', needed='classes', self='data().train | data().test', classes=CHOSEN,
      odd=dict(classes=BAD_CHOSEN), words='class')
def _(found: Any, self: Any, classes: Any) -> None:
    chosen = positions(classes)
    assert found.classes == [NAMES[i] for i in chosen]
    counts = [int((self.labels == i).sum()) for i in chosen]
    assert found.labels.bincount(minlength=len(chosen)).tolist() == counts

@call('ImageData.subset', needed='classes', self='data()', classes=CHOSEN, odd=dict(classes=BAD_CHOSEN),
      words='class')
def _(found: Any, self: Any, classes: Any) -> None:
    assert found.classes == [NAMES[i] for i in positions(classes)]
    assert all(b.classes == found.classes and b.n for b in found.splits().values())

@call('Batches.sample', needed='n', self=BATCHES, n='1 | 4 | np.int64(6)', seed='0 | 9')
def _(found: Any, self: Any, n: int, seed: int = 0) -> None: assert found.n == n

@call('Batches.take', needed='n', self=BATCHES, n='1 | 4 | np.int64(6)', seed='0 | 9')
def _(found: Any, self: Any, n: int, seed: int = 0) -> None:
    images, labels = found
    assert images.shape == (n, *self.shape) and labels.shape == (n,) and images.isfinite().all()

AX = dict(ax="'x' | 1 | axes_pair()")

@call('Batches.show', self=BATCHES, n='1 | 5 | 100 | np.int64(3)', columns='1 | 3 | 100',
      ax='None | figure_axes()', changes='ax', odd=AX)
def _(found: Any, self: Any, n: int = 20, columns: int = 10, ax: Any = None) -> None:
    assert len(found.texts) == min(n, self.n) and (ax is None or found is ax)

@call('ImageData.show', self='data()', n='1 | 5 | 100', columns='1 | 3', ax='None | figure_axes()',
      changes='ax', odd=AX)
def _(found: Any, self: Any, n: int = 20, columns: int = 10, ax: Any = None) -> None:
    assert len(found.texts) == min(n, self.train.n)
    assert [t.get_text() for t in found.texts][:3] == self.classes[:n]

@call('ImageData.report', self='data()')
def _(found: Any, self: Any) -> None: assert len(found) == 4 and found.rows[-1]['test'] == '12'

@call('ImageData.to', needed='device', self='data()', device=DEVICES, odd=dict(device=BAD_DEVICES))
def _(found: Any, self: Any, device: Any) -> None: assert found.fingerprint == self.fingerprint

@call('ImageData.shard', needed='rank world_size', self='data()', rank='0 | 1', world_size='1 | 2',
      loose=True)
def _(found: Any, self: Any, rank: int, world_size: int) -> None:
    assert found.train._shard == (rank, world_size)

@call('ImageData', needed='train valid test', words='classes|split', train='data().train',
      valid='data().valid', test='data().test', fingerprint="None | 'x'",
      odd=dict(
          valid="data(3).valid | data(classes=['a', 'b', 'c']).valid",
          test='data(3).test | loader()',
          train='loader()'))
def _(found: Any, train: Any, valid: Any, test: Any, fingerprint: Any = None) -> None:
    assert found.n_classes == 3 and found.shape == (1, 8, 8) and repr(found)

@call('image_data', examples=20, needed='source root device', words='data set|folder|data must|pad',
      root='TMP', fixed='root', source="'digits' | FOLDER | str(FOLDER)", batch_size='32 | np.int64(8)',
      seed='0 | 1', valid='.2 | .3', size='None | 4 | np.int64(6)', augment="'auto' | None | Augment(1)",
      device="'cpu'", show_progress='False', streaming='None | False', workers='0 | None | np.int64(0)',
      white='None', skip_broken='False | True', loose=True,
      odd=dict(
          source="'digit' | Path('digits') | FOLDER/'cat' | TMP/'no' | FOLDER/'cat'/'0.png' | '~'",
          white='255. | 0 | 65535 | 1e308',
          streaming='True',
          workers='1',
          device=BAD_DEVICES,
          size='3 | 10**6',
          valid='.999 | 1e-9 | 1',
          augment='Augment(3) | Augment(100)'))
def _(found: Any, source: Any, valid: float = .1, size: Any = None, batch_size: int = 128,
      **rest: Any) -> None:
    digits = source == 'digits'
    assert found.size == ((size, size) if size else (8, 8)) and found.n_classes == (10 if digits else 3)
    if not digits: whole(found, 24, batch_size, valid)


# Networks and methods

@call('create_model', examples=40, needed='name width seed', words='option|channels', small='width',
      name=' | '.join(map(repr, NETWORKS)), num_classes='2 | 3 | np.int64(5)', width='.1 | np.float32(.05)',
      in_channels='1 | 3 | np.int64(2)', seed='0 | np.int64(7)',
      odd=dict(name="'simcn' | 'torchvision/alexne' | 'torchvision/' | NAMES | 'SIMCNN'", width='1e-9 | 8.1'))
def _(found: nn.Module, name: str, width: float, num_classes: int = 10, in_channels: int = 3,
      **rest: Any) -> None:
    logits = answer(found, torch.randn(2, in_channels, 32, 32))
    assert logits.shape == (2, num_classes) and logits.isfinite().all()

METHOD_NAMES = ("'composable' | 'mwt' | 'moda' | Composable(target_krr=.3) | MwT(alpha=0) | MODA()"
                ' | Composable')
BAD_METHODS = "'compose' | Method | Method() | nn.Module | 'MWT' | ['mwt']"

@call('modularize', examples=30, needed='model n_classes',
      words='already|network|layer|mask|setting|forward pass|weights',
      model='net() | net().eval() | net().double()', n_classes='3 | np.int64(3)', method=METHOD_NAMES,
      example_input='None | torch.zeros(1, 1, 8, 8) | torch.zeros(4, 1, 9, 7)',
      filter_fn="None | (lambda layer, name: True) | (lambda layer, name: name != '3')",
      seed='0 | np.int64(4)', loose=True,
      odd=dict(
          model=NETS,
          n_classes='2 | 4 | 0 | -1 | 10**6',
          method=BAD_METHODS,
          example_input=('torch.zeros(0, 1, 8, 8) | torch.zeros(1, 2, 8, 8) | torch.zeros(1, 1, 1, 1)'
                         ' | torch.zeros(8, 8) | torch.full((1, 1, 8, 8), nan)'
                         ' | torch.zeros(1, 1, 8, 8).byte() | torch.zeros(1, 1, 0, 0)'),
          filter_fn='(lambda layer, name: False) | (lambda layer: True)'))
def _(found: ModularModel, model: nn.Module, n_classes: int, method: Any = 'composable', **rest: Any) -> None:
    assert found.n_classes == 3 and found.kernels and all(k > 0 for k in found.kernels.values())
    assert close(answer(mwt.plain(found)), answer(model))
    if 'composable' in str(type(found.method)).lower(): assert close(answer(found), answer(model))
    assert answer(found).isfinite().all()

def constructor(name: str, /, **good: str) -> None:
    "A method is what it was told to be, and can be described."
    @call(name, **good)
    def _(found: Any, **given: Any) -> None:
        for setting, value in given.items(): assert getattr(found, setting) == value
        assert make_method(**json.loads(json.dumps(describe_method(found)))) == found

FLAG = 'True | False'
constructor('MwT', alpha='0 | .5 | np.float32(1.5)', beta='0 | 2', reduction='1 | np.int64(2)',
            skip_first=FLAG)
constructor('MODA', affinity='0 | 1.', dispersion='0 | .5', compactness='0 | .3', floor='0 | .005 | 1')
constructor('Composable', target_krr='.1 | 1', separation='0 | 2', full_fraction='0 | 1', close_from='0 | .1',
            closed_by='.5 | 1', decay='0 | .995', two_roles=FLAG, skip_first=FLAG)

@call('make_method', words='method|setting', method=METHOD_NAMES, loose=True,
      odd=dict(method=BAD_METHODS), target_krr='.2 | .3')
def _(found: Any, method: Any = 'composable', **rest: Any) -> None:
    assert make_method(**describe_method(found)) == found and found.name in METHODS

@call('mask_table', needed='model', model="model() | model('mwt') | model('moda')",
      words='network|modularized', odd=dict(model=NETS))
def _(found: Any, model: Any) -> None: assert [r['layer'] for r in found.rows] == ['0', '3', '8']

@call('plain', needed='model', words='network', model='model() | net() | module() | model("mwt")',
      odd=dict(model=NETS))
def _(found: nn.Module, model: nn.Module) -> None:
    assert not isinstance(found, ModularModel)
    assert not {id(t) for t in found.parameters()} & {id(t) for t in model.parameters()}


# Training and judging

TRAINABLE = "net() | model() | model('mwt') | modularize(net(), 3, 'moda') | net().eval()"
DATA = "data() | data(batch_size=30) | data(shuffle=1) | (loader(), loader('test'))"
DATA = DATA.replace(' | data(shuffle=1)', '')
BAD_DATA = ('data(3) | data().train | loader() | (loader(), 1) | (loader(), loader(), loader(), loader())'
            " | {'train': loader()} | data().subset(['cat', 'owl']) | data(classes=['a', 'b', 'c'])"
            ' | [[X, X]]'
            " | (data().train, data().valid) | {'train': loader(), 'valid': loader(), 'tests': 1}"
            ' | (iter(loader()), loader()) | ([], []) | ([(1, 2)],) * 2'
            ' | ([(torch.zeros(2, 1, 8, 8), torch.zeros(2))],) * 2 | (loader().dataset, loader())'
            " | data(batch_size=1) | 'digits'"
            ' | ([(torch.full((2, 1, 8, 8), nan), torch.tensor([0, 1]))],) * 2')
CONFIG = dict(
      lr='.01 | .1 | np.float32(.05)',
      momentum='0 | .9',
      weight_decay='0 | 1e-4',
      warmup='0 | .5 | 1',
      amp='None | False | True',
      accumulate='1 | 2 | np.int64(2)')
BAD_CONFIG = dict(lr='1e30 | 1e9', weight_decay='1e30', accumulate='5 | 100')

@call('TrainConfig', **CONFIG)
def _(found: Any, **given: Any) -> None:
    for name, value in given.items(): assert getattr(found, name) == value

def trained(history: Any, model: nn.Module, epochs: int) -> None:
    "The rows of a run that went well."
    assert [row['epoch'] for row in history.rows] == list(range(1, epochs + 1))
    assert 1 <= history.best_epoch <= epochs
    for row in history.rows:
        assert all(math.isfinite(v) for v in row.values()) and is_fraction(row['valid_accuracy'])
    assert all(t.isfinite().all() for t in weights_of(model).values())

@call('fit', examples=30, needed='model data epochs show_progress', small='epochs',
      changes='model data checkpoint resume', loose=True, model=TRAINABLE, data=DATA,
      epochs='1 | 2 | np.int64(1)', seed='0 | np.int64(3)', config='None | TrainConfig(lr=.02)',
      device="None | 'cpu'", checkpoint="None | TMP/'a.safetensors' | str(TMP/'ü b')",
      resume="None | TMP/'run.safetensors'", compile="'auto' | False", show_progress='False', **CONFIG,
      words='network|images|loader|batch|split|option|model|loss|weights|data|could not write',
      odd=dict(
          model=NETS,
          data=BAD_DATA,
          config="TrainConfig | {'lr': .1} | TrainConfig()",
          device=BAD_DEVICES,
          compile="'never' | 2",
          checkpoint="TMP | '' | Path('/proc/x/y') | TMP/('n' * 300)",
          resume="stopped() | TMP | '' | Path('/proc/x/y') | TMP/('n' * 300)",
          **BAD_CONFIG))
def _(found: Any, model: nn.Module, data: Any, epochs: int, checkpoint: Any = None, resume: Any = None,
      **rest: Any) -> None:
    trained(found, model, epochs)
    if checkpoint is not None:
        about = mwt.load_checkpoint(mwt.plain(model) if not hasattr(model, 'masks') else model, checkpoint)
        assert about['epoch'] == found.best_epoch
        Path(checkpoint).unlink()
    assert resume is None or not Path(resume).exists()

HISTORY = ("History([{'epoch': 1, 'loss': 2., 'valid_accuracy': .5},"
           " {'epoch': 2, 'loss': nan, 'valid_accuracy': 1.}], 2)")

@call('History.series', needed='name', words='column', self=HISTORY, name="'epoch' | 'valid_accuracy'",
      odd=dict(name="'los' | 'valid accuracy'"))
def _(found: list[float], self: Any, name: str) -> None: assert len(found) == 2

@call('History.table', self=HISTORY + ' | History()')
def _(found: Any, self: Any) -> None: assert len(found) == len(self.rows)

@call('History.plot', words='history', loose=True, self=HISTORY + ' | History()', axes='None | axes_pair()',
      changes='axes', odd=dict(axes='figure_axes()'))
def _(found: Any, self: Any, axes: Any = None) -> None:
    assert len(found) == 2 and (axes is None or found == axes)

JUDGED = "data().test | data().train | loader('test') | data().test.subset(NAMES[::-1])"
BAD_JUDGED = ("data(3).test | data() | data().test.subset('cat') | data(classes=['a', 'b', 'c']).test | [1]"
              ' | [(1, 2)] | (loader(), loader()) | iter(loader()) | loader().dataset'
              ' | [(torch.zeros(2, 1, 8, 8), torch.zeros(2))]'
              ' | [(torch.zeros(2, 1, 8, 8).byte(), torch.tensor([0, 1]))]'
              ' | [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))]'
              ' | [(torch.full((2, 1, 8, 8), nan), torch.tensor([0, 1]))]'
              ' | [(torch.zeros(2, 1, 8, 8), torch.tensor([0, 9]))]'
              ' | [(torch.zeros(2, n, 8, 8), torch.tensor([0, 1])) for n in (1, 3)]'
              ' | [(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long))]'
              ' | data().test._replace(batch_size=1)')

@call('evaluate', examples=60, needed='model batches', words='network|class|loader|images|data|split|model',
      loose=True, model="net() | model() | model('mwt') | module(*NAMES) | module()", batches=JUDGED,
      changes='batches', classes="None | NAMES | ['owl', 'cat'] | ('cat', 'dög ☃')",
      odd=dict(
          model=NETS,
          batches=BAD_JUDGED,
          classes="'cat' | [0, 1] | ['cat'] | ['cat', 'cat'] | ['rat'] | 0 | np.array(['cat', 'owl'])"))
def _(found: float, model: nn.Module, batches: Any, classes: Any = None) -> None:
    assert is_fraction(found)
    if isinstance(model, ModularModel) and isinstance(batches, mwt.Batches) and batches.classes == NAMES:
        chosen = positions(NAMES if classes is None else classes)
        x, y = torch.cat([x for x, _ in batches.plain()]), batches.plain().labels
        keep = torch.isin(y, torch.tensor(chosen))
        right = torch.tensor(chosen)[answer(model, x[keep])[:, chosen].argmax(1)] == y[keep]
        assert abs(found - right.double().mean()) < 1e-6

@call('profile', examples=40, needed='model repeats', small='repeats', words='network|model|images',
      twice=False, loose=True, model='net() | model() | module() | net().double() | dense()',
      against='None | net() | model() | module()', batch_size='1 | 3 | np.int64(2)', repeats='1 | 2',
      odd=dict(model=NETS, against=NETS, repeats='0 | -1 | 1.5'))
def _(found: Any, model: nn.Module, against: Any = None, batch_size: int = 1, **rest: Any) -> None:
    assert [row['figure'].split()[0] for row in found.rows] == ['parameters', 'MFLOPs', 'latency']
    assert found.rows[0]['network'] == f'{sum(p.numel() for p in model.parameters()):,}'
    assert float(found.rows[2]['network'].replace(',', '')) > 0


# Modules

MODULAR = "model() | model('mwt') | model('moda')"

@call('decompose', examples=40, needed='model batches show_progress',
      words='network|class|loader|images|data|model|split', model=MODULAR,
      batches='data().train | data().test.subset(NAMES[::-1])', changes='batches',
      threshold='.9 | 1 | .01 | np.float32(.5)', samples='2 | 200 | np.int64(5)', show_progress='False',
      odd=dict(model=NETS, batches=BAD_JUDGED, samples='10**6'))
def _(found: Any, model: ModularModel, batches: Any, **rest: Any) -> None:
    assert found.classes == NAMES and found.sizes == model.kernels
    assert found.kept.shape == (3, sum(model.kernels.values())) and found.kept.dtype == torch.bool
    assert all(rows.any(1).all() for rows in found.split(found.kept).values())
    assert ((0 <= found.frequency) & (found.frequency <= 1)).all()
    assert (found.cohesion.nan_to_num(1.) <= 1 + 1e-6).all() and repr(found)

@call('extract', examples=40, needed='model parts classes', words='network|class|parts|model|layers|mask',
      loose=True, model='model()', parts='parts()', classes=CHOSEN.replace('range(2) | ', ''), fuse=FLAG,
      round_to='1 | 4 | np.int64(8)',
      odd=dict(
          model=NETS,
          parts="parts('mwt') | replace(parts(), classes=['a', 'b', 'c'])",
          classes=BAD_CHOSEN))
def _(found: Any, model: ModularModel, parts: Any, classes: Any, fuse: bool = False,
      round_to: int = 1) -> None:
    chosen = positions(classes)
    assert found.classes == [NAMES[i] for i in chosen] and not found.training
    x = X.sigmoid()
    if round_to == 1:
        with fixed_masks(model, union_masks(parts, chosen)):
            expected = answer(model, (x - found.pixel_mean[:, None, None]) / found.pixel_std[:, None, None])
        assert close(answer(found, x), expected[:, chosen])
    else: assert answer(found, x).isfinite().all()
    if fuse: assert not any(isinstance(m, nn.BatchNorm2d) for m in found.modules())

BAD_IMAGES = (' | torch.zeros(2, 3, 8, 8) | torch.full((4, 1, 8, 8), nan) | X[:0] | X[0] | X.double()'
              ' | X.int() | torch.full((4, 1, 8, 8), inf)')
BAD_SAMPLES = BAD_JUDGED + " | data().subset(['cat', 'dög ☃']) | data"

@call('compose', examples=40, needed='modules', changes='calibrate', loose=True,
      words='module|class|weight|images|data|loader|split',
      modules="[module()] | [module(), module('owl')] | (module('owl'), module('cat'))"
              " | [module(), module('owl', fuse=True)] | [module('owl', fuse=True), module('owl', 'cat')]",
      calibrate='None | data() | data().train | loader()', model='None | model()', share=FLAG,
      odd=dict(
          calibrate=BAD_SAMPLES,
          model=NETS,
          modules=('[module(), module()] | [net()] | module() | [model()] | [module(), net()]'
                   " | [module(), module('owl').double()] | iter([module()]) | {'a': module()}"
                   " | [module(), module('owl').to('meta')]")))
def _(found: Any, modules: Any, **rest: Any) -> None:
    assert found.classes == list(dict.fromkeys(c for m in modules for c in m.classes))
    assert answer(found, X.sigmoid()).isfinite().all()
    if not rest and all(len(m.classes) == len(found.classes) for m in modules):
        assert close(answer(found, X.sigmoid()), answer(modules[0], X.sigmoid()))

@call('add_class', needed='module other', changes='calibrate', loose=True,
      words='module|class|weight|images|data|loader|split', module="module() | module('dög ☃', fuse=True)",
      other="module('owl') | module('owl', 'cat')", calibrate='None | data()', model='None | model()',
      odd=dict(module=NETS, other=NETS + " | module() | module('owl').double()", calibrate=BAD_SAMPLES,
               model=NETS))
def _(found: Any, module: Any, other: Any, **rest: Any) -> None:
    assert found.classes == list(dict.fromkeys([*module.classes, *other.classes]))
    assert answer(found, X.sigmoid()).isfinite().all()

@call('drop_class', needed='module name', words='class|module',
      module="module() | compose([module('owl', fuse=True), module()])", name="'cat' | 'dög ☃'",
      odd=dict(module=NETS + " | module('cat')", name="'cow' | 'Cat' | 0 | ['cat']"))
def _(found: Any, module: Any, name: str) -> None:
    assert found.classes == [c for c in module.classes if c != name]
    rest = [module.classes.index(c) for c in found.classes]
    assert close(answer(found, X.sigmoid()), answer(module, X.sigmoid())[:, rest])

@call('replace_class', examples=40, needed='weak module name calibration', changes='calibration', loose=True,
      words='class|network|module|images|data|loader|split|weight', weak='net() | model() | module(*NAMES)',
      module="module() | module('cat', fuse=True)", name="'cat' | np.str_('cat')",
      calibration='data() | data().train | loader()', classes='None | NAMES | tuple(NAMES)',
      odd=dict(weak=NETS, module=NETS, name="'owl' | 'Cat' | 0 | ['cat']", calibration=BAD_SAMPLES,
               classes=BAD_CLASSES))
def _(found: Any, weak: nn.Module, **rest: Any) -> None:
    names = getattr(weak, 'classes', NAMES)
    assert found.classes == names and not found.training
    logits = answer(found, X.sigmoid())
    assert logits.shape == (4, len(names)) and logits.isfinite().all()

@call('mend', examples=40, needed='module model images', changes='images', loose=True,
      words='module|model|images|network|class|loader|data|split',
      module="module() | module('owl')", model='model()',
      images='X.sigmoid() | split()[0] | data().train | loader()', most='2 | 512 | np.int64(10)',
      ridge='.01 | 1 | np.float32(.5)',
      odd=dict(
          module=NETS + " | module('owl', fuse=True)",
          model=NETS + " | model('mwt')",
          images=BAD_JUDGED + BAD_IMAGES,
          ridge='0 | 1e-300 | 1e300',
          most='1 | 0'))
def _(found: Any, module: Any, **rest: Any) -> None:
    assert found.classes == module.classes and found.description['layers'] == module.description['layers']
    assert answer(found, X.sigmoid()).isfinite().all()

@call('fit_budget', examples=30, needed='model parts classes', loose=True, twice=False,
      words='budget|parts|class|network|model|params|flops|latency_ms', model='model()', parts='parts()',
      classes="['cat'] | ['owl', 'cat'] | NAMES | [np.int64(2)]", flops='1e9 | 20000', latency_ms='1e6',
      params='10**6 | 300 | np.int64(200) | 150.5', data='None | data().valid',
      points='2 | np.int64(3)', small='points',
      odd=dict(
          model=NETS,
          parts="parts('mwt') | replace(parts(), classes=['a', 'b', 'c'])",
          classes=BAD_CHOSEN,
          params='0 | 1 | -5 | 1e-300',
          flops='0 | 1 | nan',
          latency_ms='0 | 1e-9 | 1e-300',
          data='data() | data(3).valid | data(classes=["a", "b", "c"]).valid | loader()',
          points='1 | 0'))
def _(found: Any, params: Any = None, flops: Any = None, **rest: Any) -> None:
    [chosen] = [row for row in found.rows if row['chosen']]
    assert params is None or chosen['params'] <= params
    assert flops is None or chosen['flops'] <= flops
    assert chosen['params'] == sum(p.numel() for p in found.module.parameters()) and repr(found)

@call('fine_tune', examples=40, needed='module data epochs show_progress', small='epochs',
      words='module|class|network|images|loader|data|loss|weights|batch|split',
      module='module() | module(*NAMES)', data="data() | data().subset(['dög ☃', 'cat', 'owl'])",
      epochs='1 | np.int64(2)', new_head=FLAG, lr='.01 | np.float32(.1)', show_progress='False',
      loose=True, odd=dict(module=NETS, data=BAD_DATA, lr='1e30 | 0 | -1'))
def _(found: Any, module: Any, data: Any, **rest: Any) -> None:
    assert found is not module and found.classes == module.classes and not found.training
    logits = answer(found, X.sigmoid())
    assert logits.shape == (4, len(module.classes)) and logits.isfinite().all()

@call('Parts.split', needed='row', self='parts()', row='torch.zeros(12) | parts().kept',
      odd=dict(row='torch.zeros(11) | torch.zeros(12, 2)'))
def _(found: Any, self: Any, row: Tensor) -> None:
    assert {k: v.shape[-1] for k, v in found.items()} == self.sizes
    assert torch.equal(torch.cat([*found.values()], -1), row)

@call('Parts.index', needed='name', self='parts()', words='class',
      name="'cat' | 2 | np.int64(0) | np.str_('owl')", odd=dict(name='3 | -1'))
def _(found: int, self: Any, name: Any) -> None:
    assert type(found) is int and NAMES[found] in (name, NAMES[positions(name)[0]])

@call('Parts.report', self='parts() | parts("mwt") | parts("moda")')
def _(found: Any, self: Any) -> None: assert [r['class'] for r in found.rows] == [*NAMES, 'mean']

PARTS = dict(
      classes='NAMES',
      sizes="{'a': 2, 'b': 1}",
      frequency='torch.ones(3, 3).double()',
      kept='torch.ones(3, 3).bool()',
      thresholds='torch.ones(3, 2)',
      cohesion='torch.ones(3)',
      samples='2')

@call('Parts', needed=' '.join(PARTS), words='parts|shape', **PARTS, signature='None',
      odd=dict(
          classes=BAD_CLASSES,
          sizes="{'a': 3, 'b': 1} | {'a': -1, 'b': 4} | {'a': 1.5, 'b': 1.5} | {1: 2, 2: 1}",
          kept='torch.ones(3, 3) | torch.ones(3, 3, device="meta").bool()',
          frequency='torch.ones(3, 2) | torch.full((3, 3), nan)'))
def _(found: Any, **given: Any) -> None:
    assert repr(found) and found.index('owl') == 2 and len(found.split(found.kept)) == 2

@call('plot_masks', needed='parts', parts='parts() | parts("moda")', layer='None', ax='None | figure_axes()',
      changes='ax', odd=AX | dict(layer="'1' | 0 | '0' | 'features'"))
def _(found: Any, parts: Any, layer: Any = None, ax: Any = None) -> None:
    assert [t.get_text() for t in found.get_yticklabels()] == NAMES and (ax is None or found is ax)

@call('plot_coupling', needed='parts', parts='parts() | parts("mwt")', ax='None | figure_axes()',
      changes='ax', odd=AX)
def _(found: Any, parts: Any, ax: Any = None) -> None:
    assert [t.get_text() for t in found.get_yticklabels()] == NAMES and (ax is None or found is ax)


# Layers

@call('similarity', examples=25, needed='model data show_progress',
      words='network|class|loader|images|data|split|layers|compare|weights|answers', loose=True,
      model='net() | residual() | module() | residual_module()', data='data().train | data().test | loader()',
      of="'layers' | 'all' | ['norms', 'activations'] | 'blocks'", passes='1 | np.int64(2)', small='passes',
      seed='0 | np.int64(3)', show_progress='False', changes='data',
      odd=dict(model=NETS, data=BAD_JUDGED, of="'layer' | [] | ['all', 1] | ['layers', 'layers']"))
def _(found: Any, model: nn.Module, **rest: Any) -> None:
    n = len(found.names)
    assert found.matrix.shape == (n, n) and len(set(found.names)) == n and repr(found)
    known = found.matrix.diagonal().nan_to_num(1.)
    assert torch.allclose(known, torch.ones(n).double())
    assert (found.matrix.nan_to_num(0.).abs() <= 1 + 1e-9).all()

@call('drop_blocks', examples=25, needed='model blocks', words='network|block|forward pass|weights|layer',
      model='residual() | residual().eval() | residual().double() | residual_module()',
      blocks="'stages.0.0' | ['stages.0.1', 'stages.2.1'] | ('stages.0.0', 'stages.0.1')",
      example_input='None | torch.rand(1, 1, 8, 8)', loose=True,
      odd=dict(model=NETS, blocks="'stages.1.0' | ['stages.0.0', 'no'] | 'stages' | ['stages.0.0', 0]",
               example_input='torch.zeros(0, 1, 8, 8) | torch.zeros(1, 2, 8, 8) | torch.zeros(8, 8)'))
def _(found: nn.Module, model: nn.Module, blocks: Any, **rest: Any) -> None:
    before, after = weights_of(model), weights_of(found)
    gone = tuple(f'{name}.' for name in ([blocks] if isinstance(blocks, str) else blocks))
    assert after.keys() == {k for k in before if not k.startswith(gone)}
    assert all(torch.equal(t, before[k]) for k, t in after.items()) and found.training == model.training
    assert answer(found, X.sigmoid()).isfinite().all()

@call('shorten', examples=15, needed='module data epochs show_progress', small='epochs',
      words='module|class|network|images|loader|data|loss|weights|batch|split|block',
      module='residual_module()', data='data()', most_lost='.05 | 1 | np.float32(.5) | 0',
      by="'accuracy' | 'similarity'",
      epochs='0 | 1', show_progress='False', loose=True, lr='.01',
      odd=dict(module=NETS, data=BAD_DATA, by="'luck'", lr='1e30 | 0 | -1'))
def _(found: Any, module: Any, epochs: int, **rest: Any) -> None:
    short, table = found
    assert short is not module and short.classes == NAMES and not short.training
    assert len(weights_of(short)) <= len(weights_of(module)) and len(table) >= 1
    assert answer(short, X.sigmoid()).isfinite().all()


# Files

PATHS = "TMP/'a.safetensors' | str(TMP/'b') | TMP/'new'/'ö ☃.safetensors'"
BAD_PATHS = "TMP | '' | '.' | '/proc/x/y' | TMP/('n' * 300) | TMP/'a\\0b' | FOLDER/'cat'/'0.png'/'x' | '/'"
SAVED = "CHECKPOINT | str(CHECKPOINT) | PARTS | MODULE"

@call('save_checkpoint', needed='model path', words='network|path|write|could not',
      model='net() | model() | module()', path=PATHS, about="None | {} | {'a': [1, 'ü', None]}",
      odd=dict(
          model=NETS,
          path=BAD_PATHS,
          about=("{1: 2} | {'a': object()} | [1] | {'a': nan} | {'signature': 3} | {object(): 1}"
                 " | {'classes': 7}")))
def _(found: Path, model: nn.Module, path: Any, about: Any = None) -> None:
    other = deepcopy(model)
    with torch.no_grad(): [p.zero_() for p in other.parameters() if p.is_floating_point()]
    said = mwt.load_checkpoint(other, found)
    assert snapshot(weights_of(other)) == snapshot(weights_of(model)) and found == Path(path)
    own = {str(k): v for k, v in (about or {}).items() if k not in ('signature', 'classes')}
    assert all(said[k] == v or v != v for k, v in own.items())

@call('load_checkpoint', needed='model path', changes='model', words='network|checkpoint|could not|no ',
      model='net()', path='CHECKPOINT | str(CHECKPOINT)',
      odd=dict(model=NETS, path=BAD_PATHS + " | PARTS | MODULE | FOLDER/'cat'/'0.png'"))
def _(found: dict, model: nn.Module, path: Any) -> None: assert same_state(model, net())

@call('save_parts', needed='parts path', words='could not', parts='parts() | parts("moda")', path=PATHS,
      odd=dict(path=BAD_PATHS))
def _(found: Path, parts: Any, path: Any) -> None: assert snapshot(mwt.load_parts(found)) == snapshot(parts)

@call('load_parts', needed='path', words='parts', path='PARTS | str(PARTS)',
      odd=dict(path=BAD_PATHS + ' | CHECKPOINT | MODULE'))
def _(found: Any, path: Any) -> None: assert found.classes == NAMES

@call('save_module', needed='module path', words='module|could not',
      module="module() | module('owl', fuse=True)", path=PATHS, odd=dict(module=NETS, path=BAD_PATHS))
def _(found: Path, module: Any, path: Any) -> None:
    again = mwt.load_module(found)
    assert same_state(again, module) and torch.equal(answer(again, X.sigmoid()), answer(module, X.sigmoid()))

@call('load_module', needed='path', words='module', path='MODULE | str(MODULE)', device=DEVICES,
      odd=dict(path=BAD_PATHS + ' | CHECKPOINT | PARTS', device=BAD_DEVICES))
def _(found: Any, path: Any, device: Any = 'cpu') -> None:
    assert found.classes == ['cat', 'dög ☃'] and same_state(found, module())

@call('export', examples=4, needed='module path', loose=True, twice=False, changes='int8',
      words='module|path|int8|opset|images|class|data|loader|split|could not',
      module="module() | module('owl', fuse=True)",
      path="TMP/'a.onnx' | str(TMP/'ö b.pt2') | TMP/'new'/'c.ONNX'",
      int8='None | data().train | split()[0] | X.sigmoid() | loader()', opset='18 | np.int64(20)',
      odd=dict(
          module=NETS,
          path=BAD_PATHS + " | TMP/'a.tflite' | TMP/'a' | TMP/'a.safetensors'",
          int8=BAD_JUDGED + BAD_IMAGES,
          opset='9 | 17 | 24 | 18.5'))
def _(found: Path, path: Any, **rest: Any) -> None: assert found == Path(path) and found.stat().st_size > 1000


# Runs

HOW = dict(model='simcnn', width=.1, epochs=1, batch_size=8, valid=.2, workers=0)

@call('Run.create', examples=20, needed='folder data',
      words='folder|run|data set|setting|option|path|could not', loose=True,
      folder="TMP/'run' | str(TMP/'run2') | OLD", data="FOLDER | str(FOLDER) | 'digits'", overwrite=FLAG,
      resume=FLAG, model="'simcnn' | 'torchvision/resnet18'", width='.1 | np.float32(1)',
      method="None | 'mwt' | 'plain'", epochs='1 | np.int64(3)', seed='0 | 3', batch_size='8',
      size='None | 8', lr='.1', small='width',
      odd=dict(
          folder=BAD_PATHS,
          data="'no' | TMP/'no' | FOLDER/'cat'",
          model="'simcn' | net()",
          method="'plai' | MwT()",
          width='9'))
def _(found: Any, folder: Any, data: Any, **rest: Any) -> None:
    assert found.state in ('new', 'complete') and found.about()
    assert json.loads(json.dumps(found.settings)) == found.settings

@call('Run.open', needed='folder', words='run', folder='OLD | str(OLD)', data='None | FOLDER | str(FOLDER)',
      odd=dict(folder=BAD_PATHS + ' | FOLDER', data="TMP/'no' | 'nothing'"))
def _(found: Any, folder: Any, data: Any = None) -> None:
    assert found.state == 'complete' and len(found.table())

OLD = 'Run.open(OLD)'

@call('Run.path', needed='name', words='file', self=OLD, name="'model' | 'parts'",
      odd=dict(name="'modell' | 'run.json'"))
def _(found: Path, self: Any, name: str) -> None: assert found.parent == self.folder

@call('Run.data', self=OLD, device=DEVICES, odd=dict(device=BAD_DEVICES))
def _(found: Any, self: Any, device: Any = None) -> None: assert found.classes == ['cat', 'dog', 'owl']

@call('Run.new_model', examples=6, twice=False, self=OLD, data='None | data()', words='data',
      odd=dict(data='data(3) | data().train'))
def _(found: Any, self: Any, data: Any = None) -> None: assert found.n_classes == 3

@call('Run.model', examples=3, twice=False, self=OLD, device=DEVICES, odd=dict(device=BAD_DEVICES))
def _(found: Any, self: Any, device: Any = None) -> None: assert found.n_classes == 3

@call('Run.modules', self=OLD, device=DEVICES, odd=dict(device=BAD_DEVICES))
def _(found: Any, self: Any, device: Any = None) -> None: assert all(m.classes for m in found.values())

@call('Run.module_path', needed='classes', self=OLD, words='class',
      classes="['cat'] | ('a', 'b') | ['/', '..'] | ['☃' * 200]")
def _(found: Path, self: Any, classes: Any) -> None:
    assert found.parent == self.folder/'modules' and len(found.name.encode()) < 255

@call('Run.decompose', examples=3, needed='show_progress', self=OLD, threshold='.9 | .5',
      device="None | 'cpu'", show_progress='False', odd=dict(device=BAD_DEVICES))
def _(found: Any, self: Any, **rest: Any) -> None: assert snapshot(self.parts()) == snapshot(found)

@call('Run.extract', examples=5, twice=False, needed='_spread_groups', words='class|groups', self=OLD,
      _spread_groups="([],) | () | (['cat'],) | (['cat', 'dog'], [2])".replace('([],) | ', ''), fuse=FLAG,
      round_to='1 | 2', device="None | 'cpu'",
      odd=dict(
          device=BAD_DEVICES,
          _spread_groups="(['rat'],) | (1, 1) | ([],) | (None,) | (['cat', 'cat'],) | (iter([0]),)"))
def _(found: Any, self: Any, groups: Any, **rest: Any) -> None: assert len(found) == (len(groups) or 3)

@call('Run.evaluate', examples=2, self=OLD, twice=False, words='module|network',
      modules='() | [MODULE_OF_RUN] | (str(MODULE_OF_RUN),)', device="None | 'cpu'",
      odd=dict(
          device=BAD_DEVICES,
          modules="MODULE_OF_RUN | str(MODULE_OF_RUN) | [MODULE] | [PARTS] | ['no'] | [None]"))
def _(found: Any, self: Any, **rest: Any) -> None: assert len(found) >= 1 and len(self.figures())

@call('Run.report', examples=1, twice=False, self=OLD)
def _(found: Path, self: Any) -> None: assert '<html' in found.read_text()

@call('Run.save_history', needed='history', self=OLD, history='Run.open(OLD).history()')
def _(found: Path, self: Any, history: Any) -> None: assert snapshot(self.history()) == snapshot(history)

@call('Run.save_parts', needed='parts', self=OLD, parts='Run.open(OLD).parts()')
def _(found: Path, self: Any, parts: Any) -> None: assert snapshot(self.parts()) == snapshot(parts)

FIGURES = "{'modularity': dict(krr=.1, cohesion=1., coupling=0.), 'networks': []}"

@call('Run.save_metrics', needed='metrics', self=OLD, metrics=FIGURES)
def _(found: Path, self: Any, metrics: Any) -> None: assert self.metrics() == metrics

@call('Run.save_module', needed='module', self='Run.open(SPARE)', words='module', module='module()',
      odd=dict(module=NETS))
def _(found: Path, self: Any, module: Any) -> None: assert mwt.load_module(found).classes == module.classes

@call('Run.train', examples=3, needed='show_progress',
      self="Run.create(TMP/'t', FOLDER, overwrite=True, **HOW)",
      changes='self', device="None | 'cpu'", compile="'auto' | False", show_progress='False',
      odd=dict(device=BAD_DEVICES, compile="'x'"))
def _(found: Any, self: Any, **rest: Any) -> None: assert self.state == 'complete' and len(found.rows) == 1


# The test

@pytest.fixture(scope='session')
def scope(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    "Folders and files that expressions can name."
    yield make_scope(tmp_path_factory.mktemp('fuzz'))

def make_scope(folder: Path) -> dict[str, Any]:
    names = [f'{c}/{i}.png' for c in ('cat', 'dog', 'owl') for i in range(10)]
    images = pictures(folder/'images', names, channels=1)
    files = {name: folder/f'{name}.safetensors' for name in ('CHECKPOINT', 'PARTS', 'MODULE')}
    mwt.save_checkpoint(net(), files['CHECKPOINT'])
    mwt.save_parts(mwt.decompose(model(), data().train, show_progress=False), files['PARTS'])
    mwt.save_module(module(), files['MODULE'])
    run = mwt.Run.create(folder/'old', images, **HOW)
    run.train(show_progress=False)
    run.decompose(show_progress=False)
    [cut] = run.extract(['cat', 'dog'])
    shutil.copytree(folder/'old', folder/'spare')
    tmp = folder/'tmp'
    try: mwt.fit(net(), data(), 1, lr=1e30, resume=folder/'stopped', show_progress=False)
    except mwt.MwtError: pass
    def stopped() -> Path: return Path(shutil.copy(folder/'stopped', tmp))
    return dict(TMP=tmp, stopped=stopped, FOLDER=images, HOW=HOW, OLD=folder/'old', SPARE=folder/'spare', X=X,
                MODULE_OF_RUN=run.module_path(cut.classes), **files)

def renew(folder: Path) -> None:
    "An empty folder for each example."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

def examine(call: Call, scope: dict[str, Any], examples: int) -> None:
    how = settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                   phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck))
    @how
    @given(st.data())
    def check(data: st.DataObject) -> None:
        renew(scope['TMP'])
        given, odd = draw(call, lambda items: data.draw(st.sampled_from(items)))
        try: try_out(call, given, odd, scope)
        finally: plt.close('all')
    check()

@pytest.mark.parametrize('name', CALLS)
def test_right_or_refused(name: str, scope: dict[str, Any]) -> None:
    examine(CALLS[name], scope, -(-CALLS[name].examples // 3))

@pytest.mark.slow
@pytest.mark.parametrize('name', CALLS)
def test_right_or_refused_long(name: str, scope: dict[str, Any]) -> None:
    examine(CALLS[name], scope, 10 * CALLS[name].examples)
