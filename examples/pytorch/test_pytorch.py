#!/usr/bin/env python3
"""Checks that PyTorch takes over the sides of a buffer, in order, for as long as it needs them.

    PYTHONPATH=$(examples/pytorch/build) python3 examples/pytorch/test_pytorch.py [NAME...]

The checks need the module, and PyTorch or NumPy. Checks of host memory run with either. Checks that
need a CUDA device in PyTorch are left out without one, and reported. NAME selects the checks whose
names contain it.

A check that could deadlock runs in its own process, and fails after LIMIT seconds. Some of these
need the simulated runtime, which can hold a call back.
"""
import ctypes
import faulthandler
import gc
import subprocess
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
# The seconds after which a process counts as deadlocked.
LIMIT = 60
ALONE = "--alone"


def raises(kind, action, *arguments, **named):
    """Runs an action that must raise, and returns the text of the exception."""
    try:
        action(*arguments, **named)
    except kind as error:
        return str(error)
    raise AssertionError(f"{action} did not raise {kind}")


def on(stream):
    """A stream of the module as a stream of PyTorch."""
    return torch.cuda.ExternalStream(stream.cuda_stream)


def devices():
    """The devices of buffers. CUDA is one even if PyTorch cannot use it."""
    return ["cpu"] + (["cuda:0"] if cgb.cuda_count() else [])


class PyTorch:
    """PyTorch, as a library that takes over tensors."""

    @staticmethod
    def version():
        cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "without a CUDA device"
        return f"PyTorch {torch.__version__}, {cuda}"

    @staticmethod
    def take(side):
        return torch.from_dlpack(side)

    @staticmethod
    def reaches(device):
        """Returns whether the library takes over the device side of a buffer on this device."""
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
    """NumPy, which takes over host memory alone."""

    @staticmethod
    def version():
        return f"NumPy {numpy.__version__}"

    @staticmethod
    def take(side):
        return numpy.from_dlpack(side)

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


def a_tensor_is_the_side_itself(library):
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
            # The library writes, and Rust reads.
            host[...] = 7
            assert "host side" in raises(BufferError, buffer.tolist)
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


def what_a_consumer_has_is_refused_and_the_other_side_is_free(library):
    for device in filter(library.reaches, devices()):
        buffer, stream = cgb.Buffer(SHAPE, "f32", device), cgb.Stream(device)
        tensor = library.take(buffer)
        again = library.take(buffer)
        for refused in [buffer.upload, buffer.download, lambda stream: buffer.fill(1.0, stream)]:
            assert "device side" in raises(BufferError, refused, stream)
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


def capsules_are_what_was_asked_for(_):
    for device in devices():
        buffer = cgb.Buffer(SHAPE, "f32", device)
        for side in [buffer, buffer.host()]:
            place = side.__dlpack_device__()
            assert '"dltensor_versioned"' in repr(side.__dlpack__(max_version=(1, 0)))
            assert '"dltensor"' in repr(side.__dlpack__(max_version=(0, 8)))
            assert '"dltensor"' in repr(side.__dlpack__())
            side.__dlpack__(dl_device=place, copy=False)
            raises(BufferError, side.__dlpack__, dl_device=(place[0] + 1, 0))
            raises(BufferError, side.__dlpack__, copy=True)
            for stream in [0, -2]:
                raises(ValueError, side.__dlpack__, stream=stream)
            # A capsule of either kind that nobody took deletes its tensor.
            capsules = [side.__dlpack__(), side.__dlpack__(max_version=(1, 3))]
            raises(BufferError, buffer.synchronize)
            del capsules
            buffer.synchronize()
        raises(ValueError, buffer.host().__dlpack__, stream=1)
        assert '"dltensor_versioned"' in repr(buffer.unguarded(max_version=(1, 1)))
        assert '"dltensor"' in repr(buffer.unguarded())


def the_cpu_has_no_streams(_):
    buffer = cgb.Buffer(SHAPE, "f32", "cpu")
    for stream in [-1, 0, 1, 2, 1 << 20]:
        raises(ValueError, buffer.__dlpack__, stream=stream)
    buffer.synchronize()


