"""LoRAs are found by every name people use for them, and a wrong name says which ones are near."""

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from webui_host import NetworkOnDisk

from klora.core import file_state
from klora.core.score_cache import ScoreCache
from klora.errors import LoraFileError, PairError, SettingsError
from klora.hosts import lora_registry
from klora.hosts.webui import HOST
from klora.webui import loras


@pytest.fixture(autouse=True)
def registry(networks, shared):
    return networks.put(
        NetworkOnDisk("zebra", digest="aa11"),
        NetworkOnDisk("My Dog v2", folder="/models/Lora/pets", alias="sks_dog", digest="bb22", hashed=False),
        NetworkOnDisk("Ink", folder="/models/Lora/styles/old", alias="ink_style", digest="cc33"),
    )


def test_listed_by_name_in_any_case():
    assert [lora.name for lora in HOST.loras()] == ["Ink", "My Dog v2", "zebra"]
    assert [lora.shorthash for lora in HOST.loras()] == ["cc33", "", "aa11"]


@pytest.mark.parametrize(
    "name",
    [
        "My Dog v2",
        "sks_dog",
        "my dog V2",
        "SKS_DOG",
        "My Dog v2.safetensors",
        "pets/My Dog v2",
        "pets\\my dog v2.safetensors",
        " My Dog v2 ",
    ],
)
def test_found_by(name):
    assert loras.find(name, "subject").name == "My Dog v2"


def test_a_file_name_with_dots_is_not_taken_for_an_extension(networks):
    networks.put(NetworkOnDisk("dog.v1"), NetworkOnDisk("dog.v2"))
    assert loras.find("DOG.V2", "subject").name == "dog.v2"


def test_a_name_comes_before_another_file_with_that_alias(networks):
    networks.put(NetworkOnDisk("dog"), NetworkOnDisk("cat", alias="dog"))
    assert loras.find("dog", "subject").name == "dog"


def test_an_ambiguous_alias_is_refused_with_the_names(networks):
    networks.put(NetworkOnDisk("dog_1", alias="dog"), NetworkOnDisk("dog_2", alias="dog"))
    with pytest.raises(SettingsError, match=r"'dog' .*'dog_1', 'dog_2'.*file name") as error:
        loras.find("dog", "style")
    assert list(error.value.problems) == ["style"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_dog_v2", "named 'my_dog_v2' .*nearest: 'My Dog v2'.*refresh"),
        ("qqqq", "named 'qqqq' .subject.. If .*refresh"),
        ("", "No subject LoRA is chosen"),
        ("/etc/passwd", "lists no LoRA named '/etc/passwd'"),
        ("other/Ink", "lists no LoRA named 'other/Ink'"),
    ],
)
def test_a_missing_lora_gets_a_sentence_with_the_way_out(name, said):
    with pytest.raises(SettingsError, match=said) as error:
        loras.find(name, "subject")
    assert list(error.value.problems) == ["subject"]


def test_an_empty_list_gets_a_sentence(networks):
    with pytest.raises(SettingsError, match="no LoRA at all"):
        networks.put() and loras.find("x", "subject")


def test_a_known_hash_needs_no_file_read(registry):
    assert loras.find_by_hash("aa11").name == "zebra"
    assert not any(entry.reads for entry in registry.on_disk)


def test_a_file_not_hashed_yet_is_hashed_to_find_it(networks):
    networks.put(*(NetworkOnDisk(name, digest=name, hashed=False) for name in ("a", "dog_renamed", "z")))
    assert loras.find_by_hash("dog_renamed", like="dog").name == "dog_renamed"
    assert [entry.reads for entry in networks.on_disk] == [0, 1, 0]
    assert loras.find_by_hash("none of them") is None
    assert loras.find_by_hash("") is None


def test_found_as_the_list_of_the_api_writes_what_cannot_be_printed(networks):
    networks.put(NetworkOnDisk("my\tdog", alias="the\ndog"), NetworkOnDisk("my dog"))
    assert loras.find("my\\tdog", "subject").name == "my\tdog"
    assert loras.find("the\\ndog", "subject").name == "my\tdog"
    assert loras.find("my\tdog", "subject").name == "my\tdog"


def test_a_file_hidden_by_one_of_the_same_name_in_another_folder_gets_a_sentence(networks, shared, tmp_path):
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "Ink.safetensors").touch()
    shared.cmd_opts.lora_dirs = [str(tmp_path)]
    networks.put(NetworkOnDisk("Ink", folder=tmp_path / "new"))
    assert loras.find("new/Ink", "style").path == tmp_path / "new" / "Ink.safetensors"
    for name in ("old/Ink", "OLD\\ink.safetensors", str(tmp_path / "old" / "Ink")):
        with pytest.raises(
            SettingsError, match=r"only one LoRA named 'Ink', the one in the folder 'new'.*rename"
        ) as error:
            loras.find(name, "style")
        assert list(error.value.problems) == ["style"]
    with pytest.raises(SettingsError, match="lists no LoRA named 'other/Ink'"):
        loras.find("other/Ink", "style")


def test_hash_is_the_hosts(registry):
    assert loras.find("My Dog v2", "subject").hash() == "bb22"


