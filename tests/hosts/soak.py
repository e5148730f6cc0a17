"""What users and accidents do to a WebUI, in any order; after every one a plain image is what it was first.

    KLORA_HOST_URL=… KLORA_HOST_FOLDER=… python tests/hosts/soak.py 200 [seed]

runs that many on a running host (docs/developing.md), and on the stand-in without KLORA_HOST_URL.
"""

import random
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import torch  # noqa: E402
from facts import FLOW, kind_of  # noqa: E402
from host import PROBE_MISSING, SAME_MODULES, RunningHost, as_base64, same, tag  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from standin import StandIn  # noqa: E402

from klora.core.methods import METHODS  # noqa: E402

PATIENCE_SECONDS = 120


def pair_of(host, chance):
    return dict(
        zip(("subject", "style"), chance.sample([host.subject, host.style, host.other], 2), strict=True)
    )


def settings_of(host, chance):
    return {
        **pair_of(host, chance), "method": chance.choice(list(METHODS)),
        "schedule": chance.choice(["s", "s*"]),
        "subject_weight": chance.choice([1, 0, -0.5]),
        "text_encoder": chance.choice(["both", "style", "none"]),
    }  # fmt: skip


def plain_with_tags(host, chance):
    host.answer(
        prompt="a dog" + tag(chance.choice([host.subject, host.other]), chance.choice([1, -1])),
        seed=chance.randrange(99),
    )


def fused(host, chance):
    sampler, steps = chance.choice(list(host.clocks))
    host.answer(
        settings_of(host, chance),
        steps=steps,
        sampler_name=sampler,
        cfg_scale=1 if kind_of(host.base) == FLOW else chance.choice([1, 7]),
    )


def hires(host, chance):
    rule = {"hires": chance.choice(["continue", "restart", "off"])}
    fields = {
        "enable_hr": True,
        "hr_scale": 1.5,
        "denoising_strength": 0.5,
        "hr_upscaler": chance.choice(host.facts.upscalers),
        **SAME_MODULES,
    }
    host.answer({**settings_of(host, chance), **rule}, **fields)


def img2img(host, chance):
    host.answer(
        settings_of(host, chance),
        init_images=[as_base64(host.first)],
        denoising_strength=chance.choice([0.3, 1]),
    )


def batch(host, chance):
    host.answer(settings_of(host, chance), batch_size=chance.choice([1, 3]), n_iter=chance.choice([1, 2]))


def refused(host, chance):
    status, _ = host.request(
        {**host.pair, **chance.choice([{"subject": "no-such"}, {"alpha": "high"}, {"style": host.subject}])}
    )
    assert status == 422


def cut_short(host, chance):
    thread = threading.Thread(target=lambda: host.request(settings_of(host, chance), steps=30))
    thread.start()
    time.sleep(chance.random() / 2)
    host.call(chance.choice(["/sdapi/v1/interrupt", "/sdapi/v1/skip"]), {})
    thread.join(PATIENCE_SECONDS)


def fault(host, chance):
    kind = chance.choice(["RuntimeError", "OutOfMemoryError", "interrupt"])
    place = chance.choice(list(host.facts.places))
    armed = {"place": place, "call": chance.randrange(1, 60), "kind": kind, "times": host.facts.places[place]}
    assert host.call("/klora-probe/v1/fault", armed)[0] == 200, PROBE_MISSING
    with_klora = chance.random() < 0.7
    host.request(
        settings_of(host, chance) if with_klora else None,
        prompt="a bird" + ("" if with_klora else tag(host.subject)),
    )
    host.call("/klora-probe/v1/fault")


@contextmanager
def another_file(path):
    """With other numbers in the file at `path`; nothing is written over what a host may have mapped."""
    kept, new = path.with_suffix(".kept"), path.with_suffix(".new")
    save_file({key: value * 0.5 if "up" in key else value for key, value in load_file(path).items()}, new)
    path.replace(kept)
    new.replace(path)
    try:
        yield
    finally:
        kept.replace(path)


def file_replaced(host, chance):
    host.request(host.pair)
    with another_file(host.file(host.subject)):
        host.answer(settings_of(host, chance))


def two_clients(host, chance):
    settings = settings_of(host, chance)
    threads = [threading.Thread(target=host.request, args=[klora]) for klora in (settings, None, settings)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)


def plotted(host, chance):
    methods = chance.sample(list(METHODS), 2)
    host.answer(
        settings_of(host, chance),
        **host.grid("[K-LoRA] Method", methods, "[K-LoRA] β", chance.choice(["auto", "auto,0.7"])),
    )


def other_checkpoint(host, chance):
    """Runs on another checkpoint, with and without K-LoRA, which refuses another base model."""
    others = [
        name
        for model in host.call("/sdapi/v1/sd-models")[1]
        if (name := Path(model["filename"]).name) != host.checkpoint
    ]
    elsewhere = {"override_settings": {"sd_model_checkpoint": chance.choice(others)}}
    status, answer = host.request(chance.choice([settings_of(host, chance), None]), **elsewhere)
    assert status in (200, 422), answer


def analyzed(host, chance):
    assert (
        host.call("/klora/v1/analyze", {**pair_of(host, chance), "steps": chance.choice([1, 150])})[0] == 200
    )


def reloaded(host, chance):
    host.reload()


ACTIONS = {
    action.__name__: action for action in (
        plain_with_tags, fused, hires, img2img, batch, refused, cut_short, fault, file_replaced, two_clients,
        plotted,
        other_checkpoint, analyzed, reloaded,
    )
}  # fmt: skip


def prepare(host):
    """Remember the first images, which `act` compares with.

    A1111's very first load of a checkpoint differs from later ones by a grey level.
    """
    other_checkpoint(host, random.Random(0))
    host.first, host.first_fused = host.image(), host.image(host.pair)


def act(host, name, seed):
    """One action, and what must hold after it."""
    ACTIONS[name](host, random.Random(seed))
    assert same(host.image(), host.first), f"after {name} ({seed}) a plain image differs"
    assert same(host.image(host.pair), host.first_fused), f"after {name} ({seed}) a K-LoRA image differs"


def tensors(host):
    return host.call("/klora-probe/v1/tensors")[1]


def soak(host, count, seed):
    """Do `count` actions in random order.

    At the end at most 2 % more tensors are alive than the maximum in the first fifth.

    A host holds the file of one LoRA or of two, as the last action left it: one moment alone says nothing.
    """
    prepare(host)
    chance, warm = random.Random(seed), {"count": 0, "bytes": 0}
    for number in range(count):
        name = chance.choice(list(ACTIONS))
        act(host, name, chance.randrange(2**31))
        last = tensors(host)
        print(f"{number + 1}/{count} {name}: {last}", flush=True)
        if number <= count // 5:
            warm = {what: max(most, last[what]) for what, most in warm.items()}
    assert last["count"] <= warm["count"] * 1.02, (warm, last)
    assert last["bytes"] <= warm["bytes"] * 1.02, (warm, last)
    print(f"at most {warm} in the first fifth, at the end {last}: all images bit for bit as at first")


def main():
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    if (host := RunningHost.from_environment()) is not None:
        with host.ready(), host.another_checkpoint():
            soak(host, count, seed)
        return
    torch.set_num_threads(1)
    with StandIn(Path(tempfile.mkdtemp())).in_place() as standin, standin.another_checkpoint():
        soak(standin, count, seed)


if __name__ == "__main__":
    main()
