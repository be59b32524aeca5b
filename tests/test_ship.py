"Modules that leave: files for other programs, cards, mending, budgets, and the commands on module files."
from __future__ import annotations
import copy, json, subprocess, sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from helpers import picture, pictures
from PIL import Image
from torch import Tensor, nn
from mwt.core.display import percent
from mwt.core.files import save_tensors
from mwt.core.signature import Signature, weights_of
from mwt.data.batches import ImageData
from mwt.data.sources import image_data
from mwt.measure import count_params, evaluate, rejection
from mwt.methods.modular import ModularModel, modularize
from mwt.modules import budget as budgets
from mwt.modules import export as exporting
from mwt.modules import mend as mending
from mwt.modules.budget import fit_budget
from mwt.modules.compose import compose
from mwt.modules.decompose import decompose
from mwt.modules.export import export, served, some_images
from mwt.modules.extract import extract
from mwt.modules.mend import distance, mend
from mwt.modules.module import SlimModule, as_module, load_module, note_, note_figures_, save_module
from mwt.modules.parts import Parts
from mwt.networks import create_model
from mwt.runs.cli import main
from mwt.runs.report import Run
from mwt.runs.steps import own_figures
from mwt.train.fit import fit

OLD = Path(__file__).parent/'fixtures'/'0.1.0'
CLASSES = ['3', '5', '8']


@pytest.fixture(scope='module')
def data() -> ImageData: return image_data('digits', batch_size=64, device='cpu', show_progress=False)


@pytest.fixture(scope='module')
def trained(data: ImageData) -> tuple[ModularModel, Parts]:
    "A model that knows the digits a little, and its parts; not to be changed."
    net = create_model('simcnn', width=.1, in_channels=1, seed=0)
    model = modularize(net, n_classes=10, method='mwt')
    fit(model, data, epochs=4, show_progress=False)
    return model, decompose(model, data.train, show_progress=False)


@pytest.fixture(scope='module')
def module(trained: tuple) -> SlimModule: return extract(*trained, CLASSES)


