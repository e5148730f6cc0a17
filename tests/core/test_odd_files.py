"""Whatever a file holds, reading it ends soon and either works or says in one sentence what is wrong."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from odd_files import ask_for_everything, odd_files
from safetensors.torch import save_file
from torch import Tensor

from klora.analysis import analyze
from klora.core.deltas import dense
from klora.core.lora_file import read_lora
from klora.core.methods import SUBJECT
from klora.core.scores import profile_file, score_pair
from klora.errors import KLoraError, LoraFileError, PairError
from klora.settings import Settings

HANGS_AFTER = 60
STEM = "lora_unet_middle_block_1_proj_in"
UP, DOWN = f"{STEM}.lora_up.weight", f"{STEM}.lora_down.weight"
LAYER = "middle_block.1.proj_in"


@contextmanager
def soon() -> Iterator[None]:
    """Ends what hangs, by this process' own time, so that a busy machine does not matter.

    Without POSIX timers it does nothing.
    """
    if not hasattr(signal, "setitimer"):
        yield
        return

    def too_long(*_: object) -> None:
        raise AssertionError(f"hangs: more than {HANGS_AFTER} s of the processor")

    before = signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANGS_AFTER)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(content=odd_files())
def test_an_odd_file_is_read_or_refused_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "odd.safetensors"
    path.write_bytes(content)
    try:
        with soon():
            ask_for_everything(path)
    except KLoraError as error:
        assert str(error).isprintable()
        assert "odd.safetensors" in str(error)


def said(path: Path) -> str:
    """The sentence with which a file is refused."""
    with soon(), pytest.raises(LoraFileError) as caught:
        ask_for_everything(path)
    sentence = str(caught.value)
    assert sentence.isprintable()
    assert len(sentence) < 1000
    return sentence


def with_header(path: Path, header: str | dict[str, Any], tensors: bytes = b"") -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + tensors)
    return path


HEADERS = {
    "brackets without end": "{" + '"a":[' * 100_000,
    "brackets nested deeply": '{"a":' + "[" * 50_000 + "]" * 50_000 + "}",
    "a shape of infinity": '{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 0]}}',
    "offsets of infinity": '{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 1e400]}}',
    "half a surrogate pair": '{"\\ud800": {"dtype": "F32", "shape": [], "data_offsets": [0, 0]}}',
    "a name with a line break": '{"a\\n\\u0007": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
    "a name of a megabyte": f'{{"{"x" * 2**20}": {{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}}}',
    "overlapping tensors": json.dumps(
        {key: {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]} for key in (UP, DOWN)}
    )
    + "        ",
    "a shape beyond any memory": json.dumps(
        {UP: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}}
    ),
    "a hole before the first": json.dumps({UP: {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}})
    + "        ",
}


@pytest.mark.parametrize("fault", HEADERS)
def test_an_odd_header_is_refused(tmp_path: Path, fault: str) -> None:
    assert "odd.safetensors" in said(with_header(tmp_path / "odd.safetensors", HEADERS[fault], bytes(16)))


def saved(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: value.clone() for key, value in tensors.items()}, path, metadata)
    return path


GOOD = {UP: torch.ones(8, 2), DOWN: torch.ones(2, 8)}
TENSORS = {
    "two thin factors of a matrix without end": (
        {UP: torch.ones(2**20, 1), DOWN: torch.ones(1, 2**20)},
        "1048576 × 1048576",
    ),
    "a Tucker core that asks for one on the way": (
        {
            UP: torch.ones(1, 2**18),
            f"{STEM}.lora_mid.weight": torch.ones(2**18, 1, 1, 1),
            DOWN: torch.ones(1, 2**18),
        },
        "262144 × 262144",
    ),
    "a Kronecker product of two large ones": (
        {f"{STEM}.lokr_w1": torch.ones(1024, 1024), f"{STEM}.lokr_w2": torch.ones(1024, 1024)},
        "1048576 ×",
    ),
    "a Tucker core of two dimensions": (
        {**GOOD, f"{STEM}.lora_mid.weight": torch.ones(2, 2)},
        "not a Tucker core",
    ),
    "a bias of another height": (
        {**GOOD, f"{STEM}.diff_b": torch.ones(3)},
        "has 3 numbers where 8 are needed",
    ),
    "a magnitude of another size": (
        {**GOOD, f"{STEM}.dora_scale": torch.ones(3)},
        "has 3 numbers where 8 are needed",
    ),
    "a bias of a fused layer that no cut fits": (
        {
            **GOOD,
            "lora_unet_double_blocks_0_img_attn_qkv.diff_b": torch.ones(4),
            **{f"lora_unet_single_blocks_{i}_linear2.diff": torch.ones(2, 2) for i in range(3)},
        },
        "cannot be cut",
    ),
    "numbers beyond float64": (
        {f"{STEM}.hada_w{n}_{x}": torch.full((2, 2), 3e38) for n in "12" for x in "ab"}
        | {f"{STEM}.alpha": torch.tensor(3e38)},
        "too large",
    ),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_odd_tensors_are_refused(tmp_path: Path, fault: str) -> None:
    tensors, names = TENSORS[fault]
    assert names in said(saved(tmp_path / "odd.safetensors", tensors))


@pytest.mark.parametrize(
    "pattern",
    [{"(a+)+$": 1}, {"(": 1}, ["proj_in"], {"proj_in": "high"}, {"proj_in": None}, {"proj_in": 1e300}],
)
def test_the_headers_alphas_are_names_and_numbers(tmp_path: Path, pattern: object) -> None:
    """PEFT takes them for regular expressions, which can run for ever."""
    stem = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{stem}.lora_A.weight": torch.ones(2, 8), f"{stem}.lora_B.weight": torch.ones(8, 2)}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 4, "unet.alpha_pattern": pattern})}
    assert "alpha" in said(saved(tmp_path / "odd.safetensors", tensors, metadata))


@pytest.mark.parametrize(
    "pattern",
    [
        "proj_in",
        "mid_block.attentions.0.proj_in",
        "^mid_block.attentions.0.proj_in$",
        r"attentions\.0\.proj_in",
    ],
)
def test_the_headers_alphas_hold_for_the_modules_they_name(tmp_path: Path, pattern: str) -> None:
    stem = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{stem}.lora_A.weight": torch.ones(2, 8), f"{stem}.lora_B.weight": torch.ones(8, 2)}
    metadata = {
        "lora_adapter_metadata": json.dumps(
            {"unet.lora_alpha": 4, "unet.alpha_pattern": {pattern: 6, "in": 1}}
        )
    }
    assert read_lora(saved(tmp_path / "good.safetensors", tensors, metadata)).layers[LAYER].scale == 3


def test_a_hundred_thousand_keys_are_soon_read(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    keys = {f"lora_unet_input_blocks_{i}_of_{i}.lora_up.weight": entry for i in range(100_000)}
    assert "odd.safetensors" in said(with_header(tmp_path / "odd.safetensors", keys))
    known = {
        UP: {"dtype": "F32", "shape": [8, 2], "data_offsets": [0, 64]},
        DOWN: {"dtype": "F32", "shape": [2, 8], "data_offsets": [64, 128]},
    }
    with soon():
        lora = read_lora(
            with_header(tmp_path / "many.safetensors", {**known, **keys}, struct.pack("<32f", *[1.0] * 32))
        )
    assert len(lora.unknown_keys) == 100_000


def test_a_norm_that_a_full_difference_changes(tmp_path: Path) -> None:
    lora = read_lora(
        saved(tmp_path / "good.safetensors", {**GOOD, "lora_unet_middle_block_1_norm.diff": torch.ones(8)})
    )
    with lora.open() as reader:
        change = reader.norm("middle_block.1.norm")
    assert change.weight is not None
    assert change.weight.tolist() == [1.0] * 8
    assert change.bias is None


def test_a_rank_larger_than_the_matrix_counts_in_k_up_to_all_entries(tmp_path: Path) -> None:
    lora = read_lora(saved(tmp_path / "wide.safetensors", {UP: torch.randn(4, 50), DOWN: torch.randn(50, 4)}))
    (score,) = score_pair(lora, lora).layers
    assert (score.rank_subject, score.k) == (50, 16)
    assert score.subject_score == pytest.approx(score.subject_abs_sum)


def test_denormal_numbers_are_numbers(tmp_path: Path) -> None:
    lora = read_lora(
        saved(
            tmp_path / "small.safetensors", {UP: torch.full((8, 2), 1e-44), DOWN: torch.full((2, 8), 1e-44)}
        )
    )
    assert profile_file(lora)[LAYER].abs_sum == pytest.approx(64 * 2 * float(torch.tensor(1e-44)) ** 2)


NOTHING = {
    "down is zero": {UP: torch.ones(8, 2), DOWN: torch.zeros(2, 8)},
    "network alpha is zero": {**GOOD, f"{STEM}.alpha": torch.tensor(0.0)},
}


@pytest.mark.parametrize("of", ["subject", "style", "both"])
@pytest.mark.parametrize("why", NOTHING)
def test_gamma_of_a_lora_that_changes_nothing_is_refused(tmp_path: Path, why: str, of: str) -> None:
    """γ of eq. (9) would be 0, infinite or 0/0."""
    nothing, good = (
        saved(tmp_path / "nothing.safetensors", NOTHING[why]),
        saved(tmp_path / "good.safetensors", GOOD),
    )
    subject, style = (nothing if of in (role, "both") else good for role in ("subject", "style"))
    with pytest.raises(PairError, match=r"nothing\.safetensors. changes nothing"):
        analyze(subject, style, Settings(), steps=4)


def test_a_layer_that_neither_changes_stays_with_the_subject(tmp_path: Path) -> None:
    other = STEM.replace("in", "out")
    zero = {f"{other}.lora_up.weight": torch.ones(8, 2), f"{other}.lora_down.weight": torch.zeros(2, 8)}
    path = saved(tmp_path / "half.safetensors", {**GOOD, **zero})
    plan = analyze(path, path, Settings(), steps=4).plan
    assert (plan.strengths[:, plan.layer_names.index("middle_block.1.proj_out")] == SUBJECT).all()


def test_magnitudes_too_far_apart_to_be_balanced_are_refused(tmp_path: Path) -> None:
    def product(value: float) -> dict[str, Tensor]:
        return {f"{STEM}.hada_w{n}_{x}": torch.full((8, 8), value) for n in "12" for x in "ab"} | {
            f"{STEM}.alpha": torch.tensor(value)
        }

    large, small = (
        saved(tmp_path / "large.safetensors", product(1e30)),
        saved(tmp_path / "small.safetensors", product(1e-44)),
    )
    for pair in ((large, small), (small, large)):
        with pytest.raises(PairError, match="differ so much in magnitude"):
            analyze(*pair, Settings(), steps=4)


DTYPES = [
    name
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
    if hasattr(torch, name)
]


@pytest.mark.parametrize("down", DTYPES)
@pytest.mark.parametrize("up", DTYPES)
def test_factors_of_any_two_types_of_numbers_are_raised_to_float32_first(
    tmp_path: Path, up: str, down: str
) -> None:
    torch.manual_seed(0)
    factors = {UP: torch.randn(8, 2).to(getattr(torch, up)), DOWN: torch.randn(2, 8).to(getattr(torch, down))}
    lora = read_lora(
        saved(
            tmp_path / "mixed.safetensors", {**factors, f"{STEM}.alpha": torch.tensor(2, dtype=torch.float16)}
        )
    )
    with lora.open() as reader:
        assert torch.equal(dense(reader(LAYER)), factors[UP].float() @ factors[DOWN].float())


# Files of PyTorch


def test_a_pickled_file_in_a_tar_archive_is_not_opened(tmp_path: Path) -> None:
    """torch before 2.6 unpickles its parts without weights_only."""
    with tarfile.open(tmp_path / "odd.pt", "w") as archive:
        entry = tarfile.TarInfo("pickle")
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"evil"))
    assert "can run code" in said(tmp_path / "odd.pt")


PICKLED = {
    "one number repeated without end": torch.ones(1, 1).expand(2**20, 2**20),
    "sparse": torch.ones(2, 2).to_sparse(),
    "quantized": torch.quantize_per_tensor(torch.ones(2, 2), 1.0, 0, torch.qint8),
    "without storage": torch.ones(2, 2, device="meta"),
}


@pytest.mark.parametrize("kind", PICKLED)
def test_pickled_tensors_that_are_not_stored_as_plain_numbers_are_refused(tmp_path: Path, kind: str) -> None:
    torch.save({UP: PICKLED[kind], DOWN: torch.ones(2, 8)}, tmp_path / "odd.pt")
    assert "odd.pt" in said(tmp_path / "odd.pt")


def test_a_pickled_file_that_trains_on_is_read(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {key: torch.nn.Parameter(value) for key, value in GOOD.items()}}, tmp_path / "good.pt"
    )
    ask_for_everything(tmp_path / "good.pt")


def test_a_state_dict_that_is_none_holds_no_tensors(tmp_path: Path) -> None:
    torch.save({"state_dict": [1, 2]}, tmp_path / "odd.pt")
    assert "no tensors by name" in said(tmp_path / "odd.pt")


# Names and places


@pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8 are Linux' own")
@pytest.mark.parametrize("name", [b"caf\xe9.safetensors", b"caf\xe9.pt"])
def test_a_file_name_that_is_not_utf8_is_to_be_changed(tmp_path: Path, name: bytes) -> None:
    path = Path(os.fsdecode(bytes(tmp_path) + b"/" + name))
    saved(tmp_path / "good.safetensors", GOOD).replace(path)
    sentence = said(path)
    assert r"caf\udce9" in sentence
    assert "rename the file" in sentence


def test_names_of_tensors_are_told_in_characters_that_can_be_printed(tmp_path: Path) -> None:
    path = saved(tmp_path / "good.safetensors", {**GOOD, "line\nbreak" + "x" * 2**20: torch.ones(1)})
    (warning,) = analyze(path, path, Settings(), steps=2).warnings[:1]
    assert warning.isprintable()
    assert len(warning) < 1000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX' own")
def test_links_in_circles_pipes_and_devices_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "circle.safetensors").symlink_to(tmp_path / "circle.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "zero.ckpt").symlink_to("/dev/zero")
    for path in tmp_path.iterdir():
        assert path.name in said(path)


def test_a_rewritten_file_holds_no_numbers_that_no_lora_has(tmp_path: Path) -> None:
    """In PyTorch's format, as older versions of safetensors cannot write such numbers."""
    bias = {UP.replace("lora_up.weight", "diff_b"): torch.ones(8, dtype=torch.complex64)}
    torch.save({**GOOD, **bias}, tmp_path / "odd.pt")
    assert 'of "odd.pt" holds complex64 numbers' in said(tmp_path / "odd.pt")


def test_a_magnitude_that_is_one_number_is_rewritten(tmp_path: Path) -> None:
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    ends = {
        "lora_A.weight": torch.ones(2, 8),
        "lora_B.weight": torch.ones(8, 2),
        "lora_magnitude_vector": torch.tensor(3.0),
    }
    ask_for_everything(
        saved(tmp_path / "odd.safetensors", {f"{layer}.{end}": tensor for end, tensor in ends.items()})
    )


def test_a_dora_scale_that_is_one_number_is_rewritten(tmp_path: Path) -> None:
    ask_for_everything(
        saved(
            tmp_path / "odd.safetensors",
            {**GOOD, UP.replace("lora_up.weight", "dora_scale"): torch.tensor(3.0)},
        )
    )
