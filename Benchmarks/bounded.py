"""Merges inputs ten times larger than the memory that a control group allows.

    .venv/bin/python Benchmarks/bounded.py [FOLDER] [--methods ties linear] [--times 10]

The group's limit is a tenth of the inputs' bytes, page cache included; --memory is left to its
default, which follows the limit. Needs root: it makes a memory control group (version 1 or 2) and
removes it again. FOLDER is as in merge.py.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from merge import RECIPES, SMELT, recipe
from pairs import drop_caches

ROOT = Path("/sys/fs/cgroup")


class Group:
    """A memory control group with a limit in bytes, as a context."""

    def __init__(self, limit):
        folder = Group.controller()
        self.is_new = folder == ROOT
        self.path = folder / f"smelt-{os.getpid()}"
        self.limit = limit

    @staticmethod
    def controller():
        """Return the folder where memory groups are made, None if there is none."""
        controllers = ROOT / "cgroup.controllers"
        if controllers.exists() and "memory" in controllers.read_text().split():
            return ROOT
        old = ROOT / "memory"
        return old if (old / "memory.limit_in_bytes").exists() else None

    def __enter__(self):
        self.path.mkdir()
        limit = "memory.max" if self.is_new else "memory.limit_in_bytes"
        (self.path / limit).write_text(str(self.limit))
        return self

    def __exit__(self, *_):
        self.path.rmdir()

    def enter(self):
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def peak(self):
        name = "memory.peak" if self.is_new else "memory.max_usage_in_bytes"
        return int((self.path / name).read_text())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--methods", nargs="*", default=list(RECIPES))
    parser.add_argument("--times", type=float, default=10)
    parser.add_argument("--output", type=Path, help="where the results go; default: FOLDER")
    options = parser.parse_args()
    if os.geteuid() != 0 or not Group.controller():
        print("skipped: a memory control group takes root and a controller in /sys/fs/cgroup")
        return
    folder = options.folder or Path(tempfile.mkdtemp())
    if not (folder / "model3" / "model.safetensors").exists():
        maker = Path(__file__).parent / "merge_models.py"
        subprocess.run(
            [sys.executable, maker, folder, "--gigabytes", str(options.gigabytes)], check=True
        )
    output = options.output or folder
    output.mkdir(parents=True, exist_ok=True)
    for method in options.methods:
        path, inputs = recipe(folder, method, output)
        size = sum(input.stat().st_size for input in inputs)
        limit = int(size / options.times)
        result = output / "bounded.safetensors"
        result.unlink(missing_ok=True)
        drop_caches()
        with Group(limit) as group:
            begin = time.perf_counter()
            run = subprocess.run(
                [SMELT, "merge", path, result], preexec_fn=group.enter, capture_output=True,
                text=True,
            )
            seconds = time.perf_counter() - begin
            peak = group.peak
        outcome = run.stdout.strip() if run.returncode == 0 else f"FAILED: {run.stderr.strip()}"
        print(
            f"{method}: {size / 1e6:.0f} MB of inputs in a group of {limit / 1e6:.0f} MB, "
            f"{seconds:.2f} s, {peak / 1e6:.0f} MB used with page cache\n  {outcome}",
            flush=True,
        )
        result.unlink(missing_ok=True)
        if run.returncode:
            sys.exit(1)


if __name__ == "__main__":
    main()
