"""Ops in several threads and processes at once, inside other parallel work, and after a fork.

The libraries are operator libraries of torch, not Python modules: they call nothing of Python and neither hold nor need
the GIL, and torch releases it around an operator. Only the Python layer is untested under a free-threaded Python, which
could not be had here. torch itself refuses to be imported in a subinterpreter."""

import ctypes
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import segattn_ops
from segattn_ops import _backend

from .. import backends
from .concurrency_checks import INPUTS, Attended, attended, forked, large_call
from .every_call import BY_NAME, CALLS
from .failing_allocations import same_bits
from .test_failures import LARGE, run_script

THREADS = 8
# torch computes a double backward in plain tensors; its sums depend on the number of threads.
BITWISE = [call for call in CALLS if "double" not in call.name]
EMULATED = ("criss_cross_rows", "channel_attention backward", "position_attention forward")


@pytest.fixture(autouse=True)
def _restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def in_threads(work, backend=backends.ALL["cpu"], threads=THREADS):
    """work(number of the thread), in threads that start together. Each thread selects its backend."""
    barrier = threading.Barrier(threads)

    def started(number):
        barrier.wait()
        with backend.selected():
            return work(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(started, range(threads)))


def check_calls_in_threads(calls, rounds, record_property, backend=backends.ALL["cpu"]):
    """Every thread makes all calls, each in an order of its own, and changes the number of threads between them."""
    made = {call.name: call.make(torch.float32) for call in calls}
    expected = {call.name: call.run(*made[call.name]) for call in calls}

    def work(number):
        wrong = []
        for step in range(rounds * len(calls)):
            torch.set_num_threads(1 + (number + step) % 4)
            call = calls[(number * 5 + step) % len(calls)]
            if not same_bits(call.run(*made[call.name]), expected[call.name]):
                wrong.append(call.name)
        return wrong

    assert [name for wrong in in_threads(work, backend) for name in wrong] == []
    record_property("inputs tried", THREADS * rounds * len(calls))


def test_all_calls_in_eight_threads(kernels, record_property):
    if kernels.name == "cuda":
        pytest.skip("counts on the CPU's bits")
    calls = [BY_NAME[name] for name in EMULATED] if kernels.name == "emulated" else BITWISE
    check_calls_in_threads(calls, 1, record_property, kernels)


def check_large_calls_in_threads(rounds, record_property):
    """Calls that use torch's thread pool, which every thread has for itself."""
    expected = large_call()

    def work(number):
        results = []
        for step in range(rounds):
            torch.set_num_threads(1 + (number + step) % 4)
            results.append(same_bits(large_call(), expected))
        return all(results)

    assert all(in_threads(work))
    record_property("inputs tried", THREADS * rounds * len(INPUTS))


def test_parallel_calls_in_eight_threads(record_property):
    check_large_calls_in_threads(1, record_property)


def test_more_threads_than_processors():
    expected = large_call()
    torch.set_num_threads(64)
    assert same_bits(large_call(), expected)


def test_one_graph_differentiated_in_several_threads(backend):
    """The results that an op saves are shared by all backward passes."""
    leaves = [torch.randn(1, 4, 5, 6, requires_grad=True) for _ in range(3)]
    output = segattn_ops.position_attention(*leaves).square().sum()
    expected = torch.autograd.grad(output, leaves, retain_graph=True)
    results = in_threads(lambda _: torch.autograd.grad(output, leaves, retain_graph=True), backend)
    assert all(same_bits(result, expected) for result in results)


def test_inference_mode_in_threads(backend):
    inputs = [torch.randn(1, 4, 5, 6) for _ in range(3)]
    expected = segattn_ops.position_attention(*inputs)

    def work(_):
        with torch.inference_mode():
            result = segattn_ops.position_attention(*inputs)
        return result.is_inference() and torch.equal(result, expected)

    assert all(in_threads(work, backend))


def test_calls_inside_a_parallel_region():
    """Of torch's own pool, in its worker threads: the inner regions run in the thread that calls."""
    expected = large_call()
    results = []

    @ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    def body(begin, end, _):
        results.extend((i, threading.get_ident(), same_bits(large_call(), expected)) for i in range(begin, end))

    parallel_for = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).torch_parallel_for
    parallel_for.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, type(body), ctypes.c_void_p]
    torch.set_num_threads(2)
    assert parallel_for(0, 4, 1, body, None) == 0
    assert sorted(i for i, _, _ in results) == [0, 1, 2, 3]
    assert all(right for _, _, right in results)
    assert len({thread for _, thread, _ in results}) == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_calls_in_torch_futures():
    """torch.jit.fork runs operators on torch's pool for work between ops."""
    inputs = [torch.randn(1, 4, 5, 6) for _ in range(3)]
    expected = segattn_ops.position_attention(*inputs)
    assert all(torch.equal(result, expected) for result in torch.jit.script(forked)(*inputs))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(context):
    """After calls here, with a warm thread pool."""
    large_call()
    workers = 2 if context == "fork" else 1
    loader = DataLoader(Attended(), batch_size=2, num_workers=workers, multiprocessing_context=context)
    got = torch.cat(list(loader))
    assert torch.equal(got, torch.stack([attended(i) for i in range(len(got))]))


FORK = (
    LARGE
    + """
torch.set_num_threads(2)
expected = call() if WARM else None
child = os.fork()
if child == 0:
    result = call()
    again = []
    thread = threading.Thread(target=lambda: again.extend(call()))
    thread.start()
    thread.join()
    assert all(torch.equal(a, b) for a, b in zip(result, again, strict=True))
    assert expected is None or all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
check(expected or call())
"""
)


@pytest.mark.parametrize("warm", [True, False])
def test_after_a_fork(warm):
    """A thread that has used the pool computes alone in the child, where the pool's threads do not exist; a new thread
    starts a pool of its own. torch's own parallel ops hang in such a child."""
    done = run_script(f"WARM = {warm}\n{FORK}")
    assert done.returncode == 0, done.stderr


SUBINTERPRETER = """
import _xxsubinterpreters as interpreters
try:
    interpreters.run_string(interpreters.create(), "import torch")
except interpreters.RunFailedError as error:
    print("refused", error)
else:
    print("imported")
"""


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="_xxsubinterpreters has another name")
def test_torch_cannot_be_imported_in_a_subinterpreter():
    """So no call reaches an op there. If torch comes to allow it, this test asks for tests of the ops."""
    done = run_script("import torch\n" + SUBINTERPRETER)
    assert "imported" not in done.stdout


def test_the_libraries_call_nothing_of_python():
    """They neither hold nor need the GIL, and have nothing to declare for a Python without it."""
    for path in _backend.LIBRARIES.paths:
        symbols = subprocess.run(["nm", "-D", str(path)], capture_output=True, text=True, check=True).stdout
        names = {line.split()[-1].split("@")[0] for line in symbols.splitlines()}
        assert len(names) > 10
        assert not {name for name in names if name.startswith(("Py", "_Py"))}
