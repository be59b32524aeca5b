"Target sets learn to doubt images of other classes; how well is an AUROC."
from __future__ import annotations
import pytest
import torch
from test_training import step_calls, random_batches
from torch import Tensor
from mwt.core.checks import seeded
from mwt.measure import auroc, rejection
from mwt.methods.composable import (
    OUTSIDERS, ClassGates, Composable, draw_targets, set_accuracy, set_loss, wanted_answers)
from mwt.methods.modular import modularize
from mwt.networks import create_model


def test_some_sets_lack_the_class_of_their_image() -> None:
    labels = torch.arange(2000) % 5
    with seeded(0): sets = draw_targets(labels, 5, .4, OUTSIDERS)
    inside = sets.gather(1, labels[:, None])[:, 0]
    assert abs((~inside).float().mean() - .6 / 3) < .04
    assert sets.sum(1).min() == 2 and not (~inside & sets.all(1)).any()


def test_wanted_answers_are_distributions_over_the_set() -> None:
    sets = torch.tensor([[True, True, False], [True, True, False]])
    teacher = torch.tensor([[2., 0., 9.], [2., 0., 9.]])
    wanted = wanted_answers(torch.tensor([0, 2]), sets, teacher, share=.5)
    taught = torch.tensor([2., 0.]).softmax(0)
    assert torch.allclose(wanted[0], torch.tensor([.5 + taught[0] / 2, taught[1] / 2, 0]))
    assert torch.equal(wanted[1], torch.tensor([.5, .5, 0]))


def test_outsiders_become_uniform_and_others_certain() -> None:
    "Free logits of two images, one of them an outsider, go where the loss wants them."
    logits = torch.tensor([[0., 3., 1.], [0., 3., 1.]], requires_grad=True)
    sets, labels = torch.tensor([[True, True, False], [True, True, False]]), torch.tensor([0, 2])
    for _ in range(300):
        loss = set_loss(logits, sets, wanted_answers(labels, sets))
        [grad] = torch.autograd.grad(loss, logits)
        logits = (logits - grad).detach().requires_grad_()
    found = logits[:, :2].softmax(1)
    assert found[0, 0] > .95 and abs(found[1, 0] - .5) < .01
    assert (logits[:, 2] == 1).all(), 'classes outside of the set learn nothing'
    assert set_accuracy(logits, sets, labels) == 1, 'outsiders have no right answer'


def test_gates_learn_nothing_from_outsiders() -> None:
    def scores(sets: Tensor) -> Tensor:
        gates = ClassGates(3, torch.ones(4), torch.zeros(4, dtype=torch.long)).train()
        (gates(sets)[:, :4] * torch.arange(4.)).sum(1).mean().backward()
        gates.observe(torch.tensor([0, 2]), decay=0.)
        return gates.scores
    inside = scores(torch.ones(2, 3, dtype=torch.bool))
    outside = scores(torch.tensor([[True] * 3, [True, True, False]]))
    assert torch.equal(inside[0], outside[0]) and inside[2].sum() > 0
    assert not outside[2].any(), 'an image whose set lacks its class counts for no class'


@pytest.mark.parametrize('dense', [True, False])
def test_step_never_waits(dense: bool) -> None:
    model = modularize(create_model('simcnn', 4, .05, 1, seed=0), 4, example_input=torch.zeros(1, 1, 8, 8),
                       reject=True, dense=dense)
    assert step_calls(model, random_batches(64, 4, 16), 1.5).total() > 100


def test_two_classes_cannot_reject() -> None:
    with pytest.raises(ValueError, match='reject=True needs at least 3 classes, not 2'):
        modularize(create_model('simcnn', 2, .05, seed=0), 2, reject=True)
    with pytest.raises(TypeError, match='reject must be True or False'): Composable(reject=1)


@pytest.mark.parametrize('seed', range(3))
def test_auroc_counts_pairs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inside, outside = (torch.randint(6, (n,), generator=generator) / 2 for n in (9, 14))
    pairs = inside[:, None] - outside
    assert auroc(inside, outside) == pytest.approx(((pairs > 0).double() + (pairs == 0) / 2).mean().item())


def test_rejection_needs_images_of_other_classes() -> None:
    model = create_model('simcnn', 4, .05, 1, seed=0)
    with pytest.raises(ValueError, match='images of its classes and of others'):
        rejection(model, random_batches(8, 4, 4))
