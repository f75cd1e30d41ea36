# SPDX-License-Identifier: Apache-2.0

"""
Throughput of serving engines in tokens per second, measured in turn.

```bash
python benchmarks/serving.py                                                # our engine: many clients relative to one
python benchmarks/serving.py --engines ours vllm --vllm_python .venv-vllm/bin/python
```

Requests for greedy answers go to the engines directly, without HTTP. The first command measures our engine in the
controlled world. The second compares our engine with vLLM, for the patient SmolLM2-135M-Instruct alone and with a
doctor that has a quarter of its parameters (its embeddings and first two layers). Both engines decode in float32,
with one thread if `OMP_NUM_THREADS=1` is set. The script also compares their answers.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from measuring import cell, processor, quartiles
from real.model import default_cache, fetch_model, small_doctor
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_tfpo.server import Engine, Generation, Limits
from trl_tfpo.testbed import load_world


NUM_NEW = 64
WORKER = Path(__file__).with_name("vllm_worker.py")
TOPICS = (
    "tea bread rivers winter music chess birds glass maps letters gardens engines bridges stars clocks salt".split()
)
QUESTIONS = ["What should I know about {}?", "Write two sentences about {}.", "Why do people like {}?", "Explain {}."]
Answers = list[list[int]]


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--clients", type=int, nargs="+", help="requests at once; default: 4 16 32, or 16 64 with vllm"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--engines", nargs="+", choices=["ours", "vllm"], default=["ours"])
    parser.add_argument("--vllm_python", default=sys.executable, help="interpreter of the environment with vLLM")
    parser.add_argument("--quick", action="store_true", help="two repetitions and 4 clients, to check that it runs")
    args = parser.parse_args(arguments)
    repetitions = 2 if args.quick else args.repetitions
    if "vllm" in args.engines:
        return compare_engines(args.vllm_python, [4] if args.quick else args.clients or [16, 64], repetitions)
    return compare_clients([4] if args.quick else args.clients or [4, 16, 32], repetitions)


def compare_clients(clients: list[int], repetitions: int) -> dict[int, list[float]]:
    """Measure our engine in the controlled world, for several numbers of clients."""
    world = load_world()
    engine = Engine(world.patient, world.tokenizer, {"doctor": world.doctor}, Limits(max_rows=max(clients)))
    prompts = [
        world.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        for prompt in world.prompts("train")[: max(clients)]
    ]
    one, many = [], {num: [] for num in clients}
    for _ in range(repetitions):
        one.append(throughput(lambda batch: answers(engine, batch), [[prompt] for prompt in prompts[:4]]))
        for num in clients:
            many[num].append(throughput(lambda batch: answers(engine, batch), [prompts[:num]]))
    engine.close()
    print("| clients | throughput over that of one |\n|---:|---:|")
    for num in clients:
        print(f"| {num} | {cell(quartiles(many[num], one))} |")
    return many


def compare_engines(vllm_python: str, sizes: list[int], repetitions: int) -> dict[tuple[str, str, int], list[float]]:
    """Measure our engine and vLLM for several numbers of requests, with and without the doctor."""
    with TemporaryDirectory() as scratch:
        patient = fetch_model(default_cache())
        tokenizer = AutoTokenizer.from_pretrained(patient)
        doctor = Path(scratch) / "doctor"
        small_doctor(patient, num_layers=2).save_pretrained(doctor)
        tokenizer.save_pretrained(doctor)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        patient_model, doctor_model = (
            AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32).eval().to(device) for x in (patient, doctor)
        )
        limits = Limits(max_rows=max(sizes))
        alone = Engine(patient_model, tokenizer, {}, limits)
        guided = Engine(patient_model, tokenizer, {"doctor": doctor_model}, limits)
        workers = [VllmWorker(vllm_python, patient, None), VllmWorker(vllm_python, patient, doctor)]
        ways: dict[tuple[str, str], Callable[[Answers], Answers]] = {
            ("ours", "patient"): lambda prompts: answers(alone, prompts),
            ("vllm", "patient"): workers[0].answers,
            ("ours", "guided"): lambda prompts: answers(guided, prompts),
            ("vllm", "guided"): workers[1].answers,
        }
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question.format(topic)}], add_generation_prompt=True, return_dict=False
            )
            for topic in TOPICS
            for question in QUESTIONS
        ]
        rates: dict[tuple[str, str, int], list[float]] = {}
        num_equal = {"patient": 0, "guided": 0}
        for repetition in range(repetitions + 1):
            for size in sizes:
                texts = {}
                for (engine, kind), answer in ways.items():
                    texts[engine, kind], seconds = timed(answer, prompts[:size])
                    num_tokens = sum(map(len, texts[engine, kind]))
                    if repetition > 0:  # the first is a warm-up
                        rates.setdefault((engine, kind, size), []).append(num_tokens / seconds)
                for kind in num_equal:
                    pairs = zip(texts["ours", kind], texts["vllm", kind], strict=True)
                    num_equal[kind] += sum(ours == theirs for ours, theirs in pairs)
        for worker in workers:
            worker.close()
        alone.close()
        guided.close()
    report(rates, sizes, {kind: num / sum(sizes) / (repetitions + 1) for kind, num in num_equal.items()})
    print(f"vLLM: {workers[1].runner}. Processor: {processor(device)}.")
    return rates


def report(rates: dict[tuple[str, str, int], list[float]], sizes: list[int], equal: dict[str, float]) -> None:
    """Print the table of tokens per second and ratios of time."""
    print("| requests | | ours, tokens/s | vLLM, tokens/s | time of vLLM over ours | guided over alone: ours | vLLM |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for size in sizes:
        for kind in ("patient", "guided"):
            ours, vllm = rates["ours", kind, size], rates["vllm", kind, size]
            row = [f"{statistics.median(x):.0f}" for x in (ours, vllm)] + [cell(quartiles(ours, vllm))]
            for engine in ("ours", "vllm"):
                times = quartiles(rates[engine, "patient", size], rates[engine, kind, size])
                row.append(cell(times) if kind == "guided" else "")
            print(f"| {size} | {kind} | {' | '.join(row)} |")
    print(f"Equal answers: {equal['patient']:.3f} of the patient, {equal['guided']:.3f} guided.")


class VllmWorker:
    """A vLLM engine in another process, with its own Python environment."""

    def __init__(self, python: str, patient: Path, doctor: Path | None):
        command = [python, str(WORKER), "--patient", str(patient), "--num_new", str(NUM_NEW)]
        command += ["--doctor", str(doctor)] if doctor else []
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.runner: str = self._receive()["runner"]

    def answers(self, prompts: Answers) -> Answers:
        """Return the answers to prompts that arrive at once."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(prompts) + "\n")
        self.process.stdin.flush()
        return self._receive()["answers"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _receive(self) -> dict:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"'):  # vLLM prints to standard output too
                return json.loads(line)
        raise RuntimeError(f"The worker of vLLM must answer. Got exit status {self.process.wait()}; see its messages.")


def answers(engine: Engine, prompts: Answers) -> Answers:
    """Return the answers of our engine to prompts that arrive at once."""
    done = threading.Semaphore(0)
    ids: Answers = [[] for _ in prompts]

    def listener(answer: list[int]) -> Callable:
        def on_event(event):
            answer.extend(token["id"] for token in event.get("tokens", ()))
            if "finish_reason" in event:
                done.release()

        return on_event

    for prompt, answer in zip(prompts, ids, strict=True):
        engine.submit(Generation(prompt, listener(answer), temperature=0, max_new_tokens=NUM_NEW))
    for _ in prompts:
        done.acquire()
    return ids


def throughput(answer: Callable[[Answers], Answers], batches: list[Answers]) -> float:
    """Return tokens per second of all answers, one batch after the other."""
    results = [timed(answer, batch) for batch in batches]
    return sum(len(ids) for ids_of_batch, _ in results for ids in ids_of_batch) / sum(x for _, x in results)


def timed(answer: Callable[[Answers], Answers], prompts: Answers) -> tuple[Answers, float]:
    """Return the answers, and seconds of wall-clock time."""
    start = time.perf_counter()
    return answer(prompts), time.perf_counter() - start


if __name__ == "__main__":
    main()
