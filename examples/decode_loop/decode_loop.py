#!/usr/bin/env python3
"""The loop of `main.rs` in PyTorch, written as vLLM writes it.

Pinned tensors and their numpy views are made once. Whole-array operations prepare the arrays. Each
array has one `copy_` of a prefix.

    decode_loop.py [--requests N] [--steps N] [--kernel-us N] [--device cpu|cuda:0]

The engine is that of `engine.rs`, so that both prepare the same input. The substitute for the model
takes the same time, and returns the last token of each request.
"""

import argparse
import time

MAX_REQUESTS, PROMPT_TOKENS = 1024, 2048
MAX_TOKENS = MAX_REQUESTS + PROMPT_TOKENS
BLOCK, BLOCKS = 16, 128
LONGEST = 1024
VOCABULARY = 32000
WORD = (1 << 64) - 1


def mix(words):
    words = words.copy()
    words ^= words >> np.uint32(16)
    words *= np.uint32(0x7FEB352D)
    words ^= words >> np.uint32(15)
    words *= np.uint32(0x846CA68B)
    words ^= words >> np.uint32(16)
    return words


class Engine:
    """The live requests and their blocks, by row."""

    def __init__(self, requests):
        self.step, self.requests, self.n = 0, requests, 0
        self.random = 0x9E3779B97F4A7C15
        self.free = list(range(MAX_REQUESTS * BLOCKS - 1, -1, -1))
        self.table = np.zeros((MAX_REQUESTS, BLOCKS), np.int32)
        self.tokens = np.zeros((MAX_REQUESTS, LONGEST), np.int32)
        self.prompt, self.total, self.computed, self.scheduled, self.blocks = np.zeros((5, MAX_REQUESTS), np.int32)
        self.rows = np.zeros((2, MAX_REQUESTS), np.int32)
        self.source = np.zeros(MAX_REQUESTS, np.int32)
        self.seeds = np.zeros(MAX_REQUESTS, np.uint64)
        self.parameters = np.zeros((7, MAX_REQUESTS), np.float32)
        self.arange = np.arange(MAX_REQUESTS, dtype=np.int32)
        # The arrays whose rows move when a request takes another row.
        self.of_rows = [self.table, self.tokens, self.prompt, self.total, self.computed, self.scheduled, self.blocks,
                        self.rows[0], self.rows[1], self.source, self.seeds, *self.parameters]
        # The rows whose blocks or parameters changed in this step.
        self.changed = []

    def draw(self):
        self.random ^= self.random << 13 & WORD
        self.random ^= self.random >> 7
        self.random ^= self.random << 17 & WORD
        return self.random

    def schedule(self):
        self.step += 1
        self.changed.clear()
        n = self.n
        computed, scheduled = self.computed[:n], self.scheduled[:n]
        np.add(computed, scheduled, out=computed)
        np.subtract(self.prompt[:n], computed, out=scheduled)
        np.maximum(scheduled, 1, out=scheduled)
        for row in np.nonzero(computed >= self.total[:n])[0].tolist():
            while row < self.n and self.computed[row] >= self.total[row]:
                self.end(row)
        self.admit()
        n, rows = self.n, self.rows[self.step % 2]
        self.source[:n] = rows[:n]
        rows[:n] = self.arange[:n]
        blocks = (self.computed[:n] + self.scheduled[:n] + BLOCK - 1) // BLOCK
        for row in np.nonzero(blocks > self.blocks[:n])[0].tolist():
            for at in range(self.blocks[row], blocks[row]):
                self.table[row, at] = self.free.pop()
            self.blocks[row] = blocks[row]
            self.changed.append(row)

    def end(self, row):
        self.free.extend(self.table[row, :self.blocks[row]].tolist())
        self.n -= 1
        for array in self.of_rows:
            array[row] = array[self.n]
        self.changed.append(row)

    def admit(self):
        most = self.draw() % 4
        if self.n * 4 < self.requests * 3:
            most = self.requests
        room = PROMPT_TOKENS
        for _ in range(most):
            if self.n == self.requests or room < 512:
                break
            seed, row = self.draw(), self.n
            prompt = 2 + (seed >> 8 & 0xFFFFFFFF) % 511
            self.prompt[row] = prompt
            self.total[row] = prompt + 16 + (seed >> 24 & 0xFFFFFFFF) % 257
            self.computed[row], self.scheduled[row], self.blocks[row] = 0, prompt - 1, 0
            self.rows[:, row] = self.source[row] = 0
            self.table[row] = 0
            self.seeds[row] = seed
            for number in range(7):
                self.parameters[number, row] = seed >> 8 * number & 255
            words = np.arange(prompt, dtype=np.uint32) + np.uint32(seed & 0xFFFFFFFF)
            self.tokens[row, :prompt] = mix(words) % np.uint32(VOCABULARY)
            self.changed.append(row)
            room -= prompt - 1
            self.n += 1