def test_refresh_reads_the_folders_again(networks):
    networks.on_disk.append(NetworkOnDisk("new"))
    assert loras.exactly("new") is None
    HOST.refresh_loras()
    assert loras.exactly("new").name == "new"


def test_a_list_that_the_host_is_making_again_is_waited_for(networks, monkeypatch):
    """Meanwhile it lacks files, and a file may be hidden by one of the same name that is still to come."""
    half, go_on = threading.Event(), threading.Event()

    def list_slowly():
        networks.available_networks.clear()
        networks.available_networks["zebra"] = NetworkOnDisk("zebra", folder="/models/Lora/a")
        half.set()
        go_on.wait(10)
        networks.available_networks["zebra"] = NetworkOnDisk("zebra", folder="/models/Lora/b")
        networks.available_networks["new"] = NetworkOnDisk("new")

    monkeypatch.setattr(networks, "list_available_networks", list_slowly)
    client, timer = threading.Thread(target=HOST.refresh_loras), threading.Timer(0.2, go_on.set)
    client.start()
    half.wait(10)
    timer.start()
    assert loras.find("zebra", "subject").path.parts[-2] == "b"
    assert go_on.is_set()
    assert loras.exactly("new")
    client.join()


def test_a_reading_that_never_ends_is_not_waited_for_forever(networks, monkeypatch):
    half, go_on = threading.Event(), threading.Event()

    def hang():
        half.set()
        go_on.wait(10)

    monkeypatch.setattr(networks, "list_available_networks", hang)
    monkeypatch.setattr(lora_registry, "LONGEST_REFRESH_SECONDS", 0.1)
    client = threading.Thread(target=HOST.refresh_loras)
    client.start()
    half.wait(10)
    assert loras.exactly("zebra")
    go_on.set()
    client.join()


def test_a_hash_is_that_of_the_file_found_whatever_the_host_lists_by_then(networks):
    found = loras.find("My Dog v2", "subject")
    networks.put()
    assert found.hash() == "bb22"


def test_a_tag_means_a_name_or_an_alias_unless_several_share_it(networks):
    assert HOST.lora_of_tag("zebra").name == "zebra"
    assert HOST.lora_of_tag("sks_dog").name == "My Dog v2"
    assert HOST.lora_of_tag("my dog v2") is None
    networks.forbidden_network_aliases["sks_dog"] = 1
    assert HOST.lora_of_tag("sks_dog") is None
    assert HOST.lora_of_tag("My Dog v2").name == "My Dog v2"


@pytest.fixture
def two_files(tmp_path):
    paths = [tmp_path / f"{name}.safetensors" for name in ("one", "other")]
    save_file(a_lora(rank=4), paths[0])
    return paths


@pytest.mark.parametrize("make", [os.symlink, os.link], ids=["symbolic link", "hard link"])
def test_a_link_to_a_file_is_the_same_lora(two_files, make):
    make(*two_files)
    with pytest.raises(PairError, match=r"the same LoRA, .*one\.safetensors and .*other\.safetensors"):
        loras.check_pair(*map(loras.read, two_files))


def test_a_copy_of_a_file_is_the_same_lora_by_its_content(two_files, tmp_path):
    cache = ScoreCache(tmp_path / "scores")
    two_files[1].write_bytes(two_files[0].read_bytes())
    with pytest.raises(PairError, match="the same LoRA"):
        loras.check_pair(*map(loras.read, two_files), cache)
    two_files[1].unlink()
    save_file({name: value * 2 for name, value in a_lora(rank=4).items()}, two_files[1])
    assert two_files[0].stat().st_size == two_files[1].stat().st_size
    loras.check_pair(*map(loras.read, two_files), cache)


def test_a_file_is_read_again_only_when_it_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(file_state, "SETTLED_SECONDS", 0)
    path = tmp_path / "dog.safetensors"
    save_file(a_lora(rank=4), path)
    first = loras.read(path)
    assert loras.read(path) is first
    save_file(a_lora(rank=2), path)
    assert [layer.rank for layer in loras.read(path).layers.values()] == [2]
    path.unlink()
    with pytest.raises(LoraFileError, match=r"dog\.safetensors"):
        loras.read(path)


@pytest.mark.parametrize("into_place", [Path.replace, lambda new, path: path.write_bytes(new.read_bytes())])
def test_another_file_of_the_same_size_and_time_is_read(tmp_path, into_place):
    path, new = tmp_path / "dog.safetensors", tmp_path / "new"
    for place, alpha in ((path, 1.0), (new, 2.0)):
        save_file(
            {
                **a_lora(rank=4),
                "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha": torch.tensor(alpha),
            },
            place,
        )
        os.utime(place, (1.7e9, 1.7e9))
    scales = [layer.scale for layer in loras.read(path).layers.values()]
    into_place(new, path)
    os.utime(path, (1.7e9, 1.7e9))
    assert [layer.scale for layer in loras.read(path).layers.values()] == [2 * scale for scale in scales]


def a_lora(rank):
    layer = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    return {
        f"{layer}.lora_down.weight": torch.ones(rank, 640),
        f"{layer}.lora_up.weight": torch.ones(640, rank),
    }
