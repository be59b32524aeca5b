"""Train convolutional networks to be modular, and cut out the classes you need.

    import mwt
    data = mwt.image_data('cifar10')
    model = mwt.modularize(mwt.create_model('simcnn'), n_classes=10)
    mwt.fit(model, data, epochs=30)
    pets = mwt.extract(model, mwt.decompose(model, data.train), ['cat', 'dog'])
"""
__version__ = "0.2.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Where each public name is at home. It is imported on first use, since PyTorch takes seconds.
_HOMES = {
    'core.display': 'Table percent',
    'core.errors': 'MwtError',
    'data.augment': 'Augment',
    'data.batches': 'Batches ImageData from_tensors',
    'data.sources': 'image_data',
    'networks': 'create_model',
    'methods.base': 'Method',
    'methods.modular': 'mask_table modularize plain',
    'methods.mwt': 'MwT',
    'methods.composable': 'Composable',
    'methods.moda': 'MODA',
    'measure': 'evaluate profile',
    'train.history': 'History TrainConfig',
    'train.checkpoint': 'load_checkpoint save_checkpoint',
    'train.fit': 'fit',
    'modules.parts': 'Parts load_parts plot_coupling plot_masks save_parts',
    'modules.decompose': 'decompose',
    'modules.module': 'SlimModule load_module save_module',
    'modules.extract': 'extract',
    'modules.compose': 'compose fine_tune',
    'modules.export': 'export',
    'modules.mend': 'mend',
    'modules.budget': 'fit_budget',
    'modules.narrow': 'narrow',
    'modules.replace': 'replace_class',
    'runs.report': 'Run',
    'layers.edit': 'drop_blocks',
    'layers.similarity': 'similarity',
    'layers.shorten': 'shorten',
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = list(_HOME)

if TYPE_CHECKING: from .all import *        # editors see the names without running anything


def __getattr__(name: str) -> Any:
    "A public name, imported on first use (PEP 562)."
    if name not in _HOME: raise AttributeError(f"module 'mwt' has no attribute {name!r}")
    found = getattr(import_module(f'mwt.{_HOME[name]}'), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]: return sorted({*globals(), *__all__})
