"""What a generation needs before it begins: its two LoRAs, whether they fit, and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from klora.analysis import pair_warnings, plan_for
from klora.core.lora_file import LoraFile
from klora.core.plan import Plan
from klora.core.scores import PairScores, score_pair
from klora.errors import KLoraError
from klora.hosts.base import Checkpoint, Host, HostLora, Pair, PairLora
from klora.hosts.sizes import left_out
from klora.settings import Settings
from klora.webui import added_network, infotext, loras, options
from klora.webui.converted_loras import readable_copy
from klora.webui.options import Options
from klora.webui.prompt_tags import hashes_are_written

ROLES = ("subject", "style")


@dataclass(frozen=True)
class Preparation:
    """Everything about a run that stays the same throughout. It does not keep a checkpoint alive.

    Attributes:
        loras: {role: the host's LoRA}.
        parameters: what the host is to write into the infotext.
        warnings: what the user is told with the images.
    """

    settings: Settings
    options: Options
    loras: Mapping[str, HostLora]
    pair: Pair
    scores: PairScores
    parameters: Mapping[str, str]
    warnings: Sequence[str]

    @property
    def files(self) -> list[LoraFile]:
        """The subject's file and the style's."""
        return [lora.file for lora in self.pair.loras]

    def plan(self, steps: int, seed: int) -> Plan:
        """The plan for a whole schedule of `steps` steps."""
        return plan_for(self.scores, self.settings, steps=steps, seed=seed)


def prepare(p: Any, settings: Settings, host: Host) -> tuple[Preparation, Checkpoint]:
    """Find, read, check and score the pair of `settings` for the checkpoint that is loaded.

    Raises:
        KLoraError: with the sentence for the user.
        Cancelled: the user interrupted the scoring.
    """
    chosen = options.read(host)
    found = {role: loras.find(getattr(settings, role), role, host) for role in ROLES}
    checkpoint = host.checkpoint()
    files = loras.read_pair({role: lora.path for role, lora in found.items()}, checkpoint.family)
    if p.disable_extra_networks:
        raise KLoraError(
            "Extra networks are off for this run, and K-LoRA needs them: switch them on, or K-LoRA off."
        )
    added_network.check(p, found.values(), host)
    loras.check_pair(files["subject"], files["style"], chosen.cache())
    loras.check_checkpoint(list(files.values()), checkpoint)
    scores = scored(files, settings, chosen, host)
    warnings = pair_warnings(files["subject"], files["style"], scores, chosen.accelerator_words())
    warnings += left_out(files, checkpoint.sizes())
    if added_network.is_taken_over(p):
        warnings.append(added_network.NAMED_IN_OPTION)
    parameters = infotext.parameters(settings, found["subject"], found["style"], hashes_are_written(host))
    pair = _pair(settings, found, files, scores)
    return Preparation(settings, chosen, found, pair, scores, parameters, warnings), checkpoint


def scored(files: Mapping[str, LoraFile], settings: Settings, chosen: Options, host: Host) -> PairScores:
    """The scores of the pair, from the cache if they are known."""
    with host.scoring_progress() as progress:
        return score_pair(
            files["subject"],
            files["style"],
            k_scale=settings.k_scale,
            cache=chosen.cache(),
            device=chosen.device(host),
            progress=progress,
            cancelled=host.is_interrupted,
        )


def _pair(
    settings: Settings, found: Mapping[str, HostLora], files: Mapping[str, LoraFile], scores: PairScores
) -> Pair:
    on_text_encoder = settings.text_encoder_roles()
    return Pair(
        tuple(
            PairLora(role, found[role].name, file, settings.weight(role), role in on_text_encoder)
            for role, file in files.items()
        ),
        [layer.name for layer in scores.layers],
        {name for file in files.values() for name in file.unscored},
        readable_copy,
    )
