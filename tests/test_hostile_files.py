"What a stranger could write: nothing is run, nothing large is allocated, all of it is refused by name."
from __future__ import annotations
import json, struct, subprocess, sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
import pytest
import torch
from safetensors.torch import save_file
from test_file_fuzz import KINDS, Reader, fit_of, network, sound
from torch import Tensor, fx, nn
from mwt.channels.operations import FUNCTIONS, LAYERS, METHOD_NAMES, NAMED
from mwt.core.errors import MwtError
from mwt.core.files import LARGEST_TEXT, _checksum_1, load_tensors, save_tensors, write_json
from mwt.core.locks import LOCK, owner
from mwt.methods.modular import modularize
from mwt.modules.module import SlimModule, load_module
from mwt.modules.parts import load_parts
from mwt.train.checkpoint import load_checkpoint

Change = Callable[[dict[str, Any]], None]
X, N = {'step': 'x'}, 10**9

def toy() -> dict[str, Any]:
    "A description of a convolution and a head."
    conv = dict(type='Conv2d', in_channels=1, out_channels=2, kernel_size=3)
    head = dict(type='Linear', in_features=72, out_features=2)
    steps = [('x', 'input', '', []), ('y', 'layer', 'conv', [X]),
             ('flat', 'method', 'flatten', [{'step': 'y'}, 1]),
             ('z', 'layer', 'head', [{'step': 'flat'}]), ('output', 'output', '', [{'step': 'z'}])]
    named = [dict(name=n, kind=k, target=t, args=a, kwargs={}) for n, k, t, a in steps]
    return dict(classes=['a', 'b'], input_shape=[1, 8, 8], layers=dict(conv=conv, head=head), tensors={},
                steps=named, pixels=False)


def weights() -> dict[str, Tensor]:
    "Those of the toy."
    return {k: v for k, v in SlimModule(toy()).state_dict().items() if k != '_extra_state'}


def with_steps(*steps: tuple[str, str, list, dict]) -> Change:
    "Steps (kind, target, args, kwargs) after the input, named s0, s1, ..."
    made = [dict(name=f's{i}', kind=k, target=t, args=a, kwargs=w) for i, (k, t, a, w) in enumerate(steps)]
    def change(about: dict[str, Any]) -> None: about['steps'][1:1] = made
    return change


def call(target: str, *args: Any, **kwargs: Any) -> Change:
    "A function, or a method of the images where the name has no dot."
    return with_steps(('function' if '.' in target else 'method', target, list(args), kwargs))


def layer(kind: str, *more: tuple[str, str, list, dict], **arguments: Any) -> Change:
    "A layer that takes the images."
    def change(about: dict[str, Any]) -> None:
        about['layers']['more'] = dict(type=kind, **arguments)
        with_steps(('layer', 'more', [X], {}), *more)(about)
    return change


def many(n: int) -> Change:
    def change(about: dict[str, Any]) -> None: with_steps(*[('method', 'relu', [X], {})] * n)(about)
    return change


def tower(about: dict[str, Any]) -> None:
    "Lists of lists, 2**40 numbers with 40 steps."
    step, steps = 0, [('function', 'operator.add', [[1, 1], []], {})]
    for i in range(40):
        s = {'step': f's{i}'}
        steps.append(('function', 'operator.getitem', [[[s, s]], 0], {}))
    with_steps(*steps, ('function', 'torch.as_tensor', [{'step': 's40'}], {}))(about)


def doubled(about: dict[str, Any]) -> None:
    "A list that is added to itself 40 times."
    steps = [('function', 'operator.add', [[1], [1]], {})]
    for i in range(40): steps.append(('function', 'operator.add', [{'step': f's{i}'}] * 2, {}))
    with_steps(*steps)(about)


def product(about: dict[str, Any]) -> None:
    "A number with 2**40 digits."
    steps = [('function', 'operator.add', [10**18, 0], {})]
    for i in range(40): steps.append(('function', 'math.prod', [[{'step': f's{i}'}] * 50], {}))
    with_steps(*steps)(about)


def axes(about: dict[str, Any]) -> None:
    steps = [('method', 'unsqueeze', [X, 0], {})]
    for i in range(2000): steps.append(('method', 'unsqueeze', [{'step': f's{i}'}, 0], {}))
    with_steps(*steps)(about)


