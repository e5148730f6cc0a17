"""Coverage-guided fuzzing of the LoRA reader, with headers and keys that libFuzzer changes.

It is not part of the suite and needs `pip install atheris`.

    python tests/fuzz/fuzz_reader.py [corpus folder] -max_total_time=600

The corpus starts from one small file of every kind. Anything but a KLoraError is a crash; libFuzzer leaves
the header that caused it.
"""

import json
import math
import struct
import sys
import tempfile
from pathlib import Path

import atheris

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "core")]
with atheris.instrument_imports(include=["klora"]):
    from odd_files import KINDS, SIZES, STEMS, SUFFIX_OF, ask_for_everything

    from klora.errors import KLoraError

MOST_DATA = 1 << 16
SIDES = {"o": 8, "i": 8, "r": 2}
FOLDER = Path(tempfile.mkdtemp())


def seeds():
    """A header for each kind of module, in turn under each name."""
    for number, stem in enumerate(STEMS):
        for kind in KINDS:
            header, end = {}, 0
            for role, shape in kind.items():
                sides = [SIDES.get(side, side) for side in shape]
                suffixes = SUFFIX_OF[role]
                size = 4 * math.prod(sides)
                header[stem + suffixes[number % len(suffixes)]] = {
                    "dtype": "F32",
                    "shape": sides,
                    "data_offsets": [end, end + size],
                }
                end += size
            yield json.dumps(header).encode()


def one_input(header):
    """The file of this header, with as many bytes behind it as it asks for."""
    try:
        ends = [entry["data_offsets"][1] for entry in json.loads(header).values() if "data_offsets" in entry]
        size = min(MOST_DATA, max(0, *ends, 0))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        size = 64
    path = FOLDER / "fuzzed.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\x80?" * (int(size) // 4 + 1))
    with path.open("r+b") as file:
        file.truncate(8 + len(header) + int(size))
    try:
        ask_for_everything(path)
    except KLoraError as error:
        assert str(error).isprintable()


def main():
    folders = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    corpus = Path(folders[0]) if folders else FOLDER / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, header in enumerate(seeds()):
        (corpus / f"seed{number}").write_bytes(header)
    words = FOLDER / "words"
    texts = [
        *STEMS,
        *(suffix for suffixes in SUFFIX_OF.values() for suffix in suffixes),
        *SIZES,
        "__metadata__",
        "lora_adapter_metadata",
    ]
    words.write_text("".join(f'"{text}"\n' for text in texts))
    arguments = [argument for argument in sys.argv if argument.startswith("-")]
    atheris.Setup(
        [sys.argv[0], str(corpus), f"-dict={words}", "-timeout=5", "-max_len=20000", *arguments], one_input
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
