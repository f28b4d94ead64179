#!/usr/bin/env python3
"""That PyTorch takes the halves of a buffer over, in order, and for as long as it needs them.

    PYTHONPATH=$(examples/pytorch/build) python3 examples/pytorch/test_pytorch.py [NAME...]

Needs the module, and PyTorch or NumPy: what has to do with host memory is checked with either. What needs a CUDA device
that PyTorch can use is left out without one, and said to be. Names choose the checks that hold them.
"""
import gc
import sys
import threading
import time
import traceback

import cpu_gpu_buffer_pytorch as cgb

try:
    import torch
except ImportError:
    torch = None
try:
    import numpy
except ImportError:
    numpy = None

DTYPES = ["u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64", "f16", "bf16", "f32", "f64"]
NAMES = {
    "u8": "uint8", "i8": "int8", "u16": "uint16", "i16": "int16", "u32": "uint32", "i32": "int32", "u64": "uint64",
    "i64": "int64", "f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64",
}
SHAPE = [3, 1, 5, 2]
VALUES = [float(value) for value in range(30)]
# Cycles of the GPU's clock: about a third of a second.
LONG = 600_000_000


def raises(kind, action, *arguments, **named):
    """Runs an action that must raise; the answer is what it said."""
    try:
        action(*arguments, **named)
    except kind as error:
        return str(error)
    raise AssertionError(f"{action} did not raise {kind}")


def on(stream):
    """A stream of ours as PyTorch's."""
    return torch.cuda.ExternalStream(stream.cuda_stream)


def devices():
    """Where buffers can be: on CUDA also where PyTorch cannot use it."""
    return ["cpu"] + (["cuda:0"] if cgb.cuda_count() else [])


class PyTorch:
    """A library that takes tensors over."""

    @staticmethod
    def version():
        cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "without a CUDA device"
        return f"PyTorch {torch.__version__}, {cuda}"

    @staticmethod
    def take(half):
        return torch.from_dlpack(half)

    @staticmethod
    def reaches(device):
        """Whether it takes the device half of a buffer there."""
        return device == "cpu" or torch.cuda.is_available()

    @staticmethod
    def dtype(name):
        return getattr(torch, NAMES[name])

    @staticmethod
    def values(tensor):
        return tensor.cpu().to(torch.float64).flatten().tolist()

    @staticmethod
    def address(tensor):
        return tensor.data_ptr()


class NumPy:
    """Another one, which knows host memory alone."""

    @staticmethod
    def version():
        return f"NumPy {numpy.__version__}"

    @staticmethod
    def take(half):
        return numpy.from_dlpack(half)

    @staticmethod
    def reaches(device):
        return device == "cpu"

    @staticmethod
    def dtype(name):
        return getattr(numpy, NAMES[name], None)

    @staticmethod
    def values(array):
        return array.astype(numpy.float64).flatten().tolist()

    @staticmethod
    def address(array):
        return array.ctypes.data


# ---- with any library ----


def a_tensor_is_the_half_itself(library):
    for dtype in DTYPES:
        if library.dtype(dtype) is None:
            print(f"    {dtype}: left out, the library has no such elements")
            continue
        for device in devices():
            buffer, stream = cgb.Buffer(SHAPE, dtype, device), cgb.Stream(device)
            buffer.write(VALUES)
            host = library.take(buffer.host())
            assert host.dtype == library.dtype(dtype) and list(host.shape) == SHAPE, (host.dtype, host.shape)
            assert library.values(host) == VALUES
            # It writes, and Rust reads.
            host[...] = 7
            assert "host half" in raises(BufferError, buffer.tolist)
            del host
            assert buffer.tolist() == [7.0] * 30
            if library.reaches(device):
                buffer.write(VALUES)
                buffer.upload(stream)
                tensor = library.take(buffer)
                assert library.address(tensor) == buffer.device_ptr
                assert tensor.dtype == library.dtype(dtype) and list(tensor.shape) == SHAPE
                assert library.values(tensor) == VALUES
                assert library is NumPy or str(tensor.device) == device