def path(name: str) -> Change:
    "The convolution under another name."
    def change(about: dict[str, Any]) -> None:
        about['layers'][name] = about['layers'].pop('conv')
        about['steps'][1]['target'] = name
    return change


def holders(about: dict[str, Any]) -> None:
    "Few layers inside of many others."
    for i in range(4000):
        name = '.'.join([f'a{i}', *'abcdefghijklmnopqrstuvwxyzABC'])
        about['layers'][name] = dict(type='ReLU')
        step = dict(name=f's{i}', kind='layer', target=name, args=[X], kwargs={})
        about['steps'].insert(1, step)


def change(*keys: Any, to: Any) -> Change:
    def apply(about: dict[str, Any]) -> None:
        for key in keys[:-1]: about = about[key]
        about[keys[-1]] = to
    return apply


CPU = dict(device='cpu')
S0 = {'step': 's0'}
HUGE: dict[str, Change] = {
    'zeros': call('torch.zeros', [N, N]),
    'zeros on the CPU': call('torch.zeros', [10**9], **CPU),
    'ones, a method': call('new_ones', X, [10**10]),
    'full': call('torch.full', [10**10], 1.),
    'arange': call('torch.arange', 10**10),
    'arange on the CPU': call('torch.arange', 10**9, **CPU),
    'eye': call('torch.eye', 10**5),
    'linspace on the CPU': call('torch.linspace', 0, 1, 10**9, **CPU),
    'tril_indices on the CPU': call('torch.tril_indices', 20_000, 20_000, **CPU),
    'normal': call('torch.normal', 0., 1., [10**10]),
    'normal on the CPU': call('torch.normal', 0., 1., [10**9], **CPU),
    'combinations': with_steps(('method', 'flatten', [X], {}),
                               ('function', 'torch.combinations', [S0, 10**9], {})),
    'words nobody reads': change('more', to=[[]] * 2_000_000),
    'classes': change('classes', to=[str(i) for i in range(10**6)]),
    'expand': call('expand', X, 2, 10**9, 8, 8),
    'repeat': call('repeat', X, 1, 10**9, 1, 1),
    'tile': call('torch.tile', X, [10**9, 1, 1, 1]),
    'repeat_interleave': call('torch.repeat_interleave', X, 10**9, 1),
    'pad': call('F.pad', X, [10**6] * 4),
    'interpolate': call('F.interpolate', X, size=[10**6, 10**6]),
    'interpolate by a factor': call('F.interpolate', X, scale_factor=1e6),
    'one_hot': with_steps(('method', 'long', [X], {}), ('function', 'F.one_hot', [S0, 10**12], {})),
    'product of all pairs': with_steps(('method', 'flatten', [X], {}), ('method', 'repeat', [S0, 1000], {}),
                                       ('function', 'torch.outer', [{'step': 's1'}] * 2, {})),
    'cartesian': with_steps(('method', 'flatten', [X], {}),
                            ('function', 'torch.cartesian_prod', [S0] * 6, {})),
    'fold': call('F.fold', X, [10**6, 10**6], 1),
    'adaptive pool': call('F.adaptive_avg_pool2d', X, [10**6, 10**6]),
    'ConvTranspose2d': layer('ConvTranspose2d', in_channels=1, out_channels=1, kernel_size=1, stride=10**6,
                             output_padding=10**6 - 1),
    'Upsample': layer('Upsample', scale_factor=1e6),
    'ZeroPad2d': layer('ZeroPad2d', padding=10**6),
    'Linear on the CPU': layer('Linear', in_features=8, out_features=10**9, **CPU),
    'Embedding on the CPU': layer('Embedding', num_embeddings=10**9, embedding_dim=1, **CPU),
    'Linear': layer('Linear', in_features=8, out_features=10**12),
    'LSTM of many layers': layer('LSTM', input_size=8, hidden_size=1, num_layers=10**6),
    'pieces': with_steps(('method', 'expand', [X, 2, 10**6, 8, 8], {}), ('method', 'split', [S0, 1, 1], {})),
    'unbound': with_steps(('method', 'expand', [X, 2, 10**6, 8, 8], {}), ('method', 'unbind', [S0, 1], {})),
    'chunks': with_steps(('method', 'expand', [X, 2, 10**6, 8, 8], {}),
                         ('method', 'chunk', [S0, 10**6, 1], {})),
    'slices': with_steps(('method', 'expand', [X, 2, 10**6, 8, 8], {}),
                         ('method', 'tensor_split', [S0, 10**9, 1], {})),
    'list': call('operator.mul', [0], 10**9),
    'list in place': call('operator.imul', [0], 10**9),
    'list of a tensor': with_steps(('method', 'expand', [X, 2, 10**6, 8, 8], {}),
                                   ('method', 'transpose', [S0, 0, 1], {}),
                                   ('function', 'operator.iadd', [[], {'step': 's1'}], {})),
    'number by a power': call('operator.pow', 10, 10**9),
    'number by a shift': call('operator.lshift', 1, 10**11),
    'number of many products': product,
    'text': call('operator.mul', 'a', 10**9),
    'text of a format': call('operator.mod', '%1000000000d', 1),
    'doubled list': doubled,
    'tower': tower,
    'axes': axes,
    'a million steps': many(200_000),
    'holders': holders,
    'a path of many names': path('.'.join(['a'] * 10_000)),
    'images': change('input_shape', to=[1, 10**6, 10**6])}

