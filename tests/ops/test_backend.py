"""use_backend and set_default_backend: what serves the calls of threads, tasks and compiled functions."""

import asyncio
import concurrent.futures
import contextvars
import gc
import threading

import pytest
import torch

import segattn_ops
from segattn_ops import _selection, reference, set_default_backend, use_backend

X = torch.linspace(-1, 1, 24).reshape(1, 4, 3, 2)


@pytest.fixture
def attend(monkeypatch):
    """A function that attends and says which implementation did."""
    original = reference.position_attention
    served = threading.local()

    def recorded(*arguments):
        served.by = "reference"
        return original(*arguments)

    monkeypatch.setattr(reference, "position_attention", recorded)

    def call(x=X):
        served.by = "native"
        segattn_ops.position_attention(x, x, x)
        return served.by

    return call


@pytest.fixture
def default():
    """Restores the process's default."""
    before = _selection._default
    yield before
    set_default_backend(before)


@pytest.mark.parametrize("function", [use_backend, set_default_backend])
def test_an_unknown_name(function):
    with pytest.raises(ValueError, match=rf"{function.__name__}: backend must be one of .*'reference'.*\(got 'fast'\)"):
        function("fast")


def test_nested_blocks_and_an_error(attend):
    with use_backend("reference"):
        assert attend() == "reference"
        with use_backend("native"):
            assert attend() == "native"
        assert attend() == "reference"
        with pytest.raises(KeyError), use_backend("native"):
            raise KeyError
        assert attend() == "reference"
    assert attend() == "native"


def test_blocks_left_in_the_order_they_were_entered(attend):
    first, second = use_backend("reference"), use_backend("native")
    first.__enter__()
    second.__enter__()
    assert attend() == "native"
    first.__exit__(None, None, None)
    assert attend() == "native"
    second.__exit__(None, None, None)
    assert attend() == "native"

    outer, inner = use_backend("native"), use_backend("reference")
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert attend() == "reference"
    inner.__exit__(None, None, None)
    assert attend() == "native"


def steps(name):
    with use_backend(name):
        yield
        yield


def test_generators_that_end_in_another_order(attend):
    one, other = steps("reference"), steps("reference")
    next(one)
    next(other)
    one.close()
    assert attend() == "reference"
    other.close()
    assert attend() == "native"


def test_a_generator_closed_in_another_thread(attend):
    generator = steps("reference")
    next(generator)
    assert attend() == "reference"
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    assert attend() == "native"


def test_a_block_left_in_another_thread_or_task(attend):
    """The one that entered it has the default again, and the object can be entered once more anywhere."""

    async def main():
        block = use_backend("reference")
        block.__enter__()
        assert attend() == "reference"
        await asyncio.to_thread(block.__exit__, None, None, None)
        assert attend() == "native"

        async def leave(block):
            block.__exit__(None, None, None)

        block.__enter__()
        await asyncio.create_task(leave(block))
        assert attend() == "native"

        async def items():
            with use_backend("reference"):
                yield attend()
                yield attend()

        async for item in items():
            assert item == "reference"
            break
        gc.collect()
        await asyncio.sleep(0.01)  # asyncio closes the generator in a task of its own
        return attend()

    assert asyncio.run(main()) == "native"

    block = use_backend("reference")
    block.__enter__()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(block.__exit__, None, None, None).result()
    assert attend() == "native"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(block.__enter__).result()
        assert attend() == "native"
        pool.submit(block.__exit__, None, None, None).result()


def test_a_block_that_was_not_entered():
    with pytest.raises(RuntimeError, match="use_backend: the context is left without having been entered"):
        use_backend("reference").__exit__(None, None, None)


@pytest.mark.parametrize("function", [use_backend, set_default_backend])
def test_a_name_that_is_no_string(function):
    with pytest.raises(TypeError, match=rf"{function.__name__}: backend must be a string \(got list\)"):
        function([])


def test_an_object_entered_twice():
    block = use_backend("reference")
    with block, pytest.raises(RuntimeError, match="use_backend: the context is entered already"), block:
        pass
    with block:  # but again after it was left
        assert _selection.selected() == "reference"
    assert _selection.selected() != "reference"


