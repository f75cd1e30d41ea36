# SPDX-License-Identifier: Apache-2.0

"""Doctors, exponents and prompts that decoding refuses."""

import torch
from conftest import make_llama, make_tokenizer

from bad_input.calls import assert_refused, guide, tiny_t5, with_rows, write
from trl_tfpo import (
    Doctor,
    DoctorGuidedLogitsProcessor,
    guided_generate,
    load_doctor,
    speculative_guided_generate,
)


IDS = torch.tensor([[1, 5, 11]])


def generate(**arguments):
    defaults = dict(guide=guide(), input_ids=IDS, max_new_tokens=2)
    return guided_generate(make_llama(1), **defaults | arguments)


# The doctors
DOCTORS = [
    ("no doctor", lambda: guide([]), "at least one doctor"),
    ("None for a doctor", lambda: guide(None), "must be a language model. Got None"),
    ("name of a doctor", lambda: guide("my-doctor"), "Got 'my-doctor'; load one with `load_doctor`"),
    ("doctor in training mode", lambda: guide(make_llama(2).train()), r"must be in eval mode.*`.eval\(\)`"),
    ("encoder-decoder doctor", lambda: guide(tiny_t5().eval()), "T5ForConditionalGeneration, an encoder-decoder"),
    (
        "folder that is not there",
        lambda: DoctorGuidedLogitsProcessor.from_pretrained("./absent"),
        "Got './absent', which does not exist",
    ),
    ("doctor to load that is not there", lambda: load_doctor("./absent"), "Got './absent', which does not exist"),
    ("file instead of a folder", lambda: load_doctor(write("file", "")), "which is a file"),
    ("too few tokenizers", lambda: guide(processing_classes=[make_tokenizer()]), "Got 1 for 1 patient, 1 doctors"),
    ("unknown adapter", lambda: Doctor(make_llama(2), adapter="kind"), "one of .* Got 'kind'"),
    (
        "prompt of a doctor without ids",
        lambda: Doctor(make_llama(2), prompt={"text": "a"}),
        "must contain `input_ids`",
    ),
]

# How strongly, and where, they guide
EXPONENTS = [
    ("beta that is no number", lambda: guide(beta="much"), "`beta` must be a number, .* Got 'much'; try 0.5"),
    ("beta of None", lambda: guide(beta=None), "`beta` must be a number, .* Got None"),
    ("beta that is not finite", lambda: guide(beta=float("inf")), "`beta` must be finite. Got inf"),
    ("alpha that is not finite", lambda: guide(alpha=torch.tensor([1.0, float("nan")])), "`alpha` must be finite"),
    ("beta above one", lambda: guide(beta=1.2), "must not exceed 1 in sum.*pass `alpha`"),
    (
        "a beta too few",
        lambda: guide([make_llama(2), make_llama(3)], beta=[0.5]),
        "a `beta` and a `reference` for each. Got 2, 1",
    ),
    ("probability above one", lambda: guide(min_patient_prob=1.5), r"`min_patient_prob` must be in \[0, 1\].*Got 1.5"),
    ("negative probability", lambda: guide(min_patient_prob=-1), r"`min_patient_prob` must be in \[0, 1\].*Got -1"),
    ("negative entropy", lambda: guide(min_patient_entropy=-1), "`min_patient_entropy` a number of nats, at least 0"),
]

# The attention mask
MASKS = [
    ("mask that is a list", lambda: guide(attention_mask=[[1, 1]]), r"must have shape \(B, L\).*Got list"),
    (
        "mask of one text",
        lambda: guide(attention_mask=torch.ones(3)),
        r"must have shape \(B, L\).*Got Tensor of shape \(3,\)",
    ),
    ("mask of nothing", lambda: guide(attention_mask=torch.ones(1, 0)), "with at least one token"),
    (
        "mask padded on the right",
        lambda: guide(attention_mask=torch.tensor([[1, 0]])),
        "left-padded.*padding_side='left'",
    ),
]

# The trace
TRACES = [
    ("trace that was not kept", lambda: guide().trace(IDS), "return_trace=True"),
    ("trace of another generation", lambda: guide(return_trace=True).trace(IDS), "Got none; call `generate` first"),
]

# A generation
GENERATION = [
    ("a doctor instead of a guide", lambda: generate(guide=make_llama(2)), "Got a `LlamaForCausalLM`; make one"),
    ("text instead of ids", lambda: generate(input_ids="you are"), r"shape \(B, L\).*Got str"),
    ("ids of one text", lambda: generate(input_ids=IDS[0]), r"shape \(B, L\).*Got \(3,\)"),
    ("no ids", lambda: generate(input_ids=IDS[:, :0]), r"at least one token. Got \(1, 0\)"),
    ("ids that are not whole", lambda: generate(input_ids=IDS.float()), "torch.float32"),
    ("ids beyond the vocabulary", lambda: generate(input_ids=torch.tensor([[1, 99]])), "from 0 to 21. Got 1 to 99"),
    ("negative ids", lambda: generate(input_ids=torch.tensor([[1, -9]])), "from 0 to 21. Got -9 to 1"),
    ("mask of another shape", lambda: generate(attention_mask=torch.ones(2, 3)), r"Got \(2, 3\) for ids \(1, 3\)"),
    ("unknown argument of generate", lambda: generate(temprature=1.0), "temprature"),
    ("speculation for two", lambda: generate(input_ids=IDS.repeat(2, 1), speculative=True), "Got 2 rows"),
    ("negative number of drafts", lambda: generate(speculative=True, num_draft_tokens=-1), "Got -1; try 4"),
    (
        "speculation without a guide",
        lambda: make_llama(1).generate(IDS, custom_generate=speculative_guided_generate),
        "Got 0; for several doctors",
    ),
]


@with_rows(DOCTORS, EXPONENTS, MASKS, TRACES, GENERATION)
def test_decoding_is_refused(call, message, tmp_path):
    """A doctor that is ignored, or guides another text, still gives fluent answers."""
    assert_refused(call, message, tmp_path)
