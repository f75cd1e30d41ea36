# SPDX-License-Identifier: Apache-2.0

"""
Long runs in the controlled world. They check the correctness of all answers and the growth of memory.

```bash
python benchmarks/soak.py server --minutes 30 --clients 16
python benchmarks/soak.py decoding --calls 2000
python benchmarks/soak.py training --steps 5000
```

- *server*: clients send requests to `trl-tfpo serve`, read answers and disconnect.
- *decoding*: one logits processor is used for thousands of calls.
- *training*: a training run is killed and resumed many times.

Each run prints a table. The exit status is 1 if an answer, a call or a tensor is missing, late or wrong, or if memory
grows by 5%.
"""

import argparse
import http.client
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PrinterCallback
from transformers.utils.logging import disable_progress_bar

from trl_tfpo import DoctorGuidedLogitsProcessor, TFPOConfig, TFPOTrainer, annotate_token_rewards, guided_generate
from trl_tfpo.evaluation.completions import pad
from trl_tfpo.testbed import load_world


TIMEOUT = 60  # seconds
MARGIN = 1e-4  # minimum difference of the two best scores; below it, the greedy token depends on rounding
FAILURES = (
    *("wrong answers", "lost answers", "clients that hang", "completions still running"),
    *("calls that differ from a fresh processor", "points that differ", "tensors that differ"),
)
MAX_GROWTH = 0.05


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to check that it runs")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    soaks = parser.add_subparsers(dest="soak", required=True)
    server = soaks.add_parser("server")
    server.add_argument("--minutes", type=float, default=30.0)
    server.add_argument("--clients", type=int, default=16)
    server.add_argument(
        "--cancelled", type=float, default=0.2, help="share of answers during which the client disconnects"
    )
    decoding = soaks.add_parser("decoding")
    decoding.add_argument("--calls", type=int, default=2000)
    training = soaks.add_parser("training")
    training.add_argument("--steps", type=int, default=5000)
    training.add_argument("--kills", type=int, default=10)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    disable_progress_bar()
    if args.soak == "server":
        sizes = (0.1, 4, 2) if args.quick else (args.minutes, args.clients, 24)
        figures = soak_server(*sizes, cancelled=args.cancelled)
    elif args.soak == "decoding":
        figures = soak_decoding(30 if args.quick else args.calls)
    else:
        figures = soak_training(*((40, 2) if args.quick else (args.steps, args.kills)))
    print("\n".join(["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in figures.items())]))
    if args.output is not None:
        args.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def is_sound(figures: dict) -> bool:
    """Return whether the figures show no failure and no growth of memory."""
    return not any(figures.get(name) for name in FAILURES) and figures.get("growth", 0) < MAX_GROWTH


# Serving


def soak_server(minutes: float, num_clients: int, num_prompts: int, *, cancelled: float) -> dict:
    """Run clients against a server, and compare each answer with the answer of the library to the prompt alone."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        questions = prepare_questions(Path(folder), num_prompts)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [sys.executable, "-m", "trl_tfpo", "serve", "--world", f"--port={port}", f"--max_rows={num_clients}"]
        command += ["--max_new_tokens=64", "--doctor", *(f"{name}={Path(folder) / name}" for name in ("calm", "wild"))]
        server = subprocess.Popen(command)
        try:
            wait_for(port, server)
            counts, lock, stop = Counter(), threading.Lock(), threading.Event()
            clients = [
                threading.Thread(
                    target=run_client, args=(port, questions, random.Random(i), cancelled, counts, lock, stop)
                )
                for i in range(num_clients)
            ]
            for client in clients:
                client.start()
            memory, end = [], time.monotonic() + 60 * minutes
            while time.monotonic() < end and server.poll() is None:
                memory.append(resident_mebibytes(server.pid))
                time.sleep(min(1.0, minutes))
            stop.set()
            for client in clients:
                client.join(2 * TIMEOUT)
            hung = sum(client.is_alive() for client in clients)
            deadline = time.monotonic() + TIMEOUT
            while (num_running := rows_in_progress(port)) and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            server.send_signal(signal.SIGTERM)
            status = server.wait(TIMEOUT)
    return {
        "minutes": round(minutes, 2),
        "clients": num_clients,
        "questions": len(questions),
        "requests": counts["requests"],
        "correct answers": counts["correct"],
        "cancelled answers, correct so far": counts["cancelled"],
        "wrong answers": counts["wrong"],
        "lost answers": counts["requests"] - counts["correct"] - counts["cancelled"] - counts["wrong"],
        "clients that hang": hung,
        "completions still running": num_running,
        "exit status after SIGTERM": status,
        **growth(memory),
    }


def prepare_questions(folder: Path, num_prompts: int) -> list[tuple[dict, str]]:
    """Write two doctors to the folder. Return requests, each with the library's greedy answer."""
    world = load_world()
    torch.manual_seed(0)
    doctors = {"calm": world.doctor, "wild": AutoModelForCausalLM.from_pretrained(world.weights / "doctor").eval()}
    with torch.no_grad():
        doctors["wild"].lm_head.weight.add_(torch.randn_like(doctors["wild"].lm_head.weight) / 4)
    for name, doctor in doctors.items():
        doctor.save_pretrained(folder / name)
        world.tokenizer.save_pretrained(folder / name)
    questions = []
    for messages in [*world.prompts("test"), *world.prompts("validation")][:num_prompts]:
        for calm, wild in ((0.0, 0.0), (0.5, 0.0), (0.1, 0.7), (0.3, 0.3), (0.0, 0.9)):
            inputs = world.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            guide = DoctorGuidedLogitsProcessor(list(doctors.values()), beta=[calm, wild])
            output = guided_generate(
                world.patient,
                guide,
                **inputs,
                do_sample=False,
                max_new_tokens=64,
                output_scores=True,
                return_dict_in_generate=True,
            )
            best = torch.stack(output.scores).topk(2, dim=-1).values  # (T, 1, 2)
            if (best[..., 0] - best[..., 1]).min() > MARGIN:
                ids = output.sequences[0, inputs["input_ids"].size(1) :]
                request = {"model": "world", "messages": messages, "weights": {"calm": calm, "wild": wild}}
                answer = world.tokenizer.decode(ids, skip_special_tokens=True)
                questions.append((request | {"temperature": 0, "max_tokens": 64}, answer))
    return questions


def run_client(port: int, questions: list, draw: random.Random, cancelled: float, counts, lock, stop) -> None:
    """Send requests until `stop` is set, and count their outcomes."""
    while not stop.is_set():
        request, expected = draw.choice(questions)
        cancels, stream = draw.random() < cancelled, draw.random() < 0.5
        with lock:
            counts["requests"] += 1
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        try:
            body = json.dumps(request | {"stream": stream or cancels})
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            if cancels and draw.random() < 0.3:  # before the answer begins
                found, expected = "", ""
            elif stream or cancels:
                found = read_stream(connection.getresponse(), draw.randint(1, 20) if cancels else None)
                expected = expected[: len(found)] if cancels else expected
            else:
                found = json.load(connection.getresponse())["choices"][0]["message"]["content"]
            outcome = "wrong" if found != expected else "cancelled" if cancels else "correct"
        except (OSError, http.client.HTTPException, KeyError, ValueError) as error:
            print(f"Lost: {error!r}", file=sys.stderr)
            outcome = "lost"
        finally:
            connection.close()
        with lock:
            counts[outcome] += 1


def read_stream(response: http.client.HTTPResponse, num_pieces: int | None) -> str:
    """Return the text of a stream, or of its first chunks. Raise an error if the stream is incomplete."""
    text = ""
    for line in response:
        if line.startswith(b"data: [DONE]") or num_pieces == 0:
            return text
        if line.startswith(b"data: "):
            text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            num_pieces = None if num_pieces is None else num_pieces - 1
    raise http.client.IncompleteRead(text.encode())


def wait_for(port: int, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 2 * TIMEOUT
    while server.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"The server must start. Got status {server.poll()}; see its messages.")


def rows_in_progress(port: int) -> int:
    """Return the number of completions that run or wait, by the metrics of the server."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return int(sum(float(x.split()[1]) for x in lines if x.startswith(("trl_tfpo_rows ", "trl_tfpo_waiting "))))


# Decoding


def soak_decoding(num_calls: int) -> dict:
    """Use one processor for many calls of several forms, and compare each call with a new processor."""
    world, draw, memory, num_wrong = load_world(), random.Random(0), [], 0
    prompts = [
        world.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        for split in ("train", "validation", "test")
        for prompt in world.prompts(split)
    ]
    guide, forms = DoctorGuidedLogitsProcessor(world.doctor, beta=0.5), Counter()
    for call in range(num_calls):
        rows = [row[draw.randrange(3) :] for row in draw.sample(prompts, draw.randint(1, 6))]
        ids, mask = pad(rows, padding_side="left", device="cpu")
        settings = dict(input_ids=ids, attention_mask=mask, pad_token_id=world.tokenizer.pad_token_id)
        settings |= draw.choice([dict(do_sample=False), dict(do_sample=True), dict(do_sample=False, num_beams=2)])
        settings["max_new_tokens"] = draw.randint(1, 24)
        form = draw.choice(["guided_generate", "guided_generate, memory kept", "generate"])
        if form == "guided_generate, memory kept":
            settings["do_sample"] = False  # logits from a kept cache differ by rounding
        forms[form] += 1
        outputs = []
        for one in (guide, DoctorGuidedLogitsProcessor(world.doctor, beta=0.5)):
            torch.manual_seed(call)
            if form == "generate":
                one.reset(mask)
                outputs.append(world.patient.generate(**settings, logits_processor=[one]))
            else:
                keep_memory = form.endswith("kept")
                outputs.append(guided_generate(world.patient, one, **settings, keep_memory=keep_memory))
        num_wrong += not torch.equal(*outputs)
        memory.append(resident_mebibytes(os.getpid()))
    return {"calls": num_calls, **forms, "calls that differ from a fresh processor": num_wrong, **growth(memory)}


# Training


def soak_training(num_steps: int, num_kills: int) -> dict:
    """Compare loss curve, weights and optimizer of a training run with those of a run that is killed and resumed."""
    world, draw = load_world(), random.Random(0)
    annotated = annotate_token_rewards(
        world.preference_dataset("praise", num_pairs=64, seed=0),
        world.patient,
        world.tokenizer,
        faces=world.attributes["praise"].faces,
    )
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"

        def start(output_dir):
            process = multiprocessing.get_context("fork").Process(
                target=train, args=(annotated, output_dir, num_steps)
            )
            process.start()
            return process

        begin = time.monotonic()
        process = start(whole)
        process.join()
        seconds, num_killed, resumed_at = time.monotonic() - begin, 0, []
        while True:
            resumed_at.append(last_step(killed))
            process = start(killed)
            if num_killed == num_kills:
                process.join()
                break
            process.join(draw.uniform(0.5, 1.5) * seconds / (num_kills + 1))
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            num_killed += 1
        curves, states = zip(*(read_training(path, num_steps) for path in (whole, killed)), strict=True)
    return {
        "steps": num_steps,
        "kills": num_killed,
        "resumed at steps": " ".join(map(str, resumed_at[1:])),
        "points of the loss curve": len(curves[0]),
        "points that differ": sum(a != b for a, b in zip(*curves, strict=True)),
        "first and last loss": f"{curves[0][0][1]:.3f}, {curves[0][-1][1]:.3f}",
        "tensors of weights and optimizer": len(states[0]),
        "tensors that differ": sum(not tensor.equal(states[1][name]) for name, tensor in states[0].items()),
    }


def train(annotated, output_dir: Path, num_steps: int) -> None:
    world = load_world()
    every = max(num_steps // 100, 2)
    trainer = TFPOTrainer(
        model=world.doctor,
        args=TFPOConfig(
            str(output_dir),
            max_steps=num_steps,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            logging_steps=every // 2,
            save_steps=every,
            save_total_limit=2,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=annotated,
        processing_class=world.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=True)


def last_step(output_dir: Path) -> int:
    """Return the step of the last complete checkpoint."""
    marks = output_dir.glob("checkpoint-*/checkpoint.json")
    return max((int(mark.parent.name.removeprefix("checkpoint-")) for mark in marks), default=0)


def read_training(output_dir: Path, num_steps: int) -> tuple[list[tuple], dict[str, torch.Tensor]]:
    """Return the loss curve, and the tensors of the weights and the optimizer."""
    folder = output_dir / f"checkpoint-{num_steps}"
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    moments = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    state = {f"{index} {name}": tensor for index, of in moments.items() for name, tensor in of.items()}
    return [(x["step"], x["loss"]) for x in history if "loss" in x], load_file(folder / "model.safetensors") | state


# Memory


def resident_mebibytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(memory: list[float]) -> dict:
    """Return the median memory in the second tenth of a run (after warm-up) and in the last tenth, and the growth."""
    tenth = max(len(memory) // 10, 1)
    early, late = statistics.median(memory[tenth : 2 * tenth]), statistics.median(memory[-tenth:])
    return {
        "MiB after warm-up": round(early, 1),
        "MiB at the end": round(late, 1),
        "MiB at most": round(max(memory[tenth:]), 1),
        "growth": round(late / early - 1, 4),
    }


if __name__ == "__main__":
    sys.exit(not is_sound(main()))
