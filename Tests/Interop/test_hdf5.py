"""HDF5 files of Smelt read by h5py and h5dump, and those of h5py read by Smelt."""

import itertools
import json
import os
import shutil
import struct
import subprocess
import tempfile
import unittest
from pathlib import Path

import h5py
import hdf5plugin
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

SMELT = os.environ["SMELT"]

# Every safetensors type, its bits, and numpy's type of the dataset that holds it.
TYPES = {
    "BOOL": (8, "?"), "F4": (4, "u1"), "F6_E2M3": (6, "u1"), "F6_E3M2": (6, "u1"),
    "U8": (8, "u1"), "I8": (8, "i1"), "F8_E5M2": (8, "u1"), "F8_E4M3": (8, "u1"),
    "F8_E8M0": (8, "u1"), "F8_E4M3FNUZ": (8, "u1"), "F8_E5M2FNUZ": (8, "u1"),
    "I16": (16, "i2"), "U16": (16, "u2"), "F16": (16, "f2"), "BF16": (16, "f4"),
    "I32": (32, "i4"), "U32": (32, "u4"), "F32": (32, "f4"), "C64": (64, "c8"),
    "F64": (64, "f8"), "I64": (64, "i8"), "U64": (64, "u8"),
}  # fmt: skip
WAYS = [[], ["--layout", "tree"]] + [
    ["--compress", method] for method in ("zstd", "zstd:5", "deflate", "deflate:6")
]


def smelt(*arguments):
    return subprocess.run([SMELT, *map(str, arguments)], capture_output=True, text=True)


def write_safetensors(path, tensors, metadata):
    """`tensors` maps a name to its type, shape and bytes."""
    header = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {
            "dtype": dtype, "shape": shape, "data_offsets": [end, end + len(content)]
        }  # fmt: skip
        end += len(content)
    text = json.dumps(header, indent=1).encode()
    path.write_bytes(
        struct.pack("<Q", len(text)) + text + b"".join(t[2] for t in tensors.values())
    )


def sample():
    """All types in small and in large, empty and scalar tensors, a few difficult names."""
    random = np.random.default_rng(7)
    tensors = {}
    for dtype, (bits, _) in TYPES.items():
        for shape in ([4, 8], [0, 3], [], [3, 24000]):
            if shape == [] and bits < 8:
                continue
            size = int(np.prod(shape)) * bits // 8
            content = random.integers(0, 2 if dtype == "BOOL" else 256, size, np.uint8)
            tensors[f"m.{dtype}.{len(shape)}.{size}"] = (dtype, shape, content.tobytes())
    for name in ("a", "a/b", "", ".", "x//y", "é", "e\u0301", "__metadata__/header"):
        tensors[name] = ("U8", [1], b"\7")
    return tensors


class Folder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def convert(self, source, target, *options):
        result = smelt("convert", source, target, *options)
        self.assertEqual(result.returncode, 0, result.stderr)


