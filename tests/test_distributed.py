"Several processes compute what one process with the whole batch computes; a lost one ends the run, which can be taken up."
from __future__ import annotations
import json, os, re, signal, subprocess, sys, time
from itertools import islice
from pathlib import Path
import pytest
import torch
from torch import Tensor
from mwt.methods.modular import modularize
from mwt.core.files import load_tensors
from mwt.core.checks import seeded
from mwt.data.batches import ImageData
from mwt.data.sources import image_data
from mwt.runs.cli import main
from mwt.modules.decompose import decompose
from mwt.modules.parts import load_parts
from mwt.measure import confusion
from mwt.networks import create_model
from mwt.train.history import TrainConfig
from mwt.train.trainer import Trainer
from mwt.train.fit import fit
from mwt.methods.losses import cohesion_loss, coupling_loss, mask_losses

ALONE = dict(os.environ, OMP_NUM_THREADS='1')
NETWORKS = {'plain': ('resnet18', None), 'composable': ('resnet18', 'composable'), 'mwt': ('simcnn', 'mwt')}


def one_step(kind: str, share: tuple[int, int] = (0, 1)) -> dict[str, Tensor]:
    "Losses, gradients, statistics and kernels after a step on one batch, then after a short run."
    name, method = NETWORKS[kind]
    data = image_data('digits', batch_size=32, device='cpu').shard(*share)
    def model() -> torch.nn.Module:
        net = create_model(name, width=.1, in_channels=1, seed=0)
        return modularize(net, 10, method) if method else net
    with seeded(0):
        run = Trainer(model().train(), TrainConfig(), 40)
        parts = run.step(*next(iter(data.train.seed(3))))
    found = {f'loss {k}': v.double() for k, v in parts.items()}
    found |= {f'gradient {n}': p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None} | {f'state {n}': v.clone() for n, v in run.model.state_dict().items()}
    trained = model()
    found |= {'confusion': confusion(run.model, data.test)}
    kinds = decompose(run.model, data.train, samples=20, show_progress=False) if method else None
    with seeded(0):                                         # in double precision, where rounding has no time to grow
        run = Trainer(model().double().train(), TrainConfig(), 10)
        for images, labels in islice(data.train.seed(3), 8): run.step(images.double(), labels)
    run.write_back()
    found |= {f'later {n}': v.clone() for n, v in run.model.state_dict().items()}
    history = fit(trained, data, 2, show_progress=False)
    found |= {f'trained {n}': v for n, v in trained.state_dict().items()} | {'accuracies': torch.tensor([r['valid_accuracy'] for r in history.rows])}
    if method is None: return found
    return found | {'modules': kinds.modules.double(), 'frequency': kinds.frequency, 'cohesion': kinds.cohesion}


def losses(share: tuple[int, int] = (0, 1)) -> dict[str, Tensor]:
    "The losses over pairs, and their gradients, for masks that are spread over the processes; here with 24 samples of 5 classes."
    generator = torch.Generator().manual_seed(0)
    masks, labels = torch.rand(24, 12, generator=generator), torch.randint(5, (24,), generator=generator)
    mine = masks.chunk(share[1])[share[0]].clone().requires_grad_()
    own = labels.chunk(share[1])[share[0]]
    known, unknown = mask_losses([mine[:, :5], mine[:, 5:]], own, 5), (cohesion_loss([mine[:, :5], mine[:, 5:]], own), coupling_loss([mine[:, :5], mine[:, 5:]], own))
    (known[0] + 2 * known[1] + unknown[0] * unknown[1]).backward()
    return dict(zip(('cohesion', 'coupling', 'cohesion again', 'coupling again'), (x.detach() for x in (*known, *unknown)))) | dict(gradient=mine.grad / share[1])


def work(what: str, path: str) -> None:
    "In one of the processes."
    import torch.distributed as dist
    dist.init_process_group('gloo')
    share = dist.get_rank(), dist.get_world_size()
    found = losses(share) if what == 'losses' else one_step(what, share)
    torch.save(found, f'{path}.{share[0]}')
    dist.barrier()
    dist.destroy_process_group()


