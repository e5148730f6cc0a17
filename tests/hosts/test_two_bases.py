"""Images with two checkpoints of different base models in turn, each with a pair of its own."""

import os
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from facts import FIELDS, kind_of
from host import same, tag
from safetensors.torch import load_file

from klora.core.lora_file import read_lora


@dataclass(frozen=True)
class Other:
    """A checkpoint of another base model.

    Attributes:
        base: the key of its family.
        pair: two LoRAs that fit it.
    """

    checkpoint: str
    base: str
    pair: dict[str, str]

    @property
    def fields(self):
        """Of requests while it is loaded."""
        return FIELDS[kind_of(self.base)]

    @property
    def request(self):
        """The same, whatever checkpoint is loaded."""
        return {**self.fields, "override_settings": {"sd_model_checkpoint": self.checkpoint}}


@contextmanager
def of_the_other_standin(host, standin, standin_sd15):
    """What the other stand-in has, as files of this one."""
    other = standin_sd15 if host is standin else standin
    first = host.folder / "models" / "Stable-diffusion" / host.checkpoint
    theirs = other.folder / "models" / "Stable-diffusion" / other.checkpoint
    path = first.with_name("klora_test_two_bases.safetensors")
    written = [path, path.with_suffix(".yaml")]
    loras = {f"klora_test_{role}": load_file(other.file(name)) for role, name in other.pair.items()}
    try:
        path.write_bytes(theirs.read_bytes())
        written[1].write_bytes(theirs.with_suffix(".yaml").read_bytes())
        host.call("/sdapi/v1/refresh-checkpoints", {})
        with host.more_loras(**loras):
            yield Other(path.name, other.base, {role: f"klora_test_{role}" for role in other.pair})
    finally:
        for file in written:
            file.unlink(missing_ok=True)
        host.call("/sdapi/v1/refresh-checkpoints", {})


@pytest.fixture(scope="module")
def other(host, standin, standin_sd15):
    """Of a running host: what KLORA_OTHER_BASE and KLORA_OTHER_PAIR name."""
    if host in (standin, standin_sd15):
        with of_the_other_standin(host, standin, standin_sd15) as found:
            yield found
        return
    if not os.environ.get("KLORA_OTHER_PAIR"):
        pytest.skip("name a checkpoint of another base model in KLORA_OTHER_BASE, and KLORA_OTHER_PAIR")
    pair = dict(zip(("subject", "style"), os.environ["KLORA_OTHER_PAIR"].split(","), strict=True))
    base = read_lora(host.file(pair["subject"])).base
    yield Other(os.environ["KLORA_OTHER_BASE"], base, pair)


@pytest.fixture(scope="module")
def plain(host, other):
    """An image of the checkpoint after it was loaded again.

    In A1111 its very first load differs from later ones by a grey level, without K-LoRA too.
    """
    host.image(**other.request)
    return host.image()


def test_each_has_its_own_images_whatever_was_made_before(host, plain, fused, other):
    plain_there = host.image(**other.request)
    fused_there = host.image(other.pair, **other.request)
    assert not same(plain_there, fused_there)
    assert same(host.image(host.pair), fused)
    assert same(host.image(other.pair, **other.request), fused_there)
    for pair, fields in ((other.pair, other.request), (host.pair, {})):
        tags = tag(pair["subject"]), tag(pair["style"])
        for method, text in {"Direct merge": "".join(tags), "Subject only": tags[0]}.items():
            by_tag = host.image(prompt="a cat" + text, **fields)
            assert same(host.image({**pair, "method": method}, **fields), by_tag)
    assert same(host.image(**other.request), plain_there)
    with host.options(sd_model_checkpoint=other.checkpoint):
        assert same(host.image(other.pair, **other.fields), fused_there)
        assert same(host.image(**other.fields), plain_there)
    assert same(host.image(host.pair), fused)


@pytest.mark.parametrize("own", [True, False])
def test_neither_takes_the_others_pair(host, plain, other, own):
    pair, base, fields = (host.pair, other.base, other.request) if own else (other.pair, host.base, {})
    if all(base in read_lora(host.file(name)).families for name in pair.values()):
        pytest.skip("these files may be for either")
    status, answer = host.request(pair, **fields)
    assert status == 422
    assert "and the loaded checkpoint is" in answer["detail"]
    assert "load a checkpoint of" in answer["detail"]