class Written(Folder):
    def setUp(self):
        super().setUp()
        self.original = self.folder / "in.safetensors"
        self.tensors = sample()
        write_safetensors(self.original, self.tensors, {"format": "pt", "é": "ü" * 100000})

    def test_there_and_back_is_the_identical_file(self):
        for way in WAYS:
            with self.subTest(way=way):
                self.convert(self.original, self.folder / "a.h5", *way)
                self.convert(self.folder / "a.h5", self.folder / "b.safetensors")
                self.assertEqual(
                    self.original.read_bytes(), (self.folder / "b.safetensors").read_bytes()
                )

    def test_h5py_reads_every_value(self):
        for way in WAYS:
            with self.subTest(way=way):
                path = self.folder / "a.h5"
                self.convert(self.original, path, *way)
                found = {}

                def visit(name, node, found=found):
                    own = ("__metadata__/header", "__metadata__/checksums")
                    if isinstance(node, h5py.Dataset) and name not in own:
                        found[node.attrs.get("safetensors_name", name)] = node

                with h5py.File(path) as file:
                    file.visititems(visit)
                    self.assertEqual(set(found), set(self.tensors))
                    self.assertEqual(
                        dict(file["__metadata__"].attrs), {"format": "pt", "é": "ü" * 100000}
                    )
                    for name, (dtype, shape, content) in self.tensors.items():
                        self.check(found[name], dtype, shape, content)

    def check(self, dataset, dtype, shape, content):
        bits, numpy_type = TYPES[dtype]
        self.assertEqual(dataset.attrs["safetensors_dtype"], dtype)
        self.assertEqual(dataset.dtype, np.dtype(numpy_type))
        self.assertEqual(
            list(dataset.attrs.get("safetensors_shape", dataset.shape)), shape
        )
        values = dataset[...]
        if dtype == "BF16":
            # h5py makes a plain NaN of any.
            expected = np.frombuffer(content, ml_dtypes.bfloat16).astype("f4").reshape(shape)
            np.testing.assert_array_equal(values, expected)
        else:
            self.assertEqual(values.tobytes(), content)
        if bits >= 8:
            self.assertEqual(
                np.dtype(dataset.attrs["dtype"]).itemsize * 8, bits, dataset.attrs["dtype"]
            )

    def test_the_bytes_of_bfloat16_are_where_h5py_says(self):
        path = self.folder / "a.h5"
        self.convert(self.original, path)
        name = "m.BF16.2.144000"
        with h5py.File(path) as file:
            offset = file[name].id.get_offset()
        values = np.memmap(path, ml_dtypes.bfloat16, "r", offset, shape=(3, 24000))
        self.assertEqual(values.tobytes(), self.tensors[name][2])

    @unittest.skipUnless(shutil.which("h5dump"), "no h5dump")
    def test_h5dump_reads_the_file(self):
        for way in WAYS[:2] + WAYS[-1:]:
            self.convert(self.original, self.folder / "a.h5", *way)
            result = subprocess.run(
                ["h5dump", self.folder / "a.h5"], capture_output=True, text=True
            )
            self.assertEqual((result.returncode, result.stderr), (0, ""))
            self.assertIn('DATASET "header"', result.stdout)

    def test_an_edited_file_is_what_it_is_now(self):
        path = self.folder / "a.h5"
        self.convert(self.original, path)
        with h5py.File(path, "a") as file:
            for name in list(file):
                if name.startswith("m."):
                    del file[name]
            file["new"] = np.arange(6, dtype="i2").reshape(2, 3)
            file["__metadata__"].attrs["note"] = "edited"
        self.convert(path, self.folder / "b.safetensors")
        tensors = load_file(self.folder / "b.safetensors")
        self.assertEqual(len(tensors), 9)
        np.testing.assert_array_equal(tensors["new"], [[0, 1, 2], [3, 4, 5]])

    def test_checksums_are_of_what_they_describe(self):
        plain = self.folder / "plain.safetensors"
        save_file({name: np.arange(2, dtype=np.float32) for name in "pqr"}, plain)

        def replace(file, value):
            del file["p"]
            file["p"] = value

        edits = {
            "removed": lambda file: file.__delitem__("r"),
            "renamed": lambda file: file.move("p", "z"),
            "retyped": lambda file: replace(file, np.arange(2, dtype=np.float32).view(np.int32)),
            "reshaped": lambda file: replace(file, np.arange(2, dtype=np.float32).reshape(2, 1)),
        }
        for (kind, edit), way in itertools.product(edits.items(), WAYS):
            path = self.folder / "edited.h5"
            result = smelt("convert", plain, path, *way)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertEqual(smelt("verify", path, "--data").returncode, 0)
            with h5py.File(path, "r+") as file:
                edit(file)
            check = smelt("verify", path, "--data")
            self.assertEqual(check.returncode, 1, (kind, way))
            self.assertIn("are not those that its checksums were recorded for", check.stdout)
            result = smelt("convert", path, self.folder / "out.safetensors")
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertIn("its recorded checksums are of tensors of other names", result.stderr)