def what_a_consumer_has_is_refused_and_the_other_half_is_free(library):
    for device in filter(library.reaches, devices()):
        buffer, stream = cgb.Buffer(SHAPE, "f32", device), cgb.Stream(device)
        tensor = library.take(buffer)
        again = library.take(buffer)
        for refused in [buffer.upload, buffer.download, lambda stream: buffer.fill(1.0, stream)]:
            assert "device half" in raises(BufferError, refused, stream)
        buffer.write(VALUES)
        assert buffer.tolist() == VALUES
        del tensor
        raises(BufferError, buffer.upload, stream)
        assert library.values(again) == [0] * 30
        del again
        buffer.upload(stream)
        assert library.values(library.take(buffer)) == VALUES


def a_tensor_outlives_its_buffer_and_a_buffer_its_tensor(library):
    for device in devices():
        stream = cgb.Stream(device)
        for buffer_first in [True, False]:
            buffer = cgb.Buffer([1 << 20], "i32", device)
            buffer.fill(3, stream)
            buffer.synchronize()
            tensor = library.take(buffer.host())
            if buffer_first:
                del buffer
                gc.collect()
                others = [cgb.Buffer([1 << 20], "i32", device) for _ in range(4)]
                assert (tensor == 3).all()
                tensor[...] = 4
                assert all(other.tolist()[:9] == [0.0] * 9 for other in others)
                del tensor
            else:
                del tensor
                assert buffer.tolist()[-1] == 3
                del buffer
        cgb.reclaim()


def capsules_are_what_was_asked_for(library):
    for device in devices():
        buffer = cgb.Buffer(SHAPE, "f32", device)
        for half in [buffer, buffer.host()] if library.reaches(device) else [buffer.host()]:
            place = half.__dlpack_device__()
            assert '"dltensor_versioned"' in repr(half.__dlpack__(max_version=(1, 0)))
            assert '"dltensor"' in repr(half.__dlpack__(max_version=(0, 8)))
            assert '"dltensor"' in repr(half.__dlpack__())
            half.__dlpack__(dl_device=place, copy=False)
            raises(BufferError, half.__dlpack__, dl_device=(place[0] + 1, 0))
            raises(BufferError, half.__dlpack__, copy=True)
            raises(ValueError, half.__dlpack__, stream=0)
            # One of each kind that nobody took lets its tensor go.
            capsules = [half.__dlpack__(), half.__dlpack__(max_version=(1, 3))]
            raises(BufferError, buffer.synchronize)
            del capsules
            buffer.synchronize()
        raises(ValueError, buffer.host().__dlpack__, stream=1)
        assert '"dltensor_versioned"' in repr(buffer.unguarded(max_version=(1, 1)))
        assert '"dltensor"' in repr(buffer.unguarded())


