"""Time of a whole K-LoRA image against the host's own image with both tags, as ratios within one run.

    KLORA_HOST_URL=… KLORA_HOST_FOLDER=… python tests/bench/bench_host.py
        [--steps 20] [--size 512] [--rounds 5]

Rounds alternate between the two, with three images each: the first of the three pays for the change of
networks, the others are what people see who press Generate again. An image made before the clock starts fills
the score cache.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))

from host import RunningHost


def seconds(make):
    start = time.perf_counter()
    make()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    host = RunningHost.from_environment()
    if host is None:
        sys.exit("Set KLORA_HOST_URL and KLORA_HOST_FOLDER to a running WebUI.")
    with host.ready():
        measure(host, options)


def measure(host, options):
    common = {"steps": options.steps, "width": options.size, "height": options.size}

    def tags():
        host.image(prompt=f"a cat<lora:{host.subject}:1><lora:{host.style}:1>", **common)

    def fused():
        host.image(host.pair, **common)

    fused()
    first, again = [], []
    for _ in range(options.rounds):
        times = {make: [seconds(make) for _ in range(3)] for make in (tags, fused)}
        first.append(times[fused][0] / times[tags][0])
        again.extend(a / b for a, b in zip(times[fused][1:], times[tags][1:], strict=True))
        print(f"two tags {times[tags]}  K-LoRA {times[fused]}", file=sys.stderr)
    for name, ratios in (("after a change", first), ("again", again)):
        print(
            f"K-LoRA / two tags, {name}: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to "
            f"{max(ratios):.3f}, {len(ratios)} pairs"
        )


if __name__ == "__main__":
    main()
