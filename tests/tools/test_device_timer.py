"""The timer of the GPU benchmarks, on a fake device: the order of its commands, and the wait that hides the
host's launches."""

import pytest
import torch

from benchmarks import measure

CYCLES = 2e9  # per second of the fake device


class FakeDevice:
    """A device that runs commands in order from a queue, and a host with a simulated clock."""

    def __init__(self):
        self.host = 0.0
        self.free = 0.0  # when the device has finished its queue
        self.log = []
        self.current = None

    def enqueue(self, name, seconds):
        self.log.append(name)
        self.free = max(self.free, self.host) + seconds

    def synchronize(self, device=None):
        self.log.append("synchronize")
        self.host = max(self.host, self.free)

    def sleep(self, cycles):
        self.enqueue("sleep", cycles / CYCLES)

    def device(self, device):
        class Current:
            def __enter__(_):
                self.current = device

            def __exit__(_, *error):
                self.current = None

        return Current()

    def launch(self, name, seconds, host=10e-6):
        """Enqueues a kernel of ``seconds``, which takes the host ``host`` seconds."""
        self.host += host
        self.enqueue(name, seconds)


@pytest.fixture
def fake(monkeypatch):
    fake = FakeDevice()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            assert fake.current == "cuda:1"  # events go to the current device's stream
            self.at = max(fake.free, fake.host)
            fake.log.append("event")

        def query(self):
            return fake.host >= self.at

        def elapsed_time(self, end):
            assert fake.host >= end.at, "read before the device got there"
            return (end.at - self.at) * 1e3

    class Buffer:
        def zero_(self):
            fake.enqueue("flush", 200e-6)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", fake.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", fake.synchronize)
    monkeypatch.setattr(torch.cuda, "device", fake.device)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: object())
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: Buffer())
    monkeypatch.setattr(measure.time, "perf_counter", lambda: fake.host)
    return fake


@pytest.fixture
def timer(fake):
    timer = measure.DeviceTimer("cuda:1")
    fake.log.clear()
    return timer


def test_the_clock_is_calibrated(timer):
    assert timer.cycles_per_second == pytest.approx(CYCLES)


def test_the_order_is_flush_wait_start_run_end(timer, fake):
    timer(lambda: fake.launch("run", 1e-3))
    assert fake.log == ["flush", "sleep", "event", "run", "event", "synchronize"]


def test_launches_of_a_short_call_are_hidden(timer, fake):
    """Five kernels of 10 us, each enqueued in 2 ms: 50 us from the second call on."""

    def run():
        for _ in range(5):
            fake.launch("kernel", 10e-6, host=2e-3)

    first = timer(run)
    assert not timer.hidden
    assert first > 2e-3  # longer than the first wait: includes the host
    for _ in range(3):
        assert timer(run) == pytest.approx(50e-6)
        assert timer.hidden
    assert timer.wait == pytest.approx(timer.MARGIN * 10e-3)


def test_the_first_wait_hides_eager(timer, fake):
    def run():
        for _ in range(200):
            fake.launch("kernel", 1e-6, host=20e-6)

    assert timer(run) == pytest.approx(200e-6)
    assert timer.hidden


def test_the_wait_has_bounds(timer, fake):
    timer(lambda: fake.launch("run", 1e-6, host=1e-6))
    assert timer.wait == timer.SHORTEST
    timer(lambda: fake.launch("run", 1e-6, host=1.0))
    assert timer.wait == timer.LONGEST
    assert not timer.hidden


def test_a_call_that_synchronises_is_not_hidden(timer, fake):
    def run():
        fake.launch("kernel", 10e-6)
        fake.synchronize()
        fake.launch("kernel", 10e-6, host=1e-3)

    for _ in range(4):
        assert timer(run) == pytest.approx(1e-3 + 20e-6)
        assert not timer.hidden
    assert timer.wait <= timer.LONGEST


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_slow_host_on_a_gpu():
    """200 us of host time between ten small kernels does not change the measured time."""
    timer = measure.DeviceTimer(torch.device("cuda"))
    x = torch.zeros(2**20, device="cuda")

    def run(pause):
        for _ in range(10):
            end = measure.time.perf_counter() + pause
            while measure.time.perf_counter() < end:
                pass
            x.add_(1)

    for pause in (0.0, 200e-6):
        timer(lambda pause=pause: run(pause))
    prompt, slow = (min(timer(lambda pause=pause: run(pause)) for _ in range(5)) for pause in (0.0, 200e-6))
    assert timer.hidden
    assert slow < 2 * prompt + 20e-6