def untrained(classes: list[str], mean: float = .5, shape: tuple[int, int, int] = (1, 8, 8)) -> SlimModule:
    "A convolution and a head, with random weights."
    net = nn.Sequential(nn.Conv2d(shape[0], 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(6, len(classes)))
    known = Signature(classes, list(shape), [mean] * shape[0], [.25] * shape[0])
    return as_module(net, classes, shape, signature=known)


def byte_images(n: int, shape: tuple[int, ...] = (1, 8, 8)) -> Tensor:
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def by_onnx(path: Path, images: Tensor) -> Tensor:
    "As a service would run a file."
    session = onnxruntime.InferenceSession(path)
    [logits] = session.run(None, {'images': images.numpy()})
    return torch.from_numpy(logits)


# Files for other programs

def test_onnx_computes_what_the_module_computes(module: SlimModule, tmp_path: Path) -> None:
    "Any number of images; bytes go in, and what the file says is enough to use it."
    path = export(module, tmp_path/'new'/'a.onnx')
    for n in (1, 7, 32):
        with torch.no_grad(): expected = module(byte_images(n))
        assert torch.allclose(by_onnx(path, byte_images(n)), expected, atol=1e-4)
    facts = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert json.loads(facts['classes']) == CLASSES and json.loads(facts['input_shape']) == [1, 8, 8]
    assert facts['input'].startswith('uint8') and facts['version'].startswith('mwt ')
    assert json.loads(facts['card'])['method']['method'] == 'mwt'
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert b'.py' not in path.read_bytes(), 'where operations stood in our source code'


@pytest.mark.parametrize('change', [copy.copy, pytest.param(torch.nn.Module.double, marks=pytest.mark.slow),
                                    torch.nn.Module.half,
                                    lambda m: compose([m, untrained(['c'], mean=.1)])],
                         ids=['plain', 'double', 'half', 'composed'])
def test_every_module_is_exported(change: Callable, tmp_path: Path) -> None:
    "In float32, whatever the weights are; parts of a composed one normalise in their own way."
    module = change(untrained(['a', 'b']))
    path = export(module, tmp_path/'a.onnx')
    with torch.no_grad(): expected = copy.deepcopy(module).float()(byte_images(5))
    assert torch.allclose(by_onnx(path, byte_images(5)), expected, atol=1e-4)


def test_module_that_takes_normalised_images(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    module = as_module(net, ['a', 'b'], (3, 2, 2))
    path = export(module, tmp_path/'a.onnx')
    x = torch.randn(3, 3, 2, 2)
    assert torch.allclose(by_onnx(path, x), net(x), atol=1e-5)
    assert 'normalised' in onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map['input']


def test_pt2_loads_without_mwt(module: SlimModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export(module, tmp_path/'a.pt2')
    with torch.no_grad(): expected = {n: module(byte_images(n)) for n in (1, 9)}
    for name in [n for n in sys.modules if n.split('.')[0] == 'mwt']:
        monkeypatch.setitem(sys.modules, name, None)
    facts = {'mwt.json': ''}
    program = torch.export.load(path, extra_files=facts).module()
    for n, logits in expected.items(): assert torch.allclose(program(byte_images(n)), logits, atol=1e-5)
    assert json.loads(json.loads(facts['mwt.json'])['classes']) == CLASSES


def test_int8(module: SlimModule, data: ImageData, tmp_path: Path) -> None:
    "A smaller file that mostly answers as before; figures of both side by side."
    files = [export(module, tmp_path/'float.onnx'), export(module, tmp_path/'int8.onnx', int8=data.train)]
    sizes = [f.stat().st_size for f in files]
    assert sizes[1] < .6 * sizes[0]
    kinds = {i.data_type for i in onnx.load(files[1]).graph.initializer}
    assert onnx.TensorProto.INT8 in kinds and 'int8' in str(onnx.load(files[1]).metadata_props)
    x = data.test.subset(CLASSES)
    x = torch.cat([(images * 255).round().byte() for images, _ in x.pixels()])
    same = by_onnx(files[0], x).argmax(1) == by_onnx(files[1], x).argmax(1)
    assert same.double().mean() > .9
    rows = served(files, data.test, repeats=2).rows
    assert rows[0]['accuracy'] == f'{100 * evaluate(module, data.test):.1f} %'
    assert [r['file'] for r in rows] == ['float.onnx', 'int8.onnx'] and rows[0]['size'] != rows[1]['size']
    assert all(float(r[f'ms, batch {n}']) > 0 for r in rows for n in (1, 32))


def test_images_for_calibration(module: SlimModule, data: ImageData) -> None:
    "A tensor, a split or any batches; of a split with more classes, those of the module."
    few = some_images(module, data.train, 10)
    assert few.shape == (10, 1, 8, 8) and few.min() >= 0 and few.max() <= 1
    own = some_images(module, data.train, 10**6)
    assert len(own) == data.train.subset(CLASSES).n
    assert len(some_images(module, [(few, torch.zeros(10, dtype=torch.long))] * 3, 15)) == 15
    for wrong in (few[:0], few[:, :, :5], few[0]):
        with pytest.raises(ValueError, match='images must be'): some_images(module, wrong, 5)


def test_file_is_written_whole_or_not_at_all(module: SlimModule, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path/'a.pt2'
    path.write_text('what was there')
    def differs(*args: Any) -> None: raise ValueError('computes something else')
    monkeypatch.setattr(exporting, 'check_same', differs)
    with pytest.raises(ValueError, match='something else'): export(module, path)
    assert path.read_text() == 'what was there' and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize('error', [0., 1e-3, float('nan')])
def test_another_answer_is_noticed(error: float) -> None:
    module = untrained(['a', 'b'])
    def run(x: Tensor) -> Tensor: return module(x).detach() + error
    if not error: return exporting.check_same(module, run, 'it')
    with pytest.raises(ValueError, match='it computes something else'):
        exporting.check_same(module, run, 'it')


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    'suffix': (dict(path='a.tflite'), "path must end in .onnx or .pt2, not '.tflite'"),
    'no suffix': (dict(path='a'), "path must end in .onnx or .pt2, not ''"),
    'old opset': (dict(opset=9), 'opset must be a whole number at least 18'),
    'new opset': (dict(opset=99), 'opset must be a whole number at least 18 and at most 23'),
    'int8 of pt2': (dict(path='a.pt2', int8=byte_images(4)), 'int8 is written into .onnx files'),
    'no image': (dict(int8=byte_images(0)), 'at least one'),
    'other images': (dict(int8=byte_images(4, (3, 8, 8))), r'not \(4, 3, 8, 8\)'),
    'another network': (dict(module=nn.Linear(2, 2)), 'Linear is not an extracted module')}


@pytest.mark.parametrize('wrong, says', WRONG.values(), ids=WRONG)
def test_wrong_export(wrong: dict, says: str, tmp_path: Path) -> None:
    given = dict(module=untrained(['a', 'b']), path='a.onnx') | wrong
    given['path'] = tmp_path/given['path']
    with pytest.raises((ValueError, TypeError), match=says): export(**given)
    assert not [*tmp_path.iterdir()]


def test_nothing_to_round(tmp_path: Path) -> None:
    module = as_module(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), ['a', 'b'], (2, 4, 4))
    with pytest.raises(ValueError, match='int8: this module has no convolution or linear layer'):
        export(module, tmp_path/'a.onnx', int8=torch.randn(4, 2, 4, 4))


def test_int8_limits_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "What ONNX Runtime cannot round, answers that are no numbers, answers that are others."
    module, images = untrained(['a', 'b']), byte_images(8)
    content = exporting.as_onnx(module, 18).SerializeToString()
    with pytest.warns(UserWarning, match=r'in int8 the module answers as before for 0\.0 % of the calib'):
        mirrored = copy.deepcopy(module)
        with torch.no_grad(): [p.neg_() for p in [*mirrored.parameters()][-2:]]
        exporting.check_rounded(mirrored, content, images)
    answers = torch.full((8, 2), torch.nan)
    with monkeypatch.context() as m:
        m.setattr(exporting, 'run_session', lambda session, x: answers)
        with pytest.raises(ValueError, match='int8: the answers are no numbers any more'):
            exporting.check_rounded(module, content, images)
    def refuse(*args: Any, **options: Any) -> None: raise NotImplementedError('no 8 bits for ReLU')
    monkeypatch.setattr('onnxruntime.quantization.quantize_static', refuse)
    monkeypatch.setattr(exporting, 'as_onnx', lambda module, opset: onnx.load_from_string(content))
    with pytest.raises(ValueError, match='int8: ONNX Runtime cannot quantize this module: no 8 bits'):
        export(module, tmp_path/'a.onnx', int8=images)
    assert not [*tmp_path.iterdir()]


def test_onnx_limits_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "An opset that the installed package does not know, operations that ONNX or PyTorch cannot follow."
    module = untrained(['a', 'b'])
    def refuse(*args: Any, **options: Any) -> None: raise RuntimeError('no ONNX function for aten.nix')
    with monkeypatch.context() as m:
        m.setattr(onnx.defs, 'onnx_opset_version', lambda: 20)
        says = f'opset 21 is more than onnx {onnx.__version__} knows, 20; upgrade'
        with pytest.raises(ValueError, match=says):
            export(module, tmp_path/'a.onnx', opset=21)
    with monkeypatch.context() as m:
        m.setattr(exporting, 'as_program', lambda module: None)
        m.setattr(torch.onnx, 'export', refuse)
        with pytest.raises(ValueError, match='be written as ONNX, opset 19: no ONNX function for aten.nix'):
            export(module, tmp_path/'a.onnx', opset=19)
    monkeypatch.setattr(torch.export, 'export', refuse)
    with pytest.raises(ValueError, match='torch.export cannot follow this module .*: no ONNX function'):
        export(module, tmp_path/'a.pt2')
    assert not [*tmp_path.iterdir()]


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ImportError, match=r"pip install 'mwt\[export\]'"):
        export(untrained(['a', 'b']), tmp_path/'a.onnx')


def test_served_refuses_other_files(data: ImageData, tmp_path: Path) -> None:
    (tmp_path/'a.onnx').write_bytes(b'no network')
    with pytest.raises(ValueError, match='does not take'): served([tmp_path/'a.onnx'], data.test)
    with pytest.raises(FileNotFoundError, match='no file .*make one with export'):
        served([tmp_path/'b.onnx'], data.test)


# Mending

@pytest.fixture(scope='module')
def hard(trained: tuple) -> SlimModule:
    "Half of the kernels that training left to the classes."
    model, parts = trained
    rows = [parts.index(c) for c in CLASSES]
    kept = parts.kept.clone()
    for row in rows:
        mine = parts.kept[rows].any(0)
        kept[row] = mine & (torch.arange(len(mine)) % 2 == 0)
    return extract(model, replace(parts, kept=kept), CLASSES)


def test_mending_helps(trained: tuple, hard: SlimModule, data: ImageData) -> None:
    "On test images, which were not used: nearer to the model's answers, and more often right."
    model, _ = trained
    before = copy.deepcopy(weights_of(hard))
    mended = mend(hard, model, data.train)
    images = some_images(hard, data.test, 200)
    logits = mending.aims_of(hard, model, images)[1]
    assert distance(mended, images, logits) < .7 * distance(hard, images, logits)
    assert evaluate(mended, data.test) > evaluate(hard, data.test) + .1
    assert count_params(mended) == count_params(hard) and mended.card['changes'][0].startswith('mended on')
    assert all(torch.equal(v, before[k]) for k, v in weights_of(hard).items()), 'the module itself is changed'


def test_mending_is_never_worse(trained: tuple, hard: SlimModule, data: ImageData,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    "What is not nearer to the model on the other half is not taken."
    def spoiled(module: SlimModule, *args: Any) -> SlimModule:
        other = copy.deepcopy(module)
        with torch.no_grad(): other.get_parameter([*dict(other.named_parameters())][-1]).add_(100)
        return other
    monkeypatch.setattr(mending, 'refitted', spoiled)
    assert mend(hard, trained[0], data.train) is hard


def test_least_squares_is_exact_where_it_can_be() -> None:
    "A convolution and its norm's mean take over what another convolution does, constant included."
    torch.manual_seed(0)
    layer, wanted, norm = nn.Conv2d(2, 3, 3, bias=False), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3).eval()
    x = torch.randn(50, 2, 8, 8)
    with torch.no_grad():
        y = mending.writes_of(wanted, wanted(x))
        expected = norm(wanted(x))
        mending.refit_(layer, norm, mending.reads_of(layer, x), y, 1e-7)
        assert torch.allclose(norm(layer(x)), expected, atol=1e-4)


@pytest.mark.parametrize('wrong, says', [
    (dict(ridge=0), 'ridge must be a number above 0'), (dict(most=1), 'most must be'),
    (dict(images=torch.zeros(4, 3, 8, 8)), 'images must be'),
    (dict(images=torch.zeros(1, 1, 8, 8)), 'at least 2'),
    (dict(model=nn.Linear(2, 2)), 'was never modularized'),
    (dict(module=nn.Linear(2, 2)), 'not an extracted')],
    ids=['ridge', 'most', 'shape', 'one image', 'model', 'module'])
def test_wrong_mending(wrong: dict, says: str, trained: tuple, hard: SlimModule) -> None:
    given = dict(module=hard, model=trained[0], images=torch.zeros(4, 1, 8, 8)) | wrong
    with pytest.raises((ValueError, TypeError), match=says): mend(**given)


def test_only_fresh_cuts_are_mended(trained: tuple, hard: SlimModule, tmp_path: Path) -> None:
    loaded = load_module(save_module(hard, tmp_path/'a.safetensors'))
    with pytest.raises(ValueError, match='right after extract'): mend(loaded, trained[0], byte_images(4))


# Budgets

@pytest.mark.parametrize('cost, limits', [
    ('params', [3000, 12_000]), pytest.param('flops', [30_000, 120_000], marks=pytest.mark.slow)])
def test_budget_is_kept(cost: str, limits: list[int], trained: tuple, data: ImageData) -> None:
    "By the module itself, and by no candidate with one kernel more."
    model, parts = trained
    for limit in limits:
        found = fit_budget(model, parts, CLASSES, **{cost: limit}, points=2)
        costs = budgets.costs_of(found.module, [])
        assert costs[cost] <= limit
        [chosen] = [row for row in found.rows if row['chosen']]
        assert chosen[cost] == costs[cost]
        rows = [parts.index(c) for c in CLASSES]
        candidates = budgets.Candidates(model, parts, rows, {cost: limit})
        assert chosen['units'] == len(candidates.order) or not candidates.fits(chosen['units'] + 1)


def test_no_budget_adds_kernels(trained: tuple, module: SlimModule, data: ImageData) -> None:
    found = fit_budget(*trained, CLASSES, params=10**9, latency_ms=10**6, data=data.valid, points=2)
    assert found.module.description['layers'] == module.description['layers']
    assert found.rows[-1]['chosen'] and found.rows[-1]['accuracy'] == evaluate(module, data.valid)
    assert 0 < found.rows[0]['latency_ms'] and len(found.rows) == 2
    assert found.plot().get_ylabel() == 'accuracy (%)'


def test_impossible_budget_says_what_is_possible(trained: tuple) -> None:
    with pytest.raises(ValueError, match='smallest possible is (.+)') as e:
        fit_budget(*trained, CLASSES, params=5)
    smallest = int(str(e.value).split()[-1])
    assert fit_budget(*trained, CLASSES, params=smallest, points=2).rows[0]['chosen']
    with pytest.raises(ValueError, match='smallest possible'):
        fit_budget(*trained, CLASSES, params=smallest - 1)


@pytest.mark.parametrize('wrong, says', [
    (dict(), 'no budget given'), (dict(params=0), 'params must be'), (dict(flops='few'), 'flops must be'),
    (dict(params=9000, points=1), 'points must be'), (dict(params=9000, data=3), 'data must be a split'),
    (dict(params=9000, classes=['x']), "unknown class 'x'")], ids=str)
def test_wrong_budget(wrong: dict, says: str, trained: tuple) -> None:
    given = dict(classes=CLASSES) | wrong
    with pytest.raises((ValueError, TypeError), match=says): fit_budget(*trained, **given)


# Cards

def test_card_travels_with_the_module(tmp_path: Path) -> None:
    "And with a page that any reader of YAML understands; figures of other weights are left behind."
    module = note_(untrained(['cat', 'dog']), data=dict(name='pets: "x"', fingerprint='3f1c'))
    note_figures_(module, accuracy=dict(test=.75), flops=10)
    path = save_module(module, tmp_path/'a.safetensors', card=True)
    loaded = load_module(path)
    assert loaded.card == module.card and loaded.card['accuracy'] == dict(test=.75)
    _, head, body = (tmp_path/'README.md').read_text().split('---\n', 2)
    about = yaml.safe_load(head)
    assert about['library_name'] == 'mwt' and '**cat**, **dog**' in body
    [result] = about['model-index'][0]['results']
    assert result['dataset']['name'] == 'pets: "x"' and result['metrics'][0]['value'] == .75
    with torch.no_grad(): next(loaded.parameters()).add_(1)
    again = load_module(save_module(loaded, path)).card
    assert again == dict(data=module.card['data'])


def test_page_of_another_kind_stays(tmp_path: Path) -> None:
    (tmp_path/'README.md').write_text('mine')
    with pytest.raises(FileExistsError, match='not the page of a module'):
        save_module(untrained(['a', 'b']), tmp_path/'a.safetensors', card=True)
    assert [p.read_text() for p in tmp_path.iterdir()] == ['mine']


@pytest.mark.filterwarnings('ignore:.*is of mwt 0.1.0')
def test_old_files_have_no_card() -> None:
    files = sorted(OLD.rglob('modules/*.safetensors'))
    assert files and all(load_module(f).card == {} for f in files)


@pytest.mark.parametrize('card', [3, ['a'], dict(colour='blue'), dict(accuracy=dict(test=7)), dict(flops='x'),
                                  dict(accuracy=dict(test='x')), dict(composed_of=[3]),
                                  dict(data=dict(name='x' * 70_000))], ids=lambda c: str(c)[:30])
def test_senseless_card(card: Any, tmp_path: Path) -> None:
    module = untrained(['a', 'b'])
    about = module.description | dict(card=card)
    path = save_tensors(tmp_path/'a.safetensors', 'module', weights_of(module), about)
    with pytest.raises(ValueError, match='a.safetensors does not describe a module'): load_module(path)


# Figures on the cards of a run's modules

@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    "Digits, trained so that modules doubt other classes, and decomposed."
    folder = tmp_path_factory.mktemp('run')/'run'
    run = Run.create(folder, 'digits', width=.05, epochs=1, batch_size=128, reject=True)
    run.train('cpu', show_progress=False)
    run.decompose(device='cpu', show_progress=False)
    return run


def test_cards_say_how_good_modules_are(run: Run, capsys: pytest.CaptureFixture) -> None:
    "By validation images when they are cut, by test images when they are evaluated."
    pair, one = run.extract(['3', '8'], ['5'], device='cpu')
    valid, test = run.data('cpu').valid, run.data('cpu').test
    assert pair.card['accuracy'] == dict(valid=evaluate(pair, valid)) and 'accuracy' not in one.card
    for m in (pair, one): assert m.card['rejection'] == dict(valid=rejection(m, valid))
    out = said(capsys, 'list', run.folder)
    assert f"{percent(pair.card['accuracy']['valid'])} (valid)" in out and 'one class' in out
    table = run.evaluate(device='cpu')
    pair, one = run.modules()['3-8'], run.modules()['5']
    assert pair.card['accuracy']['test'] == evaluate(pair, test) and 'accuracy' not in one.card
    figures = [f'{rejection(m, test):.3f}' for m in (pair, one)]
    assert [row['rejection'] for row in table.rows] == ['-', *figures]
    assert 'rejection: AUROC of own classes against others' in run.report().read_text()
    out = said(capsys, 'list', run.folder)
    assert f'{percent(evaluate(pair, test))} (test)' in out and f'AUROC {figures[1]} (test)' in out
    out = said(capsys, 'show', run.module_path(['5']))
    assert 'rejection: valid' in out and f'AUROC {figures[1]}' in out


def test_others_are_not_asked_what_they_never_learned(module: SlimModule, data: ImageData) -> None:
    assert own_figures(module, data.test) == dict(accuracy=evaluate(module, data.test))
    whole = copy.deepcopy(module)
    whole.description['reject'] = True
    assert 'rejection' in own_figures(whole, data.test)
    assert 'rejection' not in own_figures(whole, data.test.subset(CLASSES)), 'no image of another class'


def test_cutting_needs_no_images(tmp_path: Path) -> None:
    images = pictures(tmp_path/'images', [f'{c}/{i}.png' for c in 'ab' for i in range(10)], channels=1)
    run = Run.create(tmp_path/'run', images, width=.1, epochs=1, batch_size=8, valid=.2, workers=0, size=8)
    run.train('cpu', show_progress=False)
    run.decompose(device='cpu', show_progress=False)
    images.rename(tmp_path/'moved')
    with pytest.warns(UserWarning, match='cut, but their accuracy is not measured: .*--data'):
        [module] = Run.open(run.folder).extract(['a', 'b'], device='cpu')
    assert 'accuracy' not in module.card
    [module] = Run.open(run.folder, tmp_path/'moved').extract(['a', 'b'], device='cpu')
    assert module.card['accuracy'].keys() == {'valid'}


# Commands

@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A folder of two modules and two images."
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name, classes in dict(a=['cat', 'dog'], b=['fox']).items():
        module = note_(untrained(classes, shape=(3, 8, 8)), data=dict(name='pets'))
        save_module(note_figures_(module, accuracy=dict(test=.5)), tmp_path/f'{name}.safetensors')
    picture(tmp_path/'x.png', 1)
    picture(tmp_path/'grey.jpg', 2, channels=1, size=(20, 30))
    return tmp_path


def said(capsys: pytest.CaptureFixture, *words: Any) -> str:
    "What a command said, when it went well."
    capsys.readouterr()
    assert main([str(w) for w in words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_list_and_show(shelf: Path, capsys: pytest.CaptureFixture) -> None:
    (shelf/'broken.safetensors').write_text('x')
    out = said(capsys, 'list', '.')
    assert 'cat, dog' in out and '50.0 % (test)' in out and 'pets' in out and out.count('safetensors') == 2
    out = said(capsys, 'show', 'a.safetensors', '--page')
    assert '3x8x8' in out and 'pets' in out and 'README.md' in out and (shelf/'README.md').is_file()


def test_predict(shelf: Path, capsys: pytest.CaptureFixture) -> None:
    "In words and as JSON, options anywhere; as the module itself answers."
    out = said(capsys, 'predict', 'a.safetensors', 'x.png', 'grey.jpg')
    assert 'x.png' in out and 'grey.jpg' in out and out.count('%') == 4
    found = json.loads(said(capsys, 'predict', 'a.safetensors', '--json', 'x.png', '--device', 'cpu'))
    pixels = torch.from_numpy(np.asarray(Image.open('x.png')).transpose(2, 0, 1).copy())[None]
    with torch.no_grad(): expected = load_module('a.safetensors')(pixels)[0].softmax(0)
    assert found[0]['probabilities']['cat'] == pytest.approx(expected[0].item(), abs=1e-5)
    assert found[0]['answer'] == ['cat', 'dog'][int(expected.argmax())] and len(found) == 1


def test_compose_and_export(shelf: Path, capsys: pytest.CaptureFixture) -> None:
    said(capsys, 'compose', 'a.safetensors', 'b.safetensors', '--out', 'both.safetensors')
    both = load_module('both.safetensors')
    assert both.classes == ['cat', 'dog', 'fox'] and len(both.card['composed_of']) == 2
    assert 'both.onnx' in said(capsys, 'export', 'both.safetensors', 'both.onnx')
    with torch.no_grad(): expected = both(byte_images(2, (3, 8, 8)))
    assert torch.allclose(by_onnx(shelf/'both.onnx', byte_images(2, (3, 8, 8))), expected, atol=1e-4)


@pytest.mark.slow
def test_export_int8(shelf: Path, module: SlimModule, data: ImageData, capsys: pytest.CaptureFixture) -> None:
    "Images for the rounding are named like any data; the file says that it is rounded."
    save_module(module, 'digits.safetensors')
    said(capsys, 'export', 'digits.safetensors', 'float.onnx')
    assert 'int8.onnx' in said(capsys, 'export', 'digits.safetensors', 'int8.onnx', '--int8', 'digits')
    assert Path('int8.onnx').stat().st_size < .6 * Path('float.onnx').stat().st_size
    facts = onnxruntime.InferenceSession('int8.onnx').get_modelmeta().custom_metadata_map
    assert facts['weights'] == 'int8' and json.loads(facts['classes']) == CLASSES
    x = torch.cat([(images * 255).round().byte() for images, _ in data.test.subset(CLASSES).pixels()])
    same = by_onnx(Path('float.onnx'), x).argmax(1) == by_onnx(Path('int8.onnx'), x).argmax(1)
    assert same.double().mean() > .9


def test_compose_with_images(shelf: Path, capsys: pytest.CaptureFixture, refused: Callable) -> None:
    "Images of all classes bring modules to one scale; so a class may be in two, and the result is measured."
    save_module(untrained(['dog', 'fox'], shape=(3, 8, 8)), shelf/'c.safetensors')
    for label, name in enumerate(('cat', 'dog', 'fox')):
        for i in range(10): picture(shelf/'images'/name/f'{i}.png', 10 * label + i)
    words = ['compose', 'a.safetensors', 'c.safetensors', '--out', 'both.safetensors']
    assert "class 'dog' is in more than one module" in refused(*words)
    said(capsys, *words, '--data', 'images')
    both = load_module('both.safetensors')
    assert both.classes == ['cat', 'dog', 'fox'] and both.card['accuracy'].keys() == {'test'}
    assert 'scale' in both.description['tensors'] and len(both.card['composed_of']) == 2


def test_fine_tune(shelf: Path, capsys: pytest.CaptureFixture) -> None:
    for label, name in enumerate(('cat', 'dog', 'fox')):
        for i in range(10): picture(shelf/'images'/name/f'{i}.png', 10 * label + i)
    words = ['fine-tune', 'a.safetensors', '--data', 'images', '--out', 'tuned.safetensors', '--epochs', 1]
    out = said(capsys, *words, '--device', 'cpu')
    card = load_module('tuned.safetensors').card
    assert 'kept in tuned.safetensors' in out and card['changes'] == ['fine-tuned for 1 epochs on images']
    assert card['accuracy'].keys() == {'valid', 'test'} and card['data'] == dict(name='pets')


MISTAKES: dict[str, tuple[list[str], str]] = {
    'no folder': (['list', 'no'], 'no folder no'),
    'no modules': (['list', 'empty'], 'empty holds no module'),
    'no module': (['show', 'x.png'], 'x.png is truncated, damaged or no safetensors file'),
    'no file': (['show', 'no.safetensors'], 'no module at no.safetensors'),
    'no image': (['predict', 'a.safetensors', 'a.safetensors'], 'a.safetensors is not a readable image'),
    'missing image': (['predict', 'a.safetensors', 'no.png'], 'no image no.png'),
    'compose no module': (['compose', 'a.safetensors', 'x.png', '--out', 'c.safetensors'],
                          'x.png is truncated, damaged or no safetensors file'),
    'another file': (['export', 'weights.safetensors', 'a.onnx'],
                     'weights.safetensors is not a module written by mwt'),
    'old opset': (['export', 'a.safetensors', 'a.onnx', '--opset', '9'],
                  'opset must be a whole number at least 18'),
    'same class': (['compose', 'a.safetensors', 'a.safetensors', '--out', 'c.safetensors'],
                   "class 'cat' is in"),
    'suffix': (['export', 'a.safetensors', 'a.tflite'], 'path must end in .onnx or .pt2'),
    'no data': (['fine-tune', 'a.safetensors', '--data', 'digitz', '--out', 'c.safetensors'], "'digitz'")}


@pytest.mark.parametrize('words, says', MISTAKES.values(), ids=MISTAKES)
def test_mistakes(words: list[str], says: str, shelf: Path, refused: Callable) -> None:
    (shelf/'empty').mkdir()
    save_tensors(shelf/'weights.safetensors', 'checkpoint', dict(a=torch.zeros(1)), {})
    before = sorted(p.name for p in shelf.iterdir())
    assert says in refused(*words)
    assert sorted(p.name for p in shelf.iterdir()) == before


# Without PyTorch and mwt

SERVE = '''
import json, sys
import numpy, onnxruntime
from PIL import Image
for name in ('torch', 'mwt'):
    try: __import__(name)
    except ImportError: pass
    else: sys.exit(f'{name} is here')
session = onnxruntime.InferenceSession(sys.argv[1])
facts = session.get_modelmeta().custom_metadata_map
_, height, width = json.loads(facts['input_shape'])
image = Image.open(sys.argv[2]).convert('L').resize((width, height))
[logits] = session.run(None, {'images': numpy.asarray(image)[None, None]})
print(json.dumps(dict(classes=json.loads(facts['classes']), logits=logits[0].tolist())))
'''


@pytest.mark.slow
def test_served_in_a_fresh_environment(module: SlimModule, tmp_path: Path) -> None:
    "A new environment with ONNX Runtime, NumPy and Pillow, and nothing of ours."
    path = export(module, tmp_path/'a.onnx')
    picture(tmp_path/'x.png', 0, channels=1)
    subprocess.run([sys.executable, '-m', 'venv', tmp_path/'env'], check=True)
    python = tmp_path/'env'/'bin'/'python'
    cmd = [python, '-m', 'pip', 'install', '--quiet', 'onnxruntime', 'numpy', 'pillow']
    done = subprocess.run(cmd, capture_output=True, text=True)
    if done.returncode: pytest.skip(f'the package index cannot be reached: {done.stderr[-300:]}')
    cmd = [python, '-I', '-c', SERVE, path, tmp_path/'x.png']
    done = subprocess.run(cmd, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    pixels = torch.from_numpy(np.asarray(Image.open(tmp_path/'x.png')).copy())[None, None]
    with torch.no_grad(): expected = module(pixels)[0].tolist()
    assert found['classes'] == CLASSES and found['logits'] == pytest.approx(expected, abs=1e-4)