def test_threads_do_not_see_each_other(attend):
    entered, checked = threading.Event(), threading.Event()

    def other():
        with use_backend("reference"):
            entered.set()
            checked.wait(60)
            return attend()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        result = pool.submit(other)
        entered.wait(60)
        assert attend() == "native"
        checked.set()
        assert result.result() == "reference"
        assert pool.submit(attend).result() == "native"


def test_a_new_thread_has_the_default_or_a_copied_context(attend, default):
    """As the threads of torch.nn.DataParallel."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool, use_backend("reference"):
        assert pool.submit(attend).result() == "native"
        assert pool.submit(contextvars.copy_context().run, attend).result() == "reference"
        set_default_backend("reference")
        assert pool.submit(attend).result() == "reference"
        with use_backend("native"):
            assert attend() == "native"


def test_tasks(attend):
    """Two tasks that alternate, of which the one that enters first leaves first; a task that outlives its creator's
    block keeps the selection."""

    async def task(name, pauses):
        with use_backend(name):
            for _ in range(pauses):
                await asyncio.sleep(0)
                assert attend() == name
        return attend()

    async def late():
        await asyncio.sleep(0)
        return attend()

    async def main():
        after = await asyncio.gather(task("reference", 2), task("native", 4), task("reference", 3))
        with use_backend("reference"):
            created = asyncio.create_task(late())
        return after, await created, attend()

    assert asyncio.run(main()) == (["native"] * 3, "reference", "native")


def test_as_a_decorator(attend):
    @use_backend("reference")
    def function(depth):
        return [attend(), *(function(depth - 1) if depth else [])]

    assert function(2) == ["reference"] * 3
    assert attend() == "native"


def test_a_decorator_of_what_returns_early_is_refused():
    async def coroutine():
        pass

    for function in (steps, coroutine):
        with pytest.raises(TypeError, match=rf"use_backend: cannot decorate {function.__name__}"):
            use_backend("reference")(function)


def test_a_backward_pass_in_another_block(attend):
    x = X.clone().requires_grad_()
    with use_backend("reference"):
        by_reference = segattn_ops.position_attention(x, x, x)
    native = segattn_ops.position_attention(x, x, x)
    assert native.grad_fn.name() == "position_attentionBackward"
    assert by_reference.grad_fn.name() != native.grad_fn.name()
    with use_backend("native"):
        (expected,) = torch.autograd.grad(by_reference.sum(), x)
    with use_backend("reference"):
        (gradient,) = torch.autograd.grad(native.sum(), x)
    torch.testing.assert_close(gradient, expected)


class TestCompiled:
    @pytest.fixture
    def compiled(self):
        """A compiled function, and the number of segattn's operators in each of its graphs."""
        torch._dynamo.reset()
        graphs = []

        def backend(graph, inputs):
            graphs.append(sum("segattn" in str(node.target) for node in graph.graph.nodes))
            return graph.forward

        def compile(function):
            return torch.compile(function, fullgraph=True, backend=backend)

        return compile, graphs

    def test_another_selection_compiles_again(self, compiled, default):
        compile, graphs = compiled
        function = compile(lambda x: segattn_ops.position_attention(x, x, x))
        function(X)
        with use_backend("reference"):
            function(X)
        set_default_backend("reference")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(function, X).result()
        set_default_backend("native")
        function(X)
        assert graphs == [1, 0]

    def test_a_block_within(self, compiled):
        compile, graphs = compiled

        def function(x):
            with use_backend("reference"):
                y = segattn_ops.position_attention(x, x, x)
            with use_backend("native"):
                return segattn_ops.position_attention(y, y, y)

        torch.testing.assert_close(compile(function)(X), function(X))
        assert graphs == [1]
        assert _selection.in_graph == []

    def test_export_keeps_the_selection(self):
        class Attend(torch.nn.Module):
            def forward(self, x):
                return segattn_ops.position_attention(x, x, x)

        for strict in (True, False):
            with use_backend("reference"):
                program = torch.export.export(Attend(), (X,), strict=strict)
            assert not any("segattn" in str(node.target) for node in program.graph.nodes)
            program = torch.export.export(Attend(), (X,), strict=strict)
            assert any("segattn" in str(node.target) for node in program.graph.nodes)
