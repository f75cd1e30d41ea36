# SPDX-License-Identifier: Apache-2.0

"""Settings of a server that are refused, and the requests that it refuses."""

from conftest import make_llama, make_tokenizer

from bad_input.calls import assert_refused, with_rows
from trl_tfpo.server import Engine, Generation, Limits, make_app


def submit(prompt_ids, **settings):
    """A generation by an engine without doctors."""
    engine = Engine(make_llama(1), make_tokenizer(), {})
    try:
        engine.submit(Generation(prompt_ids, print, **settings))
    finally:
        engine.close()


def serve_aliases(**aliases):
    engine = Engine(make_llama(1), make_tokenizer(), {})
    try:
        make_app(engine, model_name="tiny", aliases=aliases)
    finally:
        engine.close()


# Limits, models and names
SETTINGS = [
    ("no rows", lambda: Limits(max_rows=0), "`max_rows` must be positive. Got 0"),
    ("negative length", lambda: Limits(max_new_tokens=-1), "`max_new_tokens` must be positive. Got -1"),
    ("time that is no number", lambda: Limits(max_seconds=float("nan")), "`max_seconds` must be positive. Got nan"),
    ("patient in training mode", lambda: Engine(make_llama(1).train(), make_tokenizer(), {}), "eval mode"),
    ("empty key", lambda: make_app(None, model_name="world", api_key=""), "an empty key; leave out `api_key`"),
    ("model without a name", lambda: make_app(None, model_name=""), "must have names"),
    ("alias of the patient's name", lambda: serve_aliases(tiny={}), "from the name of the patient. Got 'tiny'"),
    ("alias without a name", lambda: serve_aliases(**{"": {}}), r"must have names.*\['tiny', ''\]"),
    (
        "alias of an unknown doctor",
        lambda: serve_aliases(mild={"kind": 0.1}),
        r"Alias 'mild': `weights` must name doctors",
    ),
]

# Generations
GENERATIONS = [
    ("weight that is not finite", lambda: submit([1], alpha=float("nan")), "`alpha` must be finite. Got nan"),
    ("unknown doctor", lambda: submit([1], weights={"kind": 1.0}), r"among \[\]. Got \['kind'\]"),
    ("negative temperature", lambda: submit([1], temperature=-1.0), r"`temperature` must be at least 0.* Got -1.0"),
    ("no new tokens", lambda: submit([1], max_new_tokens=0), "`max_new_tokens` must be at least 1"),
    ("prompt of nothing", lambda: submit([]), "must have 1 to 127 tokens. Got 0"),
    ("prompt beyond the positions", lambda: submit([1] * 128), "must have 1 to 127 tokens. Got 128"),
    ("negative id", lambda: submit([-4]), "ids that all models know"),
    ("id beyond the vocabulary", lambda: submit([99]), "ids that all models know"),
    ("top_k below zero", lambda: submit([1], top_k=-1), r"`top_k` must be at least 0.* Got -1"),
    ("min_p above one", lambda: submit([1], min_p=1.5), r"`min_p` must be in \[0, 1\]"),
    (
        "repetition penalty of zero",
        lambda: submit([1], repetition_penalty=0.0),
        "`repetition_penalty` must be at",
    ),
    ("penalty that is not finite", lambda: submit([1], presence_penalty=float("inf")), "must be finite"),
    ("bias for a token that is not there", lambda: submit([1], logit_bias={22: 1.0}), "from 0 to 21. Got 22"),
    (
        "bias against all tokens",
        lambda: submit([1], logit_bias=dict.fromkeys(range(22), -100.0)),
        "must not rule out all tokens",
    ),
    (
        "bias for a patient without a say",
        lambda: submit([1], alpha=0.0, logit_bias={5: 1.0}),
        "its exponent must be above 0",
    ),
]


@with_rows(SETTINGS, GENERATIONS)
def test_a_call_is_refused(call, message, tmp_path):
    """A server that starts with a wrong setting serves everybody another model."""
    assert_refused(call, message, tmp_path)