def a_capsule_that_cannot_be_made_leaks_no_tensor(_):
    try:
        import _testcapi
    except ImportError:
        print("    left out, this Python has no _testcapi")
        return
    buffer = cgb.Buffer(SHAPE, "f32", "cpu")
    version = (1, 0)
    for export in [
        lambda: buffer.__dlpack__(max_version=version),
        lambda: buffer.__dlpack__(),
        lambda: buffer.host().__dlpack__(max_version=version),
        lambda: buffer.host().__dlpack__(),
    ]:
        # Each time a later allocation of Python fails. One of them is that of the capsule.
        failed = 0
        while True:
            _testcapi.set_nomemory(failed, failed + 1)
            try:
                capsule = export()
            except MemoryError:
                failed += 1
            else:
                break
            finally:
                _testcapi.remove_mem_hooks()
            assert failed < 100, "memory runs out without end"
            buffer.synchronize()
        assert failed, "no allocation failed"
        raises(BufferError, buffer.synchronize)
        del capsule
        buffer.synchronize()


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


# ---- with a process of its own ----


def runtime():
    """The CUDA runtime that this process has loaded, if any."""
    cgb.cuda_count()
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if "libcudart" in line}
    return ctypes.CDLL(min(paths)) if paths else None


def simulated():
    """The CUDA runtime that this process has loaded, if it is the simulated one."""
    library = runtime()
    if not hasattr(library, "cudart_sim_hold"):
        return None
    library.cudart_sim_is_held.restype = ctypes.c_bool
    library.cudart_sim_calls.restype = ctypes.c_uint64
    return library


def launch_host_function(stream, function, data=None):
    """Queues a call of a C function, or of a Python function, which needs the lock."""
    status = runtime().cudaLaunchHostFunc(ctypes.c_void_p(stream.cuda_stream), function, data)
    assert status == 0, f"cudaLaunchHostFunc returned {status}"


class Gate:
    """Holds back the queued work of a stream until it is opened. Needs no lock of Python."""

    def __init__(self, stream):
        # These calls keep the lock: nothing else of Python's runs between `open` and the next call.
        self.libc = ctypes.PyDLL(None)
        self.semaphore = ctypes.create_string_buffer(64)
        assert self.libc.sem_init(self.semaphore, 0, 0) == 0
        launch_host_function(stream, self.libc.sem_wait, self.semaphore)

    def open(self):
        assert self.libc.sem_post(self.semaphore) == 0


HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def dropping_a_buffer_lets_a_host_function_have_the_lock():
    # A thread gives up the lock only in explicit calls.
    sys.setswitchinterval(1000)
    ran = []
    function = HOST_FUNCTION(lambda _: ran.append(True))
    for wait in ["drop", "tolist", "synchronize", "stream"]:
        buffer, stream = cgb.Buffer([1000], "f32", "cuda:0"), cgb.Stream("cuda:0")
        buffer.fill(1, stream)
        stream.synchronize()
        gate = Gate(stream)
        launch_host_function(stream, function)
        buffer.download(stream)
        ran.clear()
        gate.open()
        if wait == "drop":
            del buffer
        elif wait == "stream":
            stream.synchronize()
        else:
            getattr(buffer, wait)()
        assert ran, f"{wait} did not wait for what is queued"


# The functions of CUDA that the module may call. Each one is held back once under each of the
# module's own calls.
CALLS = """
    cudaGetDeviceCount cudaMalloc cudaFree cudaHostAlloc cudaFreeHost cudaHostRegister cudaHostUnregister
    cudaDeviceSynchronize cudaMemsetAsync cudaStreamCreateWithPriority cudaStreamDestroy cudaStreamSynchronize
    cudaStreamWaitEvent cudaEventCreateWithFlags cudaEventDestroy cudaEventRecord cudaEventQuery cudaEventSynchronize
    cuCtxPushCurrent cuDevicePrimaryCtxRetain cuDevicePrimaryCtxRelease cuEventQuery cuEventRecord cuEventSynchronize
    cuLaunchKernel cuMemcpyDtoHAsync cuMemcpyHtoDAsync cuMemsetD32Async cuModuleLoadData cuStreamIsCapturing
""".split()


