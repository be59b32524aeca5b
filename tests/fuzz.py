"Calls with random arguments: what is given, what it may lead to, how it is compared."
from __future__ import annotations
import inspect, itertools, re, time, warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import date
from decimal import Decimal
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune
from mwt import all as mwt
from mwt.core.checks import NotEnoughMemory, seeded
from mwt.core.errors import MwtError, TrainingLost
from mwt.methods.base import make_method
from mwt.modules.compose import add_class, drop_class
from mwt.modules.module import as_module

NAMES = ['cat', 'dög ☃', 'owl']
nan, inf = float('nan'), float('inf')

# Expressions, so that a failure can be typed in as it is shown. What no parameter takes, or only few do:
ODD = '''
None | True | False | 'x' | '' | 'zwölf ☃' | '../no/such' | b'x' | '\\0' | 0 | -1 | 1 | 2 | 7
1.5 | 0. | -.5 | 1e308 | 1e-320 | nan | inf | -inf | 1j | np.int64(2) | np.uint8(1)
np.float32(.5) | np.float64(nan)
np.bool_(True) | np.str_('cat') | np.array(2) | np.array([0, 1]) | np.array(['cat', 'owl']) | np.zeros(0)
torch.tensor(2) | torch.tensor(.5) | torch.tensor(nan) | torch.tensor([0, 1]) | torch.zeros(0)
torch.full((2, 1, 8, 8), nan) | torch.empty(2, 1, 8, 8, device='meta') | torch.zeros(2, 1, 8, 8).to_sparse()
torch.zeros(3, dtype=torch.bool) | torch.zeros(2, dtype=torch.complex64) | torch.zeros(40000)
Path('x') | Path('/dev/null/x') | [] | () | {} | set() | [1] | ['cat'] | ['cat', 'cat'] | ['cat', 'rat']
[None] | [[0]] | [nan] | [True] | ('cat', 0) | {'cat'} | {'a': 1} | range(2) | [7] | ['x'] * 5000 | 'x' * 5000
iter([0]) | (i for i in [0, 1]) | iter([]) | len | (lambda *a: None) | object() | int
Fraction(1, 2) | Decimal(1) | ... | slice(2) | date(2026, 1, 1) | nn.Identity() | net()
data() | data().train | model() | module() | parts() | torch
'''
LARGE = '1 | 2 | 7 | 1.5 | np.uint8(1) | np.int64(2)'
HUGE = '2**31 | 10**12 | 2**63 | 10**30 | -10**30 | 10**400'
NETS = '''
dense() | [net(), net()] | nn.Sequential | nn.DataParallel(net()) | torch.jit.script(net()) | net().to('meta')
net_of_nan() | net().requires_grad_(False) | net().half() | net().double()
nn.Sequential() | nn.ModuleList([net()])
nn.Sequential(nn.LazyConv2d(4, 3)) | Two() | Answers(None) | Answers(()) | Answers('x')
Raises() | nn.Conv3d(1, 2, 3)
net(4) | net(channels=3) | twice() | hooked() | net().state_dict()
fx.symbolic_trace(net()) | nn.Conv2d(1, 3, 3)
plain(model()) | module().double() | nn.Sequential(net(), nn.Flatten(0))
pruned() | nn.Sequential(*[net()] * 2)
model('moda') | nn.Module() | nn.Sequential(net(), nn.Softmax(1)) | module().train()
'''

def expressions(text: str) -> list[str]:
    "What stands between bars and line ends."
    return [e.strip() for line in text.strip().splitlines() for e in line.split(' | ') if e.strip()]


# What expressions can name

def net(classes: int = 3, channels: int = 1) -> nn.Module:
    "Two convolutions with norms and a head."
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes))

def residual() -> nn.Module:
    "Six residual blocks, of which two have a projection."
    return mwt.create_model('resnet_cifar', 3, .25, 1, seed=0, depth=14)

@cache
def _residual_module() -> Any:
    found = residual()
    mwt.fit(found, data(), 2, show_progress=False)
    return as_module(found, NAMES, (1, 8, 8), signature=found.signature)

