"Gradients in the memory order of training equal those without oneDNN, with and without AVX-512."
from __future__ import annotations
import os, subprocess, sys
import pytest

SCRIPT = '''
import torch
from torch.nn import functional as F
from mwt.networks import create_model
from mwt.core.nets import memory_format
from mwt.methods.modular import modularize
from mwt.modules.decompose import decompose
from mwt.data.batches import from_tensors
from mwt.modules.extract import extract
from mwt.train.fit import fit

def difference(net, images, labels):
    "The largest relative error of a weight gradient, against double precision without oneDNN."
    net.zero_grad()
    format = memory_format(net, images)
    net = net.to(memory_format=format).train()
    seen, convs = {}, [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    for conv in convs:
        conv.register_forward_hook(lambda conv, x, y: seen.update({conv: [x[0].detach()]}))
        conv.register_full_backward_hook(lambda conv, dx, dy: seen[conv].append(dy[0].detach()))
    F.cross_entropy(net(images.contiguous(memory_format=format)), labels).backward()
    errors = []
    for conv in convs:
        x, dy = (t.double().contiguous() for t in seen[conv])
        how = conv.stride, conv.padding, conv.dilation, conv.groups
        wanted = torch.nn.grad.conv2d_weight(x, conv.weight.shape, dy, *how)
        errors.append(((conv.weight.grad - wanted).norm() / wanted.norm()).item())
    return max(errors)

torch.manual_seed(0)
images, labels = torch.randn(8, 3, 32, 32), torch.randint(4, (8,))
nets = {w: create_model('resnet18', 4, width=w, seed=0) for w in (.0625, .1, .125, .25)}
for threads in (1, 2):
    torch.set_num_threads(threads)
    for width, net in nets.items(): print('plain', width, difference(net, images, labels))

pixels = (40 * labels[:, None, None, None] + torch.randint(60, (8, 3, 32, 32))).byte()
split = pixels, labels
data = from_tensors(split, split, split, batch_size=8, augment=None, device='cpu')
model = modularize(nets[.1], 4, target_krr=.3)
fit(model, data, epochs=4, show_progress=False)          # trains without closed kernels from half of it on
module = extract(model, decompose(model, data.train, show_progress=False), ['0', '2'])
print('module', .1, difference(module, images.sigmoid(), labels % 2))
'''


@pytest.mark.parametrize('isa', ['AVX2', pytest.param('DEFAULT', marks=pytest.mark.slow)])
def test_gradients_are_right(isa: str) -> None:
    env = os.environ | {'ONEDNN_MAX_CPU_ISA': isa, 'OMP_NUM_THREADS': '2'}
    cmd = [sys.executable, '-c', SCRIPT]
    done = subprocess.run(cmd, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line]
    assert len(lines) == 9
    for kind, width, difference in lines: assert float(difference) < 1e-4, f'{kind} {width}: {difference}'
