"""Time commands in pairs: ours, theirs, ours, theirs … in one run, so that a noisy machine is
noisy for both. Reports medians, the ratio of each pair, and the largest resident memory.

    from pairs import Side, compare
    print(compare(Side("smelt", ["smelt", …]), Side("cp", ["sh", "-c", "cp a b && sync b"])))
"""

import os
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Side:
    """A command, and what to remove before each of its runs."""

    name: str
    command: list
    outputs: list = field(default_factory=list)

    def run(self):
        """Return the wall seconds and the peak resident bytes of one run."""
        for output in map(Path, self.outputs):
            shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
        begin = time.perf_counter()
        process = subprocess.Popen(
            list(map(str, self.command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        if status:
            raise RuntimeError(f"{self.name} failed: {errors.decode()}")
        return seconds, usage.ru_maxrss * 1024


@dataclass
class Comparison:
    """The runs of two commands, pair by pair."""

    ours: Side
    theirs: Side
    pairs: list

    @property
    def ratio(self):
        """The median over the pairs of our time by theirs."""
        return statistics.median(ours[0] / theirs[0] for ours, theirs in self.pairs)

    def __str__(self):
        lines = []
        for side, runs in zip((self.ours, self.theirs), zip(*self.pairs)):
            seconds = statistics.median(run[0] for run in runs)
            memory = max(run[1] for run in runs) / 2**20
            lines.append(f"{side.name:32} {seconds:8.2f} s  {memory:8.0f} MiB")
        ratios = sorted(ours[0] / theirs[0] for ours, theirs in self.pairs)
        lines.append(
            f"ratio of times: median {self.ratio:.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}, "
            f"{len(ratios)} pairs"
        )
        return "\n".join(lines)


def drop_caches():
    """Forget cached file contents, where we may: a cold start for both sides."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except PermissionError:
        print("the page cache stays warm: dropping it needs root")


def compare(ours, theirs, runs=5, cold=False, warmup=1):
    """Run both sides in turn; `cold` drops the page cache before every run."""
    pairs = []
    for number in range(warmup + runs):
        pair = []
        for side in (ours, theirs):
            if cold:
                drop_caches()
            pair.append(side.run())
        if number >= warmup:
            pairs.append(tuple(pair))
    return Comparison(ours, theirs, pairs)