def residual_module() -> Any:
    "A module with residual blocks that has learned a little."
    return deepcopy(_residual_module())

def dense() -> nn.Module: return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def net_of_nan() -> nn.Module:
    found = net()
    with torch.no_grad(): found[3].weight[0] = nan
    return found

def twice() -> nn.Module:
    found = net()
    found[4] = found[1]
    found[3].weight = nn.Parameter(found[3].weight.detach())
    return found

def hooked() -> nn.Module:
    found = net()
    found[0].register_forward_hook(lambda layer, args, out: 2 * out)
    return found

def pruned() -> nn.Module:
    found = net()
    prune.l1_unstructured(found[3], 'weight', .5)
    return found

class Two(nn.Module):
    "Needs two inputs."
    def __init__(self) -> None:
        super().__init__()
        self.net = net()
    def forward(self, x: Tensor, y: Tensor) -> Tensor: return self.net(x + y)

class Answers(nn.Module):
    "Answers with something else than logits."
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.net, self.answer = net(), answer
    def forward(self, x: Tensor) -> Any:
        self.net(x)
        return self.answer

class Raises(Two):
    "Refuses everything."
    def forward(self, x: Tensor) -> Tensor: raise ValueError('no')

@cache
def _tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    "Images of train and test that are easy to tell apart, and their labels."
    labels = [torch.arange(n) % 3 for n in (30, 12)]
    noise = torch.Generator().manual_seed(0)
    images = [(80 * y[:, None, None, None] + torch.randint(60, (len(y), 1, 8, 8), generator=noise)).byte()
              for y in labels]
    return images[0], labels[0], images[1], labels[1]

def split(name: str = 'train', channels: int = 1) -> tuple[Tensor, Tensor]:
    "Images and labels of a split."
    x, y = _tensors()[:2] if name == 'train' else _tensors()[2:]
    return x.expand(-1, channels, -1, -1).clone(), y.clone()

def data(channels: int = 1, **options: Any) -> Any:
    "Tiny images."
    given = dict(classes=NAMES, batch_size=8, device='cpu', augment=None) | options
    return mwt.from_tensors(split('train', channels), split('test', channels), .2, **given)

def loader(name: str = 'train', **options: Any) -> Any:
    "The same as a `DataLoader`."
    x, y = split(name)
    return torch.utils.data.DataLoader(list(zip(x / 255, y.tolist())), batch_size=8, **options)

@cache
def _trained(method: str) -> Any:
    model = mwt.modularize(net(), 3, method)
    mwt.fit(model, data(), 2, show_progress=False)
    return model

def model(method: str = 'composable') -> Any:
    "A modular model that has learned a little."
    return deepcopy(_trained(method))

@cache
def _parts(method: str) -> Any: return mwt.decompose(_trained(method), data().train, show_progress=False)

def parts(method: str = 'composable') -> Any: return deepcopy(_parts(method))

@cache
def _module(classes: tuple[str, ...], fuse: bool) -> Any:
    return mwt.extract(_trained('composable'), _parts('composable'), list(classes), fuse)

def module(*classes: str, fuse: bool = False) -> Any:
    "A module for some classes, the first two where none is named."
    return deepcopy(_module(classes or ('cat', 'dög ☃'), fuse))

def figure_axes() -> Any: return plt.subplots()[1]

def axes_pair() -> Any: return tuple(plt.subplots(1, 2)[1])


# Comparing

