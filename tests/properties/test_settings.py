"""Settings given at random: every value is used, or refused with an error that names field, value and rule."""

import dataclasses
import itertools
import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from afcache import CacheConfig, Layerwise, policy
from afcache.functional.plans import forced_steps
from afcache.settings.presets import resolve_config
from tests.support.cases import configs, property_test
from tests.support.toy import mixture_flow, sample_toy, uneven_sigmas

HUGE = (2**31, 2**63, 2**64, 10**30, 10**400, 10**5000, 1e38, 1e39, 1e300, 1.7e308)
STRANGE = (
    None,
    True,
    False,
    math.nan,
    math.inf,
    -math.inf,
    -0.0,
    5e-324,
    *HUGE,
    *(-value for value in HUGE),
    "",
    "0.1",
    "adaptive",
    "adaptive\n",
    "é\u2028\U0001f600",
    "\udcff",
    b"adaptive",
    1j,
    Fraction(1, 2),
    np.float64(0.1),
    np.float32(0.1),
    np.float64("nan"),
    np.int64(2),
    np.bool_(True),
    np.str_("adaptive"),
    np.array([0.1, 0.2]),
    np.array("adaptive"),
    torch.tensor(0.1),
    torch.tensor(2),
    torch.tensor(True),
    torch.ones(2, 3),
    torch.tensor([]),
    (),
    [],
    {},
    set(),
    object,
    len,
    CacheConfig(),
    Layerwise(),
)
PLAIN = st.one_of(
    st.sampled_from(STRANGE), st.integers(), st.floats(), st.text(max_size=8), st.integers(-2, 8), st.floats(-1, 2, width=32)
)
VALUES = st.one_of(
    PLAIN,
    st.lists(PLAIN, max_size=4).map(tuple),
    st.lists(st.floats(-1, 1), min_size=3, max_size=3).map(tuple),
    st.lists(st.integers(-1, 9), max_size=4).map(tuple),
    st.lists(PLAIN, max_size=2),
    st.dictionaries(st.text(max_size=3), PLAIN, max_size=2),
)
FIELDS = [field.name for field in dataclasses.fields(CacheConfig)]
GROUP_FIELDS = [field.name for field in dataclasses.fields(Layerwise)]


def refusal(make: Any, **values: Any) -> str | None:
    """The message of the ValueError or TypeError that refuses the values; any other error is a failure."""
    try:
        make(**values)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def assert_clear(message: str, field: str) -> None:
    """One readable line that names the field and, after "got", the value, and that states a rule."""
    assert re.match(rf"{field}\b", message), message
    assert re.search(r"\bmust\b.*, got .|\bcannot be combined\b|\bmust not be empty\b", message), message
    assert len(message.splitlines()) == 1, message
    assert len(message) < 500, message


def works(config: CacheConfig) -> bool:
    """Whether settings that were accepted can be used: written, read again, and sampled with."""
    assert len(forced_steps(config, 6)) == 6
    plain = json.loads(json.dumps(config.to_dict()))
    assert {"policy", "tolerance"} <= plain.keys()
    if config.layerwise is None and not config.rule.is_gated and not config.first_blocks and not config.last_blocks:
        run = sample_toy(mixture_flow, uneven_sigmas(6), config, latents=torch.ones(1, 1, 2))
        assert len(run.records) == 6
    return True


@pytest.mark.parametrize("field", FIELDS)
@property_test(value=VALUES)
def test_a_value_of_a_field_works_or_is_refused_by_name(field, value):
    message = refusal(CacheConfig, **{field: value})
    if message is None:
        assert works(CacheConfig(**{field: value}))
    elif field == "policy" and isinstance(value, str) and value in ("magcache", "dbcache"):
        assert "under policy" in message
    else:
        assert_clear(message, field)


@pytest.mark.parametrize("field", GROUP_FIELDS)
@property_test(value=VALUES)
def test_a_value_of_a_group_works_or_is_refused_by_name(field, value):
    message = refusal(Layerwise, **{field: value})
    if message is None:
        assert works(CacheConfig(layerwise=Layerwise(**{field: value})))
    else:
        assert_clear(message, field)


@pytest.mark.parametrize("kind", [CacheConfig, Layerwise])
def test_strange_values_work_or_are_refused_by_name(kind):
    for field, value in itertools.product([field.name for field in dataclasses.fields(kind)], STRANGE):
        message = refusal(kind, **{field: value})
        if message is not None:
            assert_clear(message, field)
        else:
            settings = kind(**{field: value})
            assert works(settings if isinstance(settings, CacheConfig) else CacheConfig(layerwise=settings))


@property_test(values=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=2, max_size=6))
def test_several_values_work_or_are_refused_by_one_of_their_names(values):
    message = refusal(CacheConfig, **values)
    if message is None:
        assert works(CacheConfig(**values))
    else:
        named = [field for field in FIELDS if message.startswith(field)]
        assert set(named) & {*values, "magnitude_ratios", "first_blocks", "layerwise", "max_nodes"}, message


@property_test(
    named=st.fixed_dictionaries({}, optional={"config": VALUES, "tolerance": VALUES, "preset": VALUES}),
    name=VALUES,
    changes=st.dictionaries(st.one_of(st.sampled_from(FIELDS + GROUP_FIELDS), st.text(max_size=4)), VALUES, max_size=3),
)
def test_presets_and_policies_are_made_or_refused(named, name, changes):
    message = refusal(resolve_config, **named)
    assert message is None or any(message.startswith(key) for key in named), message
    message = refusal(lambda: policy(name, **changes))
    assert message is None or message, message
    message = refusal(lambda: policy("layerwise", **changes))
    assert message is None or message, message


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.sampled_from(FIELDS)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from([*FIELDS, *GROUP_FIELDS, "curve", "images"]), st.text(max_size=3)), inner),
    ),
    max_leaves=12,
)


@property_test(
    content=st.one_of(
        st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3).map(json.dumps),
        st.fixed_dictionaries({"calibration": JSON}).map(json.dumps),
        st.fixed_dictionaries({"layerwise": JSON}).map(json.dumps),
        JSON.map(json.dumps),
        st.text(max_size=20),
        st.binary(max_size=20),
    )
)
def test_a_file_of_settings_is_read_or_refused(tmp_path_factory, content):
    path: Path = tmp_path_factory.getbasetemp() / "settings.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    message = refusal(lambda: CacheConfig.from_json(path))
    if message is None:
        assert works(CacheConfig.from_json(path))
    else:
        assert str(path) in message or any(name in message for name in FIELDS + GROUP_FIELDS), message
        assert len(message.splitlines()) == 1, message


@property_test(config=configs())
def test_settings_written_are_the_settings_read(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "written.json"
    config.to_json(path)
    assert CacheConfig.from_json(path) == config
