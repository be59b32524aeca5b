"Training that fails says what to do, and keeps the best weights that there were."
from __future__ import annotations
import copy
from pathlib import Path
import pytest
from bad_input import fresh, named, same_state, state, tree
from mwt.data.batches import ImageData
from mwt.data.sources import image_data
from mwt.methods.modular import modularize
from mwt.train import trainer
from mwt.train.checkpoint import load_checkpoint
from mwt.train.fit import fit


@pytest.fixture(scope='module')
def data() -> ImageData: return named()


def test_loss_that_is_no_number(data: ImageData, tmp_path: Path) -> None:
    model, path = modularize(fresh(), 10), tmp_path/'model.safetensors'
    fit(model, data, 1, checkpoint=path, show_progress=False)
    before = path.read_bytes()
    with pytest.raises(FloatingPointError, match='loss became nan in epoch 1; try a lower lr than 1e[+]30'):
        fit(model, data, 2, lr=1e30, checkpoint=path, show_progress=False)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_loss_that_turns_nan_keeps_the_best_epoch(data: ImageData, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    path, steps, factor = tmp_path/'model.safetensors', len(data.train), trainer.lr_factor
    good = modularize(fresh(), 10, 'mwt')
    bad = copy.deepcopy(good)
    fit(good, data, 1, warmup=1., checkpoint=path, show_progress=False)
    path.rename(tmp_path/'expected.safetensors')

    def huge_later(step: int, total: int, warmup: float) -> float:
        return factor(step, steps, warmup) if step < steps else 1e30
    monkeypatch.setattr(trainer, 'lr_factor', huge_later)
    with pytest.raises(FloatingPointError, match='in epoch 2; try a lower lr'):
        fit(bad, data, 3, warmup=1., checkpoint=path, show_progress=False)
    load_checkpoint(bad, path)
    load_checkpoint(good, tmp_path/'expected.safetensors')
    assert same_state(state(bad), state(good)) and len(tree(tmp_path)) == 2


def test_weights_that_are_no_numbers_are_never_kept(tmp_path: Path) -> None:
    "The loss of an epoch's last step says nothing about the weights after it."
    data = image_data('digits', batch_size=1000, device='cpu')
    model, path = modularize(fresh(), 10), tmp_path/'model.safetensors'
    assert len(data.train) == 1
    with pytest.raises(FloatingPointError, match='try a lower lr'):
        fit(model, data, 1, lr=1e39, warmup=0., checkpoint=path, show_progress=False)
    assert not path.exists()