def held(sim, function, action):
    """Runs an action while a CUDA function is held back. Another Python thread, which needs the
    lock, releases the call. Returns whether the action made the call."""
    over, seen = threading.Event(), threading.Event()

    def let_go():
        while not over.is_set():
            if sim.cudart_sim_is_held():
                seen.set()
                break
            time.sleep(0.0002)
        sim.cudart_sim_let_go()

    thread = threading.Thread(target=let_go)
    sim.cudart_sim_hold(function.encode())
    thread.start()
    action()
    over.set()
    thread.join()
    return seen.is_set()


def no_call_into_cuda_is_made_under_the_lock():
    sim = simulated()
    # Once in a process.
    assert held(sim, "cudaGetDeviceCount", cgb.cuda_count)
    assert held(sim, "cuModuleLoadData", lambda: cgb.Stream("cuda:0")), "no kernels were loaded"
    # The size is too large for a chunk, which would stay.
    size = [1 << 21]
    stream, other = cgb.Stream("cuda:0"), cgb.Stream("cuda:0")
    buffer = cgb.Buffer(size, "u8", "cuda:0")
    kept = []

    def make():
        kept.append(cgb.Buffer(size, "u8", "cuda:0"))

    def make_and_drop():
        make()
        kept.clear()

    def drop_unused_stream():
        cgb.Stream("cuda:0")

    def drop_used_stream():
        mine = cgb.Stream("cuda:0")
        buffer.fill(1, mine)
        del mine
        buffer.fill(1, other)

    def drop_lent():
        mine = cgb.Buffer(size, "u8", "cuda:0")
        mine.fill(1, stream)
        capsule = mine.__dlpack__()
        del mine, capsule

    def leave_behind():
        drop_lent()
        cgb.reclaim()

    def export(**named):
        return lambda: buffer.__dlpack__(**named)

    def export_fresh(**named):
        return lambda: cgb.Buffer(size, "u8", "cuda:0").__dlpack__(**named)

    actions = {
        "Buffer": make_and_drop,
        "Stream": drop_unused_stream,
        "a stream that a buffer was used on": drop_used_stream,
        "fill": lambda: buffer.fill(2, stream),
        "write": lambda: (buffer.upload(stream), raises(ValueError, buffer.write, [])),
        "upload": lambda: buffer.upload(stream),
        "upload elsewhere": lambda: buffer.upload(other, rows=9),
        "download": lambda: buffer.download(stream),
        "tolist": lambda: (buffer.download(stream), buffer.tolist()),
        "use_on": lambda: buffer.use_on(stream),
        "synchronize": lambda: (buffer.upload(other), buffer.synchronize()),
        "Stream.synchronize": lambda: (buffer.upload(stream), stream.synchronize()),
        "host": lambda: (buffer.download(stream), buffer.host().__dlpack__()),
        "unguarded": lambda: cgb.Buffer(size, "u8", "cuda:0").unguarded(),
        "reclaim": leave_behind,
        **{f"__dlpack__({stream})": export(stream=stream) for stream in [None, -1, 1, 2, other.cuda_stream]},
        "__dlpack__ of a buffer that was never used": export_fresh(stream=-1),
    }
    found = {(name, call) for call in CALLS for name, action in actions.items() if held(sim, call, action)}
    for expected in [
        ("Buffer", "cudaMalloc"), ("Buffer", "cudaFree"), ("Stream", "cudaStreamCreateWithPriority"),
        ("Stream", "cudaStreamDestroy"), ("a stream that a buffer was used on", "cudaStreamDestroy"),
        ("Stream.synchronize", "cudaStreamSynchronize"), ("reclaim", "cudaFree"), ("reclaim", "cudaDeviceSynchronize"),
        ("fill", "cuLaunchKernel"), ("upload", "cuMemcpyHtoDAsync"), ("download", "cuMemcpyDtoHAsync"),
        ("__dlpack__(None)", "cuStreamIsCapturing"), ("__dlpack__(2)", "cudaStreamSynchronize"),
    ]:
        assert expected in found, f"{expected} was not seen"
    # A consumer that orders itself gets its tensor without a CUDA call.
    unordered = [call for name, call in found if name == "__dlpack__(-1)"]
    assert not unordered, unordered


