"""One generation as one run: its states, its passes, and what it leaves behind, in a WebUI in memory."""

import gc
import sys
import weakref
from inspect import signature
from itertools import product

import pytest
from standin.in_memory import SIZES, InMemoryHost, Model, Processing

from klora.core.lora_file import read_lora
from klora.core.methods import FULL
from klora.core.plan import make_plan
from klora.core.scores import score_pair
from klora.errors import HostError
from klora.hosts.base import Host
from klora.hosts.webui import HOST
from klora.settings import Settings
from klora.webui import paths, run
from klora.webui.processing_patches import ProcessingPatches
from klora.webui.refusal import GenerationRefused
from klora.webui.run_states import OVER, SAMPLING, TRANSITIONS, Event, State

GO_ON = {"klora_on_error": "go on without K-LoRA"}


@pytest.fixture(autouse=True)
def no_webui(tmp_path, monkeypatch):
    for name in ("modules", "networks"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(paths, "EXTENSION", tmp_path / "extension")


@pytest.fixture
def host(tmp_path):
    folder = tmp_path / "loras"
    folder.mkdir()
    return InMemoryHost(folder)


def settings(**more):
    return Settings.parse({"enabled": True, "subject": "dog", "style": "ink", **more})


def states(host):
    """[(the host's method, the run's state there)]; evaluations in a row in one state are listed once."""
    found = [(place.split()[0], state) for place, state in host.state]
    return [one for i, one in enumerate(found) if i == 0 or one != found[i - 1]]


# The table


def test_from_every_state_a_run_can_be_closed_and_then_nothing_changes_it():
    for state, following in TRANSITIONS.items():
        assert following.get(Event.CLOSE, state) is State.CLOSED
    assert not TRANSITIONS[State.CLOSED]


def test_every_state_is_in_the_table_and_is_reached():
    assert set(TRANSITIONS) == set(State)
    reached = {following for table in TRANSITIONS.values() for following in table.values()}
    assert reached == set(State)


def test_a_run_that_is_over_can_only_be_closed():
    for state in OVER:
        assert set(TRANSITIONS[state]) <= {Event.CLOSE}


def test_only_sampling_cannot_be_left_to_the_host_halfway():
    assert {state for state in set(State) - set(OVER) if Event.GIVE_UP not in TRANSITIONS[state]} == set(
        SAMPLING
    )


def test_the_pair_can_be_lost_and_regained_without_leaving_the_sampling():
    for state, event in product(SAMPLING, (Event.LOSE, Event.FIT)):
        assert TRANSITIONS[state][event] in SAMPLING
    assert TRANSITIONS[State.SAMPLING_WITHOUT][Event.SAMPLED] is State.WITHOUT
    assert TRANSITIONS[State.SAMPLING][Event.SAMPLED] is State.PREPARED


def test_a_pass_on_a_checkpoint_that_fits_has_the_pair_again():
    assert TRANSITIONS[State.WITHOUT][Event.FIT] is State.PREPARED
    assert TRANSITIONS[State.SAMPLING_WITHOUT][Event.FIT] is State.SAMPLING


E = Event
SEQUENCES = [
    ([E.ENCODE, E.ENCODED, E.SAMPLE, E.SAMPLED], State.PREPARED),
    ([E.SAMPLE, E.LOSE, E.SAMPLED], State.WITHOUT),
    ([E.SAMPLE, E.LOSE, E.SAMPLED, E.FIT, E.SAMPLE], State.SAMPLING),
    ([E.LOSE, E.ENCODE, E.SAMPLE, E.FIT], State.SAMPLING),
    ([E.SAMPLE, E.FAIL, E.FIT, E.SAMPLED, E.SAMPLE], State.FAILED),
    ([E.ENCODE, E.GIVE_UP, E.ENCODED, E.SAMPLE], State.GIVEN_UP),
    ([E.SAMPLE, E.GIVE_UP], State.SAMPLING),
    ([E.SAMPLE, E.CLOSE, E.SAMPLED, E.FAIL, E.GIVE_UP], State.CLOSED),
]


@pytest.mark.parametrize(("events", "end"), SEQUENCES)
def test_events_lead_to_their_states_and_one_that_a_state_does_not_list_changes_nothing(events, end):
    state = State.PREPARED
    for event in events:
        state = TRANSITIONS[state].get(event, state)
    assert state is end


# A generation


def test_this_host_and_the_real_one_take_what_the_boundary_asks_for(host):
    asked = {name for part in Host.__mro__ for name in vars(part) if not name.startswith("_")}
    assert len(asked) > 15
    for name in asked:
        expected = [parameter.strip("_") for parameter in signature(getattr(Host, name)).parameters][1:]
        for one in (host, HOST):
            assert [
                parameter.strip("_") for parameter in signature(getattr(one, name)).parameters
            ] == expected


def test_a_generation_goes_through_its_states_and_leaves_nothing(host):
    p = Processing(host, n_iter=2)
    before = set(vars(p))
    host.generate(p, settings())
    batch = [("setup_conds", "encoding"), ("sample", "sampling"), ("evaluation", "sampling")]
    assert states(host) == [("init", "prepared"), *batch, *batch]
    assert not {name for name in set(vars(p)) - before if name.startswith("klora") or callable(vars(p)[name])}
    assert run.run_of(p) is None


def test_what_is_on_the_layers_at_each_step_is_the_plan(host):
    p = Processing(host)
    host.generate(p, settings())
    scores = score_pair(*(read_lora(host.folder / f"{name}.safetensors") for name in ("dog", "ink")))
    plan = make_plan(scores, steps=4, schedule=settings().schedule_of_run())
    assert plan.switches() != [[]] * len(SIZES)
    expected = [dict(zip(plan.layer_names, map(tuple, row / FULL), strict=True)) for row in plan.strengths]
    assert p.evaluations == [("first", step, row) for step, row in enumerate(expected)]
    assert p.loaded == [["dog", "ink"]]


@pytest.mark.parametrize(
    ("rule", "passes"),
    [("continue", [(4, "0-3"), (4, "2-3")]), ("restart", [(4, "0-3"), (2, "0-1")]), ("off", [(4, "0-3")])],
)
def test_a_hires_pass_runs_the_end_of_its_schedule_or_starts_again_or_is_left_alone(host, rule, passes):
    p = Processing(host, enable_hr=True)
    answer = host.generate(p, settings(hires=rule))
    told = answer.extra_generation_params["K-LoRA applied"]
    assert [(one["steps"], one["ran"]) for one in told] == passes
    assert [on_layers is None for _, _, on_layers in p.evaluations] == [False] * 4 + [rule == "off"] * 2
    assert p.loaded[1] == ([] if rule == "off" else ["dog", "ink"])


def load(host, file, base="sdxl"):
    """What a refiner does, or a hires pass with a checkpoint of its own."""

    def change(_p):
        host.loaded = Model(file, base)

    return change


def test_when_a_refiner_takes_over_the_pass_goes_on_without_the_pair_and_the_next_batch_has_it(host):
    first, p = host.loaded, None

    def back(_p):
        host.loaded = first

    p = Processing(host, n_iter=2, during={"evaluation 2": load(host, "refiner.safetensors")})
    parse = p.parse_extra_network_prompts
    p.parse_extra_network_prompts = lambda: (back(p), parse())[1]
    host.generate(p, settings())
    assert [on_layers is None for _, _, on_layers in p.evaluations] == [False, False, True, True] + [
        False
    ] * 4
    assert (
        p.extra_generation_params["K-LoRA stopped"]
        == "in the first pass before step 3 (another model took over)"
    )
    assert [state for place, state in states(host) if place == "evaluation"] == [
        "sampling", "sampling without the pair", "sampling",
    ]  # fmt: skip


def test_a_pass_on_a_checkpoint_that_the_pair_does_not_fit_runs_without_it_and_a_warning_says_so(host):
    p = Processing(host, n_iter=2, during={"evaluation 3": load(host, "another.safetensors", base=None)})
    host.generate(p, settings())
    assert ("setup_conds", "without the pair") in states(host)
    assert p.extra_generation_params["K-LoRA stopped"].endswith(
        "in the first pass (the LoRAs do not fit its checkpoint)"
    )
    assert any(
        "the first pass, on another.safetensors, has neither LoRA of the pair" in said for said in p.comments
    )


def test_a_pass_on_another_checkpoint_that_the_pair_fits_has_a_switch_of_its_own(host):
    p = Processing(host, enable_hr=True)
    activate = host.activate

    def on_another(p, tags):
        if p.is_hr_pass:
            host.loaded = Model("second.safetensors")
        activate(p, tags)

    host.activate = on_another
    host.generate(p, settings())
    assert [switch.model_name for switch in host.adapter.switches] == [
        "first.safetensors",
        "second.safetensors",
    ]
    assert all(on_layers for _, _, on_layers in p.evaluations)


# Its ends


def failing(place, error=None):
    """{place: makes the run's own work there fail}."""

    def fail(p):
        run.fail(p, error or HostError("It does not work."), p.host)

    return {place: fail}


@pytest.mark.parametrize("on_error", [{}, GO_ON])
def test_an_error_while_sampling_stops_it_at_the_next_evaluation(host, on_error):
    host.options.update(on_error)
    p = Processing(host, during=failing("evaluation 2"))
    with pytest.raises(GenerationRefused, match="It does not work"):
        host.generate(p, settings())
    assert len(p.evaluations) == 2
    assert run.run_of(p).state is State.FAILED


def test_an_error_while_sampling_without_the_pair_is_raised_at_its_end(host):
    p = Processing(host, enable_hr=True, during=failing("evaluation 5"))
    with pytest.raises(GenerationRefused):
        host.generate(p, settings(hires="off"))
    assert len(p.evaluations) == 6


@pytest.mark.parametrize(("place", "next_method"), [("init", "setup_conds"), ("setup_conds", "sample")])
def test_an_error_before_stops_at_the_next_method_from_which_the_host_lets_it_out(host, place, next_method):
    p = Processing(host, during=failing(place))
    with pytest.raises(GenerationRefused):
        host.generate(p, settings())
    assert next_method not in [reached for reached, _ in host.state]
    assert not p.evaluations


def test_told_to_go_on_the_host_makes_the_rest_with_the_prompts_own_tags(host):
    host.options.update(GO_ON)
    p = Processing(host, tags=["dog", "other"], n_iter=2, during=failing("setup_conds"))
    answer = host.generate(p, settings())
    assert p.loaded == [["other", "dog", "ink"], ["dog", "other"], ["dog", "other"]]
    assert [on_layers for _, _, on_layers in p.evaluations] == [None] * 8
    assert answer.extra_generation_params["K-LoRA stopped"] == "It does not work."
    assert "K-LoRA subject" not in answer.extra_generation_params


def test_a_run_is_known_before_it_patches_anything_so_that_a_fault_there_is_undone(host, monkeypatch):
    put, seen = ProcessingPatches.put, []

    def third_fails(self, name, method):
        seen.append(run.run_of(p))
        if len(seen) == 3:
            raise RuntimeError("no third one")
        put(self, name, method)

    monkeypatch.setattr(ProcessingPatches, "put", third_fails)
    host.options.update(GO_ON)
    p = Processing(host, tags=["other"])
    host.generate(p, settings())
    assert all(seen)
    assert p.loaded == [["other"]]
    assert "sample" not in vars(p)


def closed(p):
    found = run.run_of(p)
    found.close()
    found.close()
    assert found.state is State.CLOSED
    return found


PLACES = ["init", "setup_conds", "sample", "evaluation 1"]


@pytest.mark.parametrize("place", PLACES)
def test_a_run_can_be_closed_anywhere_more_than_once_and_the_host_goes_on_alone(host, place):
    runs = []
    p = Processing(host, enable_hr=True, during={place: lambda p: runs.append(closed(p))})
    host.generate(p, settings())
    found = runs[0]
    switch = host.adapter.switches[-1]
    assert switch.on_layers is None
    assert len(p.evaluations) == 6
    for late in (
        lambda: found.networks_loaded({}), found.begin_pass, lambda: found.at_call(None),
        lambda: found.fail(ValueError()), found.give_up,
    ):  # fmt: skip
        before = list(switch.log)
        late()
        assert found.state is State.CLOSED
        assert switch.log == before


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_died_anywhere_and_is_kept_keeps_no_checkpoint_alive(host, place):
    def die(_p):
        raise ValueError("of the host")

    p = Processing(host, during={place: die})
    with pytest.raises(ValueError, match="of the host"):
        host.generate(p, settings())
    kept, model = run.run_of(p), weakref.ref(host.loaded)
    assert kept
    host.loaded = Model("another.safetensors")
    gc.collect()
    assert model() is None
    run.release(p)
    assert kept.state is State.CLOSED
    assert "sample" not in vars(p)


def test_a_closed_run_is_only_kept_alive_by_whoever_asked_for_it(host):
    p = Processing(host)
    found = weakref.ref(run.start(p, settings(), host))
    run.release(p)
    assert found() is None


def test_the_cycle_with_its_processing_object_is_gone_with_it(host):
    p = Processing(host)
    found, gone = weakref.ref(run.start(p, settings(), host)), weakref.ref(p)
    del p
    gc.collect()
    assert found() is None
    assert gone() is None


def test_what_the_host_has_loaded_expires_before_it_loads_the_networks_of_each_batch(host):
    host.generate(Processing(host, n_iter=2), settings())
    loading = [name for name in host.adapter.switches[-1].log if name in ("expire loaded", "networks loaded")]
    assert loading == ["expire loaded", "networks loaded"] * 2
