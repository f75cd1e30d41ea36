# SPDX-License-Identifier: Apache-2.0

"""Choice between calibrated and sparse token rewards."""

from collections.abc import Sequence

from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset

from ..annotation.agreement import warn_unless_faces_separate
from ..annotation.token_rewards import GAP_COLUMNS, annotation_settings
from ..common.language_model import LanguageModel, is_peft_model, is_sharded
from ..data.tokenization import columns_of
from ..functional import token_rewards
from .base_policy import POLICIES
from .calibration import Calibration, calibrate
from .checks import check_can_calibrate
from .config import TFPOConfig


MIN_PAIRS = 128  # with fewer labels, standard errors are too large
DEFAULT_REWARDS = f"{token_rewards.__module__}.{token_rewards.__qualname__}"  # name in the record of an annotation


def choose_rewards(
    dataset: Dataset | IterableDataset,
    eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None,
    model: LanguageModel,
    args: TFPOConfig,
    eos_token_ids: Sequence[int],
    *,
    is_online: bool = False,
) -> tuple[Calibration | None, str | None]:
    """
    Calibrate token rewards if the settings require it, or by default if calibrated rewards explain held-out labels
    better.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Annotated training data.
        eval_dataset (the same, or a `dict` of them, *optional*):
            Evaluation data. With `calibrate_rewards=None`, rewards are not calibrated if it has no gaps.
        model ([`~transformers.PreTrainedModel`]):
            The doctor. Calibration uses its embeddings.
        args ([`TFPOConfig`]):
            Settings.
        eos_token_ids (`Sequence[int]`):
            Tokens that end a completion.
        is_online (`bool`, *optional*, defaults to `False`):
            Whether the data collator annotates each batch.

    Returns:
        [`Calibration`], the same in all processes, or `None` if it is not used; and a summary of the comparison, or
        `None` if nothing was compared.

    Raises:
        `ValueError`: with `calibrate_rewards=True`, if there are no gaps or fewer than 32 pairs, and on errors of
            [`check_can_calibrate`].

    Warns:
        `UserWarning`: if the rewards that are used do not explain the labels; if nothing is compared and the faces do
            not separate chosen from rejected completions; for an adapter that cannot start at token credits.
    """
    if args.calibrate_rewards:
        check_can_calibrate(dataset, model, is_online=is_online)
    eval_splits = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
    by_default = args.calibrate_rewards is None and POLICIES[args.policy].has_base and not is_online
    by_default = by_default and _may_calibrate(dataset, eval_splits, model)
    if not args.calibrate_rewards and not by_default:
        if args.process_index == 0:
            warn_unless_faces_separate(dataset)
        return None, None
    embeddings = model.get_input_embeddings().get_parameter("weight")
    calibration = calibrate(dataset, embeddings, eos_token_ids)
    (calibration,) = broadcast_object_list([calibration])  # rounding may differ between machines
    is_used = args.calibrate_rewards or calibration.is_better
    if args.process_index == 0:
        calibration.report(is_used=is_used)
    return calibration if is_used else None, calibration.describe(is_used=is_used)


def _may_calibrate(
    dataset: Dataset | IterableDataset,
    eval_splits: Sequence[Dataset | IterableDataset | None],
    model: LanguageModel,
) -> bool:
    """
    Whether rewards may be calibrated by default.

    The doctor must be neither sharded nor an adapter. The dataset must have gaps and at least 128 pairs. Its
    annotation must have the default `reward_fn` and `reward_direction`, because rewards that the user chose are kept.
    """
    if is_sharded(model) or is_peft_model(model):
        return False
    recorded = annotation_settings(dataset)
    if recorded is None or not isinstance(dataset, Dataset) or len(dataset) < MIN_PAIRS:
        return False  # without a record, for example from a file, the rewards may be of any kind
    rewards = recorded.get("reward", {})
    is_default = rewards.get("function", DEFAULT_REWARDS) == DEFAULT_REWARDS
    is_default &= rewards.get("reward_direction", "agreement") == "agreement"
    splits = [dataset, *(split for split in eval_splits if split is not None)]
    return is_default and all(set(GAP_COLUMNS) <= columns_of(split) for split in splits)
