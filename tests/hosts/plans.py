"""What the plan of the host's pair says, against what the probes saw."""

from functools import cache

from host import tag

from klora.analysis import analyze
from klora.core.families import FAMILIES
from klora.core.methods import BOTH, STYLE, SUBJECT
from klora.settings import Settings

PIECES = {"q": 0, "k": 1, "v": 2, "mlp": 3}


def plan_of(host, steps, seed=0, **settings):
    family = FAMILIES[host.base]
    return planned(
        host.file(host.subject), host.file(host.style), family, steps, seed, tuple(settings.items())
    )


@cache
def planned(subject, style, family, steps, seed, settings):
    return analyze(subject, style, Settings.parse(dict(settings)), steps=steps, seed=seed, loaded=family).plan


def references_of(host, subject=1, style=1):
    """{levels: checksums of all layers} under the host's own tags at these weights.

    The levels are those of style alone, subject alone and both; None stands for neither.
    """
    subjects, styles = tag(host.subject, subject), tag(host.style, style)
    tags = {STYLE: styles, SUBJECT: subjects, BOTH: subjects + styles, None: ""}
    return {levels: host.weights(prompt="a cat" + text, steps=1)[0] for levels, text in tags.items()}


def checksum(weights, layer):
    path, _, piece = layer.partition(":")
    return weights[path][PIECES[piece] if piece else 0]


def assert_follows(calls, plan, clock, references):
    """At every evaluation every weight is what the host's own tags make of it at the planned strengths.

    Args:
        references: as `references_of` returns them.
    """
    assert len(calls) == len(clock)
    for seen, step in zip(calls, clock, strict=True):
        wrong = [
            layer
            for layer, levels in zip(plan.layer_names, map(tuple, plan.strengths[step].tolist()), strict=True)
            if checksum(seen, layer) != checksum(references[levels], layer)
        ]  # fmt: skip
        assert not wrong, f"step {step}: {len(wrong)} layers, {wrong[:3]}"
        ours = {layer.partition(":")[0] for layer in plan.layer_names}
        assert {path: seen[path] for path in seen if path not in ours} == {
            path: references[None][path] for path in seen if path not in ours
        }