def torchrun(*words: str, **options: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', *words], text=True, env=ALONE,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def shared(what: str, folder: Path) -> list[dict[str, Tensor]]:
    process = torchrun(__file__, what, str(folder/what))
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return [torch.load(folder/f'{what}.{rank}') for rank in range(2)]


def test_losses_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    alone, (first, second) = losses(), shared('losses', tmp_path)
    for name in list(alone)[:-1]: assert torch.equal(first[name], second[name]) and torch.allclose(first[name], alone[name], atol=1e-6)
    assert torch.allclose(torch.cat([first['gradient'], second['gradient']]), alone['gradient'], atol=1e-6)


@pytest.mark.parametrize('kind', NETWORKS)
def test_two_processes_are_as_one(kind: str, tmp_path: Path) -> None:
    alone, (first, second) = one_step(kind), shared(kind, tmp_path)
    assert alone.keys() == first.keys() == second.keys()
    for name, value in alone.items():
        if name.startswith('loss '):                        # a step's log is of its own process; their mean is that of the batch
            assert torch.allclose((first[name] + second[name]) / 2, value, atol=1e-5), name
            continue
        assert torch.equal(first[name], second[name]), f'{name}: the processes differ'
        if name.startswith(('trained', 'accuracies')): continue           # after a whole run rounding has grown
        assert torch.allclose(first[name].double(), value.double(), atol=1e-8 if name.startswith('later') else 1e-5, rtol=1e-5), name


# The command line

WORDS = ['train', '--data', 'digits', '--model', 'simcnn', '--width', '.1', '--batch-size', '64', '--device', 'cpu']

def mwt(*words: object, **options: object) -> subprocess.Popen: return torchrun('-m', 'mwt', *map(str, words), **options)


def test_one_command_in_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    two, one = tmp_path/'two', tmp_path/'one'
    words = [*WORDS, '--method', 'mwt', '--lr', '1e-4', '--epochs', '1', '--out']
    said, _ = (process := mwt(*words, two)).communicate(timeout=300)
    assert process.returncode == 0, said
    assert said.count('best epoch 1, kept in') == said.count('kernels are masked') == 1, 'only the first process speaks'
    assert main([*words, str(one)]) == 0
    first, second = (json.loads((out/'history.json').read_text())['rows'][0] for out in (one, two))
    for name in ('loss', 'cohesion_loss', 'coupling_loss'): assert second[name] == pytest.approx(first[name], rel=1e-3), name
    said, _ = (process := mwt('decompose', '--out', two, '--device', 'cpu')).communicate(timeout=300)
    assert process.returncode == 0 and said.count('kept in') == 1, said
    shared = load_parts(two/'parts.safetensors')
    assert main(['decompose', '--out', str(two), '--device', 'cpu']) == 0
    alone = load_parts(two/'parts.safetensors')
    assert torch.equal(shared.kept, alone.kept) and torch.allclose(shared.frequency, alone.frequency) and torch.allclose(shared.cohesion, alone.cohesion)
    assert sorted(p.name for p in two.iterdir()) == ['history.json', 'model.safetensors', 'parts.safetensors', 'run.json']
    said, _ = (process := mwt('extract', '--out', two)).communicate(timeout=300)
    assert process.returncode and 'torchrun is for mwt train and mwt decompose' in said


def worker(rank: int, parent: int) -> int:
    "The process of a rank."
    for folder in Path('/proc').glob('[0-9]*'):
        try: words, status = (folder/'environ').read_bytes().split(b'\0'), (folder/'stat').read_text().rsplit(')', 1)[1].split()
        except OSError: continue
        if f'RANK={rank}'.encode() in words and int(status[1]) == parent: return int(folder.name)
    raise LookupError(rank)


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='finds the process in /proc')
@pytest.mark.parametrize('lost', [0, 1])
def test_lost_process_ends_the_run_and_the_run_goes_on(lost: int, tmp_path: Path) -> None:
    out, whole, state = tmp_path/'run', tmp_path/'whole', tmp_path/'run'/'resume.safetensors'
    words = [*WORDS, '--epochs', '8', '--out']
    process, limit = mwt(*words, out), time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < limit: time.sleep(.01)
    os.kill(worker(lost, process.pid), signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode and 'SIGKILL' in said
    assert re.search(rf'mwt \(process {1 - lost} of 2\): training stopped: (another process was lost|asked to stop)', said) and 'the same command with --resume goes on from there' in said
    assert 0 < load_tensors(state, 'run')[1]['done'] < 8 * 20 and not (out/'run.json').exists()
    if not lost: return                                     # going on is the same whoever was lost
    said, _ = (process := mwt(*words, out, '--resume')).communicate(timeout=300)
    assert process.returncode == 0 and not state.exists(), said
    said, _ = (process := mwt(*words, whole)).communicate(timeout=300)
    assert process.returncode == 0 and (out/'history.json').read_text() == (whole/'history.json').read_text()
    assert (weights := [load_tensors(folder/'model.safetensors', 'checkpoint')[0] for folder in (out, whole)]) and all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


if __name__ == '__main__': work(*sys.argv[1:])