def the_interpreters_end_waits_for_no_device():
    # These live until the module's globals go. The gate never opens, and its semaphore is leaked:
    # the stream waits on it until the process ends.
    global at_the_end
    stream = cgb.Stream("cuda:0")
    buffer = cgb.Buffer([1000], "f32", "cuda:0")
    gate = Gate(stream)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(gate.semaphore))
    buffer.upload(stream)
    at_the_end = buffer, stream, gate


def a_stream_is_ordered_unless_none_is_to_be():
    sim = simulated()
    legacy, ready, not_ready = 1, 0, 600

    def state(stream):
        return sim.cudaStreamQuery(ctypes.c_void_p(stream))

    waits = [b"cudaStreamSynchronize", b"cudaEventSynchronize", b"cuEventSynchronize", b"cudaDeviceSynchronize"]

    def host_waits():
        return sum(sim.cudart_sim_calls(call) for call in waits)

    ours, theirs = cgb.Stream("cuda:0"), cgb.Stream("cuda:0")
    consumers = [legacy, theirs.cuda_stream]
    for named, expected in [
        (dict(stream=-1), [ready, ready]),
        (dict(), [not_ready, ready]),
        (dict(stream=None), [not_ready, ready]),
        (dict(stream=1), [not_ready, ready]),
        (dict(stream=theirs.cuda_stream), [ready, not_ready]),
    ]:
        buffer = cgb.Buffer(SHAPE, "f32", "cuda:0")
        buffer.write(VALUES)
        gate = Gate(ours)
        buffer.upload(ours)
        before = host_waits()
        # With the gate closed: a host that waited here would not return.
        capsule = buffer.__dlpack__(**named)
        assert host_waits() == before, f"the host waited for {named}"
        assert [state(stream) for stream in consumers] == expected, (named, [state(stream) for stream in consumers])
        # The side is guarded all the same.
        for refused in [buffer.upload, buffer.download, buffer.use_on]:
            assert "device" in raises(BufferError, refused, ours)
        gate.open()
        del capsule
        buffer.download(ours)
        assert buffer.tolist() == VALUES
        theirs.synchronize()
        ours.synchronize()
    # The module cannot send work to the per-thread stream: the host waits.
    buffer = cgb.Buffer(SHAPE, "f32", "cuda:0")
    gate = Gate(ours)
    buffer.upload(ours)
    opened = []

    def export():
        opened.append(buffer.__dlpack__(stream=2))

    def open_gate():
        while not sim.cudart_sim_is_held():
            time.sleep(0.0002)
        assert not opened
        gate.open()
        sim.cudart_sim_let_go()

    sim.cudart_sim_hold(b"cudaStreamSynchronize")
    thread = threading.Thread(target=open_gate)
    thread.start()
    export()
    thread.join()
    assert state(ours.cuda_stream) == ready, "the host did not wait"


def work_on_a_stream_that_use_on_ordered_needs_no_more():
    """The order that `__dlpack__` asks for with -1: `use_on` first, then work on that stream."""
    sim = simulated()
    ours, theirs = cgb.Stream("cuda:0"), cgb.Stream("cuda:0")
    buffer = cgb.Buffer(SHAPE, "f32", "cuda:0")
    buffer.write(VALUES)
    buffer.upload(ours)
    buffer.use_on(theirs)
    capsule = buffer.__dlpack__(stream=-1)
    host = (ctypes.c_float * 30)()
    to_host = 2
    status = sim.cudaMemcpyAsync(
        host, ctypes.c_void_p(buffer.device_ptr), ctypes.c_size_t(ctypes.sizeof(host)), to_host,
        ctypes.c_void_p(theirs.cuda_stream),
    )
    assert status == 0, status
    theirs.synchronize()
    assert list(host) == VALUES
    # Nobody has waited for this capsule's consumer. `use_on` does, and the next export does not.
    del capsule
    device_waits = sim.cudart_sim_calls(b"cudaDeviceSynchronize")
    buffer.use_on(theirs)
    waited = sim.cudart_sim_calls(b"cudaDeviceSynchronize")
    assert waited > device_waits
    buffer.__dlpack__(stream=-1)
    assert sim.cudart_sim_calls(b"cudaDeviceSynchronize") == waited


