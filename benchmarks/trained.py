"""Networks that were trained once and are kept in a folder, for all methods that start from the same one."""
from __future__ import annotations
import re, time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
import torch
from torch import nn
from mwt.data.batches import ImageData
from mwt.methods.base import Method
from mwt.methods.modular import modularize
from mwt.networks import create_model
from mwt.train.checkpoint import load_checkpoint, save_checkpoint
from mwt.train.fit import fit


def new_network(network: str, masks: Method | None, seed: int, data: ImageData) -> nn.Module:
    "A network `NAME:WIDTH` with random weights, or `NAME:WIDTH,depth=20`; with masks, if a method is given."
    name, _, rest = network.partition(':')
    width, *more = rest.split(',')
    options = {k: int(v) for k, v in (word.split('=') for word in more)}
    model = create_model(name, data.n_classes, float(width), data.channels, seed=seed, **options)
    return model if masks is None else modular_network(model, masks, seed, data)


def modular_network(model: nn.Module, masks: Method, seed: int, data: ImageData) -> nn.Module:
    "A plain network with the masks of a method."
    return modularize(model, data.n_classes, masks, example_input=torch.zeros(1, *data.shape), seed=seed)


def file_of(folder: Path, *about: Any, data: ImageData) -> Path:
    "Where something that was trained is kept: its name says what it is, and of which images."
    words = [str(word) for word in about]
    words += ['x'.join(map(str, data.shape)), (data.fingerprint or 'images')[:8]]
    return folder/(re.sub(r'[^\w.=,-]+', '-', '_'.join(words)) + '.safetensors')


def trained_network(
    folder: Path, # where networks are kept
    network: str, # `NAME:WIDTH`, as `new_network` takes it
    method: str, # as it is called: `plain`, `composable,separation=0`
    masks: Method | None, # the method; `None` for a plain network
    recipe: Mapping[str, Any], # of `fit`
    epochs: int,
    seed: int,
    data: ImageData,
    show_progress: bool = False,
    model: nn.Module | None = None, # to go on from; a new one if not given
) -> tuple[nn.Module, dict[str, float]]: # the network; `train_seconds`, `cpu_seconds`, `valid`
    "A trained network, from the folder where it is there, and its accuracy on images held out."
    if model is None: model = new_network(network, masks, seed, data)
    path = file_of(folder, network, method, epochs, data.train.batch_size, seed, data=data)
    if path.exists(): return model.to(data.device), load_checkpoint(model, path)['cost']
    start, cpu = time.perf_counter(), time.process_time()
    history = fit(model, data, epochs, seed=seed, device=data.device, show_progress=show_progress, **recipe)
    cost = dict(train_seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu,
                valid=history.series('valid_accuracy')[history.best_epoch - 1])
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model, path, dict(cost=cost))
    return model, cost
