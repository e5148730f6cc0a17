"""An image's parameters restore the controls, through the host's quoting, for any settings and file names."""

import dataclasses

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from webui_host import Infotext, NetworkOnDisk

from klora.hosts.webui import HOST
from klora.settings import DEFAULTS, SPECS, Settings
from klora.webui import infotext

NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=20
) | st.sampled_from(
    [
        "512x768",
        'a "quoted", name: v1.5',
        '"',
        '""',
        "50% ink",
        "%41",
        "back\\slash",
        "comma,",
        ":",
        "名前",
        "\u3000wide",
        "K-LoRA style: x",
        "None",
    ]
)
ANY_FIELD = {
    name: st.sampled_from(spec.choices)
    if spec.kind == "choice"
    else st.floats(*spec.bounds) | st.sampled_from([float(spec.bounds[0]), *spec.choices])
    for name, spec in SPECS.items()
    if spec.kind in ("choice", "number")
}


def hosted(name):
    return next(lora for lora in HOST.loras() if lora.name == name)


def restored(written):
    """The settings that the controls hold after pasting."""
    pasted = Infotext.read(
        Infotext.write({"Steps": 20, "Sampler": "Euler a", **written, "Version": "v1.10.1"})
    )
    assert pasted["Version"] == "v1.10.1"
    return {name: infotext.Restore(name)(pasted) for name in SPECS}


@hypothesis_settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300
)
@given(values=st.fixed_dictionaries({}, optional=ANY_FIELD), subject=NAMES, style=NAMES)
def test_any_settings_come_back(networks, values, subject, style):
    networks.put(NetworkOnDisk(subject, digest="a" * 12), NetworkOnDisk(style, digest="b" * 12))
    settings = dataclasses.replace(Settings.parse(values), enabled=True, subject=subject, style=style)
    controls = restored(infotext.parameters(settings, hosted(subject), hosted(style)))
    chosen = tuple(hosted(name).chosen_as for name in (subject, style))
    assert (controls.pop("subject"), controls.pop("style")) == chosen
    assert (
        dataclasses.replace(
            Settings.parse(controls | {"enabled": False}), enabled=True, subject=subject, style=style
        )
        == settings
    )


@pytest.fixture
def pair(networks):
    networks.put(NetworkOnDisk("dog", digest="d0"), NetworkOnDisk("ink", digest="1e"))
    return hosted("dog"), hosted("ink")


def test_only_what_differs_is_written(pair):
    assert infotext.parameters(Settings(enabled=True, subject="dog", style="ink"), *pair) == {
        "K-LoRA subject": "dog",
        "K-LoRA subject hash": "d0",
        "K-LoRA style": "ink",
        "K-LoRA style hash": "1e",
    }
    written = infotext.parameters(
        Settings(enabled=True, subject="dog", style="ink", beta=0.5, gamma="off", method="Random"), *pair
    )
    assert {
        k: v for k, v in written.items() if k not in ("K-LoRA subject", "K-LoRA style") and "hash" not in k
    } == {
        "K-LoRA method": "Random",
        "K-LoRA beta": "0.5",
        "K-LoRA gamma": "off",
    }


def test_an_alias_is_written_as_the_name(pair):
    assert infotext.parameters(Settings(subject="DOG", style="ink"), *pair)["K-LoRA subject"] == "dog"


def test_no_hash_is_written_where_the_host_does_no_hashing(networks):
    networks.put(NetworkOnDisk("dog"), NetworkOnDisk("ink"))
    assert list(infotext.parameters(Settings(), hosted("dog"), hosted("ink"))) == [
        "K-LoRA subject",
        "K-LoRA style",
    ]


def test_no_hash_is_written_where_the_user_wants_none(pair):
    assert list(infotext.parameters(Settings(), *pair, hashes=False)) == ["K-LoRA subject", "K-LoRA style"]


def test_values_have_the_types_of_their_controls(pair):
    controls = restored(
        infotext.parameters(Settings(enabled=True, subject="dog", style="ink", alpha=2), *pair)
    )
    for name, value in controls.items():
        assert type(value) is type(infotext.control_value(name, DEFAULTS[name])), name


def test_an_image_without_klora_only_switches_it_off(pair):
    assert restored({}) == {name: False if name == "enabled" else None for name in SPECS}


def test_missing_parameters_restore_the_defaults(pair):
    controls = restored({"K-LoRA subject": "dog", "K-LoRA style": "ink"})
    assert controls == {name: infotext.control_value(name, value) for name, value in DEFAULTS.items()} | {
        "enabled": True,
        "subject": "dog",
        "style": "ink",
    }


@pytest.mark.parametrize("hashed", [True, False])
def test_a_renamed_lora_is_found_by_its_hash(networks, hashed):
    networks.put(NetworkOnDisk("dog_final", digest="d0", hashed=hashed), NetworkOnDisk("ink", digest="1e"))
    assert (
        restored({"K-LoRA subject": "dog", "K-LoRA subject hash": "d0", "K-LoRA style": "ink"})["subject"]
        == "dog_final"
    )


def test_names_that_were_swapped_since_are_told_apart_by_hash(networks):
    networks.put(NetworkOnDisk("dog", digest="1e"), NetworkOnDisk("ink", digest="d0"))
    controls = restored(
        {
            "K-LoRA subject": "dog",
            "K-LoRA subject hash": "d0",
            "K-LoRA style": "ink",
            "K-LoRA style hash": "1e",
        }
    )
    assert (controls["subject"], controls["style"]) == ("ink", "dog")


def test_a_lora_that_is_gone_keeps_its_name_in_the_control(pair):
    assert (
        restored({"K-LoRA subject": "gone", "K-LoRA subject hash": "ff", "K-LoRA style": "ink"})["subject"]
        == "gone"
    )


def test_a_lora_hidden_by_one_of_the_same_name_gets_a_sentence(pair, capsys):
    pasted = {"K-LoRA subject": "dog", "K-LoRA subject hash": "0ther", "K-LoRA style": "ink"}
    assert restored(pasted)["subject"] == "dog"
    assert (
        "'dog' of the pasted text (hash 0ther) is not the one that the WebUI lists under this name (hash d0)"
        in capsys.readouterr().out
    )


def test_a_value_of_another_version_leaves_the_control_alone_and_gets_a_sentence(pair, capsys):
    controls = restored(
        {"K-LoRA subject": "dog", "K-LoRA style": "ink", "K-LoRA method": "Oracle", "K-LoRA alpha": "2"}
    )
    assert controls["method"] is None
    assert controls["alpha"] == 2
    assert "Oracle" in capsys.readouterr().out


def test_the_method_of_an_earlier_version_is_restored_from_its_earlier_name(pair):
    params = {"K-LoRA subject": "dog", "K-LoRA style": "ink", "K-LoRA selector": "Fixed"}
    assert restored(params)["method"] == "Fixed"
    assert restored({**params, "K-LoRA method": "Random"})["method"] == "Random"


def test_the_same_control_of_both_tabs_is_paired():
    assert infotext.Restore("alpha") == infotext.Restore("alpha") != infotext.Restore("beta")
