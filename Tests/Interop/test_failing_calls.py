"""Each system call that reads, writes or puts in place, failing once, for every time it is made;
and an input that is truncated, touched, rewritten or replaced just before any of its reads."""

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

# Loaded before libc: at the FAIL_AT-th call of FAIL_CALL it fails, or, if FAIL_CHANGE says so, the
# file FAIL_FILE is changed and the call goes on; and the file FAIL_MARK says that it was so.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static void change(const char *how, const char *path) {
  struct stat status;
  int file = open(path, O_RDWR);
  fstat(file, &status);
  if (!strcmp(how, "truncate")) ftruncate(file, status.st_size - 1);
  if (!strcmp(how, "touch")) futimens(file, NULL);
  if (!strcmp(how, "rewrite")) {
    int other = open(getenv("FAIL_OTHER"), O_RDONLY);
    char byte;
    for (off_t i = 0; i < status.st_size && read(other, &byte, 1) == 1; i++) {
      lseek(file, i, SEEK_SET);
      write(file, &byte, 1);
    }
    close(other);
  }
  if (!strcmp(how, "replace")) rename(getenv("FAIL_OTHER"), path);
  close(file);
}

static int is_due(const char *name) {
  static atomic_int calls;
  const char *wanted = getenv("FAIL_CALL"), *how = getenv("FAIL_CHANGE");
  if (!wanted || strcmp(wanted, name) || ++calls != atoi(getenv("FAIL_AT"))) return 0;
  int mark = open(getenv("FAIL_MARK"), O_CREAT | O_EXCL | O_WRONLY, 0600);
  // A child process counts anew.
  if (mark < 0) return 0;
  close(mark);
  if (!how) return 1;
  change(how, getenv("FAIL_FILE"));
  return 0;
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
WRAP(int, ftruncate, "ftruncate", EIO, (int f, off_t n), (f, n))
WRAP(int, ftruncate64, "ftruncate", EIO, (int f, off_t n), (f, n))
WRAP(int, rename, "rename", EIO, (const char *a, const char *b), (a, b))
WRAP(int, renameat2, "rename", EIO, (int d, const char *a, int e, const char *b, unsigned f),
     (d, a, e, b, f))
int posix_fallocate(int f, off_t o, off_t n) {
  if (is_due("posix_fallocate")) return ENOSPC;
  return ((int (*)(int, off_t, off_t))dlsym(RTLD_NEXT, "posix_fallocate"))(f, o, n);
}
"""

OUTPUTS = [
    ["out.safetensors"],
    ["out.safetensors", "--dtype", "BF16"],
    ["out.safetensors", "--no-sync"],
    ["out.h5"],
    ["out.h5", "--compress", "zstd"],
    ["out.h5", "--compress", "deflate"],
    ["out.npz"],
    ["out.npz", "--compress", "deflate"],
    ["out.safetensors.zst"],
    ["out/"],
    ["out/", "--max-shard-size", "1KB"],
]


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
        self.random = np.random.default_rng(2)
        self.input = self.write("in.safetensors")

    def write(self, name):
        """Write a file of new numbers, some in tensors large enough to be compressed in chunks."""
        shapes = {"t0": (50, 7), "t1": (80, 400), "t2": (3,)}
        arrays = {
            name: self.random.standard_normal(shape).astype(np.float32)
            for name, shape in shapes.items()
        }
        save_file(arrays, self.folder / name, {"format": "pt"})
        return self.folder / name

    def contents(self, path):
        if path.is_dir():
            return {file.name: file.read_bytes() for file in path.iterdir()}
        return path.read_bytes() if path.exists() else None

    def test_the_destination_is_absent_old_or_complete(self):
        for name, *options in OUTPUTS:
            for call in ("pread", "pwrite", "fsync", "ftruncate", "rename", "posix_fallocate"):
                with self.subTest(f"{call} for {name} {options}"):
                    self.fail_at_every_call(call, name, options)

    def fail_at_every_call(self, call, name, options):
        work = self.folder / "work"
        mark = self.folder / "mark"
        output = work / name
        expected = self.converted(self.input, f"expected-{name}", options)
        for number in range(1, 500):
            shutil.rmtree(work, ignore_errors=True)
            mark.unlink(missing_ok=True)
            work.mkdir()
            had_old = number % 2 == 0 and not name.endswith("/")
            if had_old:
                output.write_bytes(b"what was there")
            result = subprocess.run(
                [SMELT, "convert", str(self.input), f"{work}/{name}", *options],
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
                    [SMELT, "verify", "--data", "--against", str(expected), f"{work}/{name}"],
                    capture_output=True)  # fmt: skip
                self.assertEqual(same.returncode, 0, what)
            elif had_old:
                self.assertEqual(found, b"what was there", what)
            self.assertIn(left, ([], [output.name]), what)
        self.fail(f"{call} was called 500 times")

    def test_the_system_may_be_left_to_flush(self):
        for name, *options in OUTPUTS:
            with self.subTest(f"{name} {options}"):
                expected = self.contents(self.converted(self.input, f"expected-{name}", options))
                shutil.rmtree(self.folder / name, ignore_errors=True)
                result, was_flushed = self.run_with(
                    ["convert", self.input, f"{self.folder}/{name}", *options, "--no-sync"],
                    FAIL_CALL="fsync", FAIL_AT="1")  # fmt: skip
                self.assertEqual(result.returncode, 0, result.stderr)
                self.assertFalse(was_flushed)
                self.assertEqual(self.contents(self.folder / name), expected)

    def test_a_read_that_fails_is_an_error(self):
        for name, *options in OUTPUTS:
            with self.subTest(f"{name} {options}"):
                given = self.converted(self.input, f"given-{name}", options)
                for number in range(1, 500):
                    result, happened = self.run_with(
                        ["verify", "--data", given], FAIL_CALL="pread", FAIL_AT=str(number))
                    if not happened:
                        self.assertEqual(result.returncode, 0, result.stderr)
                        break
                    self.check_refusal(result, f"the {number}. pread")

    def test_an_input_that_changes_is_refused_or_was_read_as_a_whole(self):
        second = self.write("second.safetensors")
        for name, *options in [output for output in OUTPUTS if not output[0].endswith("/")]:
            with self.subTest(f"{name} {options}"):
                one = self.converted(self.input, f"one-{name}", options)
                other = self.converted(second, f"two-{name}", options)
                for how in ("truncate", "touch", "rewrite", "replace"):
                    for command in ("convert", "verify", "diff"):
                        self.change_at_every_read(how, command, one, other)

    def change_at_every_read(self, how, command, one, other):
        changing, spare, output = (self.folder / name for name in ("changing", "spare", "out.npz"))
        arguments = {
            "convert": ["convert", changing, output],
            "verify": ["verify", "--data", changing],
            "diff": ["diff", changing, one],
        }[command]
        for number in range(1, 500):
            shutil.copyfile(one, changing)
            shutil.copyfile(other, spare)
            output.unlink(missing_ok=True)
            result, happened = self.run_with(
                arguments, FAIL_CALL="pread", FAIL_AT=str(number), FAIL_CHANGE=how,
                FAIL_FILE=str(changing), FAIL_OTHER=str(spare))  # fmt: skip
            what = f"{how} before the {number}. read of {command}: {result.stdout}{result.stderr}"
            if not happened:
                self.assertEqual(result.returncode, 0, what)
                return
            left = [path.name for path in self.folder.iterdir() if "partial" in path.name]
            self.assertEqual(left, [], what)
            if result.returncode == 0 and command == "convert":
                # It was read before or after it was changed.
                same = [self.run_with(["verify", "--against", path, output])[0].returncode
                        for path in (one, other)]  # fmt: skip
                self.assertIn(0, same, what)
            elif result.returncode == 0:
                self.assertNotEqual(how, "truncate", what)
            elif command == "diff" and how in ("rewrite", "replace") and not result.stderr:
                self.assertIn("0 of 3 common tensors", result.stdout, what)
            else:
                self.check_refusal(result, what)
        self.fail(f"{command} reads 500 times")

    def check_refusal(self, result, what):
        what += f": {result.stdout}{result.stderr}"
        self.assertEqual(result.returncode, 1, what)
        if not result.stderr:  # A failure of one tensor: the others were still read.
            self.assertRegex(result.stdout, r'(?m)^data: tensor ".+" cannot be read: ', what)
            return
        self.assertRegex(result.stderr, r"\AError: [^\n]+\n\Z", what)

    def converted(self, path, name, options):
        output = self.folder / name
        shutil.rmtree(output, ignore_errors=True)
        subprocess.run(
            [SMELT, "convert", str(path), f"{self.folder}/{name}", *options],
            check=True, capture_output=True)  # fmt: skip
        return output

    def run_with(self, arguments, **environment):
        """Run the command; say also whether the call that the environment names was made."""
        mark = self.folder / "mark"
        mark.unlink(missing_ok=True)
        result = subprocess.run(
            [SMELT, *map(str, arguments)],
            env=os.environ | {"LD_PRELOAD": str(self.shim), "FAIL_MARK": str(mark)} | environment,
            capture_output=True, text=True)  # fmt: skip
        return result, mark.exists()


if __name__ == "__main__":
    unittest.main()