LOADER = '''
import json, resource, sys
import torch
from mwt.core.errors import MwtError
from mwt.modules.module import SlimModule, load_module
def status(name): return int(open('/proc/self/status').read().split(name)[1].split()[0]) << 10
folder, room = sys.argv[1], int(sys.argv[2])
load_module(f'{folder}/sound.safetensors')
limit = status('VmSize:') + room
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for line in open(f'{folder}/names'):
    before = status('VmHWM:')
    try: load_module(f'{folder}/{line.strip()}.safetensors')
    except MwtError as e: said = str(e)
    except BaseException as e: said = f'CRASH {type(e).__name__} {e}'
    else: said = 'ACCEPTED'
    print(json.dumps([line.strip(), said[:400], status('VmHWM:') - before]), flush=True)
'''


def load_all(folder: Path, room: int) -> list[list]:
    "Load the files of a folder in a process that may take so many bytes more: name, error and rise of each."
    command = [sys.executable, '-c', LOADER, str(folder), str(room)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope='module')
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, tuple], Path]:
    "What loading each huge file says, and how much the peak of memory rose; in a process of little room."
    folder = tmp_path_factory.mktemp('huge')
    save_tensors(folder/'sound.safetensors', 'module', weights(), toy())
    names = {f'{i}': name for i, name in enumerate(HUGE)}
    for i, name in names.items():
        about = toy()
        HUGE[name](about)
        save_tensors(folder/f'{i}.safetensors', 'module', weights(), about)
    (folder/'names').write_text('\n'.join(names))
    found = load_all(folder, room=512 << 20)
    sizes = {i: (folder/f'{i}.safetensors').stat().st_size for i in names}
    return {names[i]: (said, rise, sizes[i]) for i, said, rise in found}, folder


@pytest.mark.parametrize('name', HUGE)
def test_nothing_huge_is_allocated(name: str, loaded: tuple) -> None:
    "Refused by a check, not by the operating system; the peak rises with the size of the file alone."
    said, rise, size = loaded[0][name]
    assert f'{loaded[1]}' in said and 'does not describe a module' in said, said
    assert 'memory' not in said and 'alloc' not in said, said
    assert rise < (48 << 20) + 40 * size, f'{rise:,} bytes for a file of {size:,}'


def test_memory_is_for_the_call_to_take(tmp_path: Path) -> None:
    "What is large, but not absurd, is loaded without being allocated: 512 MB here, at each call."
    about = toy()
    with_steps(('method', 'expand', [X, 2, 10**6, 8, 8], {}),
               ('function', 'torch.zeros_like', [S0], CPU))(about)
    save_tensors(tmp_path/'large.safetensors', 'module', weights(), about)
    save_tensors(tmp_path/'sound.safetensors', 'module', weights(), toy())
    (tmp_path/'names').write_text('large')
    [[_, said, rise]] = load_all(tmp_path, room=256 << 20)
    assert said == 'ACCEPTED' and rise < 32 << 20


# Names that end the text they stand in

BOMB = 'open("crater", "w")'
CODE = f'exec(bytes({list(BOMB.encode())}))'
NAMES = ('a"), print("b', f'a", None) or {CODE} or str("b', "a'", 'a\\', 'a\nb', 'a\0', '', '__class__',
         '__dict__', 'forward', '_modules', 'a..b', '.', '../../etc/passwd', '/etc/passwd"', '_parameters',
         'training', 'x' * 5000)


