"""Each system call that reads, writes or puts in place, failing once, for every time it is made."""

import os
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SMELT = os.environ["SMELT"]
COMPILER = next(filter(None, map(shutil.which, ("cc", "clang", "gcc"))), None)

# Loaded before libc: the FAIL_AT-th call of FAIL_CALL fails, and the file FAIL_MARK says that it did.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int is_due(const char *name) {
  static atomic_int calls;
  const char *wanted = getenv("FAIL_CALL");
  if (!wanted || strcmp(wanted, name) || ++calls != atoi(getenv("FAIL_AT"))) return 0;
  close(open(getenv("FAIL_MARK"), O_CREAT | O_WRONLY, 0600));
  return 1;
}

#define WRAP(result, symbol, name, code, types, values)                 \
  result symbol types {                                                 \
    if (is_due(name)) { errno = code; return -1; }                      \
    return ((result(*) types)dlsym(RTLD_NEXT, #symbol)) values;         \
  }
WRAP(ssize_t, pread, "pread", EIO, (int f, void *b, size_t n, off_t o), (f, b, n, o))
WRAP(ssize_t, pread64, "pread", EIO, (int f, void *b, size_t n, off_t o), (f, b, n, o))
WRAP(ssize_t, pwrite, "pwrite", ENOSPC, (int f, const void *b, size_t n, off_t o), (f, b, n, o))
WRAP(ssize_t, pwrite64, "pwrite", ENOSPC, (int f, const void *b, size_t n, off_t o), (f, b, n, o))
WRAP(int, fsync, "fsync", EIO, (int f), (f))
WRAP(int, rename, "rename", EIO, (const char *a, const char *b), (a, b))
WRAP(int, renameat2, "rename", EIO, (int d, const char *a, int e, const char *b, unsigned f),
     (d, a, e, b, f))
int posix_fallocate(int f, off_t o, off_t n) {
  if (is_due("posix_fallocate")) return ENOSPC;
  return ((int (*)(int, off_t, off_t))dlsym(RTLD_NEXT, "posix_fallocate"))(f, o, n);
}
"""


@unittest.skipIf(COMPILER is None, "no C compiler")
class FailingCalls(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        (self.folder / "shim.c").write_text(SHIM)
        self.shim = self.folder / "shim.so"
        subprocess.run(
            [COMPILER, "-shared", "-fPIC", "-o", self.shim, self.folder / "shim.c", "-ldl"], check=True)  # fmt: skip
        random = np.random.default_rng(2)
        arrays = {f"t{i}": random.standard_normal((50, 7)).astype(np.float32) for i in range(3)}
        self.input = self.folder / "in.safetensors"
        save_file(arrays, self.input, {"format": "pt"})

    def contents(self, path):
        if path.is_dir():
            return {file.name: file.read_bytes() for file in path.iterdir()}
        return path.read_bytes() if path.exists() else None

    def test_the_destination_is_absent_old_or_complete(self):
        outputs = ("out.safetensors", "out.h5", "out.npz", "out.safetensors.zst", "out/")
        for name in outputs:
            for call in ("pread", "pwrite", "fsync", "rename", "posix_fallocate"):
                with self.subTest(f"{call} for {name}"):
                    self.fail_at_every_call(call, name)

    def fail_at_every_call(self, call, name):
        work = self.folder / "work"
        mark = self.folder / "mark"
        output = work / name
        for number in range(1, 500):
            shutil.rmtree(work, ignore_errors=True)
            mark.unlink(missing_ok=True)
            work.mkdir()
            had_old = number % 2 == 0 and not name.endswith("/")
            if had_old:
                output.write_bytes(b"what was there")
            result = subprocess.run(
                [SMELT, "convert", str(self.input), f"{work}/{name}"],
                env=os.environ | {"LD_PRELOAD": str(self.shim), "FAIL_CALL": call,
                                  "FAIL_AT": str(number), "FAIL_MARK": str(mark)},
                capture_output=True, text=True)  # fmt: skip
            left = sorted(file.name for file in work.iterdir())
            what = f"the {number}. {call}: {result.stderr}{left}"
            if not mark.exists():
                self.assertEqual(result.returncode, 0, what)
                return
            self.assertEqual(result.returncode, 1, what)
            self.assertRegex(result.stderr, r"\AError: [^\n]+\n\Z", what)
            self.assertNotIn("partial", result.stderr, what)
            found = self.contents(output)
            if found not in (None, b"what was there"):
                # Only flushing the folder can fail when all is in place.
                self.assertEqual(call, "fsync", what)
                same = subprocess.run(
                    [SMELT, "verify", "--data", "--against", str(self.input), f"{work}/{name}"],
                    capture_output=True)  # fmt: skip
                self.assertEqual(same.returncode, 0, what)
            elif had_old:
                self.assertEqual(found, b"what was there", what)
            self.assertIn(left, ([], [output.name]), what)
        self.fail(f"{call} was called 500 times")


if __name__ == "__main__":
    unittest.main()
