"Several processes compute what one would; a lost one ends the run, which can be resumed."
from __future__ import annotations
import functools, json, multiprocessing, os, re, signal, subprocess, sys, time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
import pytest
import torch
from torch import Tensor, nn
from mwt.core.checks import seeded
from mwt.core.files import load_tensors
from mwt.data.batches import ImageData
from mwt.data.sources import image_data
from mwt.measure import confusion
from mwt.methods.base import METHODS
from mwt.methods.losses import cohesion_loss, coupling_loss, mask_losses
from mwt.methods.modular import modularize
from mwt.modules.decompose import decompose
from mwt.modules.parts import load_parts
from mwt.networks import create_model
from mwt.runs.cli import main
from mwt.train.fit import fit
from mwt.train.history import TrainConfig
from mwt.train.trainer import Trainer

# All work is done in processes of its own, also that of the single one: threads and memory are the same
# for all, and the process of the test only compares what they wrote. They are forks of one process, since to
# import PyTorch takes seconds.
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS='1')
PATIENCE = 900              # seconds for a process; a busy machine is slow, a hanging process is found anyway
pytestmark = pytest.mark.timeout(3 * PATIENCE)

PLAIN = 'plain'
KINDS = {PLAIN: 'resnet18'} | {method: 'resnet18' for method in METHODS} | {'mwt': 'simcnn'}
SLOW = 'moda'               # what processes share shows in the others, in MwT's losses over pairs most of all
Evidence = dict[str, dict[str, Tensor]]     # claim -> name -> what was computed


# What each process computes

def network(kind: str) -> nn.Module:
    net = create_model(KINDS[kind], width=.1, in_channels=1, seed=0)
    return net if kind == PLAIN else modularize(net, 10, kind)


def one_step(kind: str, data: ImageData) -> Evidence:
    "A step on one batch: what was logged, learned and changed."
    with seeded(0):
        run = Trainer(network(kind).train(), TrainConfig(), 40)
        logged = run.step(*next(iter(data.train.seed(3))))
    found = dict(log={k: v.double() for k, v in logged.items()})
    found['gradients'] = {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}
    found['weights'] = run.model.state_dict()
    found['confusion'] = dict(counts=confusion(run.model, data.test))
    if kind == PLAIN: return found
    parts = decompose(run.model, data.train, samples=20, show_progress=False)
    found['parts'] = dict(kept=parts.kept.double(), frequency=parts.frequency, cohesion=parts.cohesion)
    return found


def several_steps(kind: str, data: ImageData) -> Evidence:
    "In double precision, where rounding has no time to grow; kernels close on the way."
    with seeded(0):
        run = Trainer(network(kind).double().train(), TrainConfig(), 10)
        batches = ((images.double(), labels) for images, labels in data.train.seed(3))
        run.step(*next(batches))
        gradients = {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}
        for images, labels in islice(batches, 7): run.step(images, labels)
    run.write_back()
    return dict(double=run.model.state_dict(), double_gradients=gradients)


def whole_run(kind: str, data: ImageData) -> Evidence:
    model = network(kind)
    history = fit(model, data, 1, show_progress=False)
    accuracies = dict(accuracies=torch.tensor(history.series('valid_accuracy')))
    return dict(run=model.state_dict() | accuracies)


def pair_losses(rank: int, world: int) -> Evidence:
    "The losses over pairs, and their gradients, for 24 masks of 5 classes, spread over the processes."
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(24, 12, generator=generator)
    labels = torch.randint(5, (24,), generator=generator).chunk(world)[rank]
    mine = masks.chunk(world)[rank].clone().requires_grad_()
    layers = [mine[:, :5], mine[:, 5:]]
    known = mask_losses(layers, labels, 5)
    unknown = cohesion_loss(layers, labels), coupling_loss(layers, labels)
    (known[0] + 2 * known[1] + unknown[0] * unknown[1]).backward()
    names = 'cohesion', 'coupling', 'cohesion again', 'coupling again'
    values = dict(zip(names, (x.detach() for x in (*known, *unknown))))
    return dict(losses=values, gradient=dict(gradient=mine.grad / world))


def few_digits() -> ImageData:
    "Enough for a dozen steps an epoch."
    data = image_data('digits', batch_size=32, device='cpu')
    return ImageData(data.train.sample(384), data.valid.sample(96), data.test.sample(96))


def work(path: str, rank: int, world: int, kinds: list[str]) -> None:
    "In one of the processes, or in the only one: everything, for some kinds of training."
    import torch.distributed as dist
    if world > 1: dist.init_process_group('gloo', f'file://{path}.meeting', rank=rank, world_size=world)
    found = dict(losses=pair_losses(rank, world))
    data = few_digits().shard(rank, world)
    for kind in kinds: found[kind] = one_step(kind, data) | several_steps(kind, data) | whole_run(kind, data)
    torch.save(found, f'{path}.{rank}of{world}')
    if world == 1: return
    dist.barrier()
    dist.destroy_process_group()