def test_the_bomb_is_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "PyTorch writes the path of a layer into Python code, and runs that."
    monkeypatch.chdir(tmp_path)
    root = nn.Module()
    root.add_module(NAMES[1], nn.ReLU())
    graph = fx.Graph()
    graph.output(graph.call_module(NAMES[1], (graph.placeholder('x'),)))
    with pytest.raises(TypeError): fx.GraphModule(root, graph)(torch.zeros(1))
    assert (tmp_path/'crater').exists()


def names(name: str) -> dict[str, Change]:
    "A description in which something has this name."
    def step(about: dict[str, Any]) -> None:
        about['steps'][1]['name'] = name
        about['steps'][2]['args'][0] = {'step': name}
    def argument(about: dict[str, Any]) -> None: about['steps'][2]['kwargs'] = {name: 1}
    def tensor(about: dict[str, Any]) -> None:
        about['tensors'][name] = dict(shape=[2], parameter=False)
        with_steps(('tensor', name, [], {}))(about)
    return dict(layer=path(name), step=step, argument=argument, tensor=tensor)


@pytest.mark.parametrize('name', NAMES, ids=lambda n: repr(n)[:40])
def test_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Refused, before anything makes code of them."
    monkeypatch.chdir(tmp_path)
    for what, forge in names(name).items():
        about = toy()
        forge(about)
        tensors = {k.replace('conv', name) if what == 'layer' else k: v for k, v in weights().items()}
        if what == 'tensor': tensors[name] = torch.zeros(2)
        file = save_tensors(tmp_path/'forged.safetensors', 'module', tensors, about)
        if what == 'step' and name.isidentifier():      # a key of a dictionary, nothing else
            load_module(file)
            continue
        with pytest.raises(MwtError) as e:
            modularize(load_module(file), 2, example_input=torch.zeros(2, 1, 8, 8))
        assert str(file) in str(e.value), what
    assert not (tmp_path/'crater').exists()


# Writes

def tensor_step(name: str) -> tuple[str, str, list, dict]: return 'tensor', name, [], {}


WRITES: dict[str, Change] = {
    'images': call('zero_', X),
    'a view of the images': with_steps(('method', 'flatten', [X], {}), ('method', 'mul_', [S0, 0], {})),
    'images, detached': with_steps(('method', 'detach', [X], {}), ('method', 'fill_', [S0, 1], {})),
    'images by an operator': call('operator.imul', X, 2),
    'images by out=': with_steps(('function', 'torch.abs', [X], dict(out=X))),
    'images in place by a layer': layer('ReLU', inplace=True),
    'images in place by a function': call('F.relu', X, inplace=True),
    'images, their axes': call('swapaxes_', X, 2, 3),
    'a weight': with_steps(tensor_step('conv.weight'), ('method', 'mul_', [S0, 0], {})),
    'a weight by out=': with_steps(tensor_step('conv.weight'),
                                   ('function', 'torch.zeros', [[2, 1, 3, 3]], dict(out=S0))),
    'a weight, its shape': with_steps(tensor_step('conv.bias'), ('method', 'unsqueeze_', [S0, 0], {})),
    'a weight, its gradient': with_steps(tensor_step('conv.bias'), ('method', 'detach_', [S0], {})),
    'a weight by copying': with_steps(tensor_step('conv.bias'), ('method', 'copy_', [S0, 1.], {})),
    'statistics': with_steps(tensor_step('mean'), tensor_step('var'),
                             ('function', 'F.batch_norm', [X, S0, {'step': 's1'}], dict(training=True))),
    'random numbers': with_steps(tensor_step('conv.bias'), ('method', 'normal_', [S0], {}))}


@pytest.mark.parametrize('forge', WRITES.values(), ids=WRITES)
def test_a_module_only_reads(forge: Change, tmp_path: Path) -> None:
    "Its images belong to others, and so do parameters once modules stand side by side."
    about = toy()
    tensors = weights() | dict(mean=torch.zeros(1), var=torch.ones(1))
    for i, name in enumerate(('conv.weight', 'conv.bias', 'mean', 'var')):
        about['tensors'][name] = dict(shape=list(tensors[name].shape), parameter='conv' in name)
        about['steps'].insert(1, dict(name=f'r{i}', kind='tensor', target=name, args=[], kwargs={}))
    file = save_tensors(tmp_path/'reads.safetensors', 'module', tensors, about)
    load_module(file)
    forge(about)
    file = save_tensors(tmp_path/'writes.safetensors', 'module', tensors, about)
    with pytest.raises(MwtError, match='writes.safetensors .* it writes into its images or its own weights'):
        load_module(file)