class CpuGpuBuffer:
    """A buffer like vLLM's `CpuGpuBuffer`."""

    def __init__(self, *shape, dtype, device):
        self.cpu = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
        self.np = self.cpu.numpy()
        self.gpu = torch.zeros_like(self.cpu, device=device)

    def copy_to_gpu(self, n):
        return self.gpu[:n].copy_(self.cpu[:n], non_blocking=True)

    def copy_to_cpu(self, n):
        return self.cpu[:n].copy_(self.gpu[:n], non_blocking=True)


class Inputs:
    def __init__(self, device):
        def make(*shape, dtype):
            return CpuGpuBuffer(*shape, dtype=dtype, device=device)

        n, i32, i64, f32 = MAX_REQUESTS, torch.int32, torch.int64, torch.float32
        self.query_starts = make(n + 1, dtype=i32)
        self.ids = make(MAX_TOKENS, dtype=i32)
        self.positions = make(MAX_TOKENS, dtype=i64)
        self.slots = make(MAX_TOKENS, dtype=i64)
        self.sequence_lengths = make(n, dtype=i32)
        self.computed = make(n, dtype=i32)
        self.logits = make(n, dtype=i32)
        self.seeds = make(n, dtype=i64)
        self.top_k = make(n, dtype=i32)
        self.temperatures, self.top_p, self.min_p, self.presence, self.frequency, self.repetition = (
            make(n, dtype=f32) for _ in range(6))
        self.table = make(n, BLOCKS, dtype=i32)
        self.by_request = [self.sequence_lengths, self.computed, self.logits, self.temperatures, self.top_p, self.min_p,
                           self.top_k, self.seeds, self.presence, self.frequency, self.repetition, self.table]
        self.by_token = [self.ids, self.positions, self.slots]
        self.arange = np.arange(MAX_TOKENS, dtype=np.int64)

    def write(self, engine, sampled):
        n = engine.n
        computed, scheduled = engine.computed[:n], engine.scheduled[:n]
        decodes = np.nonzero(computed >= engine.prompt[:n])[0]
        engine.tokens[decodes, computed[decodes]] = sampled[engine.source[decodes]]

        starts = self.query_starts.np
        np.cumsum(scheduled, out=starts[1:n + 1])
        count = int(starts[n])
        rows = np.repeat(engine.arange[:n], scheduled)
        positions = self.positions.np[:count]
        np.subtract(self.arange[:count], starts[rows], out=positions)
        np.add(positions, computed[rows], out=positions)
        np.take(engine.tokens.reshape(-1), positions + rows * LONGEST, out=self.ids.np[:count])
        blocks = np.take(engine.table.reshape(-1), positions // BLOCK + rows * BLOCKS)
        slots = self.slots.np[:count]
        np.multiply(blocks, BLOCK, out=slots)
        np.add(slots, positions % BLOCK, out=slots)
        np.add(computed, scheduled, out=self.sequence_lengths.np[:n])
        self.computed.np[:n] = computed
        np.subtract(starts[1:n + 1], 1, out=self.logits.np[:n])

        changed = [row for row in engine.changed if row < n]
        if changed:
            parameters = engine.parameters[:, changed]
            self.temperatures.np[changed] = parameters[0] / 128
            self.top_p.np[changed] = parameters[1] / 256
            self.min_p.np[changed] = parameters[2] / 1024
            self.top_k.np[changed] = parameters[3]
            self.presence.np[changed] = parameters[4] / 256
            self.frequency.np[changed] = parameters[5] / 256
            self.repetition.np[changed] = 1 + parameters[6] / 256
            self.seeds.np[changed] = engine.seeds[changed].view(np.int64)
            self.table.np[changed] = engine.table[changed]
        return count

    def upload(self, n, tokens):
        self.query_starts.copy_to_gpu(n + 1)
        for buffer in self.by_token:
            buffer.copy_to_gpu(tokens)
        for buffer in self.by_request:
            buffer.copy_to_gpu(n)

    def verify(self, engine, tokens):
        """Compares the device sides with the expected input, which is computed row by row."""
        n, at = engine.n, 0
        seen = {name: buffer.gpu.cpu().numpy() for name, buffer in vars(self).items() if hasattr(buffer, "gpu")}
        for row in range(n):
            for position in range(engine.computed[row], engine.computed[row] + engine.scheduled[row]):
                assert seen["ids"][at] == engine.tokens[row, position]
                assert seen["positions"][at] == position
                slot = engine.table[row, position // BLOCK] * BLOCK + position % BLOCK
                assert seen["slots"][at] == slot
                at += 1
            assert seen["query_starts"][row + 1] == at and seen["logits"][row] == at - 1
            assert seen["computed"][row] == engine.computed[row]
            assert seen["sequence_lengths"][row] == engine.computed[row] + engine.scheduled[row]
            assert (seen["table"][row] == engine.table[row]).all()
            assert seen["seeds"][row] == engine.seeds[row].astype(np.int64)
            assert seen["temperatures"][row] == engine.parameters[0, row] / 128
            assert seen["repetition"][row] == 1 + engine.parameters[6, row] / 256
        assert at == tokens


def ticks(microseconds):
    """The cycles for `torch.cuda._sleep` that take the given time, found by measuring."""
    cycles = 10_000_000
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
    return int(cycles * microseconds / (start.elapsed_time(end) * 1e3))


def spread(samples):
    samples = sorted(samples)
    return " ".join(f"{samples[len(samples) * percent // 100]:.3f}" for percent in (50, 99))


def main(given):
    device = torch.device(given.device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream())
    cycles = ticks(given.kernel_us) if cuda else 0
    engine, inputs = Engine(given.requests), Inputs(device)
    results = [CpuGpuBuffer(MAX_REQUESTS, dtype=torch.int32, device=device) for _ in range(2)]
    there = [torch.cuda.Event() for _ in range(2)] if cuda else []
    sent = torch.cuda.Event() if cuda else None
    prepare, host, stalls, tokens, sampled_count, counts = [], [], [], 0, 0, [0, 0]
    now = time.perf_counter_ns
    for step in range(given.steps):
        result = results[step % 2]
        begin = now()
        engine.schedule()
        scheduled = now()
        if cuda and step >= 2:
            # This waits for the samples of two steps ago.
            there[step % 2].synchronize()
        if 2 <= step < 34:
            assert (result.np[:counts[step % 2]] == expected[step % 2]).all(), "sampled something else"
        ready = now()
        if cuda and step > 0 and not sent.query():
            # The copies of the last step still read the arrays.
            waited = now()
            sent.synchronize()
            if step >= given.steps // 10:
                stalls.append(now() - waited)
        n, count = engine.n, inputs.write(engine, result.np)
        inputs.upload(engine.n, count)
        if cuda:
            sent.record()
        prepared = now()
        if cuda:
            torch.cuda._sleep(cycles)
        torch.index_select(inputs.ids.gpu, 0, inputs.logits.gpu[:n], out=result.gpu[:n])
        result.copy_to_cpu(n)
        if cuda:
            there[step % 2].record()
        end = now()
        if step >= given.steps // 10:
            prepare.append((prepared - ready) / 1e3)
            host.append((end - ready + scheduled - begin) / 1e3)
        if step < 32:
            if cuda:
                torch.cuda.synchronize()
            inputs.verify(engine, count)
            expected = expected if step else [None, None]
            expected[step % 2] = inputs.ids.np[inputs.logits.np[:n]].copy()
        tokens, sampled_count = tokens + count, sampled_count + n
        counts[step % 2] = n
    if cuda:
        torch.cuda.synchronize()
    print("work", tokens, sampled_count)
    print("prepare", spread(prepare))
    print("host", spread(host))
    print("stalls", len(stalls), f"{sum(stalls) / 1e3:.0f}")


def arguments():
    parser = argparse.ArgumentParser(description="the decode loop in PyTorch")
    parser.add_argument("--requests", type=int, default=256, help="at the most")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--kernel-us", type=float, default=200, help="what the model takes")
    parser.add_argument("--device", help="cpu or cuda:0; unless given, CUDA where there is any")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    # Imported after the arguments are parsed, so that `--help` works without PyTorch.
    import numpy as np
    import torch

    main(given)
