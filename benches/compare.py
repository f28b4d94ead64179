#!/usr/bin/env python3
"""PyTorch's part of the benchmarks.

Batches, rounds, sizes and the file format are those of `benches/compare`.

    benches/compare.py [--short] [--device cpu|cuda:0] [--only enqueue,fill,...] --json FILE
    benches/compare.py --serve      # for the Rust program: reads a subject per line, writes its figures as a line
"""

import argparse
import contextlib
import gc
import json
import sys
import time

BATCH = 64
KB, MB, GB = 1 << 10, 1 << 20, 1 << 30
COPIED = [4, 64, KB, 4 * KB, 16 * KB, 64 * KB]
MOVED = [4 * KB, 16 * KB, 64 * KB, 256 * KB, MB, 4 * MB, 16 * MB, 64 * MB, 256 * MB, GB]
FILLED = [4 * KB, 64 * KB, MB, 16 * MB, 256 * MB, GB, 8 * GB]
PINNED = [4 * KB, 64 * KB, MB, 64 * MB, GB, 4 * GB]


class CpuGpuBuffer:
    """Has the interface of vLLM's class."""

    def __init__(self, count, device):
        self.cpu = torch.zeros(count, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.np = self.cpu.numpy()
        self.gpu = torch.zeros_like(self.cpu, device=device)

    def copy_to_gpu(self, n=None):
        if n is None:
            return self.gpu.copy_(self.cpu, non_blocking=True)
        return self.gpu[:n].copy_(self.cpu[:n], non_blocking=True)

    def copy_to_cpu(self, n=None):
        if n is None:
            return self.cpu.copy_(self.gpu, non_blocking=True)
        return self.cpu[:n].copy_(self.gpu[:n], non_blocking=True)


class Bench:
    def __init__(self, device, short):
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.short = short
        if self.cuda:
            torch.cuda.set_device(self.device)
        self.figures, self.left_out = [], []

    # ---- the device ----

    def stream(self):
        return torch.cuda.Stream() if self.cuda else None

    def on(self, stream):
        return torch.cuda.stream(stream) if self.cuda else contextlib.nullcontext()

    def wait(self, stream):
        if self.cuda:
            stream.synchronize()

    def device_seconds(self, stream, send):
        """Seconds between two events around the work. On the CPU, seconds of the call."""
        if not self.cuda:
            return seconds(send)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        send()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def fits(self, what, of_device, of_host):
        """Returns True if memory suffices, with a tenth to spare. Notes the measurement as left out if not."""
        with open("/proc/meminfo") as table:
            host = next(int(line.split()[1]) * KB for line in table if line.startswith("MemAvailable"))
        device = torch.cuda.mem_get_info()[0] if self.cuda else host
        if of_device <= device * 0.9 and of_host <= host * 0.9:
            return True
        self.left_out.append(f"PyTorch, {what}: {device // MB} MB are free on the device and {host // MB} MB here")
        return False

    # ---- timing ----

    def rounds(self, whole):
        return min(max(whole // 50, 3), 5) if self.short else whole

    def sizes(self, whole):
        return [size for size in whole if size <= MB] if self.short else whole

    def turns(self, rounds, contenders):
        """Lets the pairs (name, round) take turns, after a warm-up. Each round starts with the next contender."""
        warm_up = rounds // 10 + 1
        samples = {name: [] for name, _ in contenders}
        for number in range(warm_up + rounds):
            for turn in range(len(contenders)):
                name, one = contenders[(number + turn) % len(contenders)]
                sample = one()
                if number >= warm_up:
                    samples[name].append(sample)
        return samples

    def add(self, what, name, unit, samples):
        subject, case, at = what
        samples = sorted(samples)
        low, median, high = (float(f"{samples[len(samples) * percent // 100]:.3e}") for percent in (10, 50, 90))
        self.figures.append({
            "subject": subject, "case": case, "at": at, "by": name, "unit": unit,
            "median": median, "low": low, "high": high, "samples": len(samples),
        })

    def compare(self, what, unit, rounds, contenders):
        for name, samples in self.turns(rounds, contenders).items():
            self.add(what, name, unit, samples)

    # ---- the subjects ----

    def enqueue(self):
        for size in self.sizes(COPIED):
            for case in ["H2D", "D2H"]:
                yield lambda size=size, case=case: self.enqueue_one(size, case)

    def enqueue_one(self, size, case):
        stream = self.stream()
        whole, half, typed = (CpuGpuBuffer(n, self.device) for n in (size, 2 * size, 2 * size))
        for buffer in whole, half, typed:
            randomise(buffer.np)
        if case == "H2D":
            calls = [
                ("PyTorch", lambda: whole.gpu.copy_(whole.cpu, non_blocking=True)),
                ("PyTorch `[:n]`", lambda: half.gpu[:size].copy_(half.cpu[:size], non_blocking=True)),
                ("PyTorch CpuGpuBuffer(n)", lambda: typed.copy_to_gpu(size)),
            ]
        else:
            calls = [
                ("PyTorch", lambda: whole.cpu.copy_(whole.gpu, non_blocking=True)),
                ("PyTorch `[:n]`", lambda: half.cpu[:size].copy_(half.gpu[:size], non_blocking=True)),
                ("PyTorch CpuGpuBuffer(n)", lambda: typed.copy_to_cpu(size)),
            ]

        def batch(call):
            cost = each(BATCH, call)
            self.wait(stream)
            return cost

        with self.on(stream):
            contenders = [(name, lambda call=call: batch(call)) for name, call in calls]
            self.compare(("enqueue", case, size), "ns", self.rounds(300), contenders)
            for buffer in whole, half, typed:
                self.verify(buffer, size, stream)

    def latency(self):
        for size in self.sizes(COPIED):
            for case in ["H2D", "D2H"]:
                yield lambda size=size, case=case: self.latency_one(size, case)

    def latency_one(self, size, case):
        stream = self.stream()
        buffer = CpuGpuBuffer(size, self.device)
        randomise(buffer.np)

        def until_written():
            buffer.np[:4] = fresh()
            start = time.perf_counter_ns()
            buffer.gpu.copy_(buffer.cpu, non_blocking=True)
            self.wait(stream)
            buffer.np[0] = 0
            return (time.perf_counter_ns() - start) * 1e-3

        def until_read():
            bytes = fresh()
            buffer.np[:4] = bytes
            buffer.copy_to_gpu()
            self.wait(stream)
            buffer.np[:4] = 0
            start = time.perf_counter_ns()
            buffer.cpu.copy_(buffer.gpu, non_blocking=True)
            self.wait(stream)
            seen = buffer.np[0]
            took = (time.perf_counter_ns() - start) * 1e-3
            assert seen == bytes[0], "read too early"
            return took

        with self.on(stream):
            one = until_written if case == "H2D" else until_read
            self.compare(("latency", case, size), "µs", self.rounds(2000), [("PyTorch", one)])
            self.verify(buffer, size, stream)

    def bandwidth(self):
        for size in self.sizes(MOVED):
            yield lambda size=size: self.bandwidth_one(size)

    def bandwidth_one(self, size):
        if not self.fits(f"bandwidth of {size} bytes", 2 * size, 2 * size):
            return
        copies = min(-(-64 * MB // size), BATCH)
        rounds = self.rounds(7 if size >= 64 * MB else 30)
        up, down = (CpuGpuBuffer(size, self.device) for _ in range(2))
        streams = [self.stream(), self.stream()]
        for buffer in up, down:
            randomise(buffer.np)

        def one_way(copy):
            def send():
                with self.on(streams[0]):
                    for _ in range(copies):
                        copy()
            return size * copies / self.device_seconds(streams[0], send) * 1e-9

        def both():
            def send():
                for _ in range(copies):
                    with self.on(streams[0]):
                        up.copy_to_gpu()
                    with self.on(streams[1]):
                        down.copy_to_cpu()
                for stream in streams:
                    self.wait(stream)
            return 2 * size * copies / seconds(send) * 1e-9

        cases = [("H2D", lambda: one_way(up.copy_to_gpu)), ("D2H", lambda: one_way(up.copy_to_cpu)),
                 ("both at once", both)]
        for case, one in cases:
            self.compare(("bandwidth", case, size), "GB/s", rounds, [("PyTorch", one)])
        with self.on(streams[0]):
            self.verify(up, size, streams[0])
            self.verify(down, size, streams[0])

    def fill(self):
        elements = [
            ("1 byte", torch.uint8, 0xA1),
            ("2 bytes", torch.int16, 0x21A2),
            ("4 bytes", torch.float32, 1.1),
            ("8 bytes", torch.float64, 1.1),
            ("16 bytes", torch.complex128, 1.1 + 2.2j),
            ("zero", torch.float32, 0.0),
        ]
        for size in self.sizes(FILLED):
            for element in elements:
                yield lambda size=size, element=element: self.fill_one(size, *element)

    def fill_one(self, size, case, dtype, value):
        if not self.fits(f"fill of {size} bytes, {case}", size, 0):
            return
        stream = self.stream()
        with self.on(stream):
            filled = torch.empty(size // dtype.itemsize, dtype=dtype, device=self.device)
            name, fill = "PyTorch", (lambda: filled.fill_(value))
            if case == "zero":
                fill = filled.zero_

            def enqueued():
                cost = each(BATCH, fill)
                self.wait(stream)
                return cost

            if size <= MB:
                self.compare(("fill", f"enqueue, {case}", size), "ns", self.rounds(200), [(name, enqueued)])
            fills = min(-(-256 * MB // size), BATCH)

            def rate():
                def send():
                    for _ in range(fills):
                        fill()
                return size * fills / self.device_seconds(stream, send) * 1e-9

            self.compare(("fill", f"device, {case}", size), "GB/s", self.rounds(30), [(name, rate)])
            filled.view(torch.uint8).fill_(0x5E)
            fill()
            starts = [0, len(filled) - 1, *torch.randint(len(filled), (20,)).tolist()]
            seen = torch.stack([filled[start] for start in starts]).cpu()
            assert (seen == torch.full_like(seen, value)).all(), "not filled"

    def pinned(self):
        if not self.cuda:
            self.left_out.append("PyTorch, pinned memory: there is no CUDA")
            return
        for size in self.sizes(PINNED):
            yield lambda size=size: self.pinned_one(size)

    def pinned_one(self, size):
        if not self.fits(f"pinned memory of {size} bytes", 0, 2 * size):
            return
        rounds = 3 if self.short else 30 if size < MB else 10 if size < GB else 3 if size == GB else 1
        empty_cache = getattr(torch._C, "_host_emptyCache", None)
        if empty_cache is None:
            self.left_out.append("PyTorch, pinned memory: this version cannot empty its cache")
            return
        pageable = torch.zeros(size, dtype=torch.uint8) if size <= GB else None

        def first():
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)

        def both_ends(make, release, samples):
            start = time.perf_counter()
            made = make()
            between = time.perf_counter()
            del made
            release()
            end = time.perf_counter()
            samples.append((end - between) * 1e3)
            return (between - start) * 1e3

        # Memory of the driver, and memory that PyTorch's cache reuses.
        ways = [("PyTorch pin_memory=True", first, empty_cache)]
        if pageable is not None:
            ways.append(("PyTorch .pin_memory()", pageable.pin_memory, empty_cache))
        for name, make, release in ways:
            empty_cache()
            released = []
            self.compare(("pinned", "allocate", size), "ms", rounds,
                         [(name, lambda: both_ends(make, release, released))])
            self.add(("pinned", "release", size), name, "ms", released[-rounds:])
        first()
        name, released = "PyTorch, from its cache", []
        self.compare(("pinned", "allocate", size), "ms", 30, [(name, lambda: both_ends(first, int, released))])
        self.add(("pinned", "release", size), name, "ms", released[-30:])
        empty_cache()

    def access(self):
        if not self.cuda:
            self.left_out.append("PyTorch, access: there is no CUDA")
            return
        yield self.access_idle
        yield self.access_unasked

    def access_idle(self):
        calls = 100 if self.short else 5000
        stream = self.stream()
        event = torch.cuda.Event()
        event.record(stream)
        stream.synchronize()
        contenders = [("PyTorch Event.query", lambda: each(calls, event.query)),
                      ("PyTorch Stream.query", lambda: each(calls, stream.query))]
        for case in ["idle, new", "idle, stream synchronized"]:
            self.compare(("access", case, 4096), "ns", self.rounds(50), contenders)

    def access_unasked(self):
        stream = self.stream()
        events = [torch.cuda.Event() for _ in range(BATCH)]

        def one():
            for event in events:
                event.record(stream)
            stream.synchronize()
            asked = iter(events)
            return each(BATCH, lambda: next(asked).query())

        self.compare(("access", "finished, first asked", 4096), "ns", self.rounds(200), [("PyTorch Event.query", one)])

    def group(self):
        yield self.group_of_prefixes

    def group_of_prefixes(self):
        members, room = 16, 16 * KB
        stream = self.stream()
        buffers = [CpuGpuBuffer(room, self.device) for _ in range(members)]
        prefixes = [4352 + 512 * member for member in range(members)]
        for buffer in buffers:
            randomise(buffer.np)

        def upload():
            for buffer, n in zip(buffers, prefixes):
                buffer.gpu[:n].copy_(buffer.cpu[:n], non_blocking=True)

        def enqueued():
            cost = each(BATCH // members, upload) * 1e-3
            self.wait(stream)
            return cost

        def done():
            start = time.perf_counter_ns()
            upload()
            self.wait(stream)
            return (time.perf_counter_ns() - start) * 1e-3

        with self.on(stream):
            for case, one in [("enqueue", enqueued), ("until done", done)]:
                self.compare(("group", case, sum(prefixes)), "µs", self.rounds(500), [("PyTorch, 16 `[:n]`", one)])
            for buffer, n in zip(buffers, prefixes):
                self.verify(buffer, n, stream)

    # ---- results ----

    def verify(self, buffer, size, stream):
        randomise(buffer.np)
        sent = buffer.np[:size].copy()
        buffer.copy_to_gpu(size)
        self.wait(stream)
        buffer.np[:size] = 0
        buffer.copy_to_cpu(size)
        self.wait(stream)
        assert (buffer.np[:size] == sent).all(), "bytes were lost"

    def jobs(self, subject):
        return list(getattr(self, subject)())

    def taken(self):
        """Returns the run so far and starts a new one."""
        versions = {"PyTorch": torch.__version__, "Python": sys.version.split()[0], "NumPy": np.__version__}
        run = {"machine": {}, "versions": versions, "method": {}, "left_out": self.left_out, "figures": self.figures}
        self.left_out, self.figures = [], []
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            getattr(torch._C, "_host_emptyCache", int)()
        return run


def fresh():
    return np.random.randint(256, size=4, dtype=np.uint8)


def randomise(array):
    # Random blocks, since the generator is slower than the measured calls.
    block = np.random.randint(256, size=min(len(array), 16 * MB), dtype=np.uint8)
    for start in range(0, len(array), len(block)):
        piece = array[start:start + len(block)]
        piece[:] = block[:len(piece)]


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def each(calls, call):
    """Nanoseconds of one of several calls, on average."""
    start = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return (time.perf_counter_ns() - start) / calls


SUBJECTS = ["enqueue", "latency", "bandwidth", "fill", "pinned", "access", "group"]


def arguments():
    parser = argparse.ArgumentParser(description="PyTorch's part of the benchmarks")
    parser.add_argument("--short", action="store_true", help="next to nothing, to see whether it works")
    parser.add_argument("--device", help="cpu or cuda:0; unless given, CUDA where there is any")
    parser.add_argument("--only", type=lambda names: names.split(","), default=SUBJECTS, help="subjects, with commas")
    parser.add_argument("--json", help="the file to write")
    parser.add_argument("--serve", action="store_true", help="a subject a line in, its figures in a line out")
    given = parser.parse_args()
    unknown = [name for name in given.only if name not in SUBJECTS]
    if unknown:
        parser.error(f"{', '.join(unknown)}: none of {', '.join(SUBJECTS)}")
    if not given.serve and not given.json:
        parser.error("--json says where the figures go")
    return given


def serve(bench):
    # All imports are done, and no longer disturb other measurements.
    print(flush=True)
    for line in sys.stdin:
        for job in bench.jobs(line.strip()):
            job()
        print(json.dumps(bench.taken()), flush=True)


def main(given):
    device = given.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, given.short or device == "cpu")
    if given.serve:
        return serve(bench)
    try:
        from tqdm import tqdm as progress
    except ImportError:
        def progress(jobs):
            return jobs
    for job in progress([job for subject in given.only for job in bench.jobs(subject)]):
        job()
    with open(given.json, "w") as file:
        json.dump(bench.taken(), file, indent=1)


if __name__ == "__main__":
    given = arguments()
    # After the arguments, so that `--help` works without PyTorch.
    import numpy as np
    import torch

    main(given)