# What operations and layers may do

def test_nothing_in_the_tables_believes_its_places() -> None:
    "These operators read outside of their tensors where an index is wrong, or are of sparse tensors."
    assert not [n for n in FUNCTIONS if n.rpartition('.')[2] in NAMED] and not METHOD_NAMES & set(NAMED)
    assert {'ctc_loss', 'segment_reduce'} <= set(NAMED)
    assert all(callable(getattr(Tensor, name)) for name in METHOD_NAMES), 'a property is no method'


WRONG_PLACES = {
    'embedding': 'F.embedding(far, x)', 'embedding_bag': 'F.embedding_bag(far, x, far)',
    'take': 'torch.take(x, far)',
    'gather': 'torch.gather(x, 0, far[:, None])', 'scatter': 'torch.scatter(x, 0, far[:, None], 1.)',
    'index_add': 'torch.index_add(x, 0, far, x[:1])', 'index_copy': 'torch.index_copy(x, 0, far, x[:1])',
    'index_fill': 'torch.index_fill(x, 0, far, 1.)', 'index_select': 'torch.index_select(x, 0, far)',
    'index_put': 'torch.index_put(x, (far,), x[:1])',
    'index_reduce': 'torch.index_reduce(x, 0, far, x[:1], "amax")',
    'put': 'torch.put(x, far, x[0, :1])', 'getitem': 'x[far]', 'nll_loss': 'F.nll_loss(x[:1], far)',
    'max_unpool2d': 'F.max_unpool2d(x[None], far.expand(1, *x.shape), 2)',
    'searchsorted': 'torch.searchsorted(x[0], x[0], sorter=far.expand(x.shape[1]))',
    'lu_solve': 'torch.linalg.lu_solve(x, far.int().expand(4), x)',
    'ldl_solve': 'torch.linalg.ldl_solve(x, far.int().expand(4), x)',
    'lu_unpack': 'torch.lu_unpack(x, far.int().expand(4))', 'one_hot': 'F.one_hot(far, 3)',
    'multi_margin_loss': 'F.multi_margin_loss(x[:1], far)',
    'scatter_reduce': 'torch.scatter_reduce(x, 0, far[:, None], x, "sum")'}


@pytest.mark.parametrize('far', [10**9, -10**9])
@pytest.mark.parametrize('code', WRONG_PLACES.values(), ids=WRONG_PLACES)
def test_operators_that_are_told_places_check_them(code: str, far: int) -> None:
    "Those that are in the tables; a PyTorch that no longer does would have to be kept out."
    values = dict(x=torch.ones(4, 4), far=torch.tensor([far]), torch=torch, F=torch.nn.functional)
    with pytest.raises((RuntimeError, IndexError)): eval(code, values)


@pytest.mark.parametrize('kind', sorted(LAYERS))
def test_no_layer_is_made_elsewhere(kind: str, tmp_path: Path) -> None:
    about = toy()
    layer(kind, device='cpu')(about)
    file = save_tensors(tmp_path/'forged.safetensors', 'module', weights(), about)
    with pytest.raises(MwtError, match="more: a layer of a file has no argument 'device'"): load_module(file)


# Containers

def safetensors(header: Any, data: bytes = b'', length: int | None = None) -> bytes:
    words = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(words) if length is None else length) + words + data


def entry(shape: list, start: int, end: int, dtype: str = 'F32') -> dict[str, Any]:
    return dict(dtype=dtype, shape=shape, data_offsets=[start, end])


