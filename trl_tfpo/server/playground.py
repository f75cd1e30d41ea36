# SPDX-License-Identifier: Apache-2.0

"""
The playground: a web page with a slider for the exponent of each doctor.

It shows answers with and without the doctors, and how the doctors changed the log-probabilities. In the controlled
world it also plots reward and KL, and the largest reward that any policy can reach at each KL.
"""

import html
import io
import os
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import gradio as gr
import torch

from ..common.atomic import atomic_write
from ..common.heat_map import TokenMap
from ..common.language_model import LanguageModel
from ..data.tokenization import tokenize_prompt
from ..decoding.logits_processor import DoctorGuidedLogitsProcessor
from ..evaluation import evaluate_guidance
from ..evaluation.reward_and_kl import GuidanceResult
from ..models.saved_doctor import load_doctor
from ..testbed import World, load_world, reward_kl_frontier
from ..testbed.language import MAX_NEW_TOKENS
from ..training.config import TFPOConfig
from ..training.trainer import TFPOTrainer
from .engine import Engine, Limits
from .generation import Event, Generation


NUM_FRONTIER_SAMPLES = 100  # of the patient, per test prompt
NUM_GUIDED_SAMPLES = 10  # of the guided policy, per test prompt
Piece = tuple[str, float]  # part of a text, and the change of its log-probability by guidance, in nats


def train_world_doctors(cache_dir: str | os.PathLike, *, max_steps: int = 200) -> dict[str, Path]:
    """
    Train a doctor for each attribute of the controlled world, and return their folders in `cache_dir` by attribute.

    Existing doctors are not trained again. Training takes half a minute per doctor, for 200 steps of 16 pairs.
    """
    world, folders = load_world(), {}
    for name, attribute in world.attributes.items():
        folder = Path(cache_dir) / f"{name}-{max_steps}"
        if not folder.is_dir():
            with atomic_write(folder) as part:
                trainer = TFPOTrainer(
                    model=load_world().doctor,
                    patient_model=world.patient,
                    args=TFPOConfig(
                        str(part),
                        max_steps=max_steps,
                        per_device_train_batch_size=16,
                        learning_rate=3e-3,
                        lr_scheduler_type="cosine",
                        scoring_batch_size=256,
                        activation_checkpointing=False,
                        save_strategy="no",
                        report_to="none",
                        disable_tqdm=True,
                        dataloader_pin_memory=False,
                    ),
                    train_dataset=world.preference_dataset(name, num_pairs=min(16 * max_steps, 1500), seed=0),
                    processing_class=world.tokenizer,
                    faces=attribute.faces,
                )
                trainer.train()
                trainer.save_model()
        folders[name] = folder
    return folders


class Frontiers:
    """Reward and KL of guided policies in the controlled world, and the frontier: the largest reward at each KL."""

    def __init__(self, world: World, doctors: Mapping[str, LanguageModel]):
        self.world, self.doctors = world, doctors
        texts = [completion.text for completion in self._sample(None, NUM_FRONTIER_SAMPLES)["completions"]]
        num_prompts = len(world.prompts("test"))
        self.frontiers = {
            name: reward_kl_frontier(
                torch.tensor([world.attributes[name].oracle(text) for text in texts]).view(num_prompts, -1)
            )
            for name in doctors
        }

    def _sample(self, guide: DoctorGuidedLogitsProcessor | None, num_samples: int) -> GuidanceResult:
        return evaluate_guidance(
            self.world.patient,
            self.world.tokenizer,
            self.world.prompts("test"),
            lambda prompts, completions: [0.0] * len(completions),
            guide=guide,
            num_samples_per_prompt=num_samples,
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=128,
        )

    @lru_cache(maxsize=256)  # noqa: B019
    def measure(self, weights: tuple[float, ...]) -> tuple[float, dict[str, float]]:
        """Estimate the KL from the patient in nats, and the mean reward for each attribute."""
        guide = DoctorGuidedLogitsProcessor(list(self.doctors.values()), beta=list(weights)) if any(weights) else None
        result = self._sample(guide, NUM_GUIDED_SAMPLES)
        texts = [completion.text for completion in result["completions"]]
        rewards = {name: sum(map(self.world.attributes[name].oracle, texts)) / len(texts) for name in self.doctors}
        return result["kl"], rewards

    def plot(self, weights: tuple[float, ...]) -> str:
        """Return an SVG plot of the frontier of each attribute, with a dot for the guided policy."""
        from matplotlib.figure import Figure

        kl, rewards = self.measure(weights)
        figure = Figure(figsize=(8, 2.6), layout="constrained")
        for axes, (name, frontier) in zip(
            figure.subplots(1, len(self.frontiers), squeeze=False)[0], self.frontiers.items(), strict=True
        ):
            axes.plot(frontier.kls, frontier.rewards, color="black", linewidth=1)
            axes.plot([kl], [rewards[name]], "o", color="#cc3333")
            axes.set(xlabel="KL from the patient (nats)", ylabel=f"reward: {name}", xlim=(-0.1, max(3.0, kl + 0.2)))
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
        svg = stream.getvalue()
        return svg[svg.index("<svg") :]


