"""The kinds of LoRA as records: each is consistent in itself, and no two claim the same tensors."""

from __future__ import annotations

from collections import Counter

import pytest

from klora.core.adapters import ADAPTERS, adapter_of, dora


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_every_role_that_a_kind_speaks_of_has_a_key(adapter):
    spoken = {*adapter.marks, *adapter.cut_roles, *({adapter.row_role} - {None})}
    for group in (*adapter.needed, *adapter.terms):
        spoken.update(group)
    assert spoken <= set(adapter.suffixes.values())


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_a_kind_is_told_by_what_it_needs(adapter):
    for group in adapter.needed:
        assert adapter_of(dict.fromkeys(group, (1, 1))) is adapter


def test_no_key_belongs_to_two_kinds():
    owners = Counter(
        suffix for adapter in (*ADAPTERS, dora) for suffix in getattr(adapter, "suffixes", dora.SUFFIXES)
    )
    assert not [suffix for suffix, count in owners.items() if count > 1]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_a_longer_end_of_a_key_is_tried_before_a_shorter_one(adapter):
    seen: list[str] = []
    for suffix in adapter.suffixes:
        assert not any(suffix.endswith(earlier) for earlier in seen), suffix
        seen.append(suffix)