def work_together(path: str, *kinds: str) -> int:
    "One process alone, and two together; the number of those that fail."
    forks = multiprocessing.get_context('fork')
    places = [(0, 1), (0, 2), (1, 2)]
    processes = [forks.Process(target=work, args=(path, *place, kinds)) for place in places]
    for process in processes: process.start()
    for process in processes: process.join()
    return sum(process.exitcode != 0 for process in processes)


# Their processes

def start(*cmd: object) -> subprocess.Popen:
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen([sys.executable, *map(str, cmd)], text=True, env=ENVIRONMENT, **streams)


def torchrun(*cmd: object) -> subprocess.Popen:
    return start('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', *cmd)


def finish(process: subprocess.Popen) -> str:
    "What a process said when it was done; it is ended where it takes too long."
    try: said, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.terminate()             # torchrun ends those that it started
        said, _ = process.communicate()
        raise AssertionError(f'not done after {PATIENCE} s:\n{said}') from None
    return said


def finish_well(process: subprocess.Popen) -> str:
    "What a process said that was to succeed."
    said = finish(process)
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope='module')
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Evidence, Evidence, Evidence]]:
    "What one process, the first of two and the second of two computed."
    @functools.cache
    def everything(*kinds: str) -> list[dict[str, Evidence]]:
        path = tmp_path_factory.mktemp('found')/'evidence'
        finish_well(start(__file__, path, *kinds))
        return [torch.load(f'{path}.{who}') for who in ('0of1', '0of2', '1of2')]

    quick = [kind for kind in KINDS if kind != SLOW]
    def find(what: str) -> tuple[Evidence, Evidence, Evidence]:
        return tuple(evidence[what] for evidence in everything(*([SLOW] if what == SLOW else quick)))
    return find

Found = Callable[[str], tuple[Evidence, Evidence, Evidence]]


# Two are as one

def test_losses_over_pairs_are_those_of_the_whole_batch(found: Found) -> None:
    alone, first, second = (evidence['losses'] for evidence in found('losses'))
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], value, atol=1e-6), name


def test_gradients_of_losses_are_those_of_the_whole_batch(found: Found) -> None:
    alone, first, second = (evidence['gradient']['gradient'] for evidence in found('losses'))
    assert torch.allclose(torch.cat([first, second]), alone, atol=1e-6)


every_kind = pytest.mark.parametrize('kind', [
    pytest.param(kind, marks=[pytest.mark.slow] * (kind == SLOW)) for kind in KINDS])

@every_kind
def test_log_of_a_step_is_of_its_own_process(kind: str, found: Found) -> None:
    "Their mean is that of the batch."
    alone, first, second = (evidence['log'] for evidence in found(kind))
    assert alone.keys() == first.keys() == second.keys()
    for name, value in alone.items():
        mean = (first[name] + second[name]) / 2
        assert torch.allclose(mean, value, atol=1e-5), name


# Claim -> how far two processes may be from one; `None`: after a whole run rounding has grown. Gradients in
# single precision are compared by the largest of their layer: already in one process they are 1e-5 of it away
# from those in double precision. That nothing but rounding differs is proved in double precision.
CLAIMS = dict(gradients=3e-5, weights=1e-5, confusion=0., parts=1e-5, double=1e-8, double_gradients=1e-9,
              run=None)

def skip_parts_of_plain(kind: str, claim: str) -> None:
    if kind == PLAIN and claim == 'parts': pytest.skip('a plain network has no parts')


@pytest.mark.parametrize('claim', CLAIMS)
@every_kind
def test_processes_agree_to_the_last_bit(kind: str, claim: str, found: Found) -> None:
    skip_parts_of_plain(kind, claim)
    _, first, second = (evidence[claim] for evidence in found(kind))
    assert first and first.keys() == second.keys()
    for name, value in first.items(): assert torch.equal(value, second[name]), name


@pytest.mark.parametrize('claim', [claim for claim, tolerance in CLAIMS.items() if tolerance is not None])
@every_kind
def test_two_processes_are_as_one(kind: str, claim: str, found: Found) -> None:
    skip_parts_of_plain(kind, claim)
    alone, first, _ = (evidence[claim] for evidence in found(kind))
    assert alone and alone.keys() == first.keys()
    for name, value in alone.items():
        limit = CLAIMS[claim]
        if claim == 'gradients': limit *= max(1., value.abs().max().item())
        assert torch.allclose(first[name].double(), value.double(), atol=limit, rtol=1e-5), name


# The command line

WORDS = ['train', '--data', 'digits', '--model', 'simcnn', '--width', '.1', '--batch-size', '64',
         '--device', 'cpu']
ONE_EPOCH = [*WORDS, '--method', 'mwt', '--lr', '1e-4', '--epochs', '1', '--out']

def mwt(*words: object) -> subprocess.Popen: return torchrun('-m', 'mwt', *words)