def make_playground(
    engine: Engine, *, example_prompts: list[str], frontiers: Frontiers | None = None, max_new_tokens: int = 256
) -> gr.Blocks:
    """
    Make the page of the playground.

    Args:
        engine ([`~trl_tfpo.server.Engine`]):
            Engine that decodes the answers.
        example_prompts (`list[str]`):
            Suggested prompts. The first one is answered when the page loads.
        frontiers ([`Frontiers`], *optional*):
            Measurements for the plot of reward and KL. By default there is no plot.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Maximum number of tokens of an answer.

    Returns:
        `gradio.Blocks`: page for [`launch`].
    """

    def answers(prompt: str, seed: float, *weights: float) -> Iterator[tuple[str, str]]:
        yield from stream_answers(engine, prompt, int(seed), weights, max_new_tokens)

    def picture(*weights: float) -> str:
        return frontiers.plot(tuple(round(weight, 2) for weight in weights)) if frontiers else ""

    largest = round(1 / len(engine.names), 2) if engine.language_models else 1.0
    with gr.Blocks(title="trl-tfpo", analytics_enabled=False) as page:
        gr.Markdown("# One patient, several doctors\nMove a slider to change the strength of a doctor.")
        with gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Dropdown(
                    example_prompts, value=example_prompts[0], label="Prompt", allow_custom_value=True
                )
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        with gr.Row():
            sliders = [
                gr.Slider(0, largest, value=round(min(default, largest) / 2, 2), step=0.01, label=name)
                for name, default in engine.default_weights.items()
            ]
        with gr.Row():
            with gr.Column():
                gr.Markdown("### Patient alone")
                unguided = gr.HTML(elem_id="unguided")
            with gr.Column():
                gr.Markdown("### Guided")
                guided = gr.HTML(elem_id="guided")
        chart = gr.HTML(elem_id="frontier", visible=frontiers is not None)
        inputs = [prompt, seed, *sliders]
        for trigger in (page.load, prompt.change, seed.change, *(slider.release for slider in sliders)):
            trigger(answers, inputs, [unguided, guided], show_progress="hidden", trigger_mode="always_last")
        if frontiers is not None:
            for trigger in (page.load, *(slider.release for slider in sliders)):
                trigger(picture, sliders, chart, show_progress="hidden", trigger_mode="always_last")
    return page


def stream_answers(
    engine: Engine, prompt: str, seed: int, weights: Sequence[float], max_new_tokens: int
) -> Iterator[tuple[str, str]]:
    """
    Yield both answers so far as HTML: without doctors, and with the exponents `weights`.

    If the engine refuses a generation, the first answer is empty, and the error replaces the second.
    """
    is_chat = engine.processing_class.chat_template is not None
    ids = tokenize_prompt([{"role": "user", "content": prompt}] if is_chat else prompt, engine.processing_class)
    events: queue.Queue[tuple[int, Event]] = queue.Queue()

    def listener(side: int) -> Callable[[Event], None]:
        return lambda event: events.put((side, event))

    alone = Generation(
        ids,
        listener(0),
        alpha=1.0,
        weights=dict.fromkeys(engine.names, 0.0),
        max_new_tokens=max_new_tokens,
        seed=seed,
        with_patient=True,
    )
    weights_by_name = dict(zip(engine.names, weights, strict=True))
    generations = [alone, replace(alone, on_event=listener(1), alpha=None, weights=weights_by_name)]
    pieces: tuple[list[Piece], list[Piece]] = ([], [])
    num_open = 2
    try:
        for generation in generations:
            try:
                engine.submit(generation)
            except (ValueError, OverflowError) as error:
                yield "", f"<p>{html.escape(str(error))}</p>"
                return
        while num_open:
            side, event = events.get()
            num_open -= "finish_reason" in event
            if event.get("text"):
                shift = sum((token["logp"] or 0.0) - token["patient_logp"] for token in event["tokens"])
                pieces[side].append((event["text"], shift if side else 0.0))
                yield _as_html(pieces[0]), _as_html(pieces[1])
    finally:
        for generation in generations:
            generation.is_cancelled = True


def _as_html(pieces: Sequence[Piece]) -> str:
    """Color pieces of a text by the change of their log-probability."""
    texts, shifts = [text for text, _ in pieces], [shift for _, shift in pieces]
    notes = [f"{shift:+.2f} nats" for shift in shifts]
    caption = "⁺ likelier under guidance, ⁻ less likely" if any(shifts) else ""
    return TokenMap([("", texts, shifts, notes)], caption)._repr_html_()


def world_playground(cache_dir: str | os.PathLike, *, max_steps: int = 200) -> gr.Blocks:
    """Make the page of the controlled world. The first call trains its doctors, in `cache_dir`."""
    world = load_world()
    folders = train_world_doctors(cache_dir, max_steps=max_steps)
    doctors = {name: load_doctor(folder, with_value_head=False).eval() for name, folder in folders.items()}
    engine = Engine(world.patient, world.tokenizer, doctors, Limits(max_new_tokens=MAX_NEW_TOKENS))
    prompts = [prompt[0]["content"] for prompt in world.prompts("test")]
    frontiers = Frontiers(  # separate copies of the models, because the engine's thread uses the others
        load_world(), {name: load_doctor(x, with_value_head=False).eval() for name, x in folders.items()}
    )
    return make_playground(engine, example_prompts=prompts, frontiers=frontiers, max_new_tokens=MAX_NEW_TOKENS)


def launch(page: gr.Blocks, *, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Serve the page, and return its address. The page uses system fonts, so it needs no network."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    settings = dict(share=False, quiet=True, prevent_thread_lock=True, footer_links=[])
    queued = page.queue(default_concurrency_limit=4)
    return queued.launch(server_name=host, server_port=port, theme=theme, **settings)[1]
