# SPDX-License-Identifier: Apache-2.0

"""
Log-probabilities of given completions from an engine: an OpenAI-compatible endpoint, or vLLM in this process.

Shapes: T tokens of a completion. Units: nats.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..common.endpoint import Endpoint, Json
from ..data.tokenizer_identity import check_same_tokenizer
from ..models.named_model import NamedModel


LOWEST_LOGP = -9999.0  # servers report it in place of all lower values
NUM_CHECKED_TOKENS = 32  # of the vocabulary, to compare tokenizers


class CompletionScorer(ABC):
    """A patient that another engine runs. [`~trl_tfpo.annotate_token_rewards`] takes it in place of a model."""

    name: str  # recorded as the name of the patient

    @property
    @abstractmethod
    def fingerprint(self) -> object:
        """Identity of the weights, as far as it is known. It is part of the cache key of scores."""

    @abstractmethod
    def check(self, processing_class: PreTrainedTokenizerBase) -> None:
        """Raise `ValueError` if the engine cannot score token ids of this tokenizer."""

    def score_completions(
        self,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        *,
        batch_size: int = 16,
        longest: int = 0,
        on_progress: Callable[[float], None] | None = None,
    ) -> list[torch.Tensor]:
        """
        Log-probability of every completion token after its prompt.

        Args:
            prompt_ids (`list[list[int]]`):
                At least one token each.
            completion_ids (`list[list[int]]`):
                One completion for each prompt.
            batch_size, longest (`int`):
                Not used: the engine forms its own batches.
            on_progress (`Callable`, *optional*):
                Called with the share of the completions that was scored since the last call, in [0, 1].

        Returns:
            `list[torch.Tensor]` of shape `(T_i,)`: log-probabilities, float32, in the given order.

        Raises:
            `ValueError`: if the engine cannot be imported or refuses a request, or if it returns scores of other
                tokens, or a log-probability that is positive or not finite.
            `ConnectionError`: if an endpoint does not answer.
        """
        rows = [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        logps = self._score(rows, [len(prompt) for prompt in prompt_ids], on_progress or (lambda share: None))
        pairs = zip(logps, completion_ids, strict=True)
        return [torch.tensor(_finite(row, len(completion), self.name)) for row, completion in pairs]

    @abstractmethod
    def _score(self, rows: list[list[int]], num_prompt: list[int], on_progress: Callable[[float], None]) -> list[list]:
        """Return log-probabilities of the tokens of each row, at least of those after its first `num_prompt`."""


class EndpointScorer(CompletionScorer):
    """
    Scores completions at an OpenAI-compatible endpoint that returns log-probabilities of prompts: vLLM's server,
    `trl-tfpo serve`, and others.

    Prompt and completion are sent together as a prompt of token ids, to `/completions` with `echo`, `logprobs` and
    `max_tokens=0`. Doctors at the endpoint are off unless exponents are given.

    Args:
        endpoint ([`~trl_tfpo.common.endpoint.Endpoint`]):
            The endpoint.
        exponents (`dict`, *optional*):
            Fields of [`~trl_tfpo.common.endpoint.Endpoint.exponents`]. By default the patient is scored alone.
    """

    def __init__(self, endpoint: Endpoint, exponents: Mapping[str, object] | None = None):
        self.endpoint, self.name = endpoint, endpoint.model
        self._exponents = exponents

    @property
    def fingerprint(self) -> object:
        """
        Name of the model, its `root` (the folder or Hub name behind the name, which vLLM reports), and the exponents.

        The address of the endpoint does not count. A change of the weights under the same name, of the dtype or of
        the quantization is not detected.
        """
        exponents = {} if self._exponents is None else self._exponents
        return ("endpoint", self.name, self.endpoint.description.get("root"), exponents)

    def check(self, processing_class: PreTrainedTokenizerBase) -> None:
        """
        Raise `ValueError` if the endpoint does not score prompts, or spells tokens unlike this tokenizer.

        The spelling of up to 32 tokens, spread over the vocabulary, is compared if the endpoint returns it.
        """
        spelled = {
            index: str(processing_class.decode([index])).strip()
            for index in _spread(
                [*{*processing_class.get_vocab().values()} - {*processing_class.all_special_ids}], 1000
            )
        }
        ids = _spread([i for i, text in spelled.items() if text.isascii() and text.isalnum()], NUM_CHECKED_TOKENS)
        ids = ids or [*spelled][:1]
        answer = self._read(self.endpoint.send("/completions", self._request(ids)), ids)
        tokens = [str(token).strip() for token in answer.get("tokens") or []]
        if len(tokens) != len(ids) or tokens[0].startswith("token_id:"):
            return
        other = [(i, spelled[i], x) for i, x in zip(ids, tokens, strict=True) if spelled[i] != x]
        if other:
            raise ValueError(
                "The endpoint must have the patient's tokenizer, because token ids are sent. Got token "
                f"{other[0][0]}, which is {other[0][1]!r} here and {other[0][2]!r} at {self.endpoint.base_url}; load "
                "the tokenizer of the model that it serves."
            )

    def _score(self, rows: list[list[int]], num_prompt: list[int], on_progress: Callable[[float], None]) -> list[list]:
        logps: list[list] = [[] for _ in rows]
        for index, reply in self.endpoint.send_all("/completions", [self._request(ids) for ids in rows]):
            logps[index] = self._read(reply, rows[index])["token_logprobs"]
            on_progress(1 / len(rows))
        return logps

    def _request(self, ids: list[int]) -> Json:
        request: Json = {"model": self.name, "prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 0}
        exponents = self.endpoint.patient_alone if self._exponents is None else self._exponents
        return request | {"return_token_ids": True} | dict(exponents)

    def _read(self, reply: Json, ids: list[int]) -> Json:
        """Return the log-probabilities of an answer. Raise `ValueError` if they are not those of these ids."""
        try:
            (choice,) = reply["choices"]
            logprobs, found = choice["logprobs"], choice.get("prompt_token_ids")
            num_scores = len(logprobs["token_logprobs"])
            num_tokens = reply["usage"]["prompt_tokens"] if found is None else len(found)
            is_same = num_tokens == len(ids) if found is None else found == ids
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{self.endpoint.base_url} must score prompts: `/completions` with `echo`, `logprobs` and "
                f"`max_tokens=0`. Got an answer without scores ({type(error).__name__}: {error}); use an endpoint "
                "with log-probabilities of prompts, such as vLLM."
            ) from error
        if not is_same or num_scores != len(ids):
            raise ValueError(
                f"{self.endpoint.base_url} must score the {len(ids)} tokens that were sent. Got {num_scores} scores "
                f"of {num_tokens} tokens{'' if is_same else ', which are others'}; use an endpoint that takes token "
                "ids as a prompt, and adds none."
            )
        return logprobs


class VllmScorer(CompletionScorer):
    """
    Scores completions with vLLM in this process, with the prefix cache. The engine starts at the first call.

    vLLM requires an older transformers than this package. If the two cannot be installed together, use vLLM's server
    and [`EndpointScorer`].

    Args:
        name (`str`):
            Hub name or folder of the patient.
        **engine_kwargs:
            Arguments of `vllm.LLM`, such as `dtype` or `tensor_parallel_size`.

    Raises:
        `ValueError`: if `name` is a path but not a folder, or if there are several processes.
    """

    def __init__(self, name: str, **engine_kwargs: Any):
        if PartialState().num_processes > 1:
            raise ValueError(
                "vLLM distributes a model by itself. Got "
                f"{PartialState().num_processes} processes; start one, with `tensor_parallel_size` for several GPUs."
            )
        self.name, self._engine_kwargs = name, engine_kwargs
        self._source = NamedModel(name)

    @property
    def fingerprint(self) -> object:
        """Files or commit of the patient, and the arguments of the engine."""
        return ("vllm", self._source.fingerprint, sorted((k, str(v)) for k, v in self._engine_kwargs.items()))

    def check(self, processing_class: PreTrainedTokenizerBase) -> None:
        """Raise `ValueError` if the patient has another tokenizer."""
        check_same_tokenizer(AutoTokenizer.from_pretrained(self.name, trust_remote_code=False), processing_class)

    @cached_property
    def engine(self) -> Any:
        """
        The vLLM engine, started at the first use.

        Raises:
            `ValueError`: if vLLM cannot be imported.
        """
        try:
            from vllm import LLM
        except ImportError as error:
            raise ValueError(
                f"The backend 'vllm' needs vLLM in this environment. Got an error at its import: {error}. vLLM "
                "requires an older transformers than this package: start vLLM's server in its own environment, and "
                "pass its address with `--backend openai`, or see the section on engines in docs/guide.md."
            ) from error
        return LLM(self.name, **{"enable_prefix_caching": True} | self._engine_kwargs)

    def _score(self, rows: list[list[int]], num_prompt: list[int], on_progress: Callable[[float], None]) -> list[list]:
        outputs = self._read(rows, skip_reading_prefix_cache=False)
        # A cached token has no score. If completions of a prompt begin alike, their first tokens may be cached
        missing = [i for i, output in enumerate(outputs) if (output.num_cached_tokens or 0) >= num_prompt[i]]
        for index, output in zip(missing, self._read([rows[i] for i in missing]), strict=True):
            outputs[index] = output
        logps = []
        for row, first, output in zip(rows, num_prompt, outputs, strict=True):
            if list(output.prompt_token_ids) != row or len(output.prompt_logprobs) != len(row):
                raise ValueError(
                    f"vLLM must score the {len(row)} tokens that were sent. Got {len(output.prompt_logprobs)} "
                    f"scores of {len(output.prompt_token_ids)} tokens; use the version that the documentation names."
                )
            entries = zip(list(output.prompt_logprobs)[first:], row[first:], strict=True)
            logps.append([entry[token].logprob for entry, token in entries])
        on_progress(1.0)
        return logps

    def _read(self, rows: list[list[int]], **settings: object) -> list:
        """Read rows of token ids, and return the outputs of vLLM."""
        if not rows:
            return []
        engine = self.engine
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False, **settings)
        return engine.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)


def _spread(ids: list[int], num: int) -> list[int]:
    """Take at most `num` ids, evenly spaced, in ascending order."""
    return sorted(ids)[:: -(-len(ids) // num) or 1]


def _finite(logps: list, num_tokens: int, name: str) -> list[float]:
    """Return the last log-probabilities of a row, or raise `ValueError` if one is missing, positive or not finite."""
    last = logps[len(logps) - num_tokens :]
    for index, logp in enumerate(last):
        if not isinstance(logp, (int, float)) or not math.isfinite(logp) or logp <= LOWEST_LOGP or logp > 1e-3:
            raise ValueError(
                f"Log-probabilities must be finite, and at most 0. Got {logp!r} from {name!r} for token {index} of a "
                f"completion of {num_tokens}; check the weights and the dtype of the engine, and that no token of the "
                "data is masked out."
            )
    return last
