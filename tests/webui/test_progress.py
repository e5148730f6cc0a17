"""What the hosts show while a pair is scored, by their own arithmetic."""

from types import SimpleNamespace

import pytest

from klora.errors import Cancelled
from klora.hosts.progress import scoring_progress


def state(job_count=-1, job_no=0):
    """A host's state when scripts prepare; an earlier image of the same job may have left its latent."""
    return SimpleNamespace(
        textinfo=None, job="txt2img", job_no=job_no, job_count=job_count,
        sampling_step=0, sampling_steps=20, current_latent="the last image's",
        current_image_sampling_step=0,
    )  # fmt: skip


def of_the_api(state):
    """What /sdapi/v1/progress of A1111, Forge and Neo answers."""
    if state.job_count == 0:
        return 0
    share = 0.01
    if state.job_count > 0:
        share += state.job_no / state.job_count
    if state.sampling_steps > 0:
        share += 1 / state.job_count * state.sampling_step / state.sampling_steps
    return min(share, 1)


def of_the_page(state):
    """What their progress bar shows."""
    if state.job_count <= 0:
        return 0
    return min(
        state.job_no / state.job_count + state.sampling_step / state.sampling_steps / state.job_count, 1
    )


JOBS = [(-1, 0), (0, 0), (1, 0), (6, 0), (6, 5)]


@pytest.mark.parametrize(("job_count", "job_no"), JOBS)
@pytest.mark.parametrize("shown", [of_the_api, of_the_page])
def test_the_share_done_rises_and_is_one_at_most(job_count, job_no, shown):
    host = state(job_count, job_no)
    shares = [shown(host)]
    with scoring_progress(host) as report:
        shares.append(shown(host))
        for done in range(1, 1121):
            report(done, 1120)
            shares.append(shown(host))
            assert host.textinfo == f"K-LoRA: scoring {done} of 1120 layers"
    assert shares == sorted(shares)
    assert all(0 <= share <= 1 for share in shares)
    if job_count:
        assert shares[-1] > shares[0] + 0.1


@pytest.mark.parametrize(("job_count", "job_no"), JOBS)
@pytest.mark.parametrize("ends_with", [None, Cancelled, ValueError])
def test_afterwards_the_host_shows_what_it_did_before(job_count, job_no, ends_with):
    host = state(job_count, job_no)
    try:
        with scoring_progress(host) as report:
            report(3, 7)
            if ends_with:
                raise ends_with
    except (Cancelled, ValueError):
        assert ends_with
    assert host == state(job_count, job_no)


def test_no_preview_of_the_last_image_is_drawn_meanwhile():
    host = state(6, 1)
    with scoring_progress(host) as report:
        report(500, 1120)
        assert host.current_latent is None