ONE = json.dumps(entry([1], 0, 4)).encode()
BROKEN: dict[str, bytes] = {
    'a header of 2**63 bytes': safetensors(b'{}', length=2**63),
    'a header that is longer than the file': safetensors(b'{}', length=90_000_000),
    'a header of 33 MB': safetensors(b' ' * (LARGEST_TEXT + 1)),
    'a header that ends early': safetensors(dict(a=entry([1], 0, 4)), b'1234', length=10),
    'no header': safetensors(b''),
    'brackets': safetensors(b'{"a":' + b'[' * 100_000),
    'shapes beyond all numbers': safetensors(dict(a=entry([2**62, 8], 0, 0))),
    'a huge shape with little data': safetensors(dict(a=entry([10**12], 0, 4)), b'1234'),
    'a huge shape without data': safetensors(dict(a=entry([2**62, 0], 0, 0))),
    'a negative shape': safetensors(dict(a=entry([-1], 0, 4)), b'1234'),
    'many axes': safetensors(dict(a=entry([1] * 50_000, 0, 4)), b'1234'),
    'overlapping tensors': safetensors(dict(a=entry([1], 0, 4), b=entry([1], 0, 4)), b'1234'),
    'a hole between tensors': safetensors(dict(a=entry([1], 0, 4), b=entry([1], 8, 12)), b'1' * 12),
    'a tensor that ends before it begins': safetensors(dict(a=entry([1], 8, 4)), b'1' * 12),
    'numbers that are none': safetensors(dict(a=entry([1], 0, 8, 'C64')), b'1' * 8),
    'numbers of four bits': safetensors(dict(a=entry([2], 0, 1, 'F4')), b'1'),
    'numbers of no type': safetensors(dict(a=entry([2], 0, 1, 'os.system')), b'1'),
    'the same name twice': safetensors(b'{"a":%s,"a":%s}' % (ONE, ONE), b'1234'),
    'a name of half a letter': safetensors(b'{"\\ud800":%s}' % ONE, b'1234'),
    'many empty tensors': safetensors({f'{i}': entry([0], 0, 0) for i in range(50_000)})}


@pytest.mark.parametrize('content', BROKEN.values(), ids=BROKEN)
def test_broken_containers(content: bytes, tmp_path: Path) -> None:
    "For each kind of file with tensors."
    file, net = tmp_path/'broken.safetensors', network(0)
    loads = dict(module=load_module, parts=load_parts, checkpoint=lambda p: load_checkpoint(net, p),
                 run=lambda p: fit_of(net, p).resume_run_())
    for kind, load in loads.items():
        file.write_bytes(content)
        with pytest.raises(MwtError) as e: load(file)
        assert str(file) in str(e.value)
        for about in ('[' * 100_000, '{"a":' * 100_000, '[' * 500 + ']' * 500, '9' * 5000, 'null', ''):
            words = dict(format=f'mwt-{kind}', about=about, sha256=_checksum_1({}, about))
            save_file({}, file, words)
            with pytest.raises(MwtError, match='description') as e: load(file)
            assert str(file) in str(e.value)


LOCKS = ('[' * 100_000, '{"a":' * 100_000, '9' * 5000, '[9e999]', '{"process": []}')

@pytest.mark.parametrize('text', LOCKS, ids=lambda t: t[:9])
def test_a_lock_that_says_nonsense(text: str, tmp_path: Path) -> None:
    (tmp_path/LOCK).write_text(text)
    assert isinstance(owner(tmp_path), dict)


# Whole files that say nonsense, with a right checksum

def put(*keys: Any, to: Any) -> Callable[[dict, dict], None]:
    return lambda about, tensors: change(*keys, to=to)(about)


def tensor(name: str, to: Callable[[Tensor], Tensor] | None) -> Callable[[dict, dict], None]:
    "Another tensor under this name, or none."
    def apply(about: dict, tensors: dict) -> None:
        if to is None: del tensors[name]
        else: tensors[name] = to(tensors.get(name, torch.zeros(2)))
    return apply


RUN_WEIGHT, CHECK_WEIGHT = ('model.net.head.weight', 'net.head.weight')
SIGNATURES = (3, [], dict(classes=3), dict(classes=['a'], shape=[1]), dict(classes=['a'], mean=[0], std=None),
              dict(classes=['a'], shape=[1, 8, 8], mean=[0], std=[0]), dict(classes=['a'], code='print()'))