def alone(*words: object) -> None: assert main([str(w) for w in words]) == 0


@pytest.fixture(scope='module')
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    "One command in one process and in two: their folders, and what the two said."
    folder = tmp_path_factory.mktemp('runs')
    one, two = folder/'one', folder/'two'
    alone(*ONE_EPOCH, one)
    return one, two, finish_well(mwt(*ONE_EPOCH, two))

Runs = tuple[Path, Path, str]


def test_only_the_first_process_speaks(runs: Runs) -> None:
    said = runs[2]
    assert said.count('best epoch 1, kept in') == said.count('kernels are masked') == 1


def test_one_command_learns_the_same_in_two_processes(runs: Runs) -> None:
    first, second = (json.loads((out/'history.json').read_text())['rows'][0] for out in runs[:2])
    for name in ('loss', 'cohesion_loss', 'coupling_loss'):
        assert second[name] == pytest.approx(first[name], rel=1e-3), name


@pytest.mark.slow
def test_two_processes_decompose_like_one(runs: Runs) -> None:
    out = runs[1]
    said = finish_well(mwt('decompose', '--out', out, '--device', 'cpu'))
    assert said.count('kept in') == 1, said
    shared = load_parts(out/'parts.safetensors')
    alone('decompose', '--out', out, '--device', 'cpu')
    single = load_parts(out/'parts.safetensors')
    assert torch.equal(shared.kept, single.kept)
    assert torch.allclose(shared.frequency, single.frequency)
    assert torch.allclose(shared.cohesion, single.cohesion)
    files = sorted(p.name for p in out.iterdir())
    assert files == ['history.json', 'model.safetensors', 'parts.safetensors', 'run.json']


@pytest.mark.parametrize('command', ['extract', 'evaluate', 'report'])
def test_other_commands_are_for_one_process(command: str, runs: Runs, refused: Callable,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    "As in a process that torchrun has started."
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    assert 'torchrun is for mwt train and mwt decompose' in refused(command, '--out', runs[1])


# A lost process

def child_of_rank(rank: int, parent: int) -> int:
    "The process of a rank, among the children of a process."
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            environ = (folder/'environ').read_bytes().split(b'\0')
            status = (folder/'stat').read_text().rsplit(')', 1)[1].split()
        except OSError: continue
        if f'RANK={rank}'.encode() in environ and int(status[1]) == parent: return int(folder.name)
    raise LookupError(rank)


def epochs_stored(resume: Path) -> bool:
    "Does the file of the run hold an epoch? It is there from the start."
    return resume.exists() and load_tensors(resume, 'run')[1]['done'] > 0


def kill_in_training(lost: int, words: list[object], resume: Path) -> str:
    "Start a run of two processes, and kill one after the first epoch; what was said."
    process, limit = mwt(*words), time.monotonic() + PATIENCE
    while not epochs_stored(resume) and process.poll() is None and time.monotonic() < limit: time.sleep(.01)
    os.kill(child_of_rank(lost, process.pid), signal.SIGKILL)
    said = finish(process)
    assert process.returncode and 'SIGKILL' in said, said
    return said


needs_proc = pytest.mark.skipif(not Path('/proc').is_dir(), reason='finds the process in /proc')

def check_stopped(said: str, lost: int, resume: Path) -> None:
    "The process that is left ends the run, says so, and has stored how far it came."
    stopped = rf'mwt \(process {1 - lost} of 2\): training stopped: (another process was lost|asked to stop)'
    assert re.search(stopped, said), said
    assert 'the same command with --resume goes on from there' in said
    assert 0 < load_tensors(resume, 'run')[1]['done'] < EPOCHS * 20
    assert not (resume.parent/'run.json').exists()


EPOCHS = 6

@needs_proc
def test_loss_of_the_first_process_ends_the_run(tmp_path: Path) -> None:
    resume = tmp_path/'run'/'resume.safetensors'
    said = kill_in_training(0, [*WORDS, '--epochs', EPOCHS, '--out', tmp_path/'run'], resume)
    check_stopped(said, 0, resume)


@pytest.mark.slow
@needs_proc
def test_run_with_a_lost_process_goes_on(tmp_path: Path) -> None:
    out, whole = tmp_path/'run', tmp_path/'whole'
    words = [*WORDS, '--epochs', EPOCHS, '--out']
    said = kill_in_training(1, [*words, out], out/'resume.safetensors')
    check_stopped(said, 1, out/'resume.safetensors')
    finish_well(mwt(*words, out, '--resume'))
    finish_well(mwt(*words, whole))
    assert not (out/'resume.safetensors').exists()
    assert (out/'history.json').read_text() == (whole/'history.json').read_text()
    resumed, expected = (load_tensors(folder/'model.safetensors', 'checkpoint')[0] for folder in (out, whole))
    for name, weight in resumed.items(): assert torch.equal(weight, expected[name]), name


if __name__ == '__main__': sys.exit(work_together(*sys.argv[1:]))