# ---- where PyTorch has a CUDA device ----


def warm():
    """Loads the kernels, which waits for the device."""
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
            # The host has not waited, and nothing has been read yet.
            assert time.perf_counter() - start < 0.1 and not current.query(), "something waits on the host"
            assert total.item() == sum(VALUES)
        del tensor
    # The module cannot name this stream, so the host waits instead.
    buffer.fill(0, ours)
    buffer.write(VALUES)
    with torch.cuda.stream(on(ours)):
        torch.cuda._sleep(LONG)
    buffer.upload(ours)
    with torch.cuda.stream(theirs):
        assert torch.from_dlpack(buffer.__dlpack__(stream=2)).sum().item() == sum(VALUES)
    # With -1 nothing waits. Here the consumer uses the stream on which everything is pending.
    buffer.fill(0, ours)
    buffer.write(VALUES)
    with torch.cuda.stream(on(ours)):
        torch.cuda._sleep(LONG)
        buffer.upload(ours)
        start = time.perf_counter()
        tensor = torch.from_dlpack(buffer.__dlpack__(stream=-1))
        assert time.perf_counter() - start < 0.1 and not on(ours).query(), "something waits on the host"
        assert tensor.sum().item() == sum(VALUES)
    del tensor
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


def results_come_back_to_the_host_side():
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
        # No tensor is made on a captured stream, because nothing would order it.
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
    a_tensor_is_the_side_itself,
    what_a_consumer_has_is_refused_and_the_other_side_is_free,
    a_tensor_outlives_its_buffer_and_a_buffer_its_tensor,
    capsules_are_what_was_asked_for,
    the_cpu_has_no_streams,
    a_capsule_that_cannot_be_made_leaks_no_tensor,
    tensors_are_let_go_in_other_threads,
]
WITH_A_DEVICE = [dropping_a_buffer_lets_a_host_function_have_the_lock]
SIMULATED = [
    no_call_into_cuda_is_made_under_the_lock,
    the_interpreters_end_waits_for_no_device,
    a_stream_is_ordered_unless_none_is_to_be,
    work_on_a_stream_that_use_on_ordered_needs_no_more,
]
ON_CUDA = [
    the_current_stream_waits_for_the_upload,
    the_next_use_waits_for_what_pytorch_queued,
    results_come_back_to_the_host_side,
    memory_goes_with_the_last_one,
    letting_go_ends_no_capture,
    one_unguarded_tensor_serves_all_steps,
]


def alone(check):
    """Runs a check in its own process, which ends itself in case of a deadlock."""
    child = subprocess.run([sys.executable, __file__, ALONE, check.__name__])
    assert child.returncode == 0, f"the process ended with {child.returncode}"


def main():
    wanted = sys.argv[1:]
    if wanted[:1] == [ALONE]:
        # This needs no lock, and goes on while the interpreter ends.
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        return globals()[wanted[1]]()
    failed = 0

    def run(check, library, left_out):
        nonlocal failed
        name = ", ".join([check.__name__] + ([library.__name__] if library else []))
        if wanted and not any(part in name for part in wanted):
            return
        if left_out:
            print(f"{name}: left out, {left_out}")
            return
        try:
            if check in WITH_A_DEVICE + SIMULATED:
                alone(check)
            elif check in ON_CUDA:
                check()
            else:
                check(library)
            print(f"{name}: ok", flush=True)
        except Exception:  # the other checks still run
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
    for check in WITH_A_DEVICE:
        run(check, None, None if cgb.cuda_count() else "there is no CUDA device")
    for check in SIMULATED:
        run(check, None, None if simulated() else "the runtime is not the simulated one")
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