SENSELESS: dict[str, dict[str, Callable[[dict, dict], None]]] = dict(
    checkpoint={
        **{f'signature {s}': put('signature', to=s) for s in SIGNATURES},
        'classes': put('classes', to=3), 'more': tensor('more', torch.clone),
        'less': tensor(CHECK_WEIGHT, None), 'shape': tensor(CHECK_WEIGHT, lambda t: t[:, 1:]),
        **{f'{d}': tensor(CHECK_WEIGHT, lambda t, d=d: t.to(d))
           for d in (torch.complex64, torch.int64, torch.bool)}},
    run={
        **{f'without {key}': (lambda about, tensors, key=key: about.pop(key))
           for key in ('settings', 'history', 'done')},
        **{f'{key} {value}': put(key, to=value)
           for key in ('settings', 'history') for value in (None, 3, [], 'x')},
        **{f'done {value}': put('done', to=value) for value in (None, -1, .5, 'x', True, 10**400)},
        'rows': put('history', 'rows', to=[3]), 'best': put('history', 'best_epoch', to=7),
        'loss': put('history', 'rows', 0, 'loss', to='print()'),
        'epoch': put('history', 'rows', 0, 'epoch', to=2),
        'method': put('settings', 'method', to=dict(method='mwt', alpha='x')),
        'methods': put('settings', 'method', to=dict(method='mwt', code='print()')),
        'no random numbers': tensor('random.cpu', None),
        'few random numbers': tensor('random.cpu', lambda t: t[1:]),
        'other random numbers': tensor('random.cpu', lambda t: t.int()),
        'impossible random numbers': tensor('random.cpu', lambda t: torch.full_like(t, 255)),
        'momentum of nothing': tensor('momentum.nothing', torch.clone),
        'momentum of another shape': tensor('momentum.net.head.bias', lambda t: torch.zeros(7)),
        'momentum of words': tensor('momentum.net.head.bias', lambda t: torch.zeros(3).cfloat()),
        'no best': tensor('best.net.head.weight', None), 'model': tensor(RUN_WEIGHT, lambda t: t.cfloat()),
        'less': tensor(RUN_WEIGHT, None)},
    parts={
        **{f'signature {s}': put('signature', to=s) for s in SIGNATURES},
        **{f'{key} {value}': put(key, to=value)
           for key in ('classes', 'sizes', 'samples') for value in (None, -3, 'abc', [3])},
        'sizes': put('sizes', to=dict(a=-1, b=4)), 'half': put('sizes', to=dict(a=1.5, b=1.5)),
        **{name: tensor(name, lambda t: t.cfloat()) for name in ('frequency', 'thresholds', 'cohesion')}})


@pytest.mark.parametrize('kind, fault', [(k, f) for k, faults in SENSELESS.items() for f in faults])
def test_senseless_words(kind: str, fault: str, sound: Path, tmp_path: Path) -> None:
    "Refused before anything is changed."
    reader = Reader(kind, tmp_path)
    tensors, about = load_tensors(sound/KINDS[kind], kind)
    SENSELESS[kind][fault](about, tensors)
    save_tensors(reader.path, kind, tensors, about)
    reader.refuses(reader.path.read_bytes(), fault)


JSON_FAULTS: dict[str, dict[str, tuple]] = dict(
    settings={f'{keys} {value!r:.20}': (*keys, value) for keys, values in {
        ('data',): (None, 3, []), ('data', 'source'): (None, 3), ('data', 'code'): (1,),
        ('model',): (3, None), ('width',): ('x', -1, 1e9), ('epochs',): (0, 'x', 1.5),
        ('method',): (3, 'mwt', dict(method='os.system'), dict(method='mwt', alpha='x')),
        ('seed',): (-1, None), ('classes',): (3, [3]), ('channels',): (0, 10**9),
        ('config',): (3, dict(lr=-1), dict(code='print()')), ('environment',): (None, [3])
    }.items() for value in values},
    history={f'{keys} {value!r:.20}': (*keys, value) for keys, values in {
        ('rows',): (None, 3, [3], [[]]), ('rows', 0, 'loss'): ('x', None, []), ('rows', 0, 'epoch'): (2, 'x'),
        ('best_epoch',): (-1, 2, 'x', None)}.items() for value in values},
    metrics={f'{keys} {value!r:.20}': (*keys, value) for keys, values in {
        ('modularity',): (None, 3, {}), ('modularity', 'krr'): ('x', None),
        ('networks',): (None, 3, [3], [{}]),
        ('networks', 0, 'params'): ('x', None), ('networks', 0, 'network'): (3,),
        ('networks', 0, 'classes'): ('ab', [3])
    }.items() for value in values})


@pytest.mark.parametrize('kind, fault', [(k, f) for k, faults in JSON_FAULTS.items() for f in faults])
def test_senseless_json(kind: str, fault: str, sound: Path, tmp_path: Path) -> None:
    reader = Reader(kind, tmp_path)
    about = json.loads((sound/KINDS[kind]).read_bytes())
    *keys, value = JSON_FAULTS[kind][fault]
    change(*keys, to=value)(about)
    about.pop('format')
    write_json(reader.path, about)
    reader.refuses(reader.path.read_bytes(), fault)
