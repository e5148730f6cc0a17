"""What the plan of the host's pair says, against what the probe saw."""

from functools import cache

from klora.analysis import analyze
from klora.settings import Settings


def plan_of(host, steps, seed=0, **settings):
    return planned(host.file(host.subject), host.file(host.style), steps, seed, tuple(settings.items()))


@cache
def planned(subject, style, steps, seed, settings):
    return analyze(subject, style, Settings.parse(dict(settings)), steps=steps, seed=seed).plan


def expected_names(host, plan, step):
    names, layers = [host.style, host.subject], [host.facts.probed_name(layer) for layer in plan.layer_names]
    return {layer: [names[choice]] for layer, choice in zip(layers, plan.selection[step], strict=True)}


def assert_applied(host, calls, plan, clock):
    assert len(calls) == len(clock)
    for seen, step in zip(calls, clock, strict=True):
        wanted = expected_names(host, plan, step)
        assert {layer: seen[layer] for layer in wanted} == wanted
        assert not any(names for layer, names in seen.items() if layer not in wanted)