def tensors_are_let_go_in_other_threads(library):
    for device in devices():
        buffer = cgb.Buffer([1000], "f32", device)
        tensors = [library.take(buffer.host()) for _ in range(8)]

        def let_go():
            tensors.pop().sum()

        threads = [threading.Thread(target=let_go) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert buffer.tolist()[0] == 0


def a_struct_from_before_dlpack_1_is_taken(_):
    for device in devices():
        buffer = cgb.Buffer(SHAPE, "f32", device)
        buffer.write(VALUES)
        tensor = PyTorch.take(buffer.host().__dlpack__())
        assert PyTorch.values(tensor) == VALUES
        raises(BufferError, buffer.tolist)
        del tensor
        assert buffer.tolist() == VALUES


# ---- where PyTorch has a CUDA device ----


def warm():
    """Loads the kernels: that waits for the device."""
    for dtype in [torch.float32, torch.int64, torch.uint8]:
        ones = torch.ones(30, dtype=dtype, device="cuda")
        ones.mul_(2)
        (ones * 3).cpu()
        for result in [ones.sum(), ones.sum(dtype=torch.int64), ones.max(), ones[-1]]:
            result.item()


def the_current_stream_waits_for_the_upload():
    ours, theirs = cgb.Stream("cuda:0"), torch.cuda.Stream()
    buffer = cgb.Buffer(SHAPE, "f32", "cuda:0")
    for current in [theirs, torch.cuda.default_stream()]:
        buffer.fill(0, ours)
        buffer.write(VALUES)
        with torch.cuda.stream(on(ours)):
            torch.cuda._sleep(LONG)
        buffer.upload(ours)
        with torch.cuda.stream(current):
            start = time.perf_counter()
            tensor = torch.from_dlpack(buffer)
            total = tensor.sum()
            # Nobody waited on the host, and nothing was read yet.
            assert time.perf_counter() - start < 0.1 and not current.query(), "something waits on the host"
            assert total.item() == sum(VALUES)
        del tensor
    # Streams that cannot be named: the host waits in their stead.
    for stream in [-1, 2]:
        buffer.fill(0, ours)
        buffer.write(VALUES)
        with torch.cuda.stream(on(ours)):
            torch.cuda._sleep(LONG)
        buffer.upload(ours)
        with torch.cuda.stream(theirs):
            assert torch.from_dlpack(buffer.__dlpack__(stream=stream)).sum().item() == sum(VALUES)
    for stream in [None, 1]:
        buffer.write([1.0] * 30)
        buffer.upload(ours)
        assert torch.from_dlpack(buffer.__dlpack__(stream=stream, max_version=(1, 0))).sum().item() == 30


def the_next_use_waits_for_what_pytorch_queued():
    ours, theirs = cgb.Stream("cuda:0"), torch.cuda.Stream()
    buffer = cgb.Buffer(SHAPE, "i64", "cuda:0")
    buffer.write(VALUES)
    buffer.upload(ours)
    with torch.cuda.stream(theirs):
        tensor = torch.from_dlpack(buffer)
        torch.cuda._sleep(LONG)
        tensor.mul_(2)
        start = time.perf_counter()
        del tensor
        assert time.perf_counter() - start < 0.1 and not theirs.query(), "letting go waits"
    buffer.download(ours)
    assert buffer.tolist() == [2 * value for value in VALUES]


def results_come_back_to_the_host_half():
    ours, theirs = cgb.Stream("cuda:0"), torch.cuda.Stream()
    buffer = cgb.Buffer([1 << 20], "f32", "cuda:0")
    assert buffer.is_pinned
    buffer.fill(1, ours)
    with torch.cuda.stream(theirs):
        tensor = torch.from_dlpack(buffer)
        torch.cuda._sleep(LONG)
        result = tensor * 3
        del tensor
        host = torch.from_dlpack(buffer.host())
        assert host.is_pinned()
        host.copy_(result, non_blocking=True)
        assert not theirs.query(), "the copy waits on the host"
        del host
    assert buffer.tolist() == [3.0] * (1 << 20)


def memory_goes_with_the_last_one():
    ours, theirs = cgb.Stream("cuda:0"), torch.cuda.Stream()
    megabyte = 1 << 20
    torch.ones(1, device="cuda")
    torch.cuda.synchronize()
    for buffer_first in [True, False]:
        before = torch.cuda.mem_get_info()[0]
        buffer = cgb.Buffer([256 * megabyte], "u8", "cuda:0")
        buffer.fill(5, ours)
        held = before - torch.cuda.mem_get_info()[0]
        assert held >= 256 * megabyte, held
        with torch.cuda.stream(theirs):
            tensor = torch.from_dlpack(buffer)
            torch.cuda._sleep(LONG)
            total = tensor.sum(dtype=torch.int64)
            if buffer_first:
                del buffer
                assert tensor[-1].item() == 5
                torch.cuda._sleep(LONG)
                again = tensor.max()
                del tensor
            else:
                again = tensor.max()
                del tensor
                del buffer
        cgb.reclaim()
        assert theirs.query(), "memory went before what reads it"
        assert (total.item(), again.item()) == (5 * 256 * megabyte, 5)
        del total, again
        torch.cuda.empty_cache()
        left = before - torch.cuda.mem_get_info()[0]
        assert left < 8 * megabyte, f"{left} bytes are left behind"


def letting_go_ends_no_capture():
    ours = cgb.Stream("cuda:0")
    buffer, other = cgb.Buffer([100], "f32", "cuda:0"), cgb.Buffer([100], "f32", "cuda:0")
    buffer.fill(1, ours)
    other.fill(2, ours)
    tensors = [torch.from_dlpack(buffer), torch.from_dlpack(other)]
    gone = torch.from_dlpack(cgb.Buffer([100], "f32", "cuda:0"))
    static = torch.zeros(100, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.add_(1)
        tensors.pop()
        del other, gone
        static.add_(1)
        # A tensor cannot be made on a stream that is captured: it would be ordered by nothing.
        assert "captured" in raises(BufferError, torch.from_dlpack, buffer)
    graph.replay()
    torch.cuda.synchronize()
    assert (static == 2).all()
    tensors.clear()
    buffer.download(ours)
    assert buffer.tolist() == [1.0] * 100


def one_unguarded_tensor_serves_all_steps():
    ours = cgb.Stream("cuda:0")
    buffer = cgb.Buffer([1000], "f32", "cuda:0")
    buffer.fill(0, ours)
    with torch.cuda.stream(on(ours)):
        tensor = torch.from_dlpack(buffer.unguarded(max_version=(1, 0)))
        out = torch.zeros(1000, device="cuda")
        (tensor * 2).sum()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=on(ours)):
            out.copy_(tensor * 2)
        for step in range(20):
            buffer.write([float(step)] * 1000)
            buffer.upload(ours)
            buffer.use_on(ours)
            graph.replay()
            assert out.sum().item() == 2000 * step
    del buffer
    torch.cuda.synchronize()
    assert tensor[0].item() == 19
    del tensor
    cgb.reclaim()


WITH_ANY_LIBRARY = [
    a_tensor_is_the_half_itself,
    what_a_consumer_has_is_refused_and_the_other_half_is_free,
    a_tensor_outlives_its_buffer_and_a_buffer_its_tensor,
    capsules_are_what_was_asked_for,
    tensors_are_let_go_in_other_threads,
]
ON_CUDA = [
    the_current_stream_waits_for_the_upload,
    the_next_use_waits_for_what_pytorch_queued,
    results_come_back_to_the_host_half,
    memory_goes_with_the_last_one,
    letting_go_ends_no_capture,
    one_unguarded_tensor_serves_all_steps,
]


def main():
    wanted = sys.argv[1:]
    failed = 0

    def run(check, library, left_out):
        nonlocal failed
        name = f"{check.__name__}, {library.__name__}"
        if wanted and not any(part in name for part in wanted):
            return
        if left_out:
            print(f"{name}: left out, {left_out}")
            return
        try:
            check() if check in ON_CUDA else check(library)
            print(f"{name}: ok", flush=True)
        except Exception:  # the other checks are of interest all the same
            traceback.print_exc()
            print(f"{name}: FAILED", flush=True)
            failed += 1

    print(f"{cgb.cuda_count()} CUDA devices for buffers")
    for library, module in [(PyTorch, torch), (NumPy, numpy)]:
        absent = None if module else f"there is no {library.__name__}"
        print(library.version() if module else absent)
        for check in WITH_ANY_LIBRARY:
            run(check, library, absent)
    run(a_struct_from_before_dlpack_1_is_taken, PyTorch, None if torch else "there is no PyTorch")
    cuda = torch is not None and torch.cuda.is_available()
    if cuda:
        warm()
    for check in ON_CUDA:
        run(check, PyTorch, None if cuda else "there is no PyTorch with a CUDA device")
    if torch is None and numpy is None:
        sys.exit("neither PyTorch nor NumPy is there")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