def snapshot(value: Any) -> Any:
    "Something to compare a value by, however deep; objects that have no values by their type."
    if isinstance(value, Tensor): return _tensor(value)
    if isinstance(value, np.ndarray): return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, nn.Module): return _network(value)
    if isinstance(value, Mapping): return [(snapshot(k), snapshot(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple, range)): return type(value).__name__, [snapshot(v) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, [(f.name, snapshot(getattr(value, f.name))) for f in fields(value)]
    if isinstance(value, mwt.Table): return re.sub(' at 0x[0-9a-f]+', '', str(value))
    if isinstance(value, (mwt.Batches, mwt.Run)):
        return [(k, snapshot(v)) for k, v in vars(value).items() if k != '_data']
    plain = (str, bytes, int, float, complex, np.generic, Path, set, type(None), Fraction, Decimal,
             torch.device)
    return repr(value) if isinstance(value, plain) else type(value).__name__

def _tensor(t: Tensor) -> Any:
    if isinstance(t, nn.parameter.UninitializedTensorMixin): return type(t).__name__
    about = str(t.dtype), tuple(t.shape), str(t.device), t.requires_grad
    if t.device.type == 'meta': return about
    if t.layout != torch.strided: t = t.to_dense()
    return *about, t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

def _network(net: nn.Module) -> Any:
    tensors = [*net.named_parameters(), *net.named_buffers()]
    layers = [(name, type(m).__name__, m.training) for name, m in net.named_modules()]
    return [(name, snapshot(t)) for name, t in tensors], layers, snapshot(getattr(net, 'signature', None))


# Calls

@dataclass
class Call:
    "A public function or method, good arguments for it, and what must hold of its results."
    name: str                                   # an expression
    check: Callable[..., None]                  # result, **arguments
    good: dict[str, list[str]]                  # parameter -> expressions; a name with * is spread
    odd: dict[str, list[str]]                   # further bad ones
    needed: list[str]                           # parameters that are always given
    fixed: list[str]                            # parameters that are never odd
    small: list[str]                            # parameters that are never large: such a call takes forever
    changes: list[str]                          # parameters that a success may change
    words: str                                  # that an error may use in place of a parameter's name
    loose: bool                                 # may good arguments not fit each other?
    twice: bool                                 # is the result the same each time?
    examples: int                               # to try

CALLS: dict[str, Call] = {}

def call(name: str, /, needed: str = '', fixed: str = 'self', small: str = '', changes: str = '',
         words: str = '', loose: bool = False, twice: bool = True, examples: int = 20,
         odd: Mapping[str, str] = {}, **good: str) -> Callable:
    "Registers what stands below as the check of a call."
    def register(check: Callable[..., None]) -> Callable[..., None]:
        taken = {p: expressions(text) for p, text in good.items()}
        CALLS[name] = Call(name, check, taken, {p: expressions(t) for p, t in odd.items()},
                           ['self', *needed.split()], fixed.split(), small.split(), changes.split(), words,
                           loose, twice, examples)
        return check
    return register

def bad_values(call: Call, p: str, kind: int) -> list[str]:
    "The bad values of a parameter (0), what no parameter takes (1), huge numbers (2)."
    if p.startswith('_spread') or kind == 0 and p in call.odd: return call.odd[p]
    if p in call.small: return [e for e in ODD_VALUES if e not in LARGE_VALUES]
    return HUGE_VALUES if kind == 2 else ODD_VALUES

def draw(call: Call, choose: Callable[[Sequence], Any]) -> tuple[dict[str, str], list[str]]:
    "Arguments as expressions, and which of them may be bad."
    free = [p for p in call.good if p not in call.fixed]
    n = min(choose([0, 1, 1, 1, 2]), len(free))
    odd = []
    while len(odd) < n: odd.append(choose([p for p in free if p not in odd]))
    found = {}
    for p, good in call.good.items():
        if p in odd:
            found[p] = choose(bad_values(call, p, choose([0, 0, 0, 1, 1, 2])))
        elif p in call.needed or choose([True, False]): found[p] = choose(good)
    return found, odd

ODD_VALUES, LARGE_VALUES, HUGE_VALUES = map(expressions, (ODD, LARGE, HUGE))


class Defect(AssertionError):
    "Neither a right result nor an error of ours."


def shown(call: Call, given: Mapping[str, str]) -> str:
    return f"{call.name}({', '.join(f'{p}={e}' for p, e in given.items())})"

def run(function: Callable, values: Mapping[str, Any]) -> Any:
    "Call it; parameters with a star in front are spread."
    loose = [v for p, v in values.items() if p.startswith('_spread')]
    if not loose: return function(**values)
    rest = {p: v for p, v in values.items() if p != 'self' and not p.startswith('_spread')}
    return function(values['self'], *loose[0], **rest)

def binds(function: Callable, values: Mapping[str, Any]) -> bool:
    "Can the call be made at all?"
    values = {p: v for p, v in values.items() if not p.startswith('_spread')}
    try: inspect.signature(function).bind(**values)
    except TypeError: return False
    return True

SECONDS = 20

def try_out(call: Call, given: Mapping[str, str], odd: Sequence[str], scope: Mapping[str, Any]) -> str:
    "Make a call. Raises `Defect` unless it gives a right result or an error of ours."
    scope = SCOPE | scope
    torch.manual_seed(0)
    values = {p: eval(e, scope) for p, e in given.items()}
    function = eval(call.name, scope)
    before = {p: snapshot(v) for p, v in values.items()}
    start, says = time.process_time(), shown(call, given)      # not of others on a busy machine
    error = None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        try: found = run(function, values)
        except MwtError as e: error = e
        except TypeError as e:
            if binds(function, values): raise Defect(f'{says}: bare {type(e).__name__}: {e}') from e
            return 'unbound'
        except Exception as e: raise Defect(f'{says}: bare {type(e).__name__}: {e}') from e
    if (took := time.process_time() - start) > SECONDS: raise Defect(f'{says}: took {took:.0f} s')
    if len(warned) > 3: raise Defect(f'{says}: {len(warned)} warnings: {warned[0].message}')
    may_change = call.changes if error is None or isinstance(error, (TrainingLost, NotEnoughMemory)) else []
    for p, v in values.items():
        if p in may_change or is_iterator(v): continue
        if snapshot(v) != before[p]: raise Defect(f'{says}: {p} was changed')
    if error is not None:
        check_error(call, error, says, {p: values[p] for p in (values if call.loose else odd or values)})
        if not odd and not call.loose: raise Defect(f'{says}: refused: {error}')
        return 'refused'
    if any(map(is_iterator, values.values())): return 'found'        # is used up
    try:
        first = snapshot(found)
        call.check(found, **{p.removeprefix('_spread_'): v for p, v in values.items()})
        if call.twice:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                torch.manual_seed(0)
                again = run(function, {p: eval(e, scope) for p, e in given.items()})
            assert snapshot(again) == first, 'another result the second time'
    except Exception as e: raise Defect(f'{says}: wrong result: {type(e).__name__}: {e}') from e
    return 'found'

def is_iterator(value: Any) -> bool: return hasattr(value, '__next__')

def check_error(call: Call, e: MwtError, says: str, values: Mapping[str, Any]) -> None:
    "An error says what is wrong: by the name of an argument or something of its value; briefly."
    said = str(e)
    if not said.strip(): raise Defect(f'{says}: {type(e).__name__} without a word')
    if re.search(r'\b0x[0-9a-f]{6,}', said): raise Defect(f'{says}: an address in: {said}')
    if len(said) > 2000: raise Defect(f'{says}: {len(said)} characters: {said[:200]}...')
    pieces = [piece for p, v in values.items() for piece in (p.removeprefix('_spread_'), *pieces_of(v))]
    if not any(piece in said for piece in [*pieces, *filter(None, call.words.split('|'))]):
        raise Defect(f'{says}: says nothing of {pieces}: {said}')

def pieces_of(value: Any) -> list[str]:
    "Words by which a value can be recognised."
    found = [type(value).__name__]
    if isinstance(value, Tensor): return [*found, 'tensor', str(value.dtype), str(tuple(value.shape)), 'meta']
    if isinstance(value, (type, ModuleType)) or callable(value): found.append(getattr(value, '__name__', ''))
    if isinstance(value, (list, tuple, set, range)):
        found += [piece for v in itertools.islice(value, 5) for piece in pieces_of(v)[1:]]
    if isinstance(value, (str, bytes, int, float, complex, np.generic, Path, list, tuple, dict, type(None))):
        found += [repr(value)[:40], str(value)[:40]]
    if isinstance(value, bytes): found.append(value.decode())
    return [f for f in found if f]

SCOPE = dict(globals()) | {name: getattr(mwt, name) for name in mwt.__all__}