class Foreign(Folder):
    def test_every_way_of_h5py_to_store_an_array(self):
        random = np.random.default_rng(1)
        normal = lambda *shape: random.normal(size=shape)  # noqa: E731
        wanted = {}
        path = self.folder / "a.weights.h5"
        with h5py.File(path, "w") as file:

            def add(name, array, **options):
                file.create_dataset(name, data=array, **options)
                wanted[name.replace("/", ".")] = array

            add("layers/dense/vars/0", normal(100, 37).astype("f4"), compression="gzip")
            add(
                "layers/dense/vars/1", normal(100, 37).astype("f2"),
                compression="gzip", shuffle=True, fletcher32=True,
            )  # fmt: skip
            repeating = np.repeat(random.integers(0, 9, 50), 31).reshape(50, 31).astype("i4")
            add("lzf", repeating, compression="lzf")
            add("lzf shuffled", normal(70, 31, 3), compression="lzf", shuffle=True)
            zstd = hdf5plugin.Zstd(clevel=3)
            add("zstd", normal(300, 41).astype("f4"), chunks=(64, 16), **zstd)
            add("zstd shuffled", normal(300, 41), chunks=(64, 16), shuffle=True, **zstd)
            add(
                "growing", random.integers(0, 255, (5, 6, 7, 8)).astype("u1"),
                chunks=(2, 4, 3, 16), maxshape=(None, 6, 7, 16),
            )  # fmt: skip
            add("columns", random.integers(0, 255, (500, 6)).astype("u2"), chunks=(500, 1))
            add("bool", random.integers(0, 2, (500, 6)).astype("?"), chunks=(7, 6))
            add("checked", normal(33).astype("f4"), fletcher32=True, chunks=(5,))
            add("scalar", np.float64(3.25))
            add("empty", np.zeros((0, 3), "f4"), maxshape=(None, 3), chunks=(4, 3))
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_layout(h5py.h5d.COMPACT)
            wanted["compact"] = normal(3, 4).astype("f4")
            compact = h5py.h5d.create(
                file.id, b"compact", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((3, 4)),
                properties,
            )  # fmt: skip
            compact.write(h5py.h5s.ALL, h5py.h5s.ALL, wanted["compact"])
            file["tied"] = file["lzf"]
            wanted["tied"] = wanted["lzf"]
            file["a named type"] = np.dtype("f4")
        self.convert(path, self.folder / "b.safetensors")
        tensors = load_file(self.folder / "b.safetensors")
        self.assertEqual(set(tensors), set(wanted))
        for name, array in wanted.items():
            with self.subTest(name):
                self.assertEqual(tensors[name].dtype, array.dtype)
                self.assertEqual(tensors[name].shape, array.shape)
                self.assertEqual(tensors[name].tobytes(), array.tobytes())

    def refused(self, make, sentence):
        path = self.folder / "a.h5"
        with h5py.File(path, "w") as file:
            make(file)
        result = smelt("inspect", path)
        self.assertEqual(result.returncode, 1)
        self.assertEqual(result.stderr, f"Error: {path}: {sentence}\n")

    def test_what_leads_elsewhere_is_refused(self):
        def soft(file):
            file["there"] = h5py.SoftLink("/here")

        def outside(file):
            file["there"] = h5py.ExternalLink("/etc/passwd", "/")

        link = (
            'has at "there" a soft or external link, which Smelt does not follow; '
            "put the dataset itself there"
        )
        self.refused(soft, link)
        self.refused(outside, link)

        def external(file):
            file.create_dataset("x", (4,), "u1", external=[("/etc/passwd", 0, 4)])

        self.refused(
            external,
            'tensor "x": has its bytes in another file, which Smelt does not follow',
        )

        def virtual(file):
            layout = h5py.VirtualLayout((4,), "u1")
            layout[:] = h5py.VirtualSource("other.h5", "x", (4,))
            file.create_virtual_dataset("x", layout)

        self.refused(
            virtual, 'tensor "x": is a view of other datasets, which Smelt does not follow'
        )

        def loop(file):
            file["group/again"] = file["/"]

        self.refused(loop, 'has a group that holds itself, here as "group/again"')

    def test_what_is_no_tensor_is_refused(self):
        def holding(value):
            return lambda file: file.create_dataset("x", data=value)

        end = "which is no tensor's element type; convert it with h5py"
        for value, what in [
            (np.zeros(3, ">f4"), "big-endian 32-bit floats"),
            (np.zeros(3, ">i2"), "big-endian 16-bit integers"),
            (np.zeros(3, "c16"), "compounds of 2 fields"),
            (np.zeros(3, "V4"), "opaque bytes"),
        ]:
            self.refused(holding(value), f'tensor "x": holds {what}, {end}')
        self.refused(
            lambda file: file.create_dataset("x", data=h5py.Empty("f4")),
            'tensor "x": has no shape (its dataspace is null)',
        )

    def test_shapes_without_bytes_are_refused(self):
        self.refused(
            lambda file: file.create_dataset("x", (1 << 40,), "f4"),
            'tensor "x": has a shape of 4398046511104 bytes of which some were never written',
        )

        def part(file):
            file.create_dataset("x", (1 << 30, 8), "f4", chunks=(1 << 10, 8))[0] = 1

        self.refused(part, 'tensor "x": has a shape of 34359738368 bytes of which some were never written')

        def little(file):
            file.create_dataset("x", (1 << 26,), "f4", chunks=(1 << 20,), compression="gzip")[0] = 1

        self.refused(little, 'tensor "x": has a shape of 268435456 bytes of which some were never written')

    def read_back(self, path):
        self.convert(path, self.folder / "back.npz")
        return np.load(self.folder / "back.npz")

    def test_what_was_never_written_is_its_fill_value(self):
        path = self.folder / "a.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("late", (3, 5), "f4")
            file.create_dataset("late_filled", (7,), "f8", fillvalue=2.5)
            for name, options in {
                "chunks": dict(chunks=(10, 30)),
                "packed": dict(chunks=(7, 11), compression="gzip", shuffle=True),
                "tall": dict(chunks=(100, 1)),
            }.items():
                part = file.create_dataset(name, (100, 60), "i2", fillvalue=-3, **options)
                part[20:33, 15:40] = np.arange(13 * 25).reshape(13, 25)
                part[99, 59] = 7
            file.create_dataset("none", (100, 60), "u1", chunks=(10, 10))
            file.create_dataset("empty", (0, 4), "f4", fillvalue=1)
            expected = {name: node[...] for name, node in file.items()}
        found = self.read_back(path)
        self.assertEqual(set(found), set(expected))
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, name)

    def test_what_is_no_tensor_is_left_out_with_a_warning(self):
        path = self.folder / "a.h5"
        with h5py.File(path, "w") as file:
            file["w"] = np.arange(4.0)
            file["vocabulary"] = ["a", "b"]
            file["fixed"] = np.zeros(3, "S4")
            file["records"] = np.zeros(3, [("a", "f4"), ("b", "i4")])
            file.create_dataset("group/lists", (2,), h5py.vlen_dtype("i4"))
            file.create_dataset("to", data=file["w"].ref, dtype=h5py.ref_dtype)
        result = smelt("convert", path, self.folder / "b.npz")
        self.assertEqual(
            (result.returncode, result.stderr),
            (
                0,
                f'smelt: {path}: leaves out what is no tensor: "fixed" (strings), '
                '"group/lists" (lists of varying length), "records" (compounds of 2 fields), '
                '"to" (references), "vocabulary" (strings)\n',
            ),
        )
        self.assertEqual(list(np.load(self.folder / "b.npz")), ["w"])

    def test_one_object_may_have_two_names(self):
        path = self.folder / "a.h5"
        with h5py.File(path, "w") as file:
            file["layer/w"] = np.arange(6.0)
            file["tied"] = file["layer/w"]
            file["again"] = file["layer"]
        found = self.read_back(path)
        self.assertEqual(set(found), {"layer.w", "tied", "again.w"})
        for name in found:
            np.testing.assert_array_equal(found[name], np.arange(6.0))

        def doubling(file):
            group = file.create_group("end")
            for level in range(40):
                above = file.create_group(f"level{level}")
                above["left"] = above["right"] = group
                group = above

        with h5py.File(path, "w") as file:
            doubling(file)
        result = smelt("inspect", path)
        self.assertEqual(result.returncode, 1)
        self.assertIn("has a group that appears more than 16 times, here as", result.stderr)

    def test_chunks_listed_in_each_way(self):
        # One chunk, a fixed and an extensible array, a B-tree of version 2; h5py's "latest" of
        # HDF5 2.0 has a layout that older libraries do not know.
        array = np.arange(4000, dtype=np.float32).reshape(50, 80)
        shapes = [
            {"chunks": (50, 80)}, {"chunks": (7, 9)}, {"chunks": (7, 9), "maxshape": (None, 80)},
            {"chunks": (7, 9), "maxshape": (None, None)},
        ]  # fmt: skip
        filters = [
            {}, {"compression": "gzip", "shuffle": True}, {"compression": "lzf"},
            {"fletcher32": True},
        ]  # fmt: skip
        for version in ("v108", "v110", "v112"):
            path = self.folder / f"{version}.h5"
            with h5py.File(path, "w", libver=version) as file:
                for i, (shape, filter) in enumerate(itertools.product(shapes, filters)):
                    file.create_dataset(f"t{i}", data=array, **shape, **filter)
            found = self.read_back(path)
            self.assertEqual(len(found), 16)
            for name, read in found.items():
                np.testing.assert_array_equal(read, array, f"{name} of {version}")
        path = self.folder / "latest.h5"
        with h5py.File(path, "w", libver="latest") as file:
            file.create_dataset("t", data=array, chunks=(7, 9), compression="gzip")
        result = smelt("inspect", path)
        if h5py.version.hdf5_version_tuple >= (2, 0, 0) and result.returncode:
            self.assertEqual(
                (result.returncode, result.stderr),
                (
                    1,
                    f'Error: {path}: tensor "t": is stored in a way that only libhdf5 2.0 and '
                    'later read, as h5py writes it with libver="latest"; write it again with '
                    'libver="v114", or without libver\n',
                ),
            )
        else:
            np.testing.assert_array_equal(self.read_back(path)["t"], array)

    def test_files_behind_a_user_block(self):
        random = np.random.default_rng(6)
        arrays = {"w": random.standard_normal((30, 40)), "c": random.standard_normal((300, 200))}
        for version in (("earliest", "v108"), ("v108", "v108"), ("v110", "v110")):
            for block in (512, 1 << 16):
                path, out = self.folder / "a.h5", self.folder / "out.safetensors"
                with h5py.File(path, "w", libver=version, userblock_size=block) as file:
                    file["w"] = arrays["w"]
                    file.create_dataset("c", data=arrays["c"], chunks=(7, 9), compression="gzip")
                path.write_bytes(random.bytes(block) + path.read_bytes()[block:])
                result = smelt("convert", path, out)
                if version[0] == "v110":
                    self.assertEqual(
                        (result.returncode, result.stderr),
                        (
                            1,
                            f'Error: {path}: tensor "c": has chunks behind a user block, listed in '
                            "a way that Smelt does not read there; take the block off with "
                            "'h5unjam --delete -i FILE -o NEW.h5'\n",
                        ),
                    )
                    continue
                self.assertEqual(result.stderr, "")
                loaded = load_file(out)
                for name, array in arrays.items():
                    np.testing.assert_array_equal(loaded[name], array)

    def test_datasets_of_thousands_of_chunks(self):
        # The first two are listed by a B-tree of version 1, in headers of version 1 and 2; the
        # last by another index. 30,000 chunks make trees three levels high.
        array = np.random.default_rng(5).integers(0, 1 << 16, (501, 249), np.uint16)
        for version in (("earliest", "v108"), ("v108", "v108"), ("v110", "v110")):
            path = self.folder / f"{version[0]}.h5"
            with h5py.File(path, "w", libver=version) as file:
                side = 8 if version[0] == "v110" else 2
                file.create_dataset("w", data=array, chunks=(side, side), compression="gzip")
                file.create_dataset("columns", data=array, chunks=(501, 1))
                small = array[:100, :100]
                file.create_dataset("cells", data=small, chunks=(2, 2), maxshape=(None, None))
                part = file.create_dataset("part", (4000,), "i4", chunks=(2,), fillvalue=9)
                part[500:3000] = np.arange(2500)
                for number in range(40):  # The header is continued elsewhere.
                    part.attrs[f"note {number}"] = "x" * 100
                expected = {name: node[...] for name, node in file.items()}
            found = self.read_back(path)
            self.assertEqual(set(found), set(expected))
            for name, wanted in expected.items():
                np.testing.assert_array_equal(found[name], wanted, f"{name} of {version}")

    def test_narrow_chunks_of_a_tall_matrix(self):
        path = self.folder / "a.h5"
        array = np.random.default_rng(3).integers(0, 1 << 16, (60_000, 300), np.uint16)
        with h5py.File(path, "w") as file:
            file.create_dataset("w", data=array, chunks=(60_000, 7), compression="lzf")
        found = self.read_back(path)
        np.testing.assert_array_equal(found["w"], array)

    def test_a_filter_of_others_is_named(self):
        path = self.folder / "a.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("x", data=np.zeros(9), **hdf5plugin.LZ4())
        result = smelt("inspect", path)
        self.assertEqual(result.returncode, 1)
        # Between the two is what the plugin calls itself.
        self.assertIn('tensor "x": is compressed by filter 32004, "HDF5 lz4', result.stderr)
        self.assertIn(
            ", which Smelt does not know; write it again with h5py without that filter\n",
            result.stderr,
        )

    def test_a_damaged_chunk_is_an_error(self):
        path = self.folder / "a.h5"
        for options in (
            dict(compression="gzip"), dict(compression="lzf"), dict(fletcher32=True),
            dict(hdf5plugin.Zstd()),
        ):  # fmt: skip
            with h5py.File(path, "w") as file:
                file.create_dataset("x", data=np.arange(10000) % 77, chunks=(10000,), **options)
                chunk = file["x"].id.get_chunk_info(0)
            with open(path, "r+b") as file:
                file.seek(chunk.byte_offset + 2)
                file.write(b"\xff\xff\xff\xff\xff\xff\xff")
            result = smelt("convert", path, self.folder / "b.safetensors")
            self.assertEqual(result.returncode, 1)
            self.assertIn(f'Error: {path}: tensor "x": has a ', result.stderr)
            self.assertEqual([p.name for p in self.folder.iterdir()], ["a.h5"])


if __name__ == "__main__":
    unittest.main()
