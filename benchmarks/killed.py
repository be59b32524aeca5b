"""Does a run that is killed end as if it had not been? `kill -9` at random moments, some within a write.

    python benchmarks/killed.py                     # 20 kills
    python benchmarks/killed.py --kills 100 --seed 1
    python benchmarks/killed.py --quick             # 3 kills

One run of `mwt train` is left alone; it tells how long a run takes and how many files it writes. Then
each trial starts the same command in another folder and ends it by SIGKILL: every second one at a
moment drawn between the first write and the end; the others in a write drawn among all of them, whose
temporary file is cut at a place drawn within it, just before it would be renamed. The same command
with `--resume` is then given until it ends. The trial succeeds where both folders hold the same files
with the same bits: weights, history, settings. Processes are forked from one that has imported
PyTorch, which takes seconds. Rows go to results/killed.jsonl; the exit status is 1 unless all trials
succeed.
"""

from __future__ import annotations
import os, random, signal, sys, tempfile, time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from bench import arguments, keep, parse
import mwt.runs.commands  # before the forks
from mwt.core.files import load_tensors
from mwt.runs.cli import main as mwt_main

PATIENCE = 600  # seconds for a run


def forked(work: Callable[[], Any]) -> int:  # its process number
    "Do some work in a process of its own."
    if process := os.fork():
        return process
    status = 1
    try:
        status = int(work() or 0)
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(process: int) -> int:  # exit status; minus the signal that ended it
    "Wait for a process; it is ended where it takes too long."
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise TimeoutError(f'a run takes longer than {PATIENCE} s')


def train(words: Sequence[str], kill_at: int = 0, cut: float = 0, count: Path | None = None) -> int:
    "In a process of its own: `mwt train`, killed in its n-th write, at a fraction of the file."
    done, replace = 0, os.replace

    def counting(source: str, target: str) -> None:
        nonlocal done
        done += 1
        if done == kill_at:
            os.truncate(source, int(cut * os.path.getsize(source)))
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = counting
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    status = mwt_main([*words])
    if count:
        count.write_text(str(done))
    return status


def bits(path: Path) -> Any:
    "What a file holds; safetensors writes the same words in one order or another."
    if path.suffix != '.safetensors':
        return path.read_bytes()
    tensors, about = load_tensors(path, 'checkpoint')
    return about, {k: (t.dtype, t.shape, t.numpy().tobytes()) for k, t in tensors.items()}


def content(folder: Path) -> dict[str, Any]:
    "Every file with its bits."
    return {p.relative_to(folder).as_posix(): bits(p) for p in folder.rglob('*') if p.is_file()}


def killed_in_write(words: Sequence[str], n: int, cut: float) -> int:  # exit status
    "A run that is killed in its n-th write."
    return wait(forked(lambda: train(words, n, cut)))


def killed_at(words: Sequence[str], out: Path, seconds: float) -> int:  # exit status
    "A run that is killed some time after its first write."
    process, limit = forked(lambda: train(words)), time.monotonic() + PATIENCE
    while not (out / 'resume.safetensors').exists() and time.monotonic() < limit:
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return wait(process)


def trial(
    n: int, words: Sequence[str], out: Path, whole: Path, seconds: float, writes: int, draw: random.Random
) -> dict[str, Any]:
    "Kill a run, let it go on, compare."
    words = [*words, '--out', str(out)]
    if n % 2:
        when, status = 'moment', killed_at(words, out, draw.uniform(0, seconds))
    else:
        when, status = 'write', killed_in_write(words, draw.randint(1, writes), draw.random())
    left = [p.name for p in out.iterdir()] if out.exists() else []
    resumed = wait(forked(lambda: train([*words, '--resume'])))
    same = resumed == 0 and content(out) == content(whole)
    return dict(
        trial=n,
        when=when,
        killed=status == -signal.SIGKILL,
        complete='run.json' in left,
        broken_writes=sum(name.startswith('.') and name != '.lock' for name in left),
        same=same,
    )


def main() -> int:
    p = arguments(__doc__)
    p.add_argument('--kills', type=int, default=None, help='left out: 20, or 3 with --quick')
    p.add_argument('--seed', type=int, default=0, help='of the moments')
    p.add_argument('--epochs', type=int, default=None, help='of a run; left out: 8, or 3 with --quick')
    a = parse(p)
    kills, epochs = a.kills or (3 if a.quick else 20), a.epochs or (3 if a.quick else 8)
    words = [
        'train',
        '--data',
        'digits',
        '--width',
        '.1',
        '--seed',
        '1',
        '--epochs',
        str(epochs),
        '--device',
        str(a.device),
    ]
    draw, rows = random.Random(a.seed), []
    with tempfile.TemporaryDirectory() as d:
        whole, count = Path(d) / 'whole', Path(d) / 'writes'
        process = forked(lambda: train([*words, '--out', str(whole)], count=count))
        while not (whole / 'resume.safetensors').exists():
            time.sleep(0.001)
        start = time.monotonic()
        if status := wait(process):
            return status
        seconds, writes = time.monotonic() - start, int(count.read_text())
        for n in range(kills):
            rows.append(trial(n, words, Path(d) / str(n), whole, seconds, writes, draw))
            print(rows[-1], flush=True)
    keep('killed', rows, a)
    good = sum(row['same'] for row in rows)
    print(
        f'{good} of {kills} end at the same bits; {sum(r["broken_writes"] > 0 for r in rows)} were killed '
        f'within a write ({writes} writes, {seconds:.1f} s a run)'
    )
    return good != kills


if __name__ == '__main__':
    sys.exit(main())
