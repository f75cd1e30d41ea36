# SPDX-License-Identifier: Apache-2.0

"""
A vLLM engine for `serving.py`, for the environment of vLLM.

The script reads lists of prompts (token ids) from standard input, one list as JSON per line, and writes the greedy
answers. On a CPU it uses the older runner of vLLM, because Model Runner V2 needs Triton. The older runner does not
pass the weights of a request to the model, so all requests have the default exponent.
"""

import argparse
import json
import os
import sys


os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch  # noqa: E402
from trl_tfpo_vllm import guided_config  # noqa: E402
from trl_tfpo_vllm.checks import guidance_of  # noqa: E402
from trl_tfpo_vllm.model import GuidedForCausalLM  # noqa: E402
from vllm import LLM, ModelRegistry, SamplingParams  # noqa: E402


class DefaultGuidance(GuidedForCausalLM):
    """A patient guided with the default exponents, for the older runner."""

    check = staticmethod(lambda vllm_config: None)

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.weights = torch.tensor(guidance_of(vllm_config.model_config).request_weights(None))

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        weights = self.weights.expand(input_ids.size(0), -1)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, guidance_weights=weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patient", required=True)
    parser.add_argument("--doctor")
    parser.add_argument("--num_new", type=int, required=True, help="longest answer, in tokens")
    parser.add_argument("--max_len", type=int, default=512, help="longest prompt and answer together, in tokens")
    args = parser.parse_args()
    is_cuda = torch.cuda.is_available()
    settings = {"model": args.patient}
    if args.doctor:
        settings = guided_config(args.patient, {"doctor": args.doctor})
        if not is_cuda:
            ModelRegistry.register_model(DefaultGuidance.__name__, DefaultGuidance)
            settings["hf_overrides"]["architectures"] = [DefaultGuidance.__name__]
    if not is_cuda:
        settings |= {"kv_cache_memory_bytes": 2**31, "enforce_eager": True}
    settings |= {"max_model_len": args.max_len, "max_num_seqs": 64, "enable_prefix_caching": False}
    llm = LLM(dtype="float32", seed=0, **settings)
    params = SamplingParams(temperature=0, max_tokens=args.num_new)
    write({"runner": "Model Runner V2" if is_cuda else "older runner, one weighting for all requests"})
    for line in sys.stdin:
        prompts = [{"prompt_token_ids": ids} for ids in json.loads(line)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        write({"answers": [list(output.outputs[0].token_ids) for output in outputs]})


def write(answer: dict) -> None:
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
