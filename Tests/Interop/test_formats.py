"""Files of every format, read by the libraries whose formats they are."""

import hashlib
import json
import os
import subprocess
import tempfile
import unittest
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import deserialize, safe_open
from safetensors.numpy import save_file

SMELT = os.environ["SMELT"]
FIXTURES = Path(__file__).parents[2] / "Fixtures"


def convert(source, target, *options):
    command = [SMELT, "convert", str(source), str(target), *options]
    subprocess.run(command, check=True, capture_output=True)


# What safetensors.numpy cannot load, deserialize can.
TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "I64": np.int64, "I32": np.int32, "I8": np.int8,
    "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def load_file(path):
    return {
        name: np.frombuffer(bytes(tensor["data"]), TYPES[tensor["dtype"]]).reshape(tensor["shape"])
        for name, tensor in deserialize(path.read_bytes())
    }


class Formats(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.out = Path(folder.name)
        random = np.random.default_rng(0)
        self.arrays = {
            "f32": random.standard_normal((3, 4)).astype(np.float32),
            "f16": random.standard_normal(5).astype(np.float16),
            "bf16": random.standard_normal((2, 3)).astype(ml_dtypes.bfloat16),
            "f8": random.standard_normal((2, 3)).astype(ml_dtypes.float8_e4m3fn),
            "i64": np.arange(6).reshape(2, 3),
            "u8": np.arange(256, dtype=np.uint8),
            "bool": np.array([True, False]),
            "scalar": np.array(3.5),
            "empty": np.zeros((0, 3), np.float32),
            "é/大": np.ones(1, np.int8),
        }
        save_file(self.arrays, self.out / "model.safetensors", {"format": "pt", "by": "wheel"})

    def test_checksums_are_left_out_where_they_alone_make_the_header_too_large(self):
        path, out = self.out / "many.safetensors", self.out / "out.safetensors"
        names = [f"{i:03}".ljust(99_926, "x") for i in range(1000)]
        save_file({name: np.ones(1, np.float32) for name in names}, path)
        command = [SMELT, "convert", str(path), str(out), "--dtype", "BF16"]
        refused = subprocess.run([*command, "--sha256"], capture_output=True, text=True)
        self.assertEqual(refused.returncode, 1)
        self.assertRegex(
            refused.stderr,
            r"\AError: .*/out.safetensors: would have a header of \d+ bytes; the format's limit is "
            r"100000000; leave out --sha256 or write HDF5 instead\n\Z")
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        self.assertEqual(
            result.stderr,
            f"smelt: {out}: written without checksums: they would make the header larger than "
            "the format allows\n")
        with safe_open(out, "np") as file:
            self.assertEqual(set(file.keys()), set(names))
        check = subprocess.run(
            [SMELT, "verify", "--data", str(out)], capture_output=True, text=True, check=True)
        self.assertIn("not checked: 1000 tensors have no recorded checksum", check.stdout)

    def test_diff_reads_eight_bit_floats_as_ml_dtypes_does(self):
        types = {
            "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
            "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
        }  # fmt: skip

        def write(name, arrays):
            header, offset = {}, 0
            for key, (dtype, array) in arrays.items():
                header[key] = {
                    "dtype": dtype, "shape": [], "data_offsets": [offset, offset + array.nbytes]}
                offset += array.nbytes
            text = json.dumps(header).encode()
            (self.out / name).write_bytes(
                len(text).to_bytes(8, "little") + text
                + b"".join(array.tobytes() for _, array in arrays.values()))

        codes, values = {}, {}
        for dtype, name in types.items():
            for code in range(256):
                element = np.array(code, np.uint8)
                value = element.view(getattr(ml_dtypes, name)).astype(np.float32)
                codes[f"{dtype}.{code}"] = (dtype, element)
                values[f"{dtype}.{code}"] = ("F32", value)
        write("codes.safetensors", codes)
        write("values.safetensors", values)
        result = subprocess.run(
            [SMELT, "diff", "--json", "codes.safetensors", "values.safetensors"], cwd=self.out,
            capture_output=True, text=True)  # fmt: skip
        tensors = json.loads(result.stdout)["tensors"]
        self.assertEqual(len(tensors), 256 * len(types))
        self.assertEqual([t["name"] for t in tensors if t["maximum"] != 0], [])

    def same(self, one, other, name):
        self.assertEqual(one.shape, other.shape, name)
        self.assertEqual(one.tobytes(), other.tobytes(), name)

    def test_numpy_reads_our_archives(self):
        convert(self.out / "model.safetensors", self.out / "model.npz")
        with np.load(self.out / "model.npz") as archive:
            self.assertEqual(set(archive.files), set(self.arrays))
            for name, array in self.arrays.items():
                ours = archive[name]
                if name in ("bf16", "f8"):
                    ours = ours.view(array.dtype)
                self.assertEqual(ours.dtype, array.dtype)
                self.same(ours, array, name)
        self.assertIsNone(zipfile.ZipFile(self.out / "model.npz").testzip())

    def test_an_archive_gives_back_the_same_tensors(self):
        convert(self.out / "model.safetensors", self.out / "model.npz")
        convert(self.out / "model.npz", self.out / "again.safetensors")
        again = load_file(self.out / "again.safetensors")
        for name, array in self.arrays.items():
            self.assertEqual(again[name].dtype, array.dtype)
            self.same(again[name], array, name)

    def test_numpys_archives_become_safetensors(self):
        arrays = {n: a for n, a in self.arrays.items() if n != "f8"}
        arrays["fortran"] = np.asfortranarray(np.arange(24.0).reshape(2, 3, 4))
        for save in (np.savez, np.savez_compressed):
            save(self.out / "theirs.npz", **arrays)
            convert(self.out / "theirs.npz", self.out / "theirs.safetensors")
            ours = load_file(self.out / "theirs.safetensors")
            for name, array in arrays.items():
                self.same(ours[name], np.ascontiguousarray(array).reshape(array.shape), name)

    def test_pytorchs_files_become_safetensors(self):
        convert(FIXTURES / "pytorch" / "views.pt", self.out / "views.safetensors")
        ours = load_file(self.out / "views.safetensors")
        base = np.arange(24, dtype=np.float32).reshape(4, 6)
        self.same(ours["transposed"], np.ascontiguousarray(base.T), "transposed")
        self.same(ours["steps"], np.ascontiguousarray(base[::2, ::3]), "steps")
        permuted = base.reshape(2, 3, 4).transpose(2, 0, 1)
        self.same(ours["permuted"], np.ascontiguousarray(permuted), "permuted")

    def test_a_header_of_ours_says_its_format_and_checksums(self):
        # transformers refuses a file that has metadata without a format.
        convert(FIXTURES / "pytorch" / "pytorch_model.bin", self.out / "layer.safetensors")
        with safe_open(self.out / "layer.safetensors", "numpy") as file:
            metadata = file.metadata()
        self.assertEqual(metadata["format"], "pt")
        algorithm, *checksums = metadata["checksums"].split(" ")
        self.assertEqual(algorithm, "xxh3-64/1MiB")
        self.assertEqual([len(checksum) for checksum in checksums], [16, 16, 16])

    def test_recorded_checksums_are_what_a_few_lines_of_python_compute(self):
        self.arrays["é\n"] = np.zeros(3, np.uint8)
        self.arrays["large"] = np.arange(600_000, dtype=np.float32)
        save_file(self.arrays, self.out / "in.safetensors")
        convert(self.out / "in.safetensors", self.out / "out.safetensors", "--sha256")
        data = (self.out / "out.safetensors").read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8:start]), data[start:]

        def checksum(data, H=hashlib.sha256):
            blocks = (data[i : i + 2**20] for i in range(0, len(data), 2**20))
            return H(b"".join(H(block).digest() for block in blocks)).hexdigest()

        tensors = [t for t in sorted(header.items()) if t[0] != "__metadata__"]
        described = "".join(
            f"{t['dtype']} {t['shape']} {len(n.encode())} {n}\n" for n, t in tensors)
        parts = (body[slice(*t["data_offsets"])] for _, t in tensors)
        self.assertEqual(
            header["__metadata__"]["checksums"],
            " ".join(["sha256/1MiB", checksum(described.encode()), *map(checksum, parts)]))

    def test_recorded_checksums_hold_when_the_wheel_saves_the_file_again(self):
        path, again = self.out / "out.safetensors", self.out / "again.safetensors"
        convert(self.out / "model.safetensors", path, "--rename", "^=x.")
        with safe_open(path, "np") as file:
            metadata = file.metadata()
        arrays = load_file(path)
        save_file(dict(reversed(arrays.items())), again, metadata)
        convert(again, self.out / "copy.h5")
        check = [SMELT, "verify", "--data", str(again)]
        result = subprocess.run(check, capture_output=True, text=True, check=True)
        count = len(self.arrays)
        self.assertIn(f"data: {count} of {count} tensors have the checksum", result.stdout)
        arrays["new"] = np.zeros(1)
        save_file(arrays, again, metadata)
        result = subprocess.run(check, capture_output=True, text=True)
        self.assertEqual(result.returncode, 1)
        self.assertIn("are not those that its checksums were recorded for", result.stdout)
        save_file(arrays, again, {k: v for k, v in metadata.items() if k != "checksums"})
        subprocess.run(check, capture_output=True, text=True, check=True)

    def test_an_archive_without_arrays_is_one_to_numpy(self):
        save_file({}, self.out / "none.safetensors", {"format": "pt"})
        for options in [], ["--compress", "deflate"]:
            convert(self.out / "none.safetensors", self.out / "none.npz", *options)
            with np.load(self.out / "none.npz") as archive:
                self.assertEqual(archive.files, [])
            convert(self.out / "none.npz", self.out / "back.safetensors")
            self.assertEqual(load_file(self.out / "back.safetensors"), {})

    def test_a_model_folder_holds_the_model(self):
        (self.out / "config.json").write_text(json.dumps({"model_type": "llama"}))
        convert(self.out, f"{self.out}/copy/")
        ours = load_file(self.out / "copy" / "model.safetensors")
        for name, array in self.arrays.items():
            self.same(ours[name], array, name)

    def test_a_name_that_is_not_text_is_refused(self):
        result = subprocess.run([SMELT, "inspect", b"a\xff.h5"], capture_output=True)
        self.assertEqual(result.returncode, 1)
        self.assertEqual(
            result.stderr.decode(),
            "Error: a\ufffd.h5: has a name that is not UTF-8 text; "
            "rename it, or link to it under another name\n",
        )


if __name__ == "__main__":
    unittest.main()
