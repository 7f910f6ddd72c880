"""Time commands in pairs: ours, theirs, ours, theirs … in one run, so that a noisy machine is
noisy for both. Reports medians, the ratio of each pair, and the largest resident memory.

    from pairs import Side, compare
    print(compare(Side("smelt", ["smelt", …]), Side("cp", ["sh", "-c", "cp a b && sync b"])))
"""

import os
import shutil
import statistics
import subprocess
import tempfile
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
        # What an earlier run left to be written would be counted to this one.
        os.sync()
        with tempfile.TemporaryFile() as errors:
            begin = time.perf_counter()
            process = subprocess.Popen(
                list(map(str, self.command)), stdout=subprocess.DEVNULL, stderr=errors
            )
            peak = 0
            while process.poll() is None:
                peak = max(peak, peak_resident(process.pid))
                try:
                    process.wait(0.005)
                except subprocess.TimeoutExpired:
                    pass
            seconds = time.perf_counter() - begin
            if process.returncode:
                errors.seek(0)
                raise RuntimeError(f"{self.name} failed: {errors.read().decode()}")
        return seconds, peak


def peak_resident(pid):
    """Return the high-water mark of a running process's resident memory, in bytes.

    Asked while it runs: what wait4 says of a child includes the memory of the Python that started it.
    """
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


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
