# SPDX-License-Identifier: Apache-2.0

"""
Throughput of the server in the controlled world: many clients at once relative to one client.

```bash
python benchmarks/serving.py
```

All requests go to the engine, without HTTP, for greedy answers to the same prompts. Both ways take turns.
"""

import argparse
import threading
import time

from measuring import cell, quartiles

from trl_tfpo.server import Engine, Generation, Limits
from trl_tfpo.testbed import load_world


def main(arguments: list[str] | None = None) -> dict[int, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two repetitions and 4 clients, to check that it runs")
    args = parser.parse_args(arguments)
    clients, repetitions = ([4], 2) if args.quick else (args.clients, args.repetitions)
    world = load_world()
    engine = Engine(world.patient, world.tokenizer, {"doctor": world.doctor}, Limits(max_rows=max(clients)))
    prompts = [
        world.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        for prompt in world.prompts("train")[: max(clients)]
    ]
    one, many = [], {num: [] for num in clients}
    for _ in range(repetitions):
        one.append(throughput(engine, prompts[:4], at_once=1))
        for num in clients:
            many[num].append(throughput(engine, prompts[:num], at_once=num))
    engine.close()
    print("| clients | throughput over that of one |\n|---:|---:|")
    for num in clients:
        print(f"| {num} | {cell(quartiles(many[num], one))} |")
    return many


def throughput(engine: Engine, prompts: list[list[int]], at_once: int) -> float:
    """Return tokens per second of all answers, with `at_once` requests in flight."""
    num_tokens, start = 0, time.perf_counter()
    for first in range(0, len(prompts), at_once):
        done = threading.Semaphore(0)
        counts = []

        def on_event(event, done=done, counts=counts):
            if "finish_reason" in event:
                counts.append(event["num_tokens"])
                done.release()

        batch = prompts[first : first + at_once]
        for prompt in batch:
            engine.submit(Generation(prompt, on_event, temperature=0, max_new_tokens=64))
        for _ in batch:
            done.acquire()
        num_tokens += sum(counts)
    return num_tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
