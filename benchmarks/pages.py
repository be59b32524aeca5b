"""What the pages of the book show of the stored results: means over seeds, cells of tables, pictures."""
from __future__ import annotations
import statistics
from collections.abc import Mapping, Sequence
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import Row, each, mean, select, spread, values  # noqa: F401 (the pages import them from here)
from mwt.measure import count_params
from mwt.modules.parts import Parts, plot_masks

SETS = (2, 5, 10) # sizes of the sets of classes that modules were cut for
MEASURED = 'composable'
STYLES = {MEASURED: ('o', '-', '0.1'), 'mwt': ('s', '--', '0.55')} # marker, line and grey of each method


def module_rows(rows: Sequence[Row], network: str, method: str) -> list[dict[str, str]]:
    "A row for each size of module: what it keeps, how good it is, and the full model on the same classes."
    found = select(rows, network=network, method=method)
    about = dict(network=network, method=method.split(',')[0], seeds=str(len(found)))
    return [about | {'classes': str(n), 'parameters kept': mean(found, f'params_{n}'),
                     'operations': mean(found, f'flops_{n}'),
                     'module': mean(found, f'accuracy_{n}'), 'spread': spread(found, f'accuracy_{n}'),
                     'full model': mean(found, f'full_{n}')} for n in SETS]


def plot_modules(rows: Sequence[Row], network: str, ax: Axes) -> Axes:
    "Accuracy of modules against the parameters that they keep; hollow: the full model on the same classes."
    for method, (mark, line, colour) in STYLES.items():
        found = select(rows, network=network, method=method)
        if not found: continue
        x, y, full = ([statistics.mean(values(found, f'{figure}_{n}')) for n in SETS]
                      for figure in ('params', 'accuracy', 'full'))
        ax.plot(x, full, marker=mark, markerfacecolor='none', linestyle='none', color=colour)
        ax.plot(x, y, marker=mark, linestyle=line, color=colour, label=method.split(',')[0])
        for n, a, b in zip(SETS, x, y):
            ax.annotate(str(n), (a, b), textcoords='offset points', xytext=(5, -11), fontsize=8)
    ax.set(xlabel='parameters kept (%)', ylabel='accuracy (%)', xlim=(0, 110), ylim=(0, 104), title=network)
    ax.label_outer()
    ax.legend(fontsize='small', frameon=False)
    return ax


def map_and_modules(
    parts: Parts, # which class keeps which kernels
    modules: Mapping[str, torch.nn.Module], # name -> module
) -> Figure:
    "The kernels of each class, and beside them the sizes of modules that were cut out by this map."
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 2.6), layout='constrained', width_ratios=(2, 1))
    plot_masks(parts, ax=left)
    left.set(title='kernels that each class keeps (black)', xlabel='kernel, layer after layer')
    sizes = [100 * count_params(m) / m.full['params'] for m in modules.values()]
    names = ['full network', *(f'module {name}' for name in modules)]
    bars = right.barh(names, [100, *sizes], color=['0.85', *['0.25'] * len(sizes)])
    right.bar_label(bars, ['100 %', *(f'{s:.1f} %' for s in sizes)], padding=4, fontsize=9)
    right.invert_yaxis()
    right.set(title='parameters', xlim=(0, 140), xticks=[])
    right.spines[['top', 'right', 'bottom']].set_visible(False)
    return fig
