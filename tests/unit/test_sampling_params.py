# SPDX-License-Identifier: Apache-2.0
import inspect

import pytest

from nemotron_fast import SamplingParams
from nemotron_fast.errors import RequestError


@pytest.mark.parametrize(
    "options,message",
    [
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_p": 0.0}, r"top_p=0.0, want a number in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -2}, "top_k=-2"),
        ({"min_p": 2}, "min_p=2"),
        ({"presence_penalty": 2.5}, "presence_penalty=2.5"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"n": 0}, "n=0"),
        ({"n": 10**9}, "n=1000000000"),
        ({"seed": 1 << 64}, "seed="),
        ({"logprobs": 21}, "logprobs=21"),
        ({"stop": [""]}, "stop: want"),
        ({"stop": [3]}, r"stop=\[3\]"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"logit_bias": {1: 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias is list"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 exceeds max_tokens=4"),
        ({"ignore_eos": 1}, "ignore_eos=1"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"zzz": 1}, "unknown sampling parameter 'zzz'; known: n,"),
        ({"max_tokens": 3, "max_new_tokens": 4}, "differ"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**options)


def test_one_error_names_every_problem():
    with pytest.raises(RequestError, match="3 problems: .*n=0.*top_p=7.*min_p=-1"):
        SamplingParams(n=0, top_p=7, min_p=-1)


def test_alias_of_max_tokens_and_single_stop_string():
    params = SamplingParams(max_new_tokens=4, stop="x", logit_bias={"7": 1})
    assert (params.max_tokens, params.stop, params.logit_bias) == (4, ("x",), {7: 1.0})


def test_none_is_unset_and_params_are_hashable():
    unset = SamplingParams(stop=None, stop_token_ids=None, logit_bias=None, max_tokens=None, max_new_tokens=5)
    assert unset == SamplingParams(max_tokens=5) and hash(unset) == hash(SamplingParams(max_tokens=5))


def test_min_tokens_is_not_compared_with_an_invalid_max_tokens():
    with pytest.raises(RequestError, match="1 problem: max_tokens=-1"):
        SamplingParams(max_tokens=-1)


def test_own_values_come_before_the_checkpoint_and_that_before_neutral():
    params = SamplingParams(temperature=0.0).resolve({"temperature": 0.6, "top_p": 0.95, "eos_token_id": 3})
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.0, 0.95, 0, 1.0)
    assert not params.has_penalties


def test_the_constructor_keeps_its_signature():
    assert "temperature" in inspect.signature(SamplingParams).parameters
